package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Pods are the pods of the site with their latest status. What it returns is not
// changed by this package.
type Pods interface {
	Pods() []*corev1.Pod
	Pod(namespace, name string) (*corev1.Pod, bool)
}

// Streams asks the runtime for URLs that serve one stream each. Errors carry gRPC
// status codes.
type Streams interface {
	Exec(ctx context.Context, req *cri.ExecRequest) (url string, err error)
	Attach(ctx context.Context, req *cri.AttachRequest) (url string, err error)
	PortForward(ctx context.Context, req *cri.PortForwardRequest) (url string, err error)
}

// Logs copies the log of a container to w. Package logs implements it.
type Logs interface {
	Copy(ctx context.Context, w io.Writer, req LogRequest) error
}

// A LogRequest says what of a container's log to copy.
type LogRequest = struct {
	Path       string      // beneath the log root: namespace_pod_uid/container/restarts.log
	Follow     bool        // go on until the container has ended
	Timestamps bool        // before each line, its time
	Since      time.Time   // nothing older; zero: all
	Tail       int64       // no more than so many lines, from the end; negative: all
	Limit      int64       // no more than so many bytes; negative: all
	Stream     string      // "stdout" or "stderr"; empty: both
	Ended      func() bool // whether the container has ended; nil: it has. Called often
}

// Stats is what the site uses.
type Stats interface {
	Summary(ctx context.Context) (*stats.Summary, error)
	ResourceMetrics(ctx context.Context, w io.Writer) error // Prometheus text
}

// Config configures the handler. Pods is required; of what is left nil, the paths
// answer that this edgelet does not serve them.
type Config struct {
	Pods    Pods
	Streams Streams
	Logs    Logs
	Stats   Stats

	// Sandbox returns the ID of a pod's running sandbox, for port-forward.
	Sandbox func(ctx context.Context, uid types.UID) (id string, err error)
	// Exec runs a command to its end, for /run.
	Exec func(ctx context.Context, containerID string, cmd []string, timeout time.Duration) (output []byte, exit int, err error)

	Metrics      http.Handler                // the edgelet's own
	ProbeMetrics func(w io.Writer) error     // Prometheus text
	Configz      func() any                  // the configuration, without secrets
	Healthz      func(context.Context) error // nil: healthy

	LogDir string       // served under /logs/, default /var/log
	Log    *slog.Logger // default slog.Default()
}

// server holds what the handlers share. It has no state.
type server struct {
	Config
	proxy http.RoundTripper
}

// New returns the handler of the kubelet API.
func New(cfg Config) http.Handler {
	cfg.LogDir = cmp.Or(cfg.LogDir, "/var/log")
	cfg.Log = cmp.Or(cfg.Log, slog.Default())
	s := &server{Config: cfg, proxy: newStreamTransport()}
	mux := http.NewServeMux()
	handle := func(served bool, h func(http.ResponseWriter, *http.Request) error, patterns ...string) {
		for _, pattern := range patterns {
			mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
				if !served {
					fail(w, failf(http.StatusNotImplemented, "%s is not served by this edgelet", r.URL.Path))
				} else if err := h(w, r); err != nil {
					s.Log.Debug("kubelet API request failed", "path", r.URL.Path, "err", err)
					fail(w, err)
				}
			})
		}
	}
	const container = "/{namespace}/{pod}/{container}"
	const containerOf = "/{namespace}/{pod}/{uid}/{container}"
	streams := s.Streams != nil
	handle(s.Logs != nil, s.containerLogs, "GET /containerLogs"+container)
	handle(streams, s.exec, "GET /exec"+container, "GET /exec"+containerOf, "POST /exec"+container, "POST /exec"+containerOf)
	handle(streams, s.attach, "GET /attach"+container, "GET /attach"+containerOf, "POST /attach"+container, "POST /attach"+containerOf)
	handle(streams && s.Sandbox != nil, s.portForward,
		"GET /portForward/{namespace}/{pod}", "GET /portForward/{namespace}/{pod}/{uid}",
		"POST /portForward/{namespace}/{pod}", "POST /portForward/{namespace}/{pod}/{uid}")
	handle(s.Exec != nil, s.run, "POST /run"+container, "POST /run"+containerOf)
	handle(true, s.pods, "GET /pods", "GET /pods/{$}")
	handle(true, s.runningPods, "GET /runningpods", "GET /runningpods/{$}")
	handle(s.Stats != nil, s.summary, "GET /stats/summary", "GET /stats/summary/{$}")
	handle(s.Stats != nil, s.resourceMetrics, "GET /metrics/resource")
	handle(s.Stats != nil, s.containerMetrics, "GET /metrics/cadvisor")
	handle(s.Metrics != nil, s.ownMetrics, "GET /metrics", "GET /metrics/{$}")
	handle(s.ProbeMetrics != nil, s.probeMetrics, "GET /metrics/probes")
	handle(true, s.healthz, "GET /healthz", "GET /healthz/{$}", "GET /healthz/{check}")
	handle(s.Configz != nil, s.configz, "GET /configz")
	handle(true, s.nodeLogs, "GET /logs", "GET /logs/{path...}")
	handle(true, s.checkpoint, "POST /checkpoint"+container)
	return clean(mux)
}

// clean refuses paths that are not in their shortest form, which the mux would
// answer with a redirect.
func clean(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if short := path.Clean(r.URL.Path); r.URL.Path != short && r.URL.Path != short+"/" {
			fail(w, failf(http.StatusNotFound, "path %q is not clean", r.URL.Path))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A failure is an error with the HTTP status that it is to be answered with.
type failure struct {
	code int
	text string
}

func (f *failure) Error() string { return f.text }

func failf(code int, format string, args ...any) error {
	return &failure{code, fmt.Sprintf(format, args...)}
}

// fail answers with an error. It is the only place that maps errors to HTTP.
func fail(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	if f, ok := errors.AsType[*failure](err); ok {
		code = f.code
	} else {
		switch status.Code(err) {
		case codes.NotFound:
			code = http.StatusNotFound
		case codes.ResourceExhausted:
			code = http.StatusTooManyRequests
			w.Header().Set("Retry-After", "10")
		case codes.Unavailable:
			code = http.StatusServiceUnavailable
		}
	}
	http.Error(w, err.Error(), code)
}

// find returns the pod, and the container if any, that a request names.
func (s *server) find(r *http.Request) (*corev1.Pod, error) {
	pod, ok := s.Pods.Pod(r.PathValue("namespace"), r.PathValue("pod"))
	if uid := types.UID(r.PathValue("uid")); ok && uid != "" && uid != pod.UID {
		ok = false
	}
	if !ok {
		return nil, failf(http.StatusNotFound, "pod %q does not exist", r.PathValue("pod"))
	}
	return pod, nil
}

// running returns the ID of the named container, which must run.
func (s *server) running(r *http.Request) (pod *corev1.Pod, id string, err error) {
	pod, err = s.find(r)
	if err != nil {
		return nil, "", err
	}
	name := r.PathValue("container")
	if c := containerStatus(pod, name); c != nil && c.State.Running != nil && c.ContainerID != "" {
		return pod, bareID(c.ContainerID), nil
	}
	return nil, "", failf(http.StatusInternalServerError, "container not found (%q)", name)
}

// containerStatus returns the status of a container of any kind, or nil.
func containerStatus(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		if i := slices.IndexFunc(list, func(c corev1.ContainerStatus) bool { return c.Name == name }); i >= 0 {
			return &list[i]
		}
	}
	return nil
}

// declared reports whether a pod's spec names a container, and whether that has a
// terminal.
func declared(pod *corev1.Pod, name string) (tty, ok bool) {
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].Name == name {
				return list[i].TTY, true
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if c := &pod.Spec.EphemeralContainers[i]; c.Name == name {
			return c.TTY, true
		}
	}
	return false, false
}

// bareID is a container's ID without the scheme that a pod's status puts before it.
func bareID(id string) string {
	if _, bare, ok := strings.Cut(id, "://"); ok {
		return bare
	}
	return id
}

// reply answers with value as JSON.
func reply(w http.ResponseWriter, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(data) // an error means that the client is gone
	return nil
}
