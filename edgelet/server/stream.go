package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// streams of an exec or attach, as a request's parameters name them.
type streams struct{ stdin, stdout, stderr, tty bool }

func parseStreams(q url.Values, tty bool) (streams, error) {
	s := streams{stdin: q.Get("input") == "1", stdout: q.Get("output") == "1", stderr: q.Get("error") == "1", tty: tty}
	if tty {
		s.stderr = false // a terminal has but one output
	}
	if !s.stdin && !s.stdout && !s.stderr {
		return s, failf(http.StatusBadRequest, "you must specify at least 1 of stdin, stdout, stderr")
	}
	return s, nil
}

// exec runs a command in a container with streams.
func (s *server) exec(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	want, err := parseStreams(q, q.Get("tty") == "1")
	if err != nil {
		return err
	}
	if len(q["command"]) == 0 {
		return failf(http.StatusBadRequest, "you must specify at least one command for the container")
	}
	_, id, err := s.running(r)
	if err != nil {
		return err
	}
	return s.stream(w, r, func() (string, error) {
		return s.Streams.Exec(r.Context(), &cri.ExecRequest{
			ContainerId: id, Cmd: q["command"], Tty: want.tty, Stdin: want.stdin, Stdout: want.stdout, Stderr: want.stderr,
		})
	})
}

// attach connects to the streams of a container's own process. Whether that has a
// terminal is its spec's to say, not the request's.
func (s *server) attach(w http.ResponseWriter, r *http.Request) error {
	pod, id, err := s.running(r)
	if err != nil {
		return err
	}
	tty, _ := declared(pod, r.PathValue("container"))
	want, err := parseStreams(r.URL.Query(), tty)
	if err != nil {
		return err
	}
	return s.stream(w, r, func() (string, error) {
		return s.Streams.Attach(r.Context(), &cri.AttachRequest{
			ContainerId: id, Tty: want.tty, Stdin: want.stdin, Stdout: want.stdout, Stderr: want.stderr,
		})
	})
}

// portForward connects to ports of a pod.
func (s *server) portForward(w http.ResponseWriter, r *http.Request) error {
	pod, err := s.find(r)
	if err != nil {
		return err
	}
	ports, err := parsePorts(r)
	if err != nil {
		return err
	}
	sandbox, err := s.Sandbox(r.Context(), pod.UID)
	if err != nil {
		return err
	}
	return s.stream(w, r, func() (string, error) {
		return s.Streams.PortForward(r.Context(), &cri.PortForwardRequest{PodSandboxId: sandbox, Port: ports})
	})
}

// parsePorts reads the ports to forward, which a WebSocket client names in the
// query. SPDY names the port of each of its streams by itself.
func parsePorts(r *http.Request) ([]int32, error) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return nil, nil
	}
	var ports []int32
	for _, list := range r.URL.Query()["port"] {
		for text := range strings.SplitSeq(list, ",") {
			port, err := strconv.ParseUint(text, 10, 16)
			if err != nil || port == 0 {
				return nil, failf(http.StatusBadRequest, "unable to parse %q as a port", text)
			}
			ports = append(ports, int32(port))
		}
	}
	if len(ports) == 0 {
		return nil, failf(http.StatusBadRequest, "query parameter \"port\" is required")
	}
	return ports, nil
}

// run runs a command to its end and answers with what it has written.
func (s *server) run(w http.ResponseWriter, r *http.Request) error {
	_, id, err := s.running(r)
	if err != nil {
		return err
	}
	cmd := strings.Split(r.URL.Query().Get("cmd"), " ")
	output, exit, err := s.Exec(r.Context(), id, cmd, 0)
	if err != nil {
		return err
	}
	if exit != 0 {
		return failf(http.StatusInternalServerError, "command '%s' exited with %d: %s", strings.Join(cmd, " "), exit, output)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Write(output)
	return nil
}

// checkpoint says that there are no checkpoints.
func (s *server) checkpoint(http.ResponseWriter, *http.Request) error {
	return failf(http.StatusNotImplemented, "checkpointing containers is not implemented by this edgelet")
}

// stream asks the runtime for the URL of a stream, and copies bytes between the
// client and it until one of them ends.
func (s *server) stream(w http.ResponseWriter, r *http.Request, ask func() (string, error)) error {
	if r.Header.Get("Upgrade") == "" {
		return failf(http.StatusBadRequest, "Upgrade request required")
	}
	raw, err := ask()
	if err != nil {
		return err
	}
	target, err := local(raw)
	if err != nil {
		return failf(http.StatusBadGateway, "streaming URL of the runtime: %v", err)
	}
	(&httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL, p.Out.Host = target, target.Host
			p.Out.Header.Del("Authorization")
			p.Out.Header.Del("Cookie")
		},
		Transport:      s.proxy,
		ModifyResponse: refuseRedirect,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			fail(w, failf(http.StatusBadGateway, "streaming server of the runtime: %v", err))
		},
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}).ServeHTTP(w, r)
	return nil
}

// refuseRedirect keeps the runtime from sending a client of ours somewhere else.
func refuseRedirect(resp *http.Response) error {
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		return fmt.Errorf("answers with a redirect (%d)", resp.StatusCode)
	}
	return nil
}

// newStreamTransport dials the streaming server anew for each stream, and never
// through a proxy.
func newStreamTransport() http.RoundTripper {
	return &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ResponseHeaderTimeout:  time.Minute,
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         4 << 10,
		WriteBufferSize:        4 << 10,
	}
}

// local checks that a URL names this machine: a runtime that names another, by
// mistake or because somebody speaks in its place, would get what a person types.
func local(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("not a URL") // which may hold a token
	}
	if u.Scheme != "http" || u.User != nil {
		return nil, fmt.Errorf("scheme %q, want http on an address of this machine", u.Scheme)
	}
	if u.Hostname() == "localhost" {
		return u, nil
	}
	host, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return nil, fmt.Errorf("host %q is not an IP address", u.Hostname())
	}
	if host.IsLoopback() {
		return u, nil
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("addresses of this machine: %w", err)
	}
	for _, addr := range own {
		if prefix, err := netip.ParsePrefix(addr.String()); err == nil && prefix.Addr() == host.Unmap() {
			return u, nil
		}
	}
	return nil, fmt.Errorf("host %s is not an address of this machine", host)
}
