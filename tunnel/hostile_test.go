package tunnel_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

// TestWhoIsNotAdmitted also shows that none of them disturbs a session that stands.
func TestWhoIsNotAdmitted(t *testing.T) {
	c := newCloud(t, func(s *tunnel.Server) {
		s.Authenticate = func(state *tls.ConnectionState) (string, error) {
			site, err := tunneltest.Site(state)
			if site == "stolen" {
				err = errors.New("site stolen is revoked")
			}
			return site, err
		}
		s.Accept = func(_ context.Context, site string, _ tunnel.Hello) (uint64, error) {
			if site == "quarantined" {
				return 0, errors.New("site quarantined is in quarantine")
			}
			return 7, nil
		}
	})
	cloud, edge := c.dial(t, c.dialer("site-a"))
	serve(t, edge, hello)

	stranger := tunneltest.NewCA(t)
	tests := map[string]struct {
		change func(*tunnel.Dialer)
		want   string // part of the error
	}{
		"certificate of another CA": {func(d *tunnel.Dialer) {
			d.TLS = stranger.Client("site-b")
			d.TLS.RootCAs = c.ca.Pool()
		}, "certificate"},
		"no certificate":                    {func(d *tunnel.Dialer) { d.TLS.Certificates = nil }, "certificate"},
		"server of another CA":              {func(d *tunnel.Dialer) { d.TLS.RootCAs = stranger.Pool() }, "unknown authority"},
		"server of another name":            {func(d *tunnel.Dialer) { d.TLS.ServerName = "other.test" }, "other.test"},
		"site that is revoked":              {func(d *tunnel.Dialer) { d.TLS = c.ca.Client("stolen") }, "site stolen is revoked"},
		"site in quarantine":                {func(d *tunnel.Dialer) { d.TLS = c.ca.Client("quarantined") }, "in quarantine"},
		"name other than the certificate's": {func(d *tunnel.Dialer) { d.Hello = func() tunnel.Hello { return tunnel.Hello{Site: "site-a"} } }, "that of site site-b"},
		"hello that is too large": {func(d *tunnel.Dialer) {
			d.Hello = func() tunnel.Hello { return tunnel.Hello{Version: strings.Repeat("x", 20<<10)} }
		}, "at most"},
		"epoch that the edge finds too old": {func(d *tunnel.Dialer) {
			d.Accept = func(h tunnel.Hello) error { return fmt.Errorf("epoch %d is old", h.Epoch) }
		}, "epoch 7 is old"},
		"certificate of a server, as a site": {func(d *tunnel.Dialer) { d.TLS.Certificates = c.ca.Server("site-b").Certificates }, "certificate"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := c.dialer("site-b")
			d.Transport = tunnel.Direct
			tt.change(d)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			s, err := d.Dial(ctx)
			if err == nil {
				s.Close()
				t.Fatal("got a session")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
			if got := get(t, cloud, "/x"); got != "hello /x" {
				t.Errorf("the session that stood answers %q", got)
			}
		})
	}
	for _, site := range []string{"site-b", "stolen", "quarantined"} {
		// Where the edge refuses, the server learns of it a moment later.
		for deadline := time.Now().Add(5 * time.Second); c.Session(site) != nil; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s has a session", site)
			}
		}
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	c := newCloud(t)
	for _, alpn := range []string{tunnel.ALPN, "h2", "http/1.1"} {
		config := c.ca.Client("site-a")
		config.MinVersion, config.MaxVersion, config.NextProtos = tls.VersionTLS12, tls.VersionTLS12, []string{alpn}
		conn, err := tls.Dial("tcp", c.addr, config)
		if err == nil {
			conn.Close()
			t.Errorf("TLS 1.2 with %s was accepted", alpn)
		}
	}
}

func TestServerNeedsACA(t *testing.T) {
	s := &tunnel.Server{TLS: &tls.Config{}, Authenticate: tunneltest.Site, Use: func(context.Context, *tunnel.Session) {}}
	l := listen(t)
	defer l.Close()
	if err := s.Serve(t.Context(), l); err == nil {
		t.Error("a server without a CA would take any certificate that the system trusts")
	}
}

// TestGarbage sends what no client sends, before and after the handshake.
func TestGarbage(t *testing.T) {
	c := newCloud(t)
	cloud, edge := c.dial(t, c.dialer("site-a"))
	serve(t, edge, hello)
	random := make([]byte, 100_000)
	rand.Read(random)
	tests := map[string]struct {
		bytes []byte
		after bool // the handshake
	}{
		"nothing, before":                 {nil, false},
		"random bytes, before":            {random, false},
		"HTTP in clear text, before":      {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), false},
		"half a TLS record, before":       {[]byte{22, 3, 1, 2, 0, 1, 0}, false},
		"TLS record of 65 KB, before":     {append([]byte{22, 3, 1, 255, 255}, random[:65535]...), false},
		"nothing, after":                  {nil, true},
		"random bytes, after":             {random, true},
		"HTTP, after":                     {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), true},
		"half a frame, after":             {[]byte{0, 0, 0, 1, 0}, true},
		"frame of 4 GiB, after":           {append([]byte{0, 0, 0, 1, 0, 0, 0, 1, 255, 255, 255, 255}, random...), true},
		"hello that is not JSON, after":   {hand(`{"protocol":`), true},
		"hello without protocol, after":   {hand(`{}`), true},
		"hello of 60 KiB, after":          {hand(`{"protocol":1,"version":"` + strings.Repeat("x", 60<<10) + `"}`), true},
		"hello deeply nested, after":      {hand(strings.Repeat(`{"x":`, 3000) + strings.Repeat("}", 3000)), true},
		"another stream than hello's":     {append(hand(`{"protocol":1}`), 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9), true},
		"more pings than answers, after":  {ping(100_000), true},
		"streams in wrong order, after":   {append(syn(9), syn(7)...), true},
		"stream of the other side, after": {syn(2), true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			raw, err := net.Dial("tcp", c.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			var conn net.Conn = raw
			if tt.after {
				config := c.ca.Client("site-b")
				config.ServerName, config.NextProtos = "127.0.0.1", []string{tunnel.ALPN}
				conn = tls.Client(raw, config)
			}
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			conn.Write(tt.bytes)
			if len(tt.bytes) < 100 {
				raw.(*net.TCPConn).CloseWrite()
			}
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server did not close the connection")
			}
			if got := get(t, cloud, "/x"); got != "hello /x" {
				t.Errorf("the session that stood answers %q", got)
			}
		})
	}
	if c.Session("site-b") != nil {
		t.Error("one of them has a session")
	}
}

// hand returns the frame of a stream with a hello, and its end.
func hand(hello string) []byte {
	n := len(hello)
	return append([]byte{0, 0, 0, 5, 0, 0, 0, 1, 0, byte(n >> 16), byte(n >> 8), byte(n)}, hello...)
}

func syn(id byte) []byte { return []byte{0, 1, 0, 1, 0, 0, 0, id, 0, 0, 0, 0} }

func ping(n int) (b []byte) {
	for range n {
		b = append(b, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	return b
}

func TestSilentConnectionsAreClosed(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		ca, network := tunneltest.NewCA(t), tunneltest.NewNetwork(tunneltest.Link{})
		server := &tunnel.Server{TLS: ca.Server(), Authenticate: tunneltest.Site, Use: func(context.Context, *tunnel.Session) {}, Log: quiet}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- server.Serve(ctx, network) }()
		for name, handshake := range map[string]bool{"before the handshake": false, "before the hello": true} {
			conn, err := network.Dial(ctx, "", "")
			if err != nil {
				t.Fatal(err)
			}
			if handshake {
				config := ca.Client("site-a")
				config.ServerName, config.NextProtos = tunneltest.ServerName, []string{tunnel.ALPN}
				secure := tls.Client(conn, config)
				if err := secure.Handshake(); err != nil {
					t.Fatal(err)
				}
				conn = secure
			}
			began := time.Now()
			io.Copy(io.Discard, conn)
			if d := time.Since(began); d > 12*time.Second {
				t.Errorf("silent %s: closed after %v", name, d)
			}
			conn.Close()
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// rss returns what this process keeps in memory, in MiB.
func rss(t testing.TB) int {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip("no /proc here: ", err)
	}
	for line := range strings.Lines(string(data)) {
		if text, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.Fields(text)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// floodVariable in the environment makes the test binary a hostile site.
const floodVariable = "SKERRY_TEST_FLOOD"

// floodFrom starts another process that floods the cloud, so that what is
// measured here is our side alone. It returns what that process has said.
func floodFrom(t *testing.T, c *cloud) <-chan error {
	config := c.ca.Client("site-b")
	key, err := x509.MarshalPKCS8PrivateKey(config.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	order, err := json.Marshal(floodOrder{
		Addr: c.addr, Streams: 2000, Key: key,
		Certificate: config.Certificates[0].Certificate[0],
		Server:      c.TLS.Certificates[0].Certificate[0],
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), floodVariable+"="+string(order))
	ended := make(chan error, 1)
	go func() {
		out, err := cmd.CombinedOutput()
		ended <- fmt.Errorf("%v: %s", err, out)
	}()
	return ended
}

type floodOrder struct {
	Addr                     string
	Streams                  int
	Certificate, Key, Server []byte // DER
}

// flood opens streams by plain yamux, and sends 256 KiB on each, which nobody reads.
func flood(text string) error {
	var order floodOrder
	if err := json.Unmarshal([]byte(text), &order); err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(order.Key)
	if err != nil {
		return err
	}
	server, err := x509.ParseCertificate(order.Server)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(server)
	conn, err := tls.Dial("tcp", order.Addr, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{order.Certificate}, PrivateKey: key}},
		RootCAs:      roots,
		NextProtos:   []string{tunnel.ALPN},
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	config.AcceptBacklog = 1 << 20
	config.ConnectionWriteTimeout = time.Minute
	m, err := yamux.Client(conn, config)
	if err != nil {
		return err
	}
	defer m.Close()
	first, err := m.Open()
	if err != nil {
		return err
	}
	io.WriteString(first, `{"protocol":1}`)
	first.Close()
	io.Copy(io.Discard, first)
	var wg sync.WaitGroup
	gate := make(chan struct{}, 16)
	for range order.Streams {
		st, err := m.Open()
		if err != nil {
			return err
		}
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			st.SetWriteDeadline(time.Now().Add(time.Second))
			io.WriteString(st, "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
			for range 16 { // frames as large as a peer takes them
				if _, err := st.Write(make([]byte, 16<<10)); err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	time.Sleep(300 * time.Millisecond)
	return nil
}

func TestFloodOfStreamsCostsLittle(t *testing.T) {
	for name, read := range map[string]bool{"that nobody accepts": false, "of which all requests hang": true} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			good, edge := c.dial(t, c.dialer("site-a"))
			serve(t, edge, hello)
			debug.FreeOSMemory()
			before := rss(t)
			ended := floodFrom(t, c)
			hostile := <-c.sessions
			if read {
				serve(t, hostile, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			}
			most, slowest := 0, time.Duration(0)
			for done := false; !done; {
				select {
				case err := <-ended:
					t.Logf("flood ended: %v", err)
					done = true
				case <-time.After(20 * time.Millisecond):
					most = max(most, rss(t)-before)
					began := time.Now()
					get(t, good, "/x")
					slowest = max(slowest, time.Since(began))
				}
			}
			t.Logf("at most %d MiB more; slowest request of another site %v", most, slowest.Round(time.Millisecond))
			if most > 64*memoryFactor {
				t.Errorf("2000 unread streams cost %d MiB, want at most %d", most, 64*memoryFactor)
			}
			hostile.Close()
		})
	}
}
