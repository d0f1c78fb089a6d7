package tunnel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

func hello(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "hello %s", r.URL.Path) }

// serve answers s's peer with h until the test ends.
func serve(t testing.TB, s *tunnel.Session, h http.HandlerFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(ctx, h)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// get returns what the peer of s answers.
func get(t testing.TB, s *tunnel.Session, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://peer"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestRequestsBothWays(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		cloud, edge := tunneltest.Pair(t)
		serve(t, cloud, hello)
		serve(t, edge, hello)
		for range 3 {
			if got := get(t, cloud, "/edge"); got != "hello /edge" {
				t.Errorf("edge answers %q", got)
			}
			if got := get(t, edge, "/cloud"); got != "hello /cloud" {
				t.Errorf("cloud answers %q", got)
			}
		}
		if cloud.Peer() != "site-a" || edge.Peer() != tunneltest.ServerName {
			t.Errorf("peers %q and %q", cloud.Peer(), edge.Peer())
		}
		if h := edge.Hello(); h.Epoch != 1 || h.Site != "site-a" || h.Protocol != tunnel.Protocol {
			t.Errorf("cloud says %+v", h)
		}
	})
}

func TestEndOfSession(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		cloud, edge := tunneltest.Pair(t)
		served := make(chan error)
		go func() { served <- edge.Serve(t.Context(), http.HandlerFunc(hello)) }()
		get(t, cloud, "/")
		cloud.Close()
		if err := <-served; !errors.Is(err, tunnel.ErrDown) {
			t.Errorf("Serve = %v, want ErrDown", err)
		}
		<-edge.Done()
		req, _ := http.NewRequest(http.MethodGet, "http://peer/", nil)
		if _, err := edge.RoundTrip(req); !errors.Is(err, tunnel.ErrDown) {
			t.Errorf("RoundTrip = %v, want ErrDown", err)
		}
	})
}

func TestPeerThatGivesUpCancelsTheRequest(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		cloud, edge := tunneltest.Pair(t)
		cancelled := make(chan struct{})
		serve(t, edge, func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			close(cancelled)
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://peer/", strings.NewReader(""))
		if _, err := cloud.RoundTrip(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("RoundTrip = %v", err)
		}
		<-cancelled
	})
}
