package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"golang.org/x/sys/unix"
)

// site is what the handler sees of a site: one pod, and records of what was asked.
type site struct {
	mu      sync.Mutex
	pod     *corev1.Pod
	log     string // what the container has logged
	logErr  error
	asked   LogRequest
	exec    *cri.ExecRequest
	attach  *cri.AttachRequest
	forward *cri.PortForwardRequest
	url     string // of the streaming server
	err     error  // of the runtime
}

func (s *site) Pods() []*corev1.Pod { return []*corev1.Pod{s.pod} }

func (s *site) Pod(namespace, name string) (*corev1.Pod, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pod, s.pod != nil && namespace == s.pod.Namespace && name == s.pod.Name
}

func (s *site) Copy(_ context.Context, w io.Writer, req LogRequest) error {
	s.asked = req
	if s.log != "" {
		io.WriteString(w, s.log)
	}
	return s.logErr
}

func (s *site) Exec(_ context.Context, req *cri.ExecRequest) (string, error) {
	s.exec = req
	return s.url, s.err
}

func (s *site) Attach(_ context.Context, req *cri.AttachRequest) (string, error) {
	s.attach = req
	return s.url, s.err
}

func (s *site) PortForward(_ context.Context, req *cri.PortForwardRequest) (string, error) {
	s.forward = req
	return s.url, s.err
}

func (s *site) Summary(context.Context) (*stats.Summary, error) {
	return &stats.Summary{Pods: []stats.PodStats{{
		PodRef:     stats.PodReference{Namespace: "ns", Name: "web", UID: "u1"},
		Containers: []stats.ContainerStats{{Name: "c", CPU: &stats.CPUStats{UsageCoreNanoSeconds: new(uint64(15e8))}, Rootfs: &stats.FsStats{UsedBytes: new(uint64(7))}}},
		Network:    &stats.NetworkStats{InterfaceStats: stats.InterfaceStats{Name: "eth0", RxBytes: new(uint64(42))}},
	}}}, nil
}

func (s *site) ResourceMetrics(_ context.Context, w io.Writer) error {
	_, err := io.WriteString(w, "node_cpu_usage_seconds_total 1\n")
	return err
}

// newSite has a pod web with a running container c, which was restarted twice.
func newSite() *site {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1"}}
	pod.Spec.Containers = []corev1.Container{{Name: "c", TTY: true}, {Name: "new"}}
	pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug"}}}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{
		{Name: "c", ContainerID: "containerd://id2", RestartCount: 2, State: running, LastTerminationState: exited("containerd://id1")},
		{Name: "new", State: waiting("ContainerCreating")},
	}
	return &site{pod: pod}
}

var running = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}

func exited(id string) corev1.ContainerState {
	return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: id}}
}

func waiting(reason string) corev1.ContainerState {
	return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason}}
}

func (s *site) config() Config {
	return Config{
		Pods: s, Streams: s, Logs: s, Stats: s, Log: slog.New(slog.DiscardHandler),
		Sandbox: func(_ context.Context, uid types.UID) (string, error) { return "sandbox-" + string(uid), nil },
		Exec: func(_ context.Context, id string, cmd []string, _ time.Duration) ([]byte, int, error) {
			if cmd[0] == "false" {
				return []byte("no"), 1, nil
			}
			return []byte(id + ": " + strings.Join(cmd, "|")), 0, nil
		},
		Metrics:      http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "own 1\n") }),
		ProbeMetrics: func(w io.Writer) error { _, err := io.WriteString(w, "prober_probe_total 1\n"); return err },
		Configz:      func() any { return map[string]int{"kubeletconfig": 1} },
	}
}

func get(t *testing.T, h http.Handler, method, target string) (code int, body string, header http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, target, nil)
	h.ServeHTTP(w, r.WithContext(t.Context()))
	return w.Code, strings.TrimSuffix(w.Body.String(), "\n"), w.Header()
}

func TestRoutes(t *testing.T) {
	s := newSite()
	s.log = "hello"
	h := New(s.config())
	tests := map[string]struct {
		request string
		code    int
		body    string // contained
	}{
		"logs":                          {"GET /containerLogs/ns/web/c", 200, "hello"},
		"logs of another pod":           {"GET /containerLogs/ns/other/c", 404, `pod "other" does not exist`},
		"logs of another container":     {"GET /containerLogs/ns/web/d", 404, `container "d" not found in pod "web"`},
		"logs of a waiting container":   {"GET /containerLogs/ns/web/new", 400, `container "new" in pod "web" is waiting to start: ContainerCreating`},
		"logs before there is a status": {"GET /containerLogs/ns/web/debug", 400, `container "debug" in pod "web" is not available`},
		"logs of a run that never was":  {"GET /containerLogs/ns/web/new?previous=true", 400, `previous terminated container "new" in pod "web" not found`},
		"logs with a bad number":        {"GET /containerLogs/ns/web/c?tailLines=x", 400, "tailLines"},
		"logs with a negative number":   {"GET /containerLogs/ns/web/c?limitBytes=0", 422, "limitBytes"},
		"logs by POST":                  {"POST /containerLogs/ns/web/c", 405, ""},
		"exec without upgrade":          {"POST /exec/ns/web/c?command=ls&output=1", 400, "Upgrade request required"},
		"exec without streams":          {"POST /exec/ns/web/c?command=ls", 400, "you must specify at least 1 of stdin, stdout, stderr"},
		"exec without command":          {"POST /exec/ns/web/c?output=1", 400, "at least one command"},
		"exec in another pod":           {"POST /exec/ns/other/c?command=ls&output=1", 404, `pod "other" does not exist`},
		"exec in another UID":           {"POST /exec/ns/web/u2/c?command=ls&output=1", 404, `pod "web" does not exist`},
		"exec in what does not run":     {"POST /exec/ns/web/new?command=ls&output=1", 500, `container not found ("new")`},
		"attach to what does not run":   {"GET /attach/ns/web/new?output=1", 500, `container not found ("new")`},
		"run":                           {"POST /run/ns/web/c?cmd=ls+-l", 200, "id2: ls|-l"},
		"run by UID":                    {"POST /run/ns/web/u1/c?cmd=ls", 200, "id2: ls"},
		"run what fails":                {"POST /run/ns/web/c?cmd=false", 500, "exited with 1: no"},
		"pods":                          {"GET /pods", 200, `"kind":"PodList"`},
		"running pods":                  {"GET /runningpods/", 200, `"containers":[{"name":"c"`},
		"summary":                       {"GET /stats/summary", 200, `"usedBytes":7`},
		"container metrics":             {"GET /metrics/cadvisor", 200, `container_cpu_usage_seconds_total{container="c",namespace="ns",pod="web"} 1.5` + "\n"},
		"network metrics":               {"GET /metrics/cadvisor", 200, `container_network_receive_bytes_total{interface="eth0",namespace="ns",pod="web"} 42` + "\n"},
		"resource metrics":              {"GET /metrics/resource", 200, "node_cpu_usage_seconds_total 1"},
		"probe metrics":                 {"GET /metrics/probes", 200, "prober_probe_total"},
		"own metrics":                   {"GET /metrics", 200, "own 1"},
		"healthz":                       {"GET /healthz", 200, "ok"},
		"healthz in detail":             {"GET /healthz?verbose", 200, "[+]syncloop ok\nhealthz check passed"},
		"one check":                     {"GET /healthz/ping", 200, "ok"},
		"no such check":                 {"GET /healthz/nope", 404, "nope"},
		"configz":                       {"GET /configz", 200, `{"kubeletconfig":1}`},
		"checkpoint":                    {"POST /checkpoint/ns/web/c", 501, "not implemented"},
		"node log query":                {"GET /logs/?query=kubelet", 501, "not implemented"},
		"nothing":                       {"GET /", 404, ""},
		"a path with dots":              {"GET /containerLogs/ns/../ns/web/c", 404, "not clean"},
		"a path with hidden dots":       {"GET /containerLogs/ns/%2e%2e/c", 404, "not clean"},
		"a path with a doubled slash":   {"GET //pods", 404, "not clean"},
		"a pod named after a path":      {"GET /containerLogs/ns/..%2f..%2fetc/c", 404, ""},
		"a container named after one":   {"GET /containerLogs/ns/web/x%2fpasswd", 404, `container "x/passwd" not found`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			method, target, _ := strings.Cut(tt.request, " ")
			code, body, header := get(t, h, method, target)
			if code != tt.code || !strings.Contains(body, strings.TrimSuffix(tt.body, "\n")) {
				t.Errorf("%s = %d %q, want %d %q", tt.request, code, body, tt.code, tt.body)
			}
			if header.Get("Location") != "" {
				t.Errorf("%s is a redirect to %s", tt.request, header.Get("Location"))
			}
		})
	}
}

func TestSummaryOfCPUAndMemoryAlone(t *testing.T) {
	_, body, _ := get(t, New(newSite().config()), "GET", "/stats/summary?only_cpu_and_memory=true")
	if !strings.Contains(body, "usageCoreNanoSeconds") || strings.Contains(body, "usedBytes") || strings.Contains(body, "rxBytes") {
		t.Errorf("summary %s", body)
	}
}

func TestUnhealthyEdgeletSaysWhy(t *testing.T) {
	cfg := newSite().config()
	cfg.Healthz = func(context.Context) error { return errors.New("runtime is away") }
	code, body, _ := get(t, New(cfg), "GET", "/healthz")
	if code != 500 || !strings.Contains(body, "[-]syncloop failed: runtime is away") {
		t.Errorf("%d %q", code, body)
	}
	if code, _, _ := get(t, New(cfg), "GET", "/healthz/ping"); code != 200 {
		t.Errorf("ping = %d, want 200", code)
	}
}

func TestPartsThatAreLeftOutSaySo(t *testing.T) {
	h := New(Config{Pods: newSite(), Log: slog.New(slog.DiscardHandler)})
	for _, target := range []string{"/containerLogs/ns/web/c", "/exec/ns/web/c", "/portForward/ns/web", "/stats/summary", "/metrics", "/metrics/probes", "/configz"} {
		if code, body, _ := get(t, h, "GET", target); code != 501 || !strings.Contains(body, "not served by this edgelet") {
			t.Errorf("%s = %d %q, want 501", target, code, body)
		}
	}
}

func TestWhichRunTheLogIsOf(t *testing.T) {
	type status = corev1.ContainerStatus
	tests := map[string]struct {
		status   status
		previous bool
		want     int32
		id       string
		err      string
	}{
		"running":                 {status{RestartCount: 2, ContainerID: "b", State: running, LastTerminationState: exited("a")}, false, 2, "b", ""},
		"running, the run before": {status{RestartCount: 2, ContainerID: "b", State: running, LastTerminationState: exited("a")}, true, 1, "a", ""},
		"running for the first time, the one before": {status{ContainerID: "b", State: running}, true, 0, "", `previous terminated container "c" in pod "web" not found`},
		"ended":                   {status{RestartCount: 1, State: exited("b")}, false, 1, "b", ""},
		"ended, the run before":   {status{RestartCount: 1, State: exited("b"), LastTerminationState: exited("a")}, true, 0, "a", ""},
		"waiting to be restarted": {status{RestartCount: 4, State: waiting("CrashLoopBackOff"), LastTerminationState: exited("a")}, false, 4, "a", ""},
		"waiting to be restarted, the run before": {status{RestartCount: 4, State: waiting("CrashLoopBackOff"), LastTerminationState: exited("a")}, true, 4, "a", ""},
		"ended without ever having started":       {status{State: exited("")}, false, 0, "", `container "c" in pod "web" is terminated`},
		"image that cannot be pulled":             {status{State: waiting("ErrImagePull")}, false, 0, "", "is waiting to start: image can't be pulled"},
		"image that cannot be pulled again":       {status{State: waiting("ImagePullBackOff")}, false, 0, "", "is waiting to start: trying and failing to pull image"},
		"nothing known":                           {status{}, false, 0, "", "is waiting to start - no logs yet"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.status.Name = "c"
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Status: corev1.PodStatus{ContainerStatuses: []status{tt.status}}}
			got, id, err := logOf(pod, "c", tt.previous)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if got != tt.want || id != tt.id {
				t.Errorf("run %d %q, want %d %q", got, id, tt.want, tt.id)
			}
		})
	}
}

func TestLogParametersReachTheReader(t *testing.T) {
	s := newSite()
	h := New(s.config())
	get(t, h, "GET", "/containerLogs/ns/web/c?follow=true&timestamps=1&tailLines=0&limitBytes=9&sinceTime=2026-01-02T15:04:05Z")
	a := s.asked
	if a.Path != "ns_web_u1/c/2.log" || !a.Follow || !a.Timestamps || a.Tail != 0 || a.Limit != 9 ||
		!a.Since.Equal(time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)) || a.Stream != "" || a.Ended == nil {
		t.Errorf("asked for %+v", a)
	}
	if a.Ended() {
		t.Error("the container has ended before it has")
	}
	restarted := s.pod.DeepCopy()
	restarted.Status.ContainerStatuses[0].ContainerID = "containerd://id3"
	s.pod = restarted
	if a.Ended() {
		t.Error("the pods are looked at more often than four times a second")
	}
	time.Sleep(300 * time.Millisecond)
	if !a.Ended() {
		t.Error("the end of the container is not seen")
	}
	get(t, h, "GET", "/containerLogs/ns/web/c?follow=false&previous&stream=Stderr")
	if a := s.asked; a.Path != "ns_web_u1/c/2.log" && a.Path != "ns_web_u1/c/1.log" || a.Follow || a.Tail != -1 || a.Limit != -1 || a.Stream != "stderr" || a.Ended != nil {
		t.Errorf("asked for %+v", a)
	}
}

func TestLogErrors(t *testing.T) {
	s := newSite()
	h := New(s.config())
	s.logErr = fmt.Errorf("open: %w", fs.ErrNotExist)
	if code, body, _ := get(t, h, "GET", "/containerLogs/ns/web/c"); code != 400 || !strings.Contains(body, "not there") {
		t.Errorf("absent log: %d %q", code, body)
	}
	s.log, s.logErr = "first", errors.New("disk is gone")
	if code, body, _ := get(t, h, "GET", "/containerLogs/ns/web/c"); code != 200 || body != "first\nlogs end early: disk is gone" {
		t.Errorf("log that breaks off: %d %q", code, body)
	}
}

func TestNodeLogs(t *testing.T) {
	dir := t.TempDir()
	cfg := newSite().config()
	cfg.LogDir = filepath.Join(dir, "log")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(cfg.LogDir, "sub"), 0o755))
	must(os.WriteFile(filepath.Join(cfg.LogDir, "sys.log"), []byte("<b>booted"), 0o644))
	must(os.WriteFile(filepath.Join(cfg.LogDir, "sub", "a&b:c.log"), nil, 0o644))
	must(os.WriteFile(filepath.Join(dir, "shadow"), []byte("canary"), 0o644))
	must(os.Symlink("../shadow", filepath.Join(cfg.LogDir, "out")))
	must(os.Symlink("sys.log", filepath.Join(cfg.LogDir, "in")))
	must(unix.Mkfifo(filepath.Join(cfg.LogDir, "fifo"), 0o600))
	h := New(cfg)
	tests := map[string]struct {
		target string
		code   int
		body   string
	}{
		"the directory":                  {"/logs/", 200, `<a href="sub/">sub/</a>`},
		"the directory without a slash":  {"/logs", 200, `<a href="logs/sys.log">sys.log</a>`},
		"a directory within":             {"/logs/sub/", 200, `<a href="./a&amp;b:c.log">a&amp;b:c.log</a>`},
		"a file":                         {"/logs/sys.log", 200, "<b>booted"},
		"a link within":                  {"/logs/in", 200, "<b>booted"},
		"a link that leads out":          {"/logs/out", 400, "cannot be served"},
		"a path that leads out":          {"/logs/..%2fshadow", 404, "not clean"},
		"a path that leads out, encoded": {"/logs/%2e%2e/shadow", 404, "not clean"},
		"a FIFO":                         {"/logs/fifo", 403, "not a regular file"},
		"nothing":                        {"/logs/nope", 404, `log "nope" not found`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			code, body, header := get(t, h, "GET", tt.target)
			if code != tt.code || !strings.Contains(body, tt.body) || strings.Contains(body, "canary") {
				t.Errorf("%d %q, want %d %q", code, body, tt.code, tt.body)
			}
			if tt.body == "<b>booted" && !strings.HasPrefix(header.Get("Content-Type"), "text/plain") {
				t.Errorf("a log is sent as %s", header.Get("Content-Type"))
			}
		})
	}
}

// Whatever the query, what comes out of it is sane or an error.
func FuzzLogQuery(f *testing.F) {
	f.Add("follow=true&tailLines=10&sinceSeconds=3600")
	f.Add("sinceTime=2026-01-02T15:04:05Z&limitBytes=9223372036854775807&stream=Stdout")
	f.Add("sinceSeconds=9223372036854775807&tail=all")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		now := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
		req, _, err := parseLogQuery(q, now)
		if err != nil {
			var f *failure
			if !errors.As(err, &f) || f.code != 400 && f.code != 422 {
				t.Errorf("error %v is not the client's", err)
			}
			return
		}
		if req.Tail < -1 || req.Limit < -1 || req.Limit == 0 || req.Stream != "" && req.Stream != "stdout" && req.Stream != "stderr" {
			t.Errorf("%q: %+v", query, req)
		}
		if q.Has("sinceSeconds") && !q.Has("sinceTime") && req.Since.After(now) {
			t.Errorf("%q: since %v, which is to come", query, req.Since)
		}
	})
}

func TestPodsAreAKubeletsPodList(t *testing.T) {
	_, body, header := get(t, New(newSite().config()), "GET", "/pods")
	var list corev1.PodList
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Items) != 1 || list.Items[0].UID != "u1" || list.APIVersion != "v1" {
		t.Errorf("%d pods, error %v", len(list.Items), err)
	}
	if header.Get("Content-Type") != "application/json" {
		t.Errorf("type %s", header.Get("Content-Type"))
	}
}
