//go:build e2e

package robustness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/test/lab"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// A hostile site has joined as any other and has a certificate of its own. It speaks
// the contract, and writes down every byte that it is given.
type hostile struct {
	name     string
	identity *bootstrap.Identity
	session  *tunnel.Session
	cancel   context.CancelFunc
	work     sync.WaitGroup

	mu       sync.Mutex // guards the following
	received bytes.Buffer
	held     map[edge.Key]edge.Object
	claims   []edge.Held // that it pretends to hold besides
	refuse   error       // what it answers to changes
}

// joinHostile joins a site with a token, without an edgelet.
func joinHostile(t *testing.T, name string) *hostile {
	t.Helper()
	line, err := shared.Token(t.Context(), "--site="+name, "--server=https://"+shared.ProviderAddress())
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(line)
	value := func(flag string) string {
		if i := slices.Index(words, flag); i >= 0 {
			return words[i+1]
		}
		t.Fatalf("no %s in %q", flag, line)
		return ""
	}
	identity, err := bootstrap.Join(t.Context(), bootstrap.JoinConfig{
		Server: "https://" + shared.ProviderAddress(), Token: value("--token"), CACertHash: value("--ca-cert-hash"),
		Site: name, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{name: name, identity: identity, held: map[edge.Key]edge.Object{}}
	t.Cleanup(h.disconnect)
	return h
}

// connect opens a session, in the place of the one before.
func (h *hostile) connect(t *testing.T) {
	t.Helper()
	h.disconnect()
	dialer := &tunnel.Dialer{
		Server: shared.ProviderAddress(), Transport: tunnel.Direct, TLS: h.identity.TLSConfig(bootstrap.ServerName),
		Hello: func() tunnel.Hello { return tunnel.Hello{Site: h.name, Version: "v6.6.6"} },
		Log:   slog.New(slog.DiscardHandler),
	}
	session, err := dialer.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	edge.HandleEdge(mux, h)
	var ctx context.Context
	ctx, h.cancel = context.WithCancel(context.Background())
	h.session = session
	h.work.Go(func() {
		session.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			dump, _ := httputil.DumpRequest(r, true)
			h.note(dump)
			mux.ServeHTTP(w, r)
		}))
	})
}

func (h *hostile) disconnect() {
	if h.session != nil {
		h.cancel()
		h.session.Close()
		h.work.Wait()
		h.session = nil
	}
}

func (h *hostile) note(data []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.received.Write(data)
}

// has reports whether it was ever given text.
func (h *hostile) has(text string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return bytes.Contains(h.received.Bytes(), []byte(text))
}

// Inventory implements edge.Edge.
func (h *hostile) Inventory(context.Context) ([]edge.Held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	held := slices.Clone(h.claims)
	for key, o := range h.held {
		held = append(held, edge.Held{Key: key, Version: o.Version})
	}
	return held, nil
}

// Apply implements edge.Edge.
func (h *hostile) Apply(_ context.Context, changes edge.Changes) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range changes.Upserts {
		h.held[o.Key] = o
	}
	return h.refuse
}

// claim changes what it pretends to hold, and how it answers, and connects anew.
func (h *hostile) claim(t *testing.T, refuse error, claims ...edge.Held) {
	t.Helper()
	h.mu.Lock()
	h.claims, h.refuse = claims, refuse
	h.mu.Unlock()
	h.connect(t)
}

// ask sends a request through its session and returns the status, 0 if there was
// no answer. What it gets is written down.
func (h *hostile) ask(ctx context.Context, method, path, body string) (int, string) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://provider"+path, strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	resp, err := h.session.RoundTrip(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	header, _ := json.Marshal(resp.Header)
	h.note(header)
	h.note(text)
	return resp.StatusCode, string(text)
}

// report sends a report as JSON, so that it can hold what no Go type has.
func (h *hostile) report(t *testing.T, body string) edge.Ack {
	t.Helper()
	status, text := h.ask(t.Context(), http.MethodPost, "/skerry/v1/report", body)
	var ack edge.Ack
	if status != http.StatusOK {
		t.Errorf("report %.200s: %d %s", body, status, text)
	} else if err := json.Unmarshal([]byte(text), &ack); err != nil {
		t.Errorf("report %.200s: %v in %s", body, err, text)
	}
	return ack
}

// resident returns the resident memory of a process in bytes.
func resident(pid int) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	var kb int64
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			fmt.Sscan(rest, &kb)
		}
	}
	if kb == 0 {
		return 0, fmt.Errorf("process %d has ended", pid)
	}
	return kb << 10, nil
}

// memory is resident for a process that must be alive.
func memory(t *testing.T, pid int) int64 {
	t.Helper()
	n, err := resident(pid)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// sleeper is a pod at a site that waits to be used by exec.
func sleeper(name, site, more string) string {
	return `
apiVersion: v1
kind: Pod
metadata: {name: ` + name + `}
spec:
  nodeSelector: {skerry.io/site: ` + site + `}
  terminationGracePeriodSeconds: 5
  containers:
    - name: main
      image: ` + lab.Busybox + `
      command: [sh, -c, 'trap exit TERM; while true; do sleep 3600 & wait $!; done']
` + more
}
