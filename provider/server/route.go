package server

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// A route is what the path of a request means.
type route struct {
	class        string   // of path, for metrics
	segments     []string // of the path to ask the site for
	methods      []string
	subresources []string // of the node; one that is allowed is enough
	verb         string   // of authorization; "" is that of the method
	upgrade      bool     // the connection becomes a stream
	namespace    string   // of the pod that is asked for, if it is
	pod          string
}

var (
	reads  = []string{http.MethodGet, http.MethodHead}
	writes = []string{http.MethodPost}
	either = []string{http.MethodGet, http.MethodPost}
)

// A shape is a kind of path below its first segment: how many segments may follow,
// and whether the first two of them are a pod.
type shape struct {
	route
	least, most int
	ofPod       bool
	only        []string // if set, the one segment that may follow
}

// shapes are the paths that sites are asked for, by first segment.
var shapes = map[string]shape{
	"containerLogs": {route: route{class: "logs", methods: reads, subresources: []string{"proxy"}}, ofPod: true, least: 3, most: 3},
	"exec":          {route: route{class: "exec", methods: either, subresources: []string{"proxy"}, verb: "create", upgrade: true}, ofPod: true, least: 3, most: 4},
	"attach":        {route: route{class: "attach", methods: either, subresources: []string{"proxy"}, verb: "create", upgrade: true}, ofPod: true, least: 3, most: 4},
	"portForward":   {route: route{class: "portforward", methods: either, subresources: []string{"proxy"}, verb: "create", upgrade: true}, ofPod: true, least: 2, most: 3},
	"run":           {route: route{class: "run", methods: writes, subresources: []string{"proxy"}, verb: "create"}, ofPod: true, least: 3, most: 4},
	"checkpoint":    {route: route{class: "checkpoint", methods: writes, subresources: []string{"checkpoint"}}, ofPod: true, least: 3, most: 3},
	"pods":          {route: route{class: "pods", methods: reads, subresources: []string{"pods", "proxy"}}},
	"runningpods":   {route: route{class: "pods", methods: reads, subresources: []string{"pods", "proxy"}}},
	"stats":         {route: route{class: "stats", methods: reads, subresources: []string{"stats"}}, least: 1, most: 1, only: []string{"summary"}},
	"metrics":       {route: route{class: "metrics", methods: reads, subresources: []string{"metrics"}}, most: 1, only: []string{"resource", "cadvisor", "probes"}},
	"healthz":       {route: route{class: "healthz", methods: reads, subresources: []string{"healthz", "proxy"}}, most: 1, only: []string{"log", "ping", "syncloop"}},
	"configz":       {route: route{class: "configz", methods: reads, subresources: []string{"configz", "proxy"}}},
	"logs":          {route: route{class: "nodelogs", methods: reads, subresources: []string{"log"}}, most: 16},
}

// objectName matches namespaces, pods, containers and UIDs.
var objectName = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

// parseRoute returns what a path, already unescaped, means. It is not ok for a path
// that no site is asked for; such a request needs the right to nodes/proxy all the
// same, so that only those who have it learn which paths there are.
func parseRoute(path string) (r route, ok bool) {
	other := route{class: "other", subresources: []string{"proxy"}}
	rest, rooted := strings.CutPrefix(path, "/")
	if !rooted {
		return other, false
	}
	first, rest, _ := strings.Cut(rest, "/")
	s, known := shapes[first]
	if !known {
		return other, false
	}
	r = s.route
	r.segments = []string{first}
	if s.most > 0 || rest != "" {
		r.segments = append(r.segments, splitPath(rest)...)
	}
	tail := r.segments[1:]
	if len(tail) < s.least || len(tail) > s.most || slices.ContainsFunc(tail, unsafeSegment) {
		return r, false
	}
	if s.ofPod {
		r.namespace, r.pod = tail[0], tail[1]
		return r, !slices.ContainsFunc(tail, func(segment string) bool { return !objectName.MatchString(segment) })
	}
	return r, len(tail) == 0 || s.only == nil || slices.Contains(s.only, tail[0])
}

// splitPath splits at slashes; one slash at the end does not count.
func splitPath(path string) []string {
	path = strings.TrimSuffix(path, "/")
	if path == "" {
		return nil
	}
	return strings.Split(path, "/")
}

// unsafeSegment reports segments that could mean another path to someone.
func unsafeSegment(s string) bool {
	return s == "" || s == "." || s == ".." || strings.ContainsFunc(s, func(r rune) bool {
		return r < ' ' || r == 0x7f || r == '\\' || r == '/'
	})
}

// path is what the site is asked for. The log directory keeps its slash, without
// which a file server redirects.
func (r route) path() string {
	path := "/" + strings.Join(r.segments, "/")
	if path == "/logs" || path == "/runningpods" {
		path += "/"
	}
	return path
}

// attributes are the permissions of which a request needs one.
func (r route) attributes(method, site string) []Attributes {
	verb := r.verb
	if verb == "" {
		verb = map[string]string{
			http.MethodGet: "get", http.MethodHead: "get", http.MethodPost: "create",
			http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete",
		}[method]
	}
	all := make([]Attributes, len(r.subresources))
	for i, subresource := range r.subresources {
		all[i] = Attributes{Verb: verb, Subresource: subresource, Site: site}
	}
	return all
}
