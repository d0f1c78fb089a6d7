package tunnel_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

var quiet = slog.New(slog.DiscardHandler)

// A cloud is a server on loopback and the sessions that it got.
type cloud struct {
	*tunnel.Server
	ca       *tunneltest.CA
	addr     string // for sites
	plain    string // for proxies, in clear text
	sessions chan *tunnel.Session
}

func newCloud(t testing.TB, change ...func(*tunnel.Server)) *cloud {
	c := &cloud{ca: tunneltest.NewCA(t), sessions: make(chan *tunnel.Session, 100)}
	c.Server = &tunnel.Server{
		TLS:          c.ca.Server("127.0.0.1", "localhost"),
		Authenticate: tunneltest.Site,
		Use: func(ctx context.Context, s *tunnel.Session) {
			c.sessions <- s
			<-ctx.Done()
		},
		HTTP: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "joining, TLS %v", r.TLS != nil)
		}),
		Log: quiet,
	}
	for _, f := range change {
		f(c.Server)
	}
	run := func(serve func(context.Context, net.Listener) error) string {
		l := listen(t)
		ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
		done := make(chan error)
		go func() { done <- serve(ctx, l) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("serve: %v", err)
			}
		})
		return l.Addr().String()
	}
	c.addr = run(c.Serve)
	c.plain = run(c.ServeProxied)
	return c
}

func listen(t testing.TB) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (c *cloud) dialer(site string) *tunnel.Dialer {
	return &tunnel.Dialer{Server: c.addr, TLS: c.ca.Client(site), Log: quiet, Proxy: noProxy}
}

func noProxy(*url.URL) (*url.URL, error) { return nil, nil }

// dial returns the two ends of a session that d gets.
func (c *cloud) dial(t testing.TB, d *tunnel.Dialer) (cloud, edge *tunnel.Session) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	edge, err := d.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { edge.Close() })
	return <-c.sessions, edge
}

// layer7 starts a proxy that ends TLS and passes requests on by backend.
func layer7(t testing.TB, config *tls.Config, backend http.RoundTripper, to *url.URL) (addr string) {
	l := listen(t)
	proxy := &http.Server{
		TLSConfig: &tls.Config{Certificates: config.Certificates, NextProtos: []string{"h2"}},
		Handler: &httputil.ReverseProxy{
			Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(to) },
			Transport:     backend,
			FlushInterval: -1,
			ErrorLog:      slog.NewLogLogger(quiet.Handler(), slog.LevelDebug),
		},
		ErrorLog: slog.NewLogLogger(quiet.Handler(), slog.LevelDebug),
	}
	go proxy.ServeTLS(l, "", "")
	t.Cleanup(func() { proxy.Close() })
	return l.Addr().String()
}

// connectProxy starts a CONNECT proxy that wants a user, and counts what passes.
func connectProxy(t testing.TB) (at *url.URL, passed *atomic.Int64) {
	l := listen(t)
	passed = new(atomic.Int64)
	proxy := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic c2l0ZTpzZWNyZXQ=" {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		there, err := net.Dial("tcp", r.Host)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		here, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			there.Close()
			return
		}
		io.WriteString(here, "HTTP/1.1 200 Connection established\r\n\r\n")
		go func() {
			n, _ := io.Copy(there, here)
			passed.Add(n)
			there.Close()
		}()
		n, _ := io.Copy(here, there)
		passed.Add(n)
		here.Close()
	})}
	go proxy.Serve(l)
	t.Cleanup(func() { proxy.Close() })
	return &url.URL{Scheme: "http", User: url.UserPassword("site", "secret"), Host: l.Addr().String()}, passed
}

// ways returns how to set up each way to the cloud.
func ways() map[string]func(t testing.TB, c *cloud) *tunnel.Dialer {
	return map[string]func(t testing.TB, c *cloud) *tunnel.Dialer{
		"direct": func(t testing.TB, c *cloud) *tunnel.Dialer { return c.dialer("site-a") },
		"HTTP/2 without a proxy": func(t testing.TB, c *cloud) *tunnel.Dialer {
			d := c.dialer("site-a")
			d.Transport = tunnel.HTTP2
			return d
		},
		"layer-7 proxy with TLS behind it, found by itself": func(t testing.TB, c *cloud) *tunnel.Dialer {
			d := c.dialer("site-a")
			backend := &http2.Transport{TLSClientConfig: &tls.Config{RootCAs: c.ca.Pool()}}
			t.Cleanup(backend.CloseIdleConnections)
			d.Server = "https://" + layer7(t, c.ca.Server("127.0.0.1"), backend, &url.URL{Scheme: "https", Host: c.addr})
			return d
		},
		"layer-7 proxy with clear text behind it": func(t testing.TB, c *cloud) *tunnel.Dialer {
			d := c.dialer("site-a")
			backend := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, addr)
			}}
			t.Cleanup(backend.CloseIdleConnections)
			d.Server = layer7(t, c.ca.Server("127.0.0.1"), backend, &url.URL{Scheme: "http", Host: c.plain})
			return d
		},
		"CONNECT proxy": func(t testing.TB, c *cloud) *tunnel.Dialer {
			d := c.dialer("site-a")
			proxy, _ := connectProxy(t)
			d.Proxy = always(proxy)
			return d
		},
		"CONNECT proxy, then HTTP/2": func(t testing.TB, c *cloud) *tunnel.Dialer {
			d := c.dialer("site-a")
			proxy, _ := connectProxy(t)
			d.Proxy, d.Transport = always(proxy), tunnel.HTTP2
			return d
		},
	}
}

func TestContractOverEveryWay(t *testing.T) {
	for name, setup := range ways() {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			d := setup(t, c)
			cloud, edge := c.dial(t, d)
			serve(t, cloud, contract)
			serve(t, edge, contract)
			for _, s := range []*tunnel.Session{cloud, edge} {
				t.Run("to "+s.Peer(), func(t *testing.T) { checkContract(t, s) })
			}
			t.Run("plain HTTPS for joining", func(t *testing.T) {
				client := d.HTTPClient()
				defer client.CloseIdleConnections()
				resp, err := client.Get("https://" + c.addr + "/join")
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				if body, _ := io.ReadAll(resp.Body); string(body) != "joining, TLS true" {
					t.Errorf("answer %q", body)
				}
			})
		})
	}
}

// contract answers what checkContract asks.
func contract(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/sum":
		h := sha256.New()
		io.Copy(h, r.Body)
		w.Write(h.Sum(nil))
	case "/bulk":
		rng := rand.NewChaCha8([32]byte{})
		io.CopyN(w, rng, 4<<20)
	case "/redirect":
		http.Redirect(w, r, "http://169.254.169.254/", http.StatusFound)
	case "/echo":
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		io.Copy(conn, buf)
	default:
		fmt.Fprintf(w, "%s %s", r.Host, r.URL.Path)
	}
}

func checkContract(t *testing.T, s *tunnel.Session) {
	request := func(method, path string, body io.Reader) *http.Response {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		t.Cleanup(cancel)
		req, err := http.NewRequestWithContext(ctx, method, "https://some-host"+path, body)
		if err != nil {
			t.Fatal(err)
		}
		if path == "/echo" {
			req.Header.Set("Connection", "Upgrade")
			req.Header.Set("Upgrade", "echo")
		}
		resp, err := s.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	for range 5 {
		if got, err := io.ReadAll(request("GET", "/x", nil).Body); string(got) != "some-host /x" || err != nil {
			t.Errorf("small request: %q, %v", got, err)
		}
	}
	bulk := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(bulk)
	want := sha256.Sum256(bulk)
	if got, err := io.ReadAll(request("PUT", "/sum", bytes.NewReader(bulk)).Body); !bytes.Equal(got, want[:]) || err != nil {
		t.Errorf("sum of what was sent: %x, %v", got, err)
	}
	h := sha256.New()
	if n, err := io.Copy(h, request("GET", "/bulk", nil).Body); !bytes.Equal(h.Sum(nil), want[:]) || err != nil {
		t.Errorf("sum of the %d bytes received: %v", n, err)
	}
	if resp := request("GET", "/redirect", nil); resp.StatusCode != http.StatusFound {
		t.Errorf("redirect was followed: status %d", resp.StatusCode)
	}
	resp := request("GET", "/echo", nil)
	stream, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		t.Fatalf("upgrade: status %d, body %T", resp.StatusCode, resp.Body)
	}
	for i := range 20 {
		out := bytes.Repeat([]byte{byte(i)}, 1+i*977)
		go stream.Write(out)
		in := make([]byte, len(out))
		if _, err := io.ReadFull(stream, in); err != nil || !bytes.Equal(in, out) {
			t.Fatalf("echo of %d bytes: %v", len(out), err)
		}
	}
}

func TestProxyThatRefusesIsNamed(t *testing.T) {
	c := newCloud(t)
	d := c.dialer("site-a")
	proxy, _ := connectProxy(t)
	proxy.User = nil
	d.Proxy = always(proxy)
	_, err := d.Dial(t.Context())
	if err == nil || !contains(err, "407", proxy.Host) {
		t.Errorf("dial through a proxy that wants a password: %v", err)
	}
}

func TestOuterCertificateIsVerified(t *testing.T) {
	c := newCloud(t)
	stranger := tunneltest.NewCA(t)
	backend := &http2.Transport{TLSClientConfig: &tls.Config{RootCAs: c.ca.Pool()}}
	defer backend.CloseIdleConnections()
	d := c.dialer("site-a")
	d.Server = layer7(t, stranger.Server("127.0.0.1"), backend, &url.URL{Scheme: "https", Host: c.addr})
	_, err := d.Dial(t.Context())
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok {
		t.Errorf("dial through a proxy with an unknown certificate: %v", err)
	}
}

func TestClearTextListenerServesTunnelsOnly(t *testing.T) {
	c := newCloud(t)
	resp, err := http.Get("http://" + c.plain + "/join")
	if err == nil {
		resp.Body.Close()
		t.Errorf("HTTP/1.1 on the listener for proxies: status %d", resp.StatusCode)
	}
	client := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	defer client.CloseIdleConnections()
	req, _ := http.NewRequest("GET", "http://"+c.plain+"/join", nil)
	resp, err = client.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("joining on the listener for proxies: status %d", resp.StatusCode)
	}
}

func always(proxy *url.URL) func(*url.URL) (*url.URL, error) {
	return func(*url.URL) (*url.URL, error) { return proxy, nil }
}

func contains(err error, parts ...string) bool {
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			return false
		}
	}
	return true
}
