package tunnel

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/skerry-io/skerry/tunnel/mux"
)

const (
	// webTimeout bounds reading, and then answering, a plain HTTPS request.
	webTimeout = 30 * time.Second

	// lingerTime is how long a connection is kept after a failed handshake.
	lingerTime = time.Second

	// stopTime is how long Serve waits for what it started.
	stopTime = 10 * time.Second
)

// A Server takes sessions for the cloud, all on one port: what the client asks
// for in ALPN decides whether a connection becomes a session, or carries HTTP.
// Its fields must not be changed in use.
type Server struct {
	// TLS has the server's certificate, and in ClientCAs the CA of the sites.
	// Sessions always need a certificate of theirs; for plain HTTPS, ClientAuth
	// decides. GetConfigForClient may replace it for each connection. Required.
	TLS *tls.Config

	Version  string   // of the software, for the hello
	Features []string // optional abilities, for the hello

	// Authenticate returns the name of the site whose certificate was verified,
	// or why it is not admitted, which the site is told. Required.
	Authenticate func(*tls.ConnectionState) (site string, err error)

	// Accept returns the fencing epoch of a new session, or why there cannot be
	// one, which the site is told. May be nil.
	Accept func(ctx context.Context, site string, peer Hello) (epoch uint64, err error)

	// Use is called with each session; it is closed when Use returns. The context
	// ends with the session, and so must Use: a newer session of the same site
	// closes the older, and is used when the use of that is over. Required.
	Use func(context.Context, *Session)

	HTTP http.Handler // for plain HTTPS requests; default: not found

	MaxConns      int // connections, whatever they are for; default 16384
	MaxHandshakes int // TLS handshakes at a time; default 512
	Streams       int // that each side of a session may have open; default 256

	PingInterval time.Duration // default 5m: the edge pings more often
	Timeout      time.Duration // silence after which a session is given up; default 28s

	Log     *slog.Logger // default slog.Default
	Metrics *Metrics     // may be nil

	mu    sync.Mutex
	sites map[string]*tenure
}

// A tenure is the use of a session.
type tenure struct {
	session *Session
	over    chan struct{} // closed when Use has returned
}

// Session returns the session of a site, or nil.
func (s *Server) Session(site string) *Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.sites[site]; t != nil {
		return t.session
	}
	return nil
}

// Disconnect closes the session of a site, if there is one.
func (s *Server) Disconnect(site string) {
	if session := s.Session(site); session != nil {
		session.Close()
	}
}

// Serve takes connections from l until ctx is done, and returns nil then, or
// until l fails. It closes l and all sessions.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return s.serve(ctx, l, false)
}

// ServeProxied is like Serve for a listener that only proxies can reach, which
// have ended TLS: it takes POST /tunnel over HTTP/2 in clear text, and nothing
// else. What is inside is as secure as with Serve.
func (s *Server) ServeProxied(ctx context.Context, l net.Listener) error {
	return s.serve(ctx, l, true)
}

func (s *Server) serve(ctx context.Context, l net.Listener, plain bool) error {
	if s.TLS == nil || s.Authenticate == nil || s.Use == nil {
		return errors.New("serve tunnel: TLS, Authenticate and Use are required")
	}
	if s.TLS.ClientCAs == nil && s.TLS.GetConfigForClient == nil {
		// Go would take any certificate that the system trusts.
		return errors.New("serve tunnel: no CA for the certificates of sites")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v := newServing(ctx, s)
	defer v.stop(cancel)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		select {
		case v.conns <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.Accept()
		if err == nil {
			setUnsent := tune(conn)
			counted := &released{Conn: s.Metrics.count(conn), release: sync.OnceFunc(func() { <-v.conns })}
			v.work.Go(func() {
				if plain {
					v.plain.give(counted, lowerConn{counted, setUnsent})
				} else {
					v.handle(ctx, counted, setUnsent, false)
				}
			})
			continue
		}
		<-v.conns
		if ctx.Err() != nil {
			return nil
		}
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() && !temporary(err) {
			return fmt.Errorf("serve tunnel: %w", err)
		}
		// Out of file descriptors, most likely: some will be closed.
		s.log().Warn("cannot accept connections", "error", err)
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// temporary reports what the name says; net.Error has no other word for a
// process that is out of file descriptors.
func temporary(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err)
	return ok && t.Temporary()
}

func (s *Server) log() *slog.Logger { return cmp.Or(s.Log, slog.Default()) }

// released calls release when it is closed.
type released struct {
	net.Conn
	release func()
}

func (c *released) CloseWrite() error { return closeWrite(c.Conn) }

// closeWrite half-closes conn if it can be.
func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (c *released) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// A serving is one call of Serve.
type serving struct {
	*Server
	ctx        context.Context
	conns      chan struct{}  // a token for each connection
	handshakes chan struct{}  // a token for each TLS handshake
	work       sync.WaitGroup // connections, until they are sessions' or the web server's
	secure     *webServer     // HTTPS
	inner      *webServer     // HTTPS inside a tunnel
	plain      *webServer     // h2c for proxies
}

func newServing(ctx context.Context, s *Server) *serving {
	v := &serving{
		Server:     s,
		ctx:        ctx,
		conns:      make(chan struct{}, cmp.Or(s.MaxConns, 16<<10)),
		handshakes: make(chan struct{}, cmp.Or(s.MaxHandshakes, 512)),
	}
	tunnel := http.NewServeMux()
	tunnel.HandleFunc("POST "+Path, v.serveTunnel)
	web := http.NewServeMux()
	web.HandleFunc("POST "+Path, v.serveTunnel)
	handler := http.NotFoundHandler()
	if s.HTTP != nil {
		handler = timed(s.HTTP)
	}
	web.Handle("/", handler)
	v.secure = v.newWebServer(web, "http1", "http2")
	v.inner = v.newWebServer(handler, "http1")
	v.plain = v.newWebServer(tunnel, "h2c")
	return v
}

// stop ends all that was begun.
func (v *serving) stop(cancel func()) {
	cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, w := range []*webServer{v.secure, v.inner, v.plain} {
			w.close()
		}
		v.work.Wait()
	}()
	timer := time.NewTimer(stopTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		v.log().Warn("sessions are still in use after the tunnel was stopped")
	}
}

// handle takes one connection, or what is inside a tunnel over HTTP/2, through
// the handshake and as far as it goes. A session is over when it returns.
func (v *serving) handle(ctx context.Context, raw net.Conn, setUnsent func(int), inner bool) {
	select {
	case v.handshakes <- struct{}{}:
	case <-ctx.Done():
		raw.Close()
		return
	}
	ended := make(chan struct{})
	if inner {
		raw = &released{Conn: raw, release: sync.OnceFunc(func() { close(ended) })}
	}
	conn := tls.Server(raw, v.tlsConfig(inner))
	err := handshake(ctx, conn)
	<-v.handshakes
	if err != nil {
		v.linger(raw)
		v.log().Debug("TLS handshake failed", "remote", raw.RemoteAddr(), "error", err)
		return
	}
	if conn.ConnectionState().NegotiatedProtocol == ALPN {
		v.session(ctx, conn, raw, setUnsent)
		return
	}
	lower := lowerConn{raw, setUnsent}
	if !inner {
		v.secure.give(conn, lower)
		return
	}
	v.inner.give(conn, lower)
	select {
	case <-ended: // the tunnel must stay until then
	case <-ctx.Done():
	}
}

// linger closes a connection so that what was last written to it, an alert,
// still arrives: it reads what the peer has sent already, for a moment.
func (v *serving) linger(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(lingerTime))
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		stop := context.AfterFunc(v.ctx, func() { conn.Close() })
		defer stop()
		io.CopyN(io.Discard, conn, maxHeader)
	}
}

// tlsConfig returns the configuration for a connection.
func (s *Server) tlsConfig(inner bool) *tls.Config {
	config := s.TLS.Clone()
	config.MinVersion = tls.VersionTLS13
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		base := s.TLS
		if s.TLS.GetConfigForClient != nil {
			given, err := s.TLS.GetConfigForClient(hello)
			if err != nil {
				return nil, err
			}
			base = cmp.Or(given, base)
		}
		c := base.Clone()
		c.GetConfigForClient = nil
		c.MinVersion = tls.VersionTLS13
		c.SessionTicketsDisabled = true // a revoked site must not come back with one
		switch {
		case slices.Contains(hello.SupportedProtos, ALPN):
			if c.ClientCAs == nil {
				return nil, errors.New("no CA for the certificates of sites")
			}
			c.NextProtos = []string{ALPN}
			c.ClientAuth = tls.RequireAndVerifyClientCert
			c.DynamicRecordSizingDisabled = true // our frames are the records
		case inner:
			c.NextProtos = []string{"http/1.1"}
		default:
			c.NextProtos = []string{"h2", "http/1.1"}
		}
		return c, nil
	}
	return config
}

// session makes a session of conn and has it used.
func (v *serving) session(ctx context.Context, conn *tls.Conn, raw net.Conn, setUnsent func(int)) {
	state := conn.ConnectionState()
	site, denied := v.Authenticate(&state)
	if site == "" && denied == nil {
		denied = errors.New("the certificate names no site")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m, err := mux.New(&secured{conn, raw}, false, mux.Config{
		MaxStreams:   v.Streams,
		PingInterval: v.PingInterval,
		Timeout:      v.Timeout,
		OnRTT: func(rtt time.Duration) {
			if denied == nil {
				v.Metrics.measured(site, rtt)
			}
		},
		OnOpen:  v.Metrics.opened,
		OnQueue: setUnsent,
		OnEnd:   cancel,
	})
	if err != nil {
		raw.Close()
		return
	}
	defer m.Close()
	stop := context.AfterFunc(ctx, func() { m.Close() })
	defer stop()
	hello, err := welcome(ctx, m, func(peer Hello) (own Hello, err error) {
		own = Hello{Version: v.Version, Features: v.Features, Site: site}
		switch {
		case denied != nil:
			return own, denied
		case peer.Site != "" && peer.Site != site:
			return own, fmt.Errorf("the certificate is that of site %s, not %s", site, peer.Site)
		case v.Accept != nil:
			own.Epoch, err = v.Accept(ctx, site, peer)
		}
		return own, err
	})
	if err != nil {
		v.log().Warn("no session", "site", site, "remote", raw.RemoteAddr(), "error", err)
		return
	}
	v.use(ctx, newSession(m, site, hello, v.log(), v.Metrics))
}

// use has s used in place of any older session of the same site, once the use
// of that is over: they must not be served both.
func (v *serving) use(ctx context.Context, s *Session) {
	t := &tenure{session: s, over: make(chan struct{})}
	defer close(t.over)
	v.mu.Lock()
	if v.sites == nil {
		v.sites = map[string]*tenure{}
	}
	older := v.sites[s.peer]
	v.sites[s.peer] = t
	v.mu.Unlock()
	began := time.Now()
	v.Metrics.began()
	v.log().Info("session begins", "site", s.peer, "version", s.hello.Version, "replaces", older != nil)
	if older != nil {
		older.session.closeFor(ErrReplaced)
		select {
		case <-older.over:
		case <-ctx.Done():
		}
	}
	if ctx.Err() == nil {
		v.Use(ctx, s)
	}
	s.Close()
	v.mu.Lock()
	last := v.sites[s.peer] == t
	if last {
		delete(v.sites, s.peer)
	}
	v.mu.Unlock()
	err := s.Err()
	v.Metrics.ended(s.peer, reason(err), last)
	v.log().Info("session ends", "site", s.peer, "after", time.Since(began).Round(time.Second), "reason", err)
}
