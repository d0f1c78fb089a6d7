package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// ask executes a probe against a server at addr, host:port.
func ask(t *testing.T, addr string, p *corev1.Probe) (answer, string) {
	t.Helper()
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	c := newChecker(Config{Version: "1.37"})
	return c.run(t.Context(), job{probe: p, pod: &corev1.Pod{}, container: &corev1.Container{
		Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: int32(portOf(t, addr))}},
	}, ip: host})
}

func portOf(t *testing.T, addr string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func httpProbe(action corev1.HTTPGetAction) *corev1.Probe {
	p := &corev1.Probe{TimeoutSeconds: 1}
	p.HTTPGet = &action
	return p
}

func TestHTTPProbe(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) {})
	mux.HandleFunc("/broken", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "secret", 500) })
	mux.HandleFunc("/here", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/broken", 302) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://elsewhere.invalid/", 302)
	})
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", 302) })
	mux.HandleFunc("/hang", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "shop.example" || r.Header.Get("X-Key") != "a" || r.Header["Accept"] != nil ||
			r.Header.Get("User-Agent") != "kube-probe/1.37" || r.URL.RawQuery != "q=1" {
			w.WriteHeader(400)
		}
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	addr := server.Listener.Addr().String()

	tests := map[string]struct {
		action corev1.HTTPGetAction
		want   answer
		output string
	}{
		"200 is success":                              {corev1.HTTPGetAction{Path: "/ok"}, success, ""},
		"500 is failure, its body not repeated":       {corev1.HTTPGetAction{Path: "/broken"}, failure, "HTTP probe failed with statuscode: 500"},
		"a redirect on the same host is followed":     {corev1.HTTPGetAction{Path: "/here"}, failure, "HTTP probe failed with statuscode: 500"},
		"a redirect to another host is not followed":  {corev1.HTTPGetAction{Path: "/away"}, warning, "Probe terminated redirects"},
		"redirects without end are failure":           {corev1.HTTPGetAction{Path: "/round"}, failure, "stopped after 10 redirects"},
		"no answer in time is failure":                {corev1.HTTPGetAction{Path: "/hang"}, failure, "context deadline exceeded"},
		"a body without end is read only in part":     {corev1.HTTPGetAction{Path: "/endless"}, success, ""},
		"headers, host and user agent are sent":       {corev1.HTTPGetAction{Path: "/headers?q=1", HTTPHeaders: []corev1.HTTPHeader{{Name: "Host", Value: "shop.example"}, {Name: "X-Key", Value: "a"}, {Name: "Accept", Value: ""}}}, success, ""},
		"a path cannot name another host":             {corev1.HTTPGetAction{Path: "//elsewhere.invalid/ok"}, success, ""},
		"a port that no container declares":           {corev1.HTTPGetAction{Path: "/ok", Port: intstr.FromString("nope")}, unknown, `port "nope" not found`},
		"a header that cannot be sent":                {corev1.HTTPGetAction{Path: "/ok", HTTPHeaders: []corev1.HTTPHeader{{Name: "a b", Value: "c"}}}, failure, "invalid header"},
		"a path that is no URL is passed on as it is": {corev1.HTTPGetAction{Path: "/%zz"}, failure, "statuscode: 404"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.action.Port == (intstr.IntOrString{}) {
				tt.action.Port = intstr.FromString("web")
			}
			got, output := ask(t, addr, httpProbe(tt.action))
			if got != tt.want || !strings.Contains(output, tt.output) || (tt.output == "") != (output == "") {
				t.Errorf("got %v %q, want %v %q", got, output, tt.want, tt.output)
			}
		})
	}
}

func TestHTTPSProbeAcceptsACertificateThatThePodHasMadeItself(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	addr := server.Listener.Addr().String()
	got, output := ask(t, addr, httpProbe(corev1.HTTPGetAction{Scheme: "HTTPS", Port: intstr.FromInt(portOf(t, addr))}))
	if got != success {
		t.Errorf("got %v %q, want success", got, output)
	}
}

func TestHTTP2ProbeInClearText(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			w.WriteHeader(505)
		}
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	addr := server.Listener.Addr().String()
	got, output := ask(t, addr, httpProbe(corev1.HTTPGetAction{Port: intstr.FromInt(portOf(t, addr)), Protocol: new(corev1.HTTPProtocolHTTP2)}))
	if got != success {
		t.Errorf("got %v %q, want success", got, output)
	}
}

func TestProbeOfAPodWithoutAddressAsksNobody(t *testing.T) {
	c := newChecker(Config{})
	for name, p := range map[string]*corev1.Probe{
		"http": httpProbe(corev1.HTTPGetAction{Port: intstr.FromInt(1)}),
		"tcp":  {ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(1)}}},
		"grpc": {ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 1}}},
	} {
		got, output := c.run(t.Context(), job{probe: p, pod: &corev1.Pod{}, container: &corev1.Container{}})
		if got != unknown || !strings.Contains(output, "no IP address") {
			t.Errorf("%s: got %v %q, want unknown for want of an address", name, got, output)
		}
	}
}

func TestTCPProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &corev1.Probe{}
	p.TCPSocket = &corev1.TCPSocketAction{Port: intstr.FromString("web")}
	if got, output := ask(t, l.Addr().String(), p); got != success {
		t.Errorf("open port: %v %q, want success", got, output)
	}
	l.Close()
	if got, output := ask(t, l.Addr().String(), p); got != failure || !strings.Contains(output, "connection refused") {
		t.Errorf("closed port: %v %q, want failure", got, output)
	}
}

// health is a gRPC health server that answers by service name.
type health struct {
	grpc_health_v1.UnimplementedHealthServer
}

func (health) Check(ctx context.Context, r *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	switch r.Service {
	case "":
		return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
	case "sick":
		return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_NOT_SERVING}, nil
	case "slow":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, status.Error(codes.NotFound, "unknown service")
}

func TestGRPCProbe(t *testing.T) {
	serve := func(register bool) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer()
		if register {
			grpc_health_v1.RegisterHealthServer(s, health{})
		}
		go s.Serve(l)
		t.Cleanup(s.Stop)
		return l.Addr().String()
	}
	healthy, bare := serve(true), serve(false)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, but never says a word
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()

	tests := map[string]struct {
		addr, service string
		want          answer
		output        string
	}{
		"serving":                    {healthy, "", success, ""},
		"not serving":                {healthy, "sick", failure, `service unhealthy (responded with "NOT_SERVING")`},
		"unknown service":            {healthy, "nope", failure, "error: health rpc probe failed"},
		"no answer in time":          {healthy, "slow", failure, "timeout: health rpc did not complete within 1s"},
		"no health protocol":         {bare, "", failure, "error: this server does not implement the grpc health protocol"},
		"nobody listens":             {closed.Addr().String(), "", failure, "error: failed to connect service at"},
		"connected, but not to gRPC": {silent.Addr().String(), "", failure, "timeout: failed to connect service"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := &corev1.Probe{TimeoutSeconds: 1}
			p.GRPC = &corev1.GRPCAction{Port: int32(portOf(t, tt.addr)), Service: &tt.service}
			got, output := ask(t, tt.addr, p)
			if got != tt.want || !strings.Contains(output, tt.output) {
				t.Errorf("got %v %q, want %v %q", got, output, tt.want, tt.output)
			}
		})
	}
}

func TestHooks(t *testing.T) {
	var agent atomic.Value
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		agent.Store(r.UserAgent())
		w.WriteHeader(500) // the status of a hook's answer does not matter
	}))
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	port := intstr.FromInt(portOf(t, u.Host))
	var events []string
	hooks := NewHooks(Config{
		Exec: func(_ context.Context, id string, cmd []string, _ time.Duration) ([]byte, int, error) {
			switch cmd[0] {
			case "false":
				return []byte("no\n"), 1, nil
			case "gone":
				return nil, 0, errors.New("container is gone")
			}
			return nil, 0, nil
		},
		Event: func(_ *corev1.Pod, _, reason, _ string) { events = append(events, reason) },
	})
	tests := map[string]struct {
		hook   corev1.LifecycleHandler
		want   string // in the error; empty: none
		events []string
	}{
		"a command that succeeds":             {corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}, "", nil},
		"a command that fails":                {corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"false"}}}, `exited with 1, message: "no\n"`, nil},
		"a command that cannot run":           {corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"gone"}}}, "container is gone", nil},
		"an HTTP server":                      {corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: port}}, "", nil},
		"an HTTP server taken for HTTPS":      {corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: port, Scheme: "HTTPS"}}, "", []string{"LifecycleHTTPFallback"}},
		"no HTTP server":                      {corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt(1)}}, "connection refused", nil},
		"tcpSocket, which is not implemented": {corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}, "tcpSocket", nil},
		"nothing at all":                      {corev1.LifecycleHandler{}, "neither", nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			events = nil
			err := hooks.Run(t.Context(), &corev1.Pod{}, &corev1.Container{Name: "c"}, "id", "127.0.0.1", &tt.hook)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if !slices.Equal(events, tt.events) {
				t.Errorf("events %v, want %v", events, tt.events)
			}
		})
	}
	if got := agent.Load(); got != "kube-lifecycle/1.37" {
		t.Errorf("user agent %q", got)
	}
}

func TestSleepHook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hooks := NewHooks(Config{})
		hook := &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 5}}
		begun := time.Now()
		if err := hooks.Run(t.Context(), nil, nil, "", "", hook); err != nil || time.Since(begun) != 5*time.Second {
			t.Errorf("slept %v, error %v", time.Since(begun), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := hooks.Run(ctx, nil, nil, "", "", hook); err == nil {
			t.Error("a sleep that is cut short is no error")
		}
	})
}

func TestExpand(t *testing.T) {
	env := []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)"}, {Name: "A", Value: "2"}}
	for word, want := range map[string]string{
		"plain": "plain", "$(A)": "2", "x$(A)y$(A)": "x2y2", "$(B)": "$(A)", "$(C)": "$(C)",
		"$$(A)": "$(A)", "$A": "$A", "$": "$", "$(": "$(", "$(A": "$(A", "a$$b": "a$b", "$()": "$()", "$$": "$",
	} {
		if got := expandWord(word, env); got != want {
			t.Errorf("expand %q = %q, want %q", word, got, want)
		}
	}
}

// A probe's specification comes from whoever may create pods: nothing in it may
// do more than make an answer unknown.
func FuzzProbeSpec(f *testing.F) {
	f.Add("/healthz?a=b", "HTTP", "10.0.0.1", "web", int32(80), "X-A", "b", "echo $(A)")
	f.Add("http://user@host/%zz#x", "hTTps", "::1", "", int32(-1), "Host", "a\r\nb", "$$($(")
	f.Fuzz(func(t *testing.T, path, scheme, host, name string, port int32, header, value, word string) {
		container := &corev1.Container{Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: port}}}
		action := &corev1.HTTPGetAction{Path: path, Scheme: corev1.URIScheme(scheme), Host: host, Port: intstr.FromString(name),
			HTTPHeaders: []corev1.HTTPHeader{{Name: header, Value: value}}}
		req, err := newRequest(t.Context(), action, container, "10.0.0.9", "agent")
		if err == nil {
			want := host
			if host == "" {
				want = "10.0.0.9"
			}
			if req.URL.Host != net.JoinHostPort(want, fmt.Sprint(port)) || req.URL.User != nil || port < 1 {
				t.Errorf("request goes to %q, asked for host %q port %d", req.URL, host, port)
			}
		}
		expandWord(word, []corev1.EnvVar{{Name: name, Value: value}})
		spec := &corev1.Probe{PeriodSeconds: port, TimeoutSeconds: port, FailureThreshold: port, SuccessThreshold: port, InitialDelaySeconds: port}
		if period(spec) < time.Second || timeout(spec) < time.Second || threshold(spec, success) < 1 || threshold(spec, failure) < 1 {
			t.Errorf("numbers of %v are not sane", spec)
		}
		c := newContainer(&corev1.Container{LivenessProbe: spec}, RunningContainer{}, false, false)
		if now := time.Now(); first(c.probes[liveness], now).Before(now) {
			t.Error("first execution in the past")
		}
	})
}
