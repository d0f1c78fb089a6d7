package tunnel_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel"
)

// upgrade opens an echo stream to the peer of s, which serves contract.
func upgrade(t testing.TB, s *tunnel.Session) io.ReadWriteCloser {
	t.Helper()
	req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodGet, "http://peer/echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "echo")
	resp, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Body.(io.ReadWriteCloser)
}

// newEcho returns a function that sends n bytes there and back, and says how long that took.
func newEcho(t testing.TB, s *tunnel.Session) func(n int) time.Duration {
	stream := upgrade(t, s)
	t.Cleanup(func() { stream.Close() })
	return func(n int) time.Duration {
		t.Helper()
		out, in := bytes.Repeat([]byte{'x'}, n), make([]byte, n)
		began := time.Now()
		if _, err := stream.Write(out); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(stream, in); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
}

// startBulk has the peer of s, which serves contract, send without end; it counts what arrives.
func startBulk(t testing.TB, s *tunnel.Session) (arrived *atomic.Int64, stop func()) {
	arrived = new(atomic.Int64)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 32<<10)
		for ctx.Err() == nil {
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://peer/bulk", nil)
			resp, err := s.RoundTrip(req)
			if err != nil {
				return
			}
			for err == nil {
				var n int
				n, err = resp.Body.Read(buf)
				arrived.Add(int64(n))
			}
			resp.Body.Close()
		}
	}()
	return arrived, func() {
		cancel()
		<-done
	}
}
