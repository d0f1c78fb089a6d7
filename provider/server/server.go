package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Sites are those that this replica has a session with. *provider.Provider implements
// it.
type Sites interface {
	// Site returns the way to a site. Its error is a sentence for people: that the site
	// is not connected, and since when.
	Site(name string) (http.RoundTripper, error)
	// HasPod reports whether a pod is bound to a site.
	HasPod(namespace, name, site string) bool
}

// Config configures a server. Sites, Certificate, ClientCAs, Authenticator and
// Authorizer are required.
type Config struct {
	Sites         Sites
	Certificate   func(*tls.ClientHelloInfo) (*tls.Certificate, error) // that the server shows
	ClientCAs     func() *x509.CertPool                                // that sign certificates of clients; nil: none is accepted
	Authenticator Authenticator                                        // of bearer tokens
	Authorizer    Authorizer

	Address    string                // to listen at; default all addresses
	FirstPort  int                   // of the sites' ports; default 20000
	LastPort   int                   // default 29999, below the cluster's node ports
	Log        *slog.Logger          // default slog.Default()
	Registerer prometheus.Registerer // default none
}

// Limits of one site's port.
const (
	maxConnections = 512  // open at once; further ones are closed
	maxRequests    = 1024 // served at once; further ones are answered with 429
	maxStreams     = 250  // requests at once on one HTTP/2 connection

	headerTimeout = 10 * time.Second // for the TLS handshake and for the header of a request
	idleTimeout   = 3 * time.Minute  // of a connection without a request
)

// A Server serves the kubelet API of sites. Its methods may be called from any
// goroutine.
type Server struct {
	sites       Sites
	log         *slog.Logger
	errorLog    *log.Logger // for net/http
	guard       *guard
	metrics     *metrics
	proxy       *httputil.ReverseProxy
	tls         *tls.Config
	http        *http.Server
	address     string
	first, last int

	mu     sync.Mutex // guards what follows
	ports  map[string]*sitePort
	taken  map[int]bool
	closed bool
	wg     sync.WaitGroup // of the goroutines that accept connections
}

// New returns a server without ports.
func New(c Config) (*Server, error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("kubelet API: %w", err)
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("kubelet API: metrics: %w", err)
	}
	s := &Server{
		sites: c.Sites, log: c.Log, errorLog: slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug),
		guard: newGuard(c), metrics: m, address: c.Address, first: c.FirstPort, last: c.LastPort,
		ports: map[string]*sitePort{}, taken: map[int]bool{},
		tls: &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.Certificate,
			ClientAuth: tls.RequestClientCert, // verified with each request, against the authorities of the day
		},
	}
	s.proxy = newProxy(s)
	s.http = &http.Server{
		Handler: s, TLSConfig: s.tls, ErrorLog: s.errorLog, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		HTTP2:       &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		BaseContext: func(l net.Listener) context.Context { return l.(*sitePort).ctx },
	}
	return s, nil
}

func (c *Config) complete() error {
	var errs []error
	for name, missing := range map[string]bool{
		"Sites": c.Sites == nil, "Certificate": c.Certificate == nil, "ClientCAs": c.ClientCAs == nil,
		"Authenticator": c.Authenticator == nil, "Authorizer": c.Authorizer == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("%s is required", name))
		}
	}
	if c.FirstPort == 0 && c.LastPort == 0 {
		c.FirstPort, c.LastPort = 20000, 29999
	}
	if c.FirstPort < 1 || c.LastPort < c.FirstPort || c.LastPort > 65535 {
		errs = append(errs, fmt.Errorf("ports %d to %d are no range", c.FirstPort, c.LastPort))
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return errors.Join(errs...)
}

// Run serves until ctx is done, then closes all ports, connections and streams.
func (s *Server) Run(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	s.closed = true
	open := make([]string, 0, len(s.ports))
	for site := range s.ports {
		open = append(open, site)
	}
	s.mu.Unlock()
	for _, site := range open {
		s.Close(site)
	}
	err := s.http.Close()
	s.wg.Wait()
	if err != nil {
		return fmt.Errorf("kubelet API: close: %w", err)
	}
	return nil
}

// Port returns the port at which a site is served, and opens it if it is not.
func (s *Server) Port(site string) (int32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.ports[site]; p != nil {
		return int32(p.port), nil
	}
	if s.closed {
		return 0, fmt.Errorf("kubelet API: port of %s: %w", site, http.ErrServerClosed)
	}
	l, port, err := s.listen(site)
	if err != nil {
		return 0, fmt.Errorf("kubelet API: port of %s: %w", site, err)
	}
	p := &sitePort{Listener: l, site: site, port: port, tls: s.tls, refused: s.metrics.refused, conns: map[net.Conn]struct{}{}}
	p.ctx, p.cancel = context.WithCancelCause(context.WithValue(context.Background(), portKey{}, p))
	s.ports[site], s.taken[port] = p, true
	s.wg.Go(func() {
		if err := s.http.Serve(p); !p.over() && !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("port of a site failed", "node", site, "port", port, "err", err)
			s.closePort(p) // the next call of Port opens another one
		}
	})
	s.log.Debug("port of a site opened", "node", site, "port", port)
	return int32(port), nil
}

// Close closes the port of a site, with all connections and streams.
func (s *Server) Close(site string) {
	s.mu.Lock()
	p := s.ports[site]
	s.mu.Unlock()
	if p != nil {
		s.closePort(p)
	}
}

func (s *Server) closePort(p *sitePort) {
	s.mu.Lock()
	if s.ports[p.site] == p {
		delete(s.ports, p.site)
		delete(s.taken, p.port)
	}
	s.mu.Unlock()
	p.shut()
}

// listen opens the first port that is free, beginning where the site's name says.
func (s *Server) listen(site string) (net.Listener, int, error) {
	h := fnv.New32a()
	h.Write([]byte(site))
	n := s.last - s.first + 1
	start := int(h.Sum32() % uint32(n))
	for i := range n {
		port := s.first + (start+i)%n
		if s.taken[port] {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(s.address, strconv.Itoa(port)))
		if err == nil {
			return l, port, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, 0, err
		}
	}
	return nil, 0, fmt.Errorf("all ports from %d to %d are in use", s.first, s.last)
}

// ServeHTTP answers one request: it finds out who asks, what for, whether they may,
// and passes it on.
func (s *Server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	port, ok := r.Context().Value(portKey{}).(*sitePort)
	if !ok {
		http.NotFound(rw, r)
		return
	}
	if r.ContentLength != 0 { // a body, which is never read: do not wait for it either
		rw.Header().Set("Connection", "close")
		http.NewResponseController(rw).SetReadDeadline(time.Now().Add(headerTimeout))
	}
	route, known := parseRoute(r.URL.Path)
	w := &recorder{ResponseWriter: rw, metrics: s.metrics, class: route.class, start: time.Now()}
	defer w.done()
	user, ok := s.admit(w, r, port.site, route)
	if !ok {
		return
	}
	defer port.requests.Add(-1)
	if port.requests.Add(1) > maxRequests {
		refuse(w, http.StatusTooManyRequests, fmt.Sprintf("site %s is busy with %d requests", port.site, maxRequests))
		return
	}
	upgrade, ok := s.acceptable(w, r, port.site, route, known)
	if !ok {
		return
	}
	s.log.Debug("kubelet request", "node", port.site, "user", user.Name, "class", route.class, "method", r.Method, "namespace", route.namespace, "pod", route.pod)
	p := passage{port.site, route, user.Name, upgrade}
	if upgrade == "" {
		r.Header.Del("Connection")
		r.Header.Del("Upgrade")
	}
	s.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), passageKey{}, p)))
}

// admit authenticates and authorizes a request, and answers one that fails.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, site string, route route) (User, bool) {
	user, err := s.guard.authenticate(r)
	switch {
	case errors.Is(err, ErrUnauthenticated):
		refuse(w, http.StatusUnauthorized, "Unauthorized")
		return user, false
	case err != nil:
		s.log.Warn("authentication of a kubelet request failed", "node", site, "err", err)
		refuse(w, http.StatusServiceUnavailable, "it cannot be found out now who you are; try again")
		return user, false
	}
	attributes := route.attributes(r.Method, site)
	allowed, err := s.guard.authorize(r.Context(), user, attributes)
	switch {
	case err != nil:
		s.log.Warn("authorization of a kubelet request failed", "node", site, "user", user.Name, "err", err)
		refuse(w, http.StatusServiceUnavailable, "it cannot be found out now what you may do; try again")
	case !allowed:
		var names []string
		for _, a := range attributes {
			names = append(names, "nodes/"+a.Subresource)
		}
		refuse(w, http.StatusForbidden, fmt.Sprintf("Forbidden: user %q may not %s %s of %s",
			user.Name, attributes[0].Verb, strings.Join(names, " or "), site))
	}
	return user, err == nil && allowed
}

// acceptable answers a request that no site is to see. It returns the protocol that
// an upgrade asks for.
func (s *Server) acceptable(w http.ResponseWriter, r *http.Request, site string, route route, known bool) (upgrade string, ok bool) {
	switch {
	case !known:
		refuse(w, http.StatusNotFound, "404 page not found")
		return "", false
	case !slices.Contains(route.methods, r.Method):
		w.Header().Set("Allow", strings.Join(route.methods, ", "))
		refuse(w, http.StatusMethodNotAllowed, "method not allowed")
		return "", false
	case route.pod != "" && !s.sites.HasPod(route.namespace, route.pod, site):
		refuse(w, http.StatusNotFound, fmt.Sprintf("pod %s/%s is not on %s", route.namespace, route.pod, site))
		return "", false
	case !route.upgrade:
		return "", true
	}
	upgrade = upgradeOf(r)
	switch {
	case !slices.ContainsFunc(upgrades, func(u string) bool { return strings.EqualFold(u, upgrade) }):
		refuse(w, http.StatusBadRequest, "you must ask to upgrade the connection, to "+strings.Join(upgrades, " or "))
	case r.ContentLength != 0 || len(r.TransferEncoding) > 0:
		refuse(w, http.StatusBadRequest, "a request to upgrade the connection has no body")
	default:
		return upgrade, true
	}
	return "", false
}

type portKey struct{}

// A sitePort is the listener of one site. The connections that it accepts speak TLS.
type sitePort struct {
	net.Listener
	site     string
	port     int
	tls      *tls.Config
	refused  prometheus.Counter
	ctx      context.Context // of its requests; done when the port is closed
	cancel   context.CancelCauseFunc
	requests atomic.Int32

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
}

var errPortClosed = errors.New("the port of the site is closed")

// Accept implements net.Listener.
func (p *sitePort) Accept() (net.Conn, error) {
	for {
		conn, err := p.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &portConn{Conn: conn, port: p}
		if p.add(c) {
			return tls.Server(c, p.tls), nil
		}
		conn.Close()
	}
}

func (p *sitePort) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over() {
		return false
	}
	if len(p.conns) >= maxConnections {
		p.refused.Inc()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *sitePort) over() bool { return p.ctx.Err() != nil }

// Close implements net.Listener, for the HTTP server.
func (p *sitePort) Close() error {
	p.shut()
	return nil
}

// shut closes the listener and every connection, also those that became streams.
func (p *sitePort) shut() {
	p.cancel(errPortClosed)
	p.Listener.Close()
	p.mu.Lock()
	conns := p.conns
	p.conns = map[net.Conn]struct{}{}
	p.mu.Unlock()
	for c := range conns {
		c.Close()
	}
}

// A portConn is a connection that its port knows of while it is open.
type portConn struct {
	net.Conn
	port *sitePort
}

// Close implements net.Conn.
func (c *portConn) Close() error {
	c.port.mu.Lock()
	delete(c.port.conns, c)
	c.port.mu.Unlock()
	return c.Conn.Close()
}
