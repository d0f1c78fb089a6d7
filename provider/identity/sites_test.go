package identity_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/skerry-io/skerry/provider/identity"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
	"github.com/skerry-io/skerry/tunnel/bootstrap/bootstraptest"
)

// startSites runs sites until the test ends.
func startSites(t *testing.T, client kubernetes.Interface) *identity.Sites {
	t.Helper()
	sites, err := identity.NewSites(identity.SitesConfig{Client: client, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- sites.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	eventually(t, "sync", sites.HasSynced)
	return sites
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}

// certificate returns a certificate of site with serial n.
func certificate(t *testing.T, ca *bootstrap.CA, site string, n int) *x509.Certificate {
	t.Helper()
	cert, err := ca.IssueSite(site, bootstrap.Record{
		Serial: fmt.Sprintf("%x", n), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}, bootstraptest.NewRequest(t, site).CSR.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestAdmit(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, false)
	ca, err := bootstrap.NewCA(time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	sites := startSites(t, client)
	admit := func(n int) error {
		_, err := sites.Admit(t.Context(), certificate(t, ca, "site-a", n))
		return err
	}
	if err := admit(5); !errors.Is(err, bootstrap.UnknownSite) {
		t.Errorf("a site that has not joined: %v, want %v", err, bootstrap.UnknownSite)
	}
	commit := func(old, next bootstrap.Record) {
		t.Helper()
		if err := f.Commit(t.Context(), "site-a", old, next); err != nil {
			t.Fatal(err)
		}
	}
	first := bootstrap.Record{Serial: "5", Key: "k5"}
	commit(bootstrap.Record{}, first)
	if err := admit(5); err != nil {
		t.Errorf("right after joining: %v", err) // whether the watch has told yet or not
	}
	second := bootstrap.Record{Serial: "6", Key: "k6", Previous: "5"}
	commit(first, second)
	eventually(t, "news of the renewal", func() bool { r, _ := sites.Record("site-a"); return r.Serial == "6" })
	if err := admit(5); err != nil {
		t.Errorf("the predecessor, while the new one has not been used: %v", err)
	}
	if err := admit(6); err != nil {
		t.Errorf("the new one: %v", err)
	}
	eventually(t, "end of the predecessor", func() bool { return errors.Is(admit(5), bootstrap.Stale) })
	if err := admit(4); !errors.Is(err, bootstrap.Stale) {
		t.Errorf("an older one: %v, want %v", err, bootstrap.Stale)
	}
	if err := admit(7); err != nil {
		t.Errorf("a newer one, as after a restored backup: %v", err)
	}
	f.Revoke("site-a", "stolen")
	eventually(t, "end of the site", func() bool { return errors.Is(admit(6), bootstrap.Revoked) })
	if why, revoked := sites.Revoked("site-a"); !revoked || why != "stolen" {
		t.Errorf("Revoked = %q, %v", why, revoked)
	}
	f.Revoke("site-a", "")
	eventually(t, "return of the site", func() bool { return admit(6) == nil })
	if err := client.CoordinationV1().Leases(namespace).Delete(t.Context(), "site-site-a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the deleted site", func() bool { return errors.Is(admit(6), bootstrap.UnknownSite) })
}

func TestNobodyIsAdmittedBeforeTheSync(t *testing.T) {
	sites, err := identity.NewSites(identity.SitesConfig{Client: fake.NewClientset()})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := bootstrap.NewCA(time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sites.Admit(t.Context(), certificate(t, ca, "site-a", 1)); !errors.Is(err, bootstrap.Unavailable) {
		t.Errorf("Admit = %v, want %v", err, bootstrap.Unavailable)
	}
}

// A watcher is told of every change of an identity, and of nothing else.
func TestWatch(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, false)
	f.Revoke("banned", "before we started")
	sites := startSites(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var told []string
	done := make(chan error, 1)
	go func() {
		done <- sites.Watch(ctx, func(site string, revoked bool) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, fmt.Sprintf("%s %v", site, revoked))
		})
	}()
	expect := func(want string) {
		t.Helper()
		eventually(t, want, func() bool {
			mu.Lock()
			defer mu.Unlock()
			if len(told) == 0 {
				return false
			}
			got := told[0]
			told = told[1:]
			if got != want {
				t.Errorf("told %q, want %q", got, want)
			}
			return true
		})
	}
	expect("banned true")
	if err := f.Commit(ctx, "site-a", bootstrap.Record{}, bootstrap.Record{Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	leases := client.CoordinationV1().Leases(namespace)
	if _, err := leases.Patch(ctx, "site-site-a", types.MergePatchType, []byte(`{"spec":{"holderIdentity":"x"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(ctx, "site-a", bootstrap.Record{Serial: "1"}, bootstrap.Record{Serial: "2", Previous: "1"}); err != nil {
		t.Fatal(err)
	}
	expect("site-a false")
	if err := f.Commit(ctx, "site-a", bootstrap.Record{Serial: "2"}, bootstrap.Record{Serial: "3"}); err != nil {
		t.Fatal(err)
	}
	expect("site-a true") // a new installation
	f.Revoke("site-a", "stolen")
	expect("site-a true")
	f.Revoke("site-a", "")
	expect("site-a false")
	if err := leases.Delete(ctx, "site-site-a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("site-a true")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch = %v", err)
	}
	if len(told) != 0 {
		t.Errorf("told %q besides", told)
	}
}
