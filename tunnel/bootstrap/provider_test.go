package bootstrap_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
	"github.com/skerry-io/skerry/tunnel/bootstrap/bootstraptest"
)

// A provider is the cloud side of a test, with real TLS over TCP or over pipes.
type provider struct {
	ca     *bootstrap.CA
	keeper *bootstraptest.Memory
	url    string
	dial   bootstrap.DialFunc

	mu   sync.Mutex
	cert *tls.Certificate
	life time.Duration // of the server's certificate
}

type options struct {
	pipe  bool          // in memory, for fake time
	life  time.Duration // of sites' certificates
	names []string      // of the provider; default 127.0.0.1
	wrap  func(http.Handler) http.Handler
}

func newProvider(t testing.TB, o options) *provider {
	t.Helper()
	ca, err := bootstrap.NewCA(time.Now(), 20*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if o.names == nil {
		o.names = []string{"127.0.0.1"}
	}
	p := &provider{ca: ca, keeper: new(bootstraptest.Memory), life: 30 * 24 * time.Hour}
	handler, err := bootstrap.NewHandler(bootstrap.HandlerConfig{
		CA: ca, Tokens: p.keeper, Authority: p.keeper, Life: o.life,
		PerSource: 1e6, Overall: 1e6, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.wrap != nil {
		handler = o.wrap(handler)
	}
	listener := listen(t, o.pipe)
	p.url = "https://" + listener.Addr().String()
	if l, ok := listener.(*pipeListener); ok {
		p.url, p.dial = "https://127.0.0.1:1", l.dial
	}
	server := &http.Server{
		Handler:  handler,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				p.mu.Lock()
				defer p.mu.Unlock()
				if p.cert == nil || time.Now().After(p.cert.Leaf.NotAfter) {
					var err error
					if p.cert, err = ca.IssueServer(o.names, time.Now(), p.life); err != nil {
						return nil, err
					}
				}
				return p.cert, nil
			},
		},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.ServeTLS(listener, "", "")
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
		if o.pipe {
			time.Sleep(time.Minute) // fake: TLS takes 5 s to close a pipe that nobody reads
		}
	})
	return p
}

// joinConfig is what a good join line says, with a fresh token for site.
func (p *provider) joinConfig(t testing.TB, site string) bootstrap.JoinConfig {
	return bootstrap.JoinConfig{
		Server:     p.url,
		Token:      p.keeper.Token(site, false, time.Hour),
		CACertHash: p.ca.Pin(),
		Site:       site,
		Dir:        filepath.Join(t.TempDir(), "identity"),
		Dial:       p.dial,
		Log:        slog.New(slog.DiscardHandler),
	}
}

func (p *provider) join(t testing.TB, site string) *bootstrap.Identity {
	t.Helper()
	id, err := bootstrap.Join(t.Context(), p.joinConfig(t, site))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (p *provider) rotator(t testing.TB, id *bootstrap.Identity) *bootstrap.Rotator {
	t.Helper()
	r, err := bootstrap.NewRotator(bootstrap.RotatorConfig{
		Identity: id, Server: p.url, Dial: p.dial, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// admits says whether the provider would let a session of id in.
func (p *provider) admits(id *bootstrap.Identity) error {
	record, err := p.keeper.Lookup(context.Background(), id.Site())
	if err != nil {
		return err
	}
	_, err = record.Admits(id.Certificate().SerialNumber)
	return err
}

func wantCode(t *testing.T, err error, want bootstrap.Code) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error = %v, want %s", err, want)
	}
}

func listen(t testing.TB, pipe bool) net.Listener {
	if pipe {
		return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A pipeListener accepts what its dial opens.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, io.EOF
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
