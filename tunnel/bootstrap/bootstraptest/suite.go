package bootstraptest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// A Keeper is what [RunSuite] checks.
type Keeper interface {
	bootstrap.Tokens
	bootstrap.Authority
}

// A Fixture is a keeper with the means to change what it keeps.
type Fixture struct {
	Keeper
	Token  func(site string, replace bool, life time.Duration) string
	Revoke func(site, why string)
	Take   func(name string) // makes name that of something that is no site
}

// RunSuite checks what every keeper of tokens and records must do.
func RunSuite(t *testing.T, open func(*testing.T) Fixture) {
	checks := map[string]func(*testing.T, Fixture){
		"a token that never was is unknown":              checkUnknownToken,
		"a token tells what it allows":                   checkGrant,
		"an expired token is expired":                    checkExpired,
		"a hundred redemptions at once: one succeeds":    checkRedeemOnce,
		"redeeming again for the same key succeeds":      checkRedeemAgain,
		"a site that never was has a zero record":        checkNoRecord,
		"a record is read as it was written":             checkRecord,
		"of many commits of one record one succeeds":     checkCommitOnce,
		"a commit leaves a revocation in place":          checkRevoked,
		"the name of something else is taken":            checkTaken,
		"a request is approved and published repeatedly": checkPublish,
	}
	for name, check := range checks {
		t.Run(name, func(t *testing.T) { check(t, open(t)) })
	}
}

func checkUnknownToken(t *testing.T, f Fixture) {
	token := f.Token("", false, time.Hour)
	for _, wrong := range []string{"", ".", "zzzzzz.0123456789abcdef", token[:7] + strings.Repeat("z", 16), token + "x", token[:10], "../../../../../x.y"} {
		if _, err := f.Check(t.Context(), wrong); !errors.Is(err, bootstrap.TokenUnknown) {
			t.Errorf("Check(%q) = %v, want %v", wrong, err, bootstrap.TokenUnknown)
		}
	}
}

func checkGrant(t *testing.T, f Fixture) {
	token := f.Token("site-a", true, time.Hour)
	grant, err := f.Check(t.Context(), token)
	want := bootstrap.Grant{ID: token[:6], Site: "site-a", Replace: true}
	if err != nil || grant != want {
		t.Errorf("Check = %+v, %v, want %+v", grant, err, want)
	}
}

func checkExpired(t *testing.T, f Fixture) {
	if _, err := f.Check(t.Context(), f.Token("", false, -time.Minute)); !errors.Is(err, bootstrap.TokenExpired) {
		t.Errorf("Check = %v, want %v", err, bootstrap.TokenExpired)
	}
}

// parallel runs f for 0..n-1 at once and returns the errors.
func parallel(n int, f func(i int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errs
}

func checkRedeemOnce(t *testing.T, f Fixture) {
	token := f.Token("", false, time.Hour)
	redeemed := 0
	for _, err := range parallel(100, func(i int) error {
		return f.Redeem(t.Context(), token, fmt.Sprintf("site-%d", i), fmt.Sprintf("key-%d", i))
	}) {
		switch {
		case err == nil:
			redeemed++
		case !errors.Is(err, bootstrap.TokenUsed):
			t.Errorf("Redeem = %v, want %v", err, bootstrap.TokenUsed)
		}
	}
	if redeemed != 1 {
		t.Errorf("redeemed %d times, want once", redeemed)
	}
}

func checkRedeemAgain(t *testing.T, f Fixture) {
	token := f.Token("", false, time.Hour)
	for range 2 {
		if err := f.Redeem(t.Context(), token, "site-a", "key"); err != nil {
			t.Errorf("Redeem = %v, want nil", err)
		}
	}
	for site, key := range map[string]string{"site-a": "other", "site-b": "key"} {
		if err := f.Redeem(t.Context(), token, site, key); !errors.Is(err, bootstrap.TokenUsed) {
			t.Errorf("Redeem for %s, %s = %v, want %v", site, key, err, bootstrap.TokenUsed)
		}
	}
	grant, err := f.Check(t.Context(), token)
	if err != nil || grant.UsedKey != "key" || grant.UsedSite != "site-a" || time.Since(grant.UsedAt).Abs() > time.Minute {
		t.Errorf("Check = %+v, %v, want it used for key and site-a just now", grant, err)
	}
}

func checkNoRecord(t *testing.T, f Fixture) {
	if record, err := f.Lookup(t.Context(), "site-a"); err != nil || record != (bootstrap.Record{}) {
		t.Errorf("Lookup = %+v, %v, want nothing", record, err)
	}
}

// record returns a record that says n.
func record(n int) bootstrap.Record {
	return bootstrap.Record{
		Serial:    fmt.Sprintf("%x", n),
		Key:       fmt.Sprintf("key-%d", n),
		NotBefore: time.Unix(int64(n), 0).UTC(),
		NotAfter:  time.Unix(int64(n)+1000, 0).UTC(),
		Previous:  fmt.Sprintf("%x", n-1),
	}
}

func commit(t *testing.T, f Fixture, old, next bootstrap.Record) {
	t.Helper()
	if err := f.Commit(t.Context(), "site-a", old, next); err != nil {
		t.Fatalf("Commit: %v", err)
	}
}

func checkRecord(t *testing.T, f Fixture) {
	var last bootstrap.Record
	for n := 1; n < 4; n++ {
		commit(t, f, last, record(n))
		got, err := f.Lookup(t.Context(), "site-a")
		if err != nil || got != record(n) {
			t.Fatalf("Lookup = %+v, %v, want %+v", got, err, record(n))
		}
		last = got
	}
	if err := f.Commit(t.Context(), "site-a", record(1), record(9)); !errors.Is(err, bootstrap.ErrConflict) {
		t.Errorf("Commit over an older record = %v, want %v", err, bootstrap.ErrConflict)
	}
	if other, err := f.Lookup(t.Context(), "site-b"); err != nil || other != (bootstrap.Record{}) {
		t.Errorf("Lookup of another site = %+v, %v, want nothing", other, err)
	}
}

func checkCommitOnce(t *testing.T, f Fixture) {
	var last bootstrap.Record
	for round := range 3 { // the first finds nothing
		committed := 0
		for _, err := range parallel(30, func(i int) error {
			return f.Commit(t.Context(), "site-a", last, record(100*round+i+1))
		}) {
			switch {
			case err == nil:
				committed++
			case !errors.Is(err, bootstrap.ErrConflict):
				t.Errorf("Commit = %v, want %v", err, bootstrap.ErrConflict)
			}
		}
		if committed != 1 {
			t.Errorf("round %d: committed %d times, want once", round, committed)
		}
		var err error
		if last, err = f.Lookup(t.Context(), "site-a"); err != nil {
			t.Fatal(err)
		}
	}
}

func checkRevoked(t *testing.T, f Fixture) {
	commit(t, f, bootstrap.Record{}, record(1))
	old, err := f.Lookup(t.Context(), "site-a")
	if err != nil {
		t.Fatal(err)
	}
	f.Revoke("site-a", "stolen")
	commit(t, f, old, record(2))
	want := record(2)
	want.Revoked = "stolen"
	if got, err := f.Lookup(t.Context(), "site-a"); err != nil || got != want {
		t.Errorf("Lookup = %+v, %v, want %+v", got, err, want)
	}
	f.Revoke("site-a", "")
	if got, err := f.Lookup(t.Context(), "site-a"); err != nil || got != record(2) {
		t.Errorf("Lookup = %+v, %v, want %+v", got, err, record(2))
	}
}

func checkTaken(t *testing.T, f Fixture) {
	f.Take("control-plane")
	if _, err := f.Lookup(t.Context(), "control-plane"); !errors.Is(err, bootstrap.NodeExists) {
		t.Errorf("Lookup = %v, want %v", err, bootstrap.NodeExists)
	}
}

func checkPublish(t *testing.T, f Fixture) {
	ctx := context.WithoutCancel(t.Context())
	ca, err := bootstrap.NewCA(time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, renewal := range []bool{false, true} {
		req := NewRequest(t, "site-a")
		req.Renewal = renewal
		next := record(1)
		next.NotBefore, next.NotAfter = time.Now(), time.Now().Add(time.Hour)
		for n := range 3 { // each signature differs
			if err := f.Approve(ctx, req); err != nil {
				t.Fatalf("Approve %d: %v", n, err)
			}
			cert, err := ca.IssueSite(req.Site, next, req.CSR.PublicKey)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Publish(ctx, req, Chain(cert)); err != nil {
				t.Fatalf("Publish %d: %v", n, err)
			}
		}
	}
}

// NewRequest returns a request of site with a fresh key.
func NewRequest(t testing.TB, site string) bootstrap.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: site, Organization: []string{bootstrap.Organization}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	id, err := bootstrap.KeyID(csr.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return bootstrap.Request{Site: site, CSR: csr, Key: id, Basis: "abcdef", Source: "192.0.2.1:1"}
}

// Chain writes a certificate as PEM.
func Chain(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
