package server

import (
	"net/http"
	"strings"
	"testing"
)

func TestRoutes(t *testing.T) {
	for path, want := range map[string]struct{ out, class, pod string }{
		"/containerLogs/ns/web/main":   {"/containerLogs/ns/web/main", "logs", "ns/web"},
		"/containerLogs/ns/web.0/main": {"/containerLogs/ns/web.0/main", "logs", "ns/web.0"},
		"/exec/ns/web/main":            {"/exec/ns/web/main", "exec", "ns/web"},
		"/exec/ns/web/uid-1/main":      {"/exec/ns/web/uid-1/main", "exec", "ns/web"},
		"/portForward/ns/web":          {"/portForward/ns/web", "portforward", "ns/web"},
		"/portForward/ns/web/":         {"/portForward/ns/web", "portforward", "ns/web"},
		"/pods":                        {"/pods", "pods", "/"},
		"/pods/":                       {"/pods", "pods", "/"},
		"/runningpods":                 {"/runningpods/", "pods", "/"},
		"/logs":                        {"/logs/", "nodelogs", "/"},
		"/logs/":                       {"/logs/", "nodelogs", "/"},
		"/logs/a b/ü.log":              {"/logs/a b/ü.log", "nodelogs", "/"},
		"/healthz/syncloop":            {"/healthz/syncloop", "healthz", "/"},
		"/metrics/resource":            {"/metrics/resource", "metrics", "/"},
		"/stats/summary":               {"/stats/summary", "stats", "/"},
	} {
		r, ok := parseRoute(path)
		if !ok || r.path() != want.out || r.class != want.class || r.namespace+"/"+r.pod != want.pod {
			t.Errorf("%s: %v, %+v to %s", path, ok, r, r.path())
		}
	}
}

func FuzzRoute(f *testing.F) {
	for _, seed := range []string{"/exec/ns/web/main", "/logs/../skerry/v1", "/pods//", "/skerry/v1/changes", "", "exec", "/logs/a\x00b", "/containerLogs/ns/web/main/", "/portForward/a/b/c"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		r, ok := parseRoute(path)
		if len(r.subresources) == 0 || r.class == "" {
			t.Errorf("%q: nothing to authorize", path)
		}
		if !ok {
			return
		}
		out := r.path()
		again, ok := parseRoute(out)
		if !ok || again.path() != out || again.class != r.class || again.pod != r.pod || again.namespace != r.namespace {
			t.Errorf("%q becomes %q, which means something else", path, out)
		}
		if first, _, _ := strings.Cut(out[1:], "/"); shapes[first].class == "" || strings.Contains(out, "/../") || strings.Contains(out, "//") || strings.HasSuffix(out, "/..") {
			t.Errorf("%q becomes %q", path, out)
		}
		if r.upgrade && r.attributes(http.MethodGet, "s")[0].Verb != "create" {
			t.Errorf("%q: a stream for who may only get", path)
		}
	})
}
