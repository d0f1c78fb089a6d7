package bootstrap

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	dialTimeout = 20 * time.Second // connection and handshake
	maxAnswer   = 64 << 10         // bytes
	alpn        = "http/1.1"
)

// A DialFunc opens the connection on which a site speaks TLS with the provider:
// TCP, or through whatever proxies there are.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// A remote is the provider as a site sees it.
type remote struct {
	server string // https://host:port
	addr   string // host:port to dial
	site   string
	dial   DialFunc
	trust  []*x509.Certificate
	clock  *clock
	log    *slog.Logger
}

// newRemote reads the address of a provider: https://host[:port] with no path.
func newRemote(server string, dial DialFunc, log *slog.Logger) (*remote, error) {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("provider address: %w", err)
	}
	if u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return nil, fmt.Errorf("provider address %q: must be https://HOST:PORT", server)
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return &remote{
		server: "https://" + u.Host,
		addr:   net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443")),
		dial:   dial,
		log:    cmp.Or(log, slog.Default()),
	}, nil
}

// fail makes the error that people see.
func (r *remote) fail(code Code, detail string, err error) error {
	return &Error{Code: code, Site: r.site, Server: r.server, Detail: detail, Err: err}
}

// pin finds the CA whose public key has the given hash in the chain that the
// provider shows, in a handshake that trusts nobody: it cannot succeed, so not a
// byte of application data can be sent.
func (r *remote) pin(ctx context.Context, pin string) error {
	_, err := r.handshake(ctx, &tls.Config{RootCAs: x509.NewCertPool(), Time: r.clock.Now})
	unverified, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok {
		return r.classify(err)
	}
	shown := "it shows none"
	for _, cert := range unverified.UnverifiedCertificates {
		if !cert.IsCA {
			continue
		}
		if pinOf(cert) == pin {
			r.trust = []*x509.Certificate{cert}
			return nil
		}
		shown = "it shows " + pinOf(cert)
	}
	return r.fail(WrongPin, shown, nil)
}

// handshake opens a TLS connection with config, whose trust the caller has set.
func (r *remote) handshake(ctx context.Context, config *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := r.dial(ctx, "tcp", r.addr)
	if err != nil {
		return nil, err
	}
	config.ServerName, config.MinVersion, config.NextProtos = ServerName, tls.VersionTLS13, []string{alpn}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// connect opens a verified connection. Where the machine's clock makes the
// provider's certificate look invalid it first asks for the time.
func (r *remote) connect(ctx context.Context) (net.Conn, error) {
	conn, err := r.handshake(ctx, &tls.Config{RootCAs: poolOf(r.trust), Time: r.clock.Now})
	if leaf := outOfTime(err); leaf != nil {
		if err := r.askTime(ctx, leaf); err != nil {
			return nil, err
		}
		conn, err = r.handshake(ctx, &tls.Config{RootCAs: poolOf(r.trust), Time: r.clock.Now})
	}
	if err != nil {
		return nil, r.classify(err)
	}
	return conn, nil
}

// outOfTime returns the provider's certificate if err says that it is not valid
// at this time, else nil.
func outOfTime(err error) *x509.Certificate {
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	if !ok || invalid.Reason != x509.Expired {
		return nil
	}
	unverified, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok || len(unverified.UnverifiedCertificates) == 0 {
		return nil
	}
	return unverified.UnverifiedCertificates[0]
}

// askTime sets the clock by the provider's. If leaf is given, it goes by a time
// at which leaf is valid until it knows better: all that it sends is a nonce, and
// what it believes is signed by the CA itself.
func (r *remote) askTime(ctx context.Context, leaf *x509.Certificate) error {
	connect := r.connect
	if leaf != nil {
		connect = func(ctx context.Context) (net.Conn, error) {
			then := func() time.Time { return leaf.NotBefore.Add(time.Second) }
			conn, err := r.handshake(ctx, &tls.Config{RootCAs: poolOf(r.trust), Time: then})
			if err != nil {
				return nil, r.classify(err)
			}
			return conn, nil
		}
	}
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("nonce: %w", err)
	}
	nonce := hex.EncodeToString(raw)
	var answer timeAnswer
	if err := r.do(ctx, connect, http.MethodGet, PathTime+"?nonce="+nonce, "", nil, &answer); err != nil {
		return err
	}
	if err := verifyTime(r.trust, nonce, answer.Time, answer.Signature); err != nil {
		return r.fail(WrongClock, "", err)
	}
	r.setClock(answer.Time)
	return nil
}

// setClock takes the provider's time, and says so if it makes a difference.
func (r *remote) setClock(now time.Time) {
	wall := r.clock.wall()
	if r.clock.set(now) {
		r.log.Warn("this machine's clock is wrong: certificates are judged by the provider's time until it is set (timedatectl set-ntp true)",
			"clock", wall.UTC().Format(time.RFC3339), "provider", now.UTC().Format(time.RFC3339))
	}
}

// post sends body and reads the answer to it. A 200 is nil, all else an [Error].
func (r *remote) post(ctx context.Context, path, token string, body, answer any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return r.do(ctx, r.connect, http.MethodPost, path, token, data, answer)
}

func (r *remote) do(ctx context.Context, connect func(context.Context) (net.Conn, error), method, path, token string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 4*dialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, r.server+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	transport := &http.Transport{
		DialTLSContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return connect(ctx) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswer,
	}
	// Not http.Client: it follows redirects.
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return r.classify(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return r.classify(err)
	}
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(data, answer); err != nil {
			return r.fail(NotProvider, "", err)
		}
		return nil
	}
	var refused refusedAnswer
	if err := json.Unmarshal(data, &refused); err != nil || refused.Code == "" {
		return r.fail(NotProvider, "HTTP status "+resp.Status, nil)
	}
	return r.fail(refused.Code, refused.Detail, nil)
}

// classify is the only place that maps what went wrong with a connection to what
// people are told.
func (r *remote) classify(err error) error {
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	if outOfTime(err) != nil {
		return r.fail(WrongClock, "", err)
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return r.fail(WrongCA, "", err)
	}
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	// How crypto/tls marks an alert of the peer: it speaks TLS, but not with us.
	op, ok := errors.AsType[*net.OpError](err)
	if noTLS || ok && op.Op == "remote error" {
		return r.fail(NotProvider, "", err)
	}
	return r.fail(Unreachable, "", err)
}

func poolOf(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool
}
