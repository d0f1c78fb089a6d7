package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// openHTTP2 returns a byte stream to the server inside an HTTP/2 request, and
// what sets how much may wait unsent. The outer TLS connection is verified with
// the roots given.
func (d *Dialer) openHTTP2(ctx context.Context, addr address, roots *x509.CertPool) (net.Conn, func(int), error) {
	conn, setUnsent, err := d.connect(ctx, addr)
	if err != nil {
		return nil, nil, err
	}
	outer := tls.Client(conn, &tls.Config{
		ServerName: addr.host,
		RootCAs:    roots,
		MinVersion: tls.VersionTLS12, // it protects nothing but the proxy's peace of mind
		NextProtos: []string{"h2"},
		Time:       d.tlsConfig().Time,
	})
	if err := handshake(ctx, outer); err != nil {
		conn.Close()
		return nil, nil, &dialError{stageOuter, err}
	}
	if got := outer.ConnectionState().NegotiatedProtocol; got != "h2" {
		conn.Close()
		return nil, nil, &dialError{stageOuter, fmt.Errorf("no HTTP/2, server chose %q", got)}
	}
	stream, err := post(ctx, outer, addr)
	if err != nil {
		conn.Close()
		return nil, nil, &dialError{stageHTTP2, err}
	}
	return stream, setUnsent, nil
}

// handshake shakes hands within handshakeTimeout.
func handshake(ctx context.Context, conn *tls.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	return conn.HandshakeContext(ctx)
}

// post begins the one request of an HTTP/2 connection, and returns its two bodies as a net.Conn.
func post(dialing context.Context, outer net.Conn, addr address) (net.Conn, error) {
	client, err := (&http2.Transport{DisableCompression: true, MaxHeaderListSize: maxHeader}).NewClientConn(outer)
	if err != nil {
		return nil, err
	}
	// The request outlives the dial, whose end cancels it only until the answer is here.
	ctx, cancel := context.WithCancel(context.WithoutCancel(dialing))
	stop := context.AfterFunc(dialing, cancel)
	limit := time.AfterFunc(handshakeTimeout, cancel)
	body, out := io.Pipe()
	req := (&http.Request{
		Method:        http.MethodPost,
		URL:           &url.URL{Scheme: "https", Host: addr.hostPort(), Path: addr.path + Path},
		Header:        http.Header{"Content-Type": {"application/octet-stream"}},
		Body:          body,
		ContentLength: -1,
	}).WithContext(ctx)
	resp, err := client.RoundTrip(req)
	inTime := limit.Stop()
	if !stop() && err == nil || !inTime && err == nil {
		err = errors.New("no answer in time")
		resp.Body.Close()
	}
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("POST %s: status %s", req.URL.Path, printable(resp.Status))
		resp.Body.Close()
	}
	if err != nil {
		cancel()
		client.Close()
		return nil, err
	}
	return bridge(resp.Body, out, outer, func() {
		cancel()
		out.Close()
		resp.Body.Close()
		client.Close()
		outer.Close()
	}), nil
}

// bridge makes a net.Conn with working deadlines of a reader and a writer, on
// which stop ends what is under way. Addresses are those of lower.
func bridge(r io.Reader, w io.Writer, lower net.Conn, stop func()) net.Conn {
	near, far := net.Pipe()
	b := &bridged{Conn: near, lower: lower, stop: sync.OnceFunc(func() {
		near.Close()
		far.Close()
		stop()
	})}
	b.copies.Go(func() {
		io.Copy(far, r)
		far.Close() // what is below has ended, which near's reader learns by this
	})
	b.copies.Go(func() {
		io.Copy(w, far)
		far.Close()
	})
	return b
}

type bridged struct {
	net.Conn
	lower  net.Conn
	stop   func()
	copies sync.WaitGroup
}

func (b *bridged) Close() error {
	b.stop()
	b.copies.Wait()
	return nil
}

func (b *bridged) LocalAddr() net.Addr  { return b.lower.LocalAddr() }
func (b *bridged) RemoteAddr() net.Addr { return b.lower.RemoteAddr() }

// serveTunnel takes POST /tunnel: what is inside is handled like a connection.
func (s *serving) serveTunnel(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 2 {
		http.Error(w, "tunnels need HTTP/2", http.StatusHTTPVersionNotSupported)
		return
	}
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.WriteHeader(http.StatusOK)
	if control.Flush() != nil {
		return
	}
	lower, ok := r.Context().Value(lowerKey{}).(lowerConn)
	if !ok {
		return
	}
	conn := bridge(r.Body, &flusher{w, control}, lower.conn, func() {
		past := time.Unix(1, 0)
		control.SetReadDeadline(past)
		control.SetWriteDeadline(past)
		r.Body.Close()
	})
	defer conn.Close()
	s.handle(r.Context(), conn, lower.setUnsent, true)
}

// lowerKey is the context key of the lowerConn on which an HTTP request came.
type lowerKey struct{}

type lowerConn struct {
	conn      net.Conn
	setUnsent func(int)
}

// A flusher sends at once what is written.
type flusher struct {
	w       io.Writer
	control *http.ResponseController
}

func (f *flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		return n, err
	}
	return n, f.control.Flush()
}
