package bootstrap

import (
	"context"
	"crypto/ecdsa"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	l := newLimiter(rate{1, 4}, rate{10, 40})
	now := time.Now()
	count := func(source string, n int) (allowed int) {
		for range n {
			if l.allow(source, now) {
				allowed++
			}
		}
		return allowed
	}
	if got := count("192.0.2.1:1", 10); got != 4 {
		t.Errorf("one source: %d at once, want 4", got)
	}
	if got := count("192.0.2.1:2", 10); got != 0 {
		t.Errorf("another port of it: %d, want 0", got)
	}
	if got := count("[2001:db8::1]:1", 10) + count("[2001:db8::2]:1", 10); got != 4 {
		t.Errorf("two addresses of one network: %d, want 4", got)
	}
	if got := count("[::ffff:192.0.2.1]:2", 10); got != 0 {
		t.Errorf("the first as IPv6: %d, want 0", got)
	}
	now = now.Add(2 * time.Second)
	if got := count("192.0.2.1:1", 10); got != 2 {
		t.Errorf("two seconds later: %d, want 2", got)
	}
	total := 0
	for i := range 2 * maxSources {
		total += count(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255), 1)
	}
	if total > 40 || len(l.sources) > maxSources {
		t.Errorf("%d from many sources, %d remembered, want at most 40 and %d", total, len(l.sources), maxSources)
	}
	now = now.Add(time.Minute)
	if got := count("198.51.100.1:1", 1); got != 1 {
		t.Error("after a flood from many sources a new one is refused for ever")
	}
}

// keeper is the least that a handler can stand on.
type keeper struct {
	Tokens
	Authority
}

func (keeper) Check(context.Context, string) (Grant, error) { return Grant{ID: "abcdef"}, nil }
func (keeper) Redeem(context.Context, string, string, string) error {
	return errors.New("not reached")
}
func (keeper) Lookup(context.Context, string) (Record, error) {
	return Record{}, errors.New("database password: canary")
}

func testHandler(t testing.TB, ca *CA) http.Handler {
	t.Helper()
	h, err := NewHandler(HandlerConfig{CA: ca, Tokens: keeper{}, Authority: keeper{}, PerSource: 1e9, Overall: 1e9})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// FuzzHandler sends what it likes to the two paths that take bodies.
func FuzzHandler(f *testing.F) {
	ca := testCA(f)
	csr, err := newCSR("site-a", testKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(PathJoin, "Bearer abcdef.0123456789abcdef", fmt.Sprintf(`{"site":"site-a","csr":%q}`, csr))
	f.Add(PathRenew, "", fmt.Sprintf(`{"csr":%q,"certificate":%q,"proof":"AAAA"}`, csr, ca.Bundle()))
	f.Add(PathRenew, "", `{"certificate":null}`)
	h := testHandler(f, ca)
	f.Fuzz(func(t *testing.T, path, auth, body string) {
		if path != PathJoin && path != PathRenew {
			return
		}
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
		r.Header.Set("Authorization", auth)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusOK {
			t.Errorf("issued for %q", body)
		}
		if strings.Contains(w.Body.String(), "canary") {
			t.Errorf("our own error is told: %s", w.Body)
		}
	})
}

func TestHandlerBounds(t *testing.T) {
	h := testHandler(t, testCA(t))
	post := func(body string) int {
		r := httptest.NewRequest(http.MethodPost, PathJoin, strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer x")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	if code := post(`{"site":"` + strings.Repeat("x", 10<<20)); code != http.StatusBadRequest {
		t.Errorf("a body of 10 MiB: %d, want %d", code, http.StatusBadRequest)
	}
	limited, err := NewHandler(HandlerConfig{CA: testCA(t), Tokens: keeper{}, Authority: keeper{}, PerSource: 1})
	if err != nil {
		t.Fatal(err)
	}
	h = limited
	codes := map[int]int{}
	for range 20 {
		codes[post("{}")]++
	}
	if codes[http.StatusTooManyRequests] != 16 {
		t.Errorf("20 requests at once: %v, want 16 of %d", codes, http.StatusTooManyRequests)
	}
}

// A renewal needs a certificate of this CA and the key of it.
func TestForgedRenewals(t *testing.T) {
	ca, rogue := testCA(t), testCA(t)
	key, newer := testKey(t), testKey(t)
	record, err := Record{}.next("k", "", issue{now: time.Now(), life: time.Hour, end: ca.cert.NotAfter})
	if err != nil {
		t.Fatal(err)
	}
	renewal := func(ca *CA, holder, signer *ecdsa.PrivateKey) renewRequest {
		cert, err := ca.IssueSite("site-a", record, holder.Public())
		if err != nil {
			t.Fatal(err)
		}
		request, err := newRenewal("site-a", newer, bundle{key: signer, cert: cert})
		if err != nil {
			t.Fatal(err)
		}
		return request
	}
	otherCSR := renewal(ca, key, key)
	csr, err := newCSR("site-a", testKey(t))
	if err != nil {
		t.Fatal(err)
	}
	otherCSR.CSR = string(csr)
	server, err := ca.IssueServer([]string{"x"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	asServer := renewal(ca, key, key)
	asServer.Certificate = string(certificatePEM(server.Leaf))
	for name, tt := range map[string]struct {
		request renewRequest
		want    Code
	}{
		"certificate of another CA":       {renewal(rogue, key, key), NotOurs},
		"somebody else's certificate":     {renewal(ca, key, newer), Invalid},
		"proof for another request":       {otherCSR, Invalid},
		"the provider's own certificate":  {asServer, NotOurs},
		"nothing":                         {renewRequest{}, Invalid},
		"a good one, as far as it can go": {renewal(ca, key, key), Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(testHandler(t, ca))
			defer s.Close()
			r := &remote{server: s.URL, clock: newClock()}
			dial := func(ctx context.Context) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", s.Listener.Addr().String())
			}
			r.server = "https://" + s.Listener.Addr().String()
			body := fmt.Sprintf(`{"csr":%q,"certificate":%q,"proof":%q}`, tt.request.CSR, tt.request.Certificate, base64Of(tt.request.Proof))
			err := r.do(t.Context(), dial, http.MethodPost, PathRenew, "", []byte(body), new(issuedAnswer))
			if !errors.Is(err, tt.want) {
				t.Errorf("error = %v, want %s", err, tt.want)
			}
		})
	}
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
