package server

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A streamer stands for a runtime's streaming server: it accepts any upgrade and
// echoes what it gets, until it gets "bye".
type streamer struct {
	*httptest.Server
	got    chan *http.Request
	closed chan struct{} // a value for each connection that has ended
}

func newStreamer(t *testing.T) *streamer {
	s := &streamer{got: make(chan *http.Request, 1), closed: make(chan struct{}, 1)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.got <- r
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { conn.Close(); s.closed <- struct{}{} }()
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n", r.Header.Get("Upgrade"))
		rw.Flush()
		for {
			line, err := rw.ReadString('\n')
			if err != nil || line == "bye\n" {
				return
			}
			rw.WriteString(line)
			rw.Flush()
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// dial sends a request with an Upgrade and returns the connection and the answer.
func dial(t *testing.T, addr, method, target, upgrade string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: site\r\nConnection: Upgrade\r\nUpgrade: %s\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nAuthorization: Bearer secret\r\nContent-Length: 0\r\n\r\n", method, target, upgrade)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn, r, resp
}

func TestStreamsAreCopiedBothWays(t *testing.T) {
	for name, tt := range map[string]struct{ method, target, upgrade string }{
		"exec by SPDY":              {"POST", "/exec/ns/web/c?command=sh&command=-c&input=1&output=1&error=1&tty=0", "SPDY/3.1"},
		"exec by WebSocket and UID": {"GET", "/exec/ns/web/u1/c?command=sh&command=-c&input=1&output=1&error=1", "websocket"},
		"attach":                    {"POST", "/attach/ns/web/c?input=1&output=1&error=1", "SPDY/3.1"},
		"port-forward by SPDY":      {"POST", "/portForward/ns/web", "SPDY/3.1"},
		"port-forward by WebSocket": {"GET", "/portForward/ns/web/u1?port=80,8080&port=1", "websocket"},
	} {
		t.Run(name, func(t *testing.T) {
			s, runtime := newSite(), newStreamer(t)
			s.url = runtime.URL + "/exec/token"
			front := httptest.NewServer(New(s.config()))
			defer front.Close()
			conn, r, resp := dial(t, front.Listener.Addr().String(), tt.method, tt.target, tt.upgrade)
			if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != tt.upgrade || resp.Header.Get("X-Stream-Protocol-Version") != "v4.channel.k8s.io" {
				t.Fatalf("answer %d %v", resp.StatusCode, resp.Header)
			}
			got := <-runtime.got
			if got.URL.Path != "/exec/token" || got.URL.RawQuery != "" || got.Method != tt.method || got.Header.Get("Authorization") != "" ||
				got.Header.Get("X-Stream-Protocol-Version") != "v4.channel.k8s.io" || got.Host == "site" {
				t.Errorf("runtime got %s %s for %s with %v", got.Method, got.URL, got.Host, got.Header)
			}
			for range 3 {
				fmt.Fprintf(conn, "hello\n")
				if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
					t.Fatalf("echo %q, error %v", line, err)
				}
			}
			fmt.Fprintf(conn, "bye\n")
			if _, err := r.ReadByte(); err != io.EOF {
				t.Errorf("after the end: %v, want EOF", err)
			}
			want := map[bool]string{true: fmt.Sprint(s.exec), false: ""}[s.exec != nil]
			switch {
			case s.exec != nil:
				if e := s.exec; e.ContainerId != "id2" || len(e.Cmd) != 2 || e.Tty || !e.Stdin || !e.Stdout || !e.Stderr {
					t.Errorf("exec request %s", want)
				}
			case s.attach != nil:
				if a := s.attach; a.ContainerId != "id2" || !a.Tty || a.Stderr || !a.Stdin { // the spec asks for a terminal
					t.Errorf("attach request %v", a)
				}
			case s.forward != nil:
				if f := s.forward; f.PodSandboxId != "sandbox-u1" || (tt.upgrade == "websocket") != (fmt.Sprint(f.Port) == "[80 8080 1]") {
					t.Errorf("port-forward request %v", f)
				}
			}
		})
	}
}

func TestClientThatLeavesEndsItsStream(t *testing.T) {
	s, runtime := newSite(), newStreamer(t)
	s.url = runtime.URL
	front := httptest.NewServer(New(s.config()))
	defer front.Close()
	conn, _, _ := dial(t, front.Listener.Addr().String(), "POST", "/exec/ns/web/c?command=sh&input=1", "SPDY/3.1")
	<-runtime.got
	conn.Close()
	select {
	case <-runtime.closed:
	case <-time.After(10 * time.Second):
		t.Error("the runtime's end of the stream is still open after 10 s")
	}
}

func TestStreamsThatAreRefused(t *testing.T) {
	elsewhere := newStreamer(t)
	redirect := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound))
	defer redirect.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	defer gone.Close()
	tests := map[string]struct {
		url  string
		err  error
		code int
		text string
	}{
		"a URL of another machine":    {"http://192.0.2.1:1234/exec/x", nil, 502, "not an address of this machine"},
		"a URL with a name":           {"http://evil.example/exec/x", nil, 502, "not an IP address"},
		"a URL of another scheme":     {"https://127.0.0.1/exec/x", nil, 502, "scheme"},
		"a URL with a user":           {"http://a:b@127.0.0.1/exec/x", nil, 502, "scheme"},
		"something that is no URL":    {"http://127.0.0.1:%zz/token", nil, 502, "not a URL"},
		"nothing":                     {"", nil, 502, "scheme"},
		"a redirect":                  {redirect.URL, nil, 502, "redirect"},
		"a stream that is gone":       {gone.URL, nil, 404, "404 page not found"},
		"a runtime that does not run": {"http://127.0.0.1:1/", nil, 502, "connection refused"},
		"a container that is gone":    {"", status.Error(codes.NotFound, "no such container"), 404, "no such container"},
		"a runtime with enough to do": {"", status.Error(codes.ResourceExhausted, "too many"), 429, "too many"},
		"a runtime that is away":      {"", fmt.Errorf("exec: %w", status.Error(codes.Unavailable, "away")), 503, "away"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite()
			s.url, s.err = tt.url, tt.err
			front := httptest.NewServer(New(s.config()))
			defer front.Close()
			_, _, resp := dial(t, front.Listener.Addr().String(), "POST", "/exec/ns/web/c?command=sh&output=1", "SPDY/3.1")
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.code || !strings.Contains(string(body), tt.text) || resp.Header.Get("Location") != "" {
				t.Errorf("%d %q, want %d %q", resp.StatusCode, body, tt.code, tt.text)
			}
			select {
			case <-elsewhere.got:
				t.Error("the redirect was followed")
			default:
			}
		})
	}
}

func TestPortsOfWebSocketClients(t *testing.T) {
	for query, ok := range map[string]bool{"port=80": true, "port=1,65535": true, "": false, "port=": false, "port=0": false, "port=65536": false, "port=80,": false, "port=-1": false} {
		r := httptest.NewRequest("GET", "/portForward/ns/web?"+query, nil)
		r.Header.Set("Upgrade", "websocket")
		if _, err := parsePorts(r); (err == nil) != ok {
			t.Errorf("%q: error %v, want ok %v", query, err, ok)
		}
	}
}

func TestOwnAddressesAreLocal(t *testing.T) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range addrs {
		ip := addr.(*net.IPNet).IP
		if ip.IsLinkLocalUnicast() {
			continue // not without a zone
		}
		if _, err := local("http://" + net.JoinHostPort(ip.String(), "1234") + "/x"); err != nil {
			t.Errorf("%s: %v", ip, err)
		}
	}
}

func FuzzStreamURL(f *testing.F) {
	f.Add("http://127.0.0.1:1234/exec/abc")
	f.Add("http://[::1]:80/x")
	f.Add("http://127.0.0.1@evil.example/")
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := local(raw)
		if err != nil {
			return
		}
		host := u.Hostname()
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback() && !isOwn(t, ip)) {
			t.Errorf("%q is taken for local", raw)
		}
	})
}

func isOwn(t *testing.T, ip net.IP) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range addrs {
		if addr.(*net.IPNet).IP.Equal(ip) {
			return true
		}
	}
	return false
}
