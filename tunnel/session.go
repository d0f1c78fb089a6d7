package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"

	"github.com/skerry-io/skerry/tunnel/mux"
)

const (
	// Streams kept open for the next request: how many, and how long by the
	// side that opened them. The other side keeps them longer, so that it is
	// not the one to close a stream on which a request is under way.
	idleStreams = 4
	idleTime    = time.Minute
	idleLimit   = 2 * time.Minute

	// readHeaderTimeout bounds the time from the first byte of a request to the end of its header.
	readHeaderTimeout = 30 * time.Second

	// drainTime is how long Serve waits for handlers whose requests were cancelled.
	drainTime = 10 * time.Second
)

// A Session is one live tunnel. It is an http.RoundTripper towards the peer
// and serves the peer's requests with the handler given to Serve, so neither
// side needs to know who dialed. Sessions are not reused: when Done is closed,
// every later RoundTrip fails with ErrDown. Its methods may be called at the
// same time.
type Session struct {
	mux     *mux.Session
	rt      *http.Transport // opens a stream instead of dialing
	peer    string
	hello   Hello
	log     *slog.Logger
	metrics *Metrics

	mu    sync.Mutex
	cause error // for which we closed it; nil if none was given
}

func newSession(m *mux.Session, peer string, hello Hello, log *slog.Logger, metrics *Metrics) *Session {
	s := &Session{mux: m, peer: peer, hello: hello, log: log, metrics: metrics}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	s.rt = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			st, err := m.Open(ctx)
			if err != nil {
				return nil, err
			}
			return s.counted(st), nil
		},
		Protocols:              protocols,
		DisableCompression:     true, // an answer passes as it is
		MaxIdleConns:           idleStreams,
		MaxIdleConnsPerHost:    idleStreams,
		IdleConnTimeout:        idleTime,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeader,
	}
	return s
}

// Peer returns the peer's authenticated name: the site's in the cloud, the
// provider's at the edge.
func (s *Session) Peer() string { return s.peer }

// Hello returns what the peer has said of itself.
func (s *Session) Hello() Hello { return s.hello }

// RTT returns the smoothed round trip time, 0 if none is known yet.
func (s *Session) RTT() time.Duration { return s.mux.RTT() }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.Done() }

// Err returns nil until Done is closed, then why; it wraps ErrDown.
func (s *Session) Err() error {
	err := s.mux.Err()
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrDown, cmp.Or(s.cause, err))
}

// Close ends the session, telling the peer if that is possible within a second.
func (s *Session) Close() error { return s.closeFor(nil) }

func (s *Session) closeFor(cause error) error {
	s.mu.Lock()
	s.cause = cmp.Or(s.cause, cause)
	s.mu.Unlock()
	return s.mux.Close()
}

// RoundTrip sends req to the peer; scheme and host of its URL say nothing about
// the way there, the Host header is kept. The answer to a request with Upgrade
// has, when its status is 101, an io.ReadWriteCloser as Body. Redirects are not
// followed. It takes a stream that is idle, or else a new one, for which it
// waits when 256 are open.
func (s *Session) RoundTrip(req *http.Request) (*http.Response, error) {
	class := s.metrics.traffic(s.metrics.classOf(req))
	ctx := httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotConn: func(got httptrace.GotConnInfo) {
			if conn, ok := got.Conn.(*streamConn); ok {
				conn.class.Store(class)
			}
		},
	})
	out := req.WithContext(ctx)
	url := *req.URL
	url.Scheme, url.Host = "http", "peer"
	out.URL = &url
	out.Host = cmp.Or(req.Host, req.URL.Host, s.peer)
	resp, err := s.rt.RoundTrip(out)
	if err != nil {
		if down := s.Err(); down != nil {
			return nil, fmt.Errorf("request to %s: %w", s.peer, down)
		}
		return nil, fmt.Errorf("request to %s: %w", s.peer, err)
	}
	resp.Request = req
	return resp, nil
}

// Serve answers the peer's requests with h until ctx is done, and returns nil
// then, or until the session ends, and returns why. Requests under way are
// cancelled, hijacked streams closed. A request's context ends too when the
// peer gives it up. Serve is called at most once; without it the peer's
// requests wait.
func (s *Session) Serve(ctx context.Context, h http.Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l := &listener{session: s, ctx: ctx, idle: make(chan struct{}), conns: map[*streamConn]bool{}}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	srv := &http.Server{
		Handler:     l.count(h),
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		Protocols:         protocols,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	srv.Serve(l) // always fails, with what Accept failed
	stopped := ctx.Err() != nil
	cancel()
	s.mux.Refuse()
	l.closeAll()
	srv.Close()
	l.drain(s.log)
	if stopped {
		return nil
	}
	return cmp.Or(s.Err(), ErrDown)
}

// A listener hands the peer's streams to an http.Server, and keeps track of
// them and of the handlers at work: http.Server forgets what was hijacked.
type listener struct {
	session *Session
	ctx     context.Context
	idle    chan struct{} // closed when it is closed and no handler is at work

	mu    sync.Mutex
	conns map[*streamConn]bool // nil when closed
	busy  int                  // handlers at work
}

func (l *listener) Accept() (net.Conn, error) {
	st, err := l.session.mux.Accept(l.ctx)
	if err != nil {
		return nil, err
	}
	conn := l.session.counted(st)
	conn.closed = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, conn)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		st.Close()
		return nil, net.ErrClosed
	}
	l.conns[conn] = true
	return conn, nil
}

func (l *listener) Close() error   { return nil } // by http.Server, when it is closed
func (l *listener) Addr() net.Addr { return peerAddr(l.session.peer) }

type peerAddr string

func (peerAddr) Network() string  { return "tunnel" }
func (a peerAddr) String() string { return string(a) }

func (l *listener) closeAll() {
	l.mu.Lock()
	conns := l.conns
	l.conns = nil
	if l.busy == 0 {
		close(l.idle)
	}
	l.mu.Unlock()
	for conn := range conns {
		conn.Stream.Close()
	}
}

// enter counts a handler in, unless the listener is closed.
func (l *listener) enter() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		return false
	}
	l.busy++
	return true
}

func (l *listener) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy--; l.busy == 0 && l.conns == nil {
		close(l.idle)
	}
}

// drain waits for the handlers, for a time.
func (l *listener) drain(log *slog.Logger) {
	timer := time.NewTimer(drainTime)
	defer timer.Stop()
	select {
	case <-l.idle:
	case <-timer.C:
		log.Warn("handlers of a session are still busy after it was stopped", "peer", l.session.peer)
	}
}

type connKey struct{}

// count returns h with its calls and their traffic counted.
func (l *listener) count(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !l.enter() {
			panic(http.ErrAbortHandler) // how a handler ends a connection without an answer
		}
		defer l.leave()
		m := l.session.metrics
		if conn, ok := r.Context().Value(connKey{}).(*streamConn); ok {
			conn.class.Store(m.traffic(m.classOf(r)))
		}
		h.ServeHTTP(w, r)
	})
}

// A streamConn is a stream whose bytes are counted.
type streamConn struct {
	*mux.Stream
	class  atomic.Pointer[traffic] // of the request under way
	closed func()                  // may be nil
}

func (s *Session) counted(st *mux.Stream) *streamConn {
	conn := &streamConn{Stream: st}
	conn.class.Store(s.metrics.traffic(classRequest))
	return conn
}

func (c *streamConn) Read(p []byte) (int, error) {
	n, err := c.Stream.Read(p)
	c.class.Load().read(n)
	return n, err
}

func (c *streamConn) Write(p []byte) (int, error) {
	n, err := c.Stream.Write(p)
	c.class.Load().wrote(n)
	return n, err
}

func (c *streamConn) Close() error {
	if c.closed != nil {
		c.closed()
	}
	return c.Stream.Close()
}

// reason names why a session ended, for a metric.
func reason(err error) string {
	switch {
	case errors.Is(err, ErrReplaced):
		return "replaced"
	case errors.Is(err, mux.ErrClosed):
		return "closed"
	case errors.Is(err, mux.ErrPeerClosed):
		return "peer-closed"
	case errors.Is(err, mux.ErrTimeout):
		return "timeout"
	case errors.Is(err, mux.ErrProtocol):
		return "protocol"
	}
	return "lost"
}
