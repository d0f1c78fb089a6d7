package tunnel

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/skerry-io/skerry/internal/backoff"
	"github.com/skerry-io/skerry/tunnel/mux"
)

const (
	// Between attempts a site waits a random time of up to retryBase, doubled
	// with each failure. While nobody can be reached, which costs nobody
	// anything, that stays below retrySoon, else below retryLimit.
	retryBase  = time.Second
	retrySoon  = 2 * time.Second
	retryLimit = time.Minute

	// steadyTime is how long a session must last to count as a success.
	steadyTime = time.Minute
)

// A Dialer gets sessions for the edge. Its fields must not be changed in use.
type Dialer struct {
	Server string // host, host:port or https URL; required. Default port 443

	// TLS has the site's certificate, best by GetClientCertificate, so that a
	// rotated one is picked up, and in RootCAs the provider's CA. ServerName
	// defaults to the host of Server. Dial and Run require it.
	TLS *tls.Config

	// Proxy returns the CONNECT proxy for a URL, or nil. Default: HTTPS_PROXY and NO_PROXY.
	Proxy func(*url.URL) (*url.URL, error)

	Transport string // Auto (default), Direct or HTTP2

	// Hello returns what to say of ourselves; Protocol and Time are filled in. May be nil.
	Hello func() Hello
	// Accept may refuse a session for what the peer says, such as an epoch that is too old. May be nil.
	Accept func(Hello) error

	// Net dials TCP. Default: net.Dialer.
	Net func(ctx context.Context, network, address string) (net.Conn, error)

	// Failed is told why Run got no session, each time. May be nil.
	Failed func(error)

	PingInterval time.Duration // default 15s
	Timeout      time.Duration // silence after which a session is given up; default 28s

	Log     *slog.Logger // default slog.Default
	Metrics *Metrics     // may be nil

	mu   sync.Mutex
	last *way // that got through last
}

// A way is how to get to the server: one of the fields of Dialer.Transport, and
// whose roots to trust for the outer certificate of HTTP2.
type way struct {
	transport string
	system    bool
}

func (d *Dialer) log() *slog.Logger { return cmp.Or(d.Log, slog.Default()) }

func (d *Dialer) tlsConfig() *tls.Config {
	if d.TLS == nil {
		return &tls.Config{MinVersion: tls.VersionTLS13}
	}
	return d.TLS
}

// Run gets sessions for ever and calls use with each, with a context that ends
// with the session; the session is closed when use returns. After a failure, or
// the end of a session, it tries again within a second, and ever later while
// that fails. It returns nil when ctx is done, or an error at once if the
// configuration cannot work.
func (d *Dialer) Run(ctx context.Context, use func(context.Context, *Session) error) error {
	_, err := d.check()
	if err == nil && d.TLS == nil {
		err = errors.New("no TLS configuration")
	}
	if err != nil {
		return fmt.Errorf("run tunnel: %w", err)
	}
	unreached, failures, reported := 0, 0, ""
	for ctx.Err() == nil {
		began, wait := time.Now(), time.Duration(0)
		s, err := d.Dial(ctx)
		switch {
		case ctx.Err() != nil && err != nil:
			return nil
		case err != nil:
			if unreachable(err) {
				wait = backoff.Delay(unreached, retryBase, retrySoon)
				unreached++
			} else {
				wait = backoff.Delay(failures, retryBase, retryLimit)
				failures++
			}
			if why := label(err); why != reported {
				reported = why
				d.log().Warn("no tunnel", "server", d.Server, "reason", why, "error", err)
			}
			if d.Failed != nil {
				d.Failed(err)
			}
		default:
			unreached, reported = 0, ""
			d.use(ctx, s, use)
			if time.Since(began) >= steadyTime {
				failures = 0
			}
			wait = backoff.Delay(failures, retryBase, retryLimit)
			failures++
		}
		if backoff.Sleep(ctx, wait) != nil {
			return nil
		}
	}
	return nil
}

// unreachable reports whether err came before the server could notice anything.
func unreachable(err error) bool {
	failed, ok := errors.AsType[*dialError](err)
	return ok && (failed.stage == stageConnect || failed.stage == stageProxy)
}

// use runs f with s and then closes it.
func (d *Dialer) use(ctx context.Context, s *Session, f func(context.Context, *Session) error) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // waited for below: it ends with the session
		<-s.Done()
		cancel()
	}()
	d.Metrics.began()
	err := f(ctx, s)
	s.Close()
	<-ctx.Done()
	d.Metrics.ended(s.peer, reason(s.Err()), true)
	d.log().Info("tunnel is down", "server", d.Server, "after", time.Since(began).Round(time.Second), "reason", cmp.Or(err, s.Err()))
}

// check returns where the server is, or what cannot work.
func (d *Dialer) check() (address, error) {
	addr, err := parseServer(d.Server)
	switch d.Transport {
	case "", Auto, Direct, HTTP2:
	default:
		err = errors.Join(err, fmt.Errorf("transport %q: want %s, %s or %s", d.Transport, Auto, Direct, HTTP2))
	}
	return addr, err
}

// Dial gets one session.
func (d *Dialer) Dial(ctx context.Context) (*Session, error) {
	addr, err := d.check()
	if err == nil && d.TLS == nil {
		err = errors.New("no TLS configuration")
	}
	if err != nil {
		return nil, fmt.Errorf("dial tunnel: %w", err)
	}
	var errs []error
	for _, w := range d.ways() {
		s, err := d.dial(ctx, addr, w)
		if err == nil {
			d.remember(&w)
			d.log().Info("tunnel is up", "server", d.Server, "peer", s.peer, "transport", w.transport, "epoch", s.hello.Epoch)
			return s, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", w.transport, err))
		if !getsNowhere(err) {
			break // another way leads to the same answer
		}
	}
	d.remember(nil)
	err = errors.Join(errs...)
	d.Metrics.failed(label(err))
	return nil, fmt.Errorf("dial %s: %w", d.Server, err)
}

// ways returns the ways to try, in order.
func (d *Dialer) ways() []way {
	http2 := []way{{HTTP2, false}, {HTTP2, true}}
	if d.tlsConfig().RootCAs == nil {
		http2 = http2[1:] // the same roots
	}
	direct := way{transport: Direct}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.Transport == Direct:
		return []way{direct}
	case d.last != nil && d.last.transport == HTTP2:
		return []way{*d.last}
	case d.Transport == HTTP2:
		return http2
	}
	return append([]way{direct}, http2...)
}

func (d *Dialer) remember(w *way) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = w
}

// getsNowhere reports whether err may be due to who stands in the way rather
// than to the server: it came before the server had proved who it is.
func getsNowhere(err error) bool {
	failed, ok := errors.AsType[*dialError](err)
	return ok && (failed.stage == stageTLS || failed.stage == stageOuter)
}

// open returns a byte stream to the server, on which it speaks TLS.
func (d *Dialer) open(ctx context.Context, addr address, w way) (net.Conn, func(int), error) {
	switch {
	case w.transport == Direct:
		return d.connect(ctx, addr)
	case w.system:
		return d.openHTTP2(ctx, addr, nil)
	}
	return d.openHTTP2(ctx, addr, d.tlsConfig().RootCAs)
}

// dial gets a session in one way.
func (d *Dialer) dial(ctx context.Context, addr address, w way) (*Session, error) {
	raw, setUnsent, err := d.open(ctx, addr, w)
	if err != nil {
		return nil, err
	}
	config := d.TLS.Clone()
	config.ServerName = cmp.Or(config.ServerName, addr.host)
	config.MinVersion = tls.VersionTLS13
	config.NextProtos = []string{ALPN}
	config.DynamicRecordSizingDisabled = true // our frames are the records
	config.ClientSessionCache = nil
	conn := tls.Client(raw, config)
	if err := handshake(ctx, conn); err != nil {
		raw.Close()
		return nil, &dialError{stageTLS, err}
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != ALPN {
		raw.Close()
		return nil, &dialError{stageTLS, fmt.Errorf("server does not speak %s", ALPN)}
	}
	peer := peerName(&state, addr.host)
	m, err := mux.New(&secured{conn, raw}, true, mux.Config{
		PingInterval: d.PingInterval,
		Timeout:      d.Timeout,
		OnRTT:        func(rtt time.Duration) { d.Metrics.measured(peer, rtt) },
		OnOpen:       d.Metrics.opened,
		OnQueue:      setUnsent,
	})
	if err != nil {
		raw.Close()
		return nil, err
	}
	s, err := d.greet(ctx, m, peer)
	if err != nil {
		m.Close()
		return nil, &dialError{stageHello, err}
	}
	return s, nil
}

func (d *Dialer) greet(ctx context.Context, m *mux.Session, peer string) (*Session, error) {
	// Whatever waits below ends with ctx.
	stop := context.AfterFunc(ctx, func() { m.Close() })
	defer stop()
	var own Hello
	if d.Hello != nil {
		own = d.Hello()
	}
	hello, err := greet(ctx, m, own)
	if err != nil {
		if !stop() {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if d.Accept != nil {
		if err := d.Accept(hello); err != nil {
			return nil, fmt.Errorf("we refuse: %w", err)
		}
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	return newSession(m, peer, hello, d.log(), d.Metrics), nil
}

// peerName returns the name in a verified server certificate.
func peerName(state *tls.ConnectionState, host string) string {
	if len(state.PeerCertificates) == 0 {
		return host
	}
	if cert := state.PeerCertificates[0]; cert.Subject.CommonName != "" {
		return printable(cert.Subject.CommonName)
	} else if len(cert.DNSNames) > 0 {
		return printable(cert.DNSNames[0])
	}
	return host
}

// secured is a TLS connection that closes at once: Go away has said what
// close_notify would, and to say that again could block on a dead link.
type secured struct {
	*tls.Conn
	raw net.Conn
}

func (c *secured) Close() error { return c.raw.Close() }

// DialContext returns a byte stream to the server, whatever address says, on
// which the caller speaks TLS with it, for requests before there is a
// certificate for Dial. In Auto it goes inside HTTP/2 if a certificate that the
// system trusts is shown to it on that way: then a proxy stands between.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	addr, err := d.check()
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", d.Server, err)
	}
	ways := d.ways()
	if len(ways) > 1 && ways[0].transport == Direct {
		ways = []way{{HTTP2, true}, {transport: Direct}}
	}
	var conn net.Conn
	for _, w := range ways {
		if conn, _, err = d.open(ctx, addr, w); err == nil {
			if w.transport == HTTP2 {
				d.remember(&w)
			}
			return conn, nil
		}
		if unreachable(err) {
			break
		}
	}
	return nil, fmt.Errorf("dial %s: %w", d.Server, err)
}

// HTTPClient returns a client for plain HTTPS requests to the server, over the
// same ways as sessions and with the same TLS configuration. It does not follow
// redirects. Close its idle connections when done.
func (d *Dialer) HTTPClient() *http.Client {
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				addr, err := d.check()
				if err != nil {
					return nil, err
				}
				raw, err := d.DialContext(ctx, network, address)
				if err != nil {
					return nil, err
				}
				config := d.tlsConfig().Clone()
				config.ServerName = cmp.Or(config.ServerName, addr.host)
				config.MinVersion = tls.VersionTLS13
				config.NextProtos = []string{"http/1.1"}
				conn := tls.Client(raw, config)
				if err := handshake(ctx, conn); err != nil {
					raw.Close()
					return nil, err
				}
				return conn, nil
			},
			DisableCompression:     true,
			MaxIdleConns:           1,
			IdleConnTimeout:        10 * time.Second,
			MaxResponseHeaderBytes: maxHeader,
		},
	}
}

// label names why a dial failed, for a metric.
func label(err error) string {
	if _, ok := errors.AsType[*RefusedError](err); ok {
		return "refused"
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return "dns"
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "certificate"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "certificate"
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return "timeout"
	}
	if failed, ok := errors.AsType[*dialError](err); ok {
		return failed.stage
	}
	return "other"
}
