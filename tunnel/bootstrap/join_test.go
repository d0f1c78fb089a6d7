package bootstrap_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

func TestJoin(t *testing.T) {
	p := newProvider(t, options{})
	config := p.joinConfig(t, "site-a")
	var log bytes.Buffer
	config.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	id, err := bootstrap.Join(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if id.Site() != "site-a" {
		t.Errorf("Site = %q, want site-a", id.Site())
	}
	if err := p.admits(id); err != nil {
		t.Errorf("the provider does not admit the site: %v", err)
	}
	if strings.Contains(log.String(), config.Token[7:]) {
		t.Error("the token is in the log")
	}
	entries, err := os.ReadDir(config.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600 (%v)", e.Name(), info.Mode(), err)
		}
		if strings.HasPrefix(e.Name(), "pending") || strings.HasSuffix(e.Name(), ".tmp") {
			t.Errorf("%s is left over", e.Name())
		}
	}
	loaded, err := bootstrap.Load(config.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if !loaded.Certificate().Equal(id.Certificate()) {
		t.Error("Load gives another certificate than Join")
	}
	// The same line again is no error and no second certificate.
	again, err := bootstrap.Join(t.Context(), config)
	if err != nil || !again.Certificate().Equal(id.Certificate()) || p.keeper.Issued() != 1 {
		t.Errorf("joining again: %v, %d certificates, want the same one", err, p.keeper.Issued())
	}
}

// The certificate works for mutual TLS, and what it presents changes with a
// renewal although the configuration is old.
func TestTLSConfig(t *testing.T) {
	p := newProvider(t, options{})
	id := p.join(t, "site-a")
	serverCert, err := p.ca.IssueServer([]string{"provider.example"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	config := id.TLSConfig("provider.example")
	handshake := func() string {
		here, there := net.Pipe()
		defer here.Close()
		server := tls.Server(there, &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*serverCert},
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: p.ca.Pool(), SessionTicketsDisabled: true,
		})
		done := make(chan error, 1)
		go func() { done <- tls.Client(here, config).HandshakeContext(t.Context()) }()
		if err := errors.Join(server.HandshakeContext(t.Context()), <-done); err != nil {
			t.Fatal(err)
		}
		leaf := server.ConnectionState().PeerCertificates[0]
		if site, err := bootstrap.SiteFromCertificate(leaf); err != nil || site != "site-a" {
			t.Fatalf("SiteFromCertificate = %q, %v", site, err)
		}
		return bootstrap.Serial(leaf)
	}
	first := handshake()
	if err := p.rotator(t, id).Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if second := handshake(); second == first || second != bootstrap.Serial(id.Certificate()) {
		t.Errorf("serial after renewal = %s, want that of the new certificate", second)
	}
}

// A provider with another CA, or something in between, gets nothing.
func TestWrongPinSendsNothing(t *testing.T) {
	for _, version := range []string{"another CA", "another CA that shows the pinned certificate too"} {
		t.Run(version, func(t *testing.T) {
			real, rogue := newProvider(t, options{}), newProvider(t, options{})
			cert, err := rogue.ca.IssueServer([]string{"127.0.0.1"}, time.Now(), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if version != "another CA" {
				cert.Certificate = append(cert.Certificate, real.ca.Certificate().Raw)
			}
			l := listen(t, false)
			var received atomic.Int64
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					raw, err := l.Accept()
					if err != nil {
						return
					}
					conn := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{*cert}})
					n, _ := conn.Read(make([]byte, 1))
					received.Add(int64(n))
					conn.Close()
				}
			})
			config := real.joinConfig(t, "site-a")
			config.Server = "https://" + l.Addr().String()
			_, err = bootstrap.Join(t.Context(), config)
			l.Close()
			wg.Wait()
			if version == "another CA" {
				wantCode(t, err, bootstrap.WrongPin)
			} else {
				wantCode(t, err, bootstrap.WrongCA)
			}
			if received.Load() != 0 {
				t.Errorf("the rogue provider received %d bytes", received.Load())
			}
			t.Log(err)
		})
	}
}

func TestRefusedJoins(t *testing.T) {
	tests := map[string]struct {
		prepare func(*testing.T, *provider, *bootstrap.JoinConfig)
		want    bootstrap.Code
		says    string
	}{
		"unknown token": {func(_ *testing.T, _ *provider, c *bootstrap.JoinConfig) {
			c.Token = "abcdef.0123456789abcdef"
		}, bootstrap.TokenUnknown, "token create"},
		"wrong secret": {func(_ *testing.T, _ *provider, c *bootstrap.JoinConfig) {
			c.Token = c.Token[:22] + "z"
		}, bootstrap.TokenUnknown, "token create"},
		"expired token": {func(_ *testing.T, p *provider, c *bootstrap.JoinConfig) {
			c.Token = p.keeper.Token("", false, -time.Second)
		}, bootstrap.TokenExpired, "expired"},
		"token that another machine used": {func(t *testing.T, p *provider, c *bootstrap.JoinConfig) {
			other := *c
			other.Dir = t.TempDir()
			if _, err := bootstrap.Join(t.Context(), other); err != nil {
				t.Fatal(err)
			}
		}, bootstrap.TokenUsed, "used already"},
		"token of another site": {func(_ *testing.T, p *provider, c *bootstrap.JoinConfig) {
			c.Token = p.keeper.Token("site-b", false, time.Hour)
		}, bootstrap.TokenOther, "another site"},
		"name of a site with a certificate": {func(t *testing.T, p *provider, c *bootstrap.JoinConfig) {
			p.join(t, "site-a")
			c.Token = p.keeper.Token("", false, time.Hour)
		}, bootstrap.NameTaken, "--replace"},
		"name of a node that is no site": {func(_ *testing.T, p *provider, c *bootstrap.JoinConfig) {
			p.keeper.Take("site-a")
		}, bootstrap.NodeExists, "choose another name"},
		"revoked site": {func(t *testing.T, p *provider, c *bootstrap.JoinConfig) {
			p.join(t, "site-a")
			p.keeper.Revoke("site-a", "stolen \x1b[31mbox")
			c.Token = p.keeper.Token("site-a", true, time.Hour)
		}, bootstrap.Revoked, "stolen  [31mbox"},
		"denied by the operator": {func(_ *testing.T, p *provider, c *bootstrap.JoinConfig) {
			p.keeper.Manual()
			p.keeper.Answer("site-a", bootstrap.Denied)
		}, bootstrap.Denied, "denied"},
		"nothing there": {func(t *testing.T, _ *provider, c *bootstrap.JoinConfig) {
			l := listen(t, false)
			c.Server = "https://" + l.Addr().String()
			l.Close()
		}, bootstrap.Unreachable, "firewall"},
		"something that speaks no TLS": {func(t *testing.T, _ *provider, c *bootstrap.JoinConfig) {
			s := httptest.NewServer(http.NotFoundHandler())
			t.Cleanup(s.Close)
			c.Server = "https://" + s.Listener.Addr().String()
		}, bootstrap.NotProvider, "not a Skerry provider"},
		"a machine that has joined as another site": {func(t *testing.T, p *provider, c *bootstrap.JoinConfig) {
			if _, err := bootstrap.Join(t.Context(), *c); err != nil {
				t.Fatal(err)
			}
			c.Site = "site-b"
		}, bootstrap.Joined, "edgelet reset"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, options{})
			config := p.joinConfig(t, "site-a")
			tt.prepare(t, p, &config)
			before := p.keeper.Issued()
			_, err := bootstrap.Join(t.Context(), config)
			wantCode(t, err, tt.want)
			if e, ok := errors.AsType[*bootstrap.Error](err); !ok || !strings.Contains(e.Error(), tt.says) || strings.Contains(e.Error(), "%!") {
				t.Errorf("it says %q, want %q in it", err, tt.says)
			}
			if strings.Contains(err.Error(), config.Token[7:]) {
				t.Errorf("it tells the token: %v", err)
			}
			if got := p.keeper.Issued(); got != before {
				t.Errorf("%d certificates issued", got-before)
			}
			t.Log(err)
		})
	}
}

func TestMistypedJoinLine(t *testing.T) {
	_, err := bootstrap.Join(t.Context(), bootstrap.JoinConfig{Server: "http://x", Token: "secret", CACertHash: "md5:x", Site: "Site A"})
	for _, want := range []string{"https://HOST:PORT", "ca-cert-hash", "token", "site name", "dir"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not mention %q", err, want)
		}
	}
	if strings.Contains(fmt.Sprint(err), "secret") {
		t.Errorf("error %q tells the token", err)
	}
}

func TestHundredMachinesWithOneToken(t *testing.T) {
	p := newProvider(t, options{})
	token := p.keeper.Token("", false, time.Hour)
	var joined, used atomic.Int32
	var wg sync.WaitGroup
	for i := range 100 {
		config := p.joinConfig(t, fmt.Sprintf("site-%d", i%7))
		config.Token = token
		wg.Go(func() {
			switch _, err := bootstrap.Join(t.Context(), config); {
			case err == nil:
				joined.Add(1)
			case errors.Is(err, bootstrap.TokenUsed), errors.Is(err, bootstrap.NameTaken):
				used.Add(1)
			default:
				t.Errorf("Join: %v", err)
			}
		})
	}
	wg.Wait()
	if joined.Load() != 1 || p.keeper.Issued() != 1 {
		t.Errorf("%d joined, %d certificates, want one", joined.Load(), p.keeper.Issued())
	}
}

// A machine that is installed anew takes its name back, and the old certificate
// is good no more.
func TestReplace(t *testing.T) {
	p := newProvider(t, options{})
	old := p.join(t, "site-a")
	config := p.joinConfig(t, "site-a")
	config.Token = p.keeper.Token("site-a", true, time.Hour)
	id, err := bootstrap.Join(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.admits(id); err != nil {
		t.Errorf("the new certificate is not admitted: %v", err)
	}
	wantCode(t, p.admits(old), bootstrap.Stale)
	wantCode(t, p.rotator(t, old).Renew(t.Context()), bootstrap.Stale)
}

func TestApprovalIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t, options{pipe: true})
		p.keeper.Manual()
		config := p.joinConfig(t, "site-a")
		time.AfterFunc(10*time.Minute, func() { p.keeper.Answer("site-a", nil) })
		start := time.Now()
		if _, err := bootstrap.Join(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < 10*time.Minute || took > 11*time.Minute {
			t.Errorf("joined after %v, want soon after 10m", took)
		}
	})
}

func TestApprovalEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t, options{pipe: true})
		p.keeper.Manual()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := bootstrap.Join(ctx, p.joinConfig(t, "site-a"))
		wantCode(t, err, bootstrap.Pending)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v, want it to tell that time is up", err)
		}
	})
}

// The connection breaks after the provider has done its part: the same line, or
// the same attempt, gets the certificate all the same.
func TestLostAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lost atomic.Int32
		p := newProvider(t, options{pipe: true, wrap: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost && lost.Add(1)%3 != 0 {
					next.ServeHTTP(httptest.NewRecorder(), r)
					panic(http.ErrAbortHandler)
				}
				next.ServeHTTP(w, r)
			})
		}})
		id := p.join(t, "site-a")
		if err := p.admits(id); err != nil {
			t.Error(err)
		}
		for range 3 {
			r := p.rotator(t, id)
			first := r.Renew(t.Context())
			wantCode(t, first, bootstrap.Unreachable)
			if err := p.admits(id); err != nil {
				t.Errorf("the old certificate is not admitted after a lost answer: %v", err)
			}
			wantCode(t, r.Renew(t.Context()), bootstrap.Unreachable)
			if err := r.Renew(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := p.admits(id); err != nil {
				t.Error(err)
			}
		}
	})
}

// The address is where to dial, and no more: trust is in the pinned CA.
func TestJoinThroughALink(t *testing.T) {
	p := newProvider(t, options{})
	config := p.joinConfig(t, "site-a")
	var dialled []string
	config.Server = "https://an-alias.example"
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled = append(dialled, network+" "+address)
		return new(net.Dialer).DialContext(ctx, network, strings.TrimPrefix(p.url, "https://"))
	}
	if _, err := bootstrap.Join(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	want := "tcp an-alias.example:443"
	if len(dialled) != 2 || dialled[0] != want {
		t.Errorf("dialled %q, want %q twice: once to pin, once to join", dialled, want)
	}
}

func TestLoadOfNothing(t *testing.T) {
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), "absent")} {
		if _, err := bootstrap.Load(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Load = %v, want that it does not exist", err)
		}
	}
}
