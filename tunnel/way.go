package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// Ways to the server, as Dialer.Transport names them.
const (
	Auto   = "auto"   // direct, and over HTTP/2 if that does not get through
	Direct = "direct" // TLS to the server itself, CONNECT included
	HTTP2  = "http2"  // inside an HTTP/2 request, for proxies that end TLS
)

const (
	// connectTimeout bounds getting a TCP connection. Every hedgeTime another
	// attempt is begun beside those under way: the kernel repeats a lost SYN ever
	// more slowly, and a site is to be back soon after its link is.
	connectTimeout = 10 * time.Second
	hedgeTime      = 2 * time.Second
)

// A dialError says at which stage an attempt to get a session failed, as
// the metric names it.
type dialError struct {
	stage string
	err   error
}

func (e *dialError) Error() string { return e.stage + ": " + e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// Stages of a dial.
const (
	stageConnect = "connect"
	stageProxy   = "proxy"
	stageOuter   = "outer-tls" // of the HTTP/2 way
	stageHTTP2   = "http2"
	stageTLS     = "tls"
	stageHello   = "hello"
)

// An address is where a server is.
type address struct {
	host string // without port
	port string
	path string // before Path, for the HTTP/2 way
}

func (a address) hostPort() string { return net.JoinHostPort(a.host, a.port) }

// parseServer reads host, host:port or an https URL.
func parseServer(server string) (address, error) {
	text := server
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return address{}, fmt.Errorf("server %q: %w", server, err)
	case u.Scheme != "https":
		return address{}, fmt.Errorf("server %q: scheme %s, want https", server, u.Scheme)
	case u.Hostname() == "":
		return address{}, fmt.Errorf("server %q: no host", server)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return address{}, fmt.Errorf("server %q: want host:port or https://host:port/path", server)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return address{u.Hostname(), port, strings.TrimSuffix(u.Path, "/")}, nil
}

// connect returns a byte stream to addr, through a CONNECT proxy if there is one
// for it, and what sets how much may wait unsent.
func (d *Dialer) connect(ctx context.Context, addr address) (conn net.Conn, setUnsent func(int), err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	proxyFor := d.Proxy
	if proxyFor == nil {
		proxyFor = httpproxy.FromEnvironment().ProxyFunc()
	}
	proxy, err := proxyFor(&url.URL{Scheme: "https", Host: addr.hostPort()})
	if err != nil {
		return nil, nil, &dialError{stageProxy, err}
	}
	target := addr.hostPort()
	if proxy != nil {
		if target, err = proxyAddress(proxy); err != nil {
			return nil, nil, &dialError{stageProxy, err}
		}
	}
	raw, err := d.hedged(ctx, target)
	if err != nil {
		return nil, nil, &dialError{stageConnect, err}
	}
	setUnsent = tune(raw)
	conn = d.Metrics.count(raw)
	if proxy == nil {
		return conn, setUnsent, nil
	}
	if conn, err = throughProxy(ctx, conn, proxy, addr.hostPort()); err != nil {
		raw.Close()
		return nil, nil, &dialError{stageProxy, fmt.Errorf("proxy %s: %w", proxy.Host, err)}
	}
	return conn, setUnsent, nil
}

// hedged dials address, again and again until one attempt succeeds or all have failed.
func (d *Dialer) hedged(ctx context.Context, address string) (net.Conn, error) {
	dial := d.Net
	if dial == nil {
		dial = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: false}}).DialContext
	}
	type result struct {
		conn net.Conn
		err  error
	}
	var attempts sync.WaitGroup
	defer attempts.Wait()
	all := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result)
	pending := 0
	try := func() {
		pending++
		attempts.Go(func() {
			conn, err := dial(ctx, "tcp", address)
			select {
			case results <- result{conn, err}:
			case <-ctx.Done():
				if err == nil {
					conn.Close()
				}
			}
		})
	}
	try()
	again := time.NewTicker(hedgeTime)
	defer again.Stop()
	for {
		select {
		case r := <-results:
			if pending--; r.err == nil || pending == 0 {
				return r.conn, r.err
			}
		case <-again.C:
			try()
		case <-all.Done():
			return nil, fmt.Errorf("dial %s: %w", address, context.Cause(all))
		}
	}
}

func proxyAddress(proxy *url.URL) (string, error) {
	port := proxy.Port()
	switch {
	case proxy.Scheme != "http" && proxy.Scheme != "https":
		return "", fmt.Errorf("proxy of kind %q is not supported, only http and https", proxy.Scheme)
	case port == "" && proxy.Scheme == "http":
		port = "80"
	case port == "":
		port = "443"
	}
	return net.JoinHostPort(proxy.Hostname(), port), nil
}

// throughProxy asks the proxy at the other end of conn for a connection to target.
func throughProxy(ctx context.Context, conn net.Conn, proxy *url.URL, target string) (net.Conn, error) {
	raw := conn
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	if proxy.Scheme == "https" {
		secure := tls.Client(conn, &tls.Config{ServerName: proxy.Hostname(), MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}})
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		conn = secure
	}
	req := &http.Request{
		Method: http.MethodConnect,
		URL:    &url.URL{Opaque: target},
		Host:   target,
		Header: http.Header{"User-Agent": {"skerry"}},
	}
	if user := proxy.User; user != nil {
		password, _ := user.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := req.Write(conn); err != nil {
		return nil, fmt.Errorf("CONNECT: %w", err)
	}
	limited := &io.LimitedReader{R: conn, N: maxHeader}
	r := bufio.NewReader(limited)
	resp, err := http.ReadResponse(r, req)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("CONNECT: %w", context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("CONNECT: %w", err)
	case resp.StatusCode/100 != 2:
		return nil, fmt.Errorf("CONNECT: status %s", printable(resp.Status))
	case r.Buffered() > 0:
		// A TLS server is silent until the client has spoken.
		return nil, errors.New("CONNECT: data after the proxy's answer")
	case !stop():
		return nil, context.Cause(ctx)
	}
	return conn, nil
}
