//go:build e2e

package identity_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/provider/identity"
	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
	"github.com/skerry-io/skerry/tunnel/bootstrap/bootstraptest"
)

// control is the control plane that the tests of this file share; admin is an
// administrator of it and account the provider's own service account, with the
// rights of manifests/rbac and no more.
var (
	control        *cluster.Cluster
	admin, account kubernetes.Interface
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "identity-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if control, err = cluster.Start(ctx, cluster.Options{Dir: dir, Out: os.Stderr}); err != nil {
		return 1, err
	}
	defer control.Stop()
	config, err := control.Config()
	if err != nil {
		return 1, err
	}
	if admin, err = kubernetes.NewForConfig(config); err != nil {
		return 1, err
	}
	if out, err := kubectl("apply", "-k", "../../manifests/rbac"); err != nil {
		return 1, fmt.Errorf("apply manifests/rbac: %w: %s", err, out)
	}
	token, err := admin.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "skerry-provider",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: new(int64(7200))}}, metav1.CreateOptions{})
	if err != nil {
		return 1, err
	}
	restricted := rest.AnonymousClientConfig(config)
	restricted.BearerToken, restricted.QPS = token.Status.Token, -1
	if account, err = kubernetes.NewForConfig(restricted); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

func kubectl(args ...string) (string, error) {
	out, err := exec.Command(control.Kubectl, append([]string{"--kubeconfig", control.Kubeconfig}, args...)...).CombinedOutput()
	return string(out), err
}

// wipe removes what earlier tests have left.
func wipe(t *testing.T) {
	t.Helper()
	all := metav1.DeleteOptions{}
	if err := errors.Join(
		admin.CoordinationV1().Leases(namespace).DeleteCollection(t.Context(), all, metav1.ListOptions{}),
		admin.CoreV1().Secrets(namespace).DeleteCollection(t.Context(), all, metav1.ListOptions{LabelSelector: "skerry.io/join-token"}),
		admin.CoreV1().Nodes().DeleteCollection(t.Context(), all, metav1.ListOptions{}),
		admin.CertificatesV1().CertificateSigningRequests().DeleteCollection(t.Context(), all, metav1.ListOptions{}),
	); err != nil {
		t.Fatal(err)
	}
}

func TestSuiteOnAnAPIServer(t *testing.T) {
	bootstraptest.RunSuite(t, func(t *testing.T) bootstraptest.Fixture {
		wipe(t)
		return newFixture(t, account, false)
	})
}

// A door is a provider that sites can join, on the real control plane.
type door struct {
	ca  *bootstrap.CA
	url string
}

func openDoor(t *testing.T, manual bool) door {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	ca, err := identity.LoadCA(t.Context(), identity.CAConfig{Client: account, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, account, manual)
	handler, err := bootstrap.NewHandler(bootstrap.HandlerConfig{CA: ca, Tokens: f, Authority: f, PerSource: 1e6, Overall: 1e6, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	shown, err := bootstrap.NewServerCertificate(bootstrap.ServerConfig{CA: ca, Names: []string{"127.0.0.1"}, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler: handler, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: shown.GetCertificate},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return door{ca, "https://" + l.Addr().String()}
}

func (d door) config(t *testing.T, site string, options identity.TokenOptions) bootstrap.JoinConfig {
	t.Helper()
	token, err := identity.CreateToken(t.Context(), account, namespace, options)
	if err != nil {
		t.Fatal(err)
	}
	return bootstrap.JoinConfig{
		Server: d.url, Token: token, CACertHash: d.ca.Pin(), Site: site,
		Dir: filepath.Join(t.TempDir(), "identity"), Log: slog.New(slog.DiscardHandler),
	}
}

func TestJoinRenewRevoke(t *testing.T) {
	wipe(t)
	d := openDoor(t, false)
	sites := startSites(t, account)
	id, err := bootstrap.Join(t.Context(), d.config(t, "site-a", identity.TokenOptions{Site: "site-a"}))
	if err != nil {
		t.Fatal(err)
	}
	if site, err := sites.Admit(t.Context(), id.Certificate()); err != nil || site != "site-a" {
		t.Errorf("Admit = %q, %v", site, err)
	}
	first := id.Certificate()
	rotator, err := bootstrap.NewRotator(bootstrap.RotatorConfig{Identity: id, Server: d.url, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := rotator.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	out, err := kubectl("get", "csr", "-l", "skerry.io/site=site-a", "--no-headers")
	if err != nil || strings.Count(out, "Approved,Issued") != 2 || strings.Count(out, identity.SignerName) != 2 {
		t.Errorf("kubectl get csr: %v\n%s", err, out)
	}
	eventually(t, "end of the first certificate", func() bool {
		_, old := sites.Admit(t.Context(), first)
		_, err := sites.Admit(t.Context(), id.Certificate())
		return errors.Is(old, bootstrap.Stale) && err == nil
	})
	if _, err := bootstrap.Join(t.Context(), d.config(t, "site-a", identity.TokenOptions{})); !errors.Is(err, bootstrap.NameTaken) {
		t.Errorf("another machine joins under the name: %v, want %s", err, bootstrap.NameTaken)
	}
	atTheAPIServer(t, id)
	cutOff(t, sites)
	if err := rotator.Renew(t.Context()); !errors.Is(err, bootstrap.Revoked) {
		t.Errorf("Renew = %v, want %s", err, bootstrap.Revoked)
	}
}

// atTheAPIServer checks that a site's certificate is no use there.
func atTheAPIServer(t *testing.T, id *bootstrap.Identity) {
	t.Helper()
	config, err := control.Config()
	if err != nil {
		t.Fatal(err)
	}
	trust, err := rest.TLSConfigFor(rest.AnonymousClientConfig(config))
	if err != nil {
		t.Fatal(err)
	}
	trust.GetClientCertificate = id.TLSConfig("").GetClientCertificate
	mine := &http.Transport{TLSClientConfig: trust}
	defer mine.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, control.Server+"/api", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := mine.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("the API server answers the site with %s, want 401", resp.Status)
	}
}

// cutOff measures how long after kubectl a watcher knows that a site is cut off.
func cutOff(t *testing.T, sites *identity.Sites) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan bool, 64)
	done := make(chan error, 1)
	go func() { done <- sites.Watch(ctx, func(_ string, revoked bool) { told <- revoked }) }()
	for n := range 5 {
		for _, annotation := range []string{"skerry.io/revoked=stolen", "skerry.io/revoked-"} {
			if out, err := kubectl("annotate", "lease", "-n", namespace, "site-site-a", annotation); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			start := time.Now()
			select {
			case revoked := <-told:
				if want := !strings.HasSuffix(annotation, "-"); revoked != want {
					t.Errorf("round %d: told revoked %v, want %v", n, revoked, want)
				}
			case <-time.After(time.Second):
				t.Errorf("round %d: not told within 1 s", n)
			}
			t.Logf("told %v after kubectl had ended", time.Since(start))
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := identity.Revoke(t.Context(), account, namespace, "site-a", "stolen"); err != nil {
		t.Fatal(err)
	}
}

func TestHundredMachinesWithOneToken(t *testing.T) {
	wipe(t)
	d := openDoor(t, false)
	first := d.config(t, "site-0", identity.TokenOptions{})
	var joined atomic.Int32
	var wg sync.WaitGroup
	for i := range 100 {
		config := first
		config.Site, config.Dir = fmt.Sprintf("site-%d", i), filepath.Join(t.TempDir(), fmt.Sprint(i))
		wg.Go(func() {
			switch _, err := bootstrap.Join(t.Context(), config); {
			case err == nil:
				joined.Add(1)
			case !errors.Is(err, bootstrap.TokenUsed) && !errors.Is(err, bootstrap.TooMany):
				t.Errorf("Join: %v", err)
			}
		})
	}
	wg.Wait()
	list, err := admin.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if joined.Load() != 1 || len(list.Items) != 1 {
		t.Errorf("%d joined, %d requests, want one", joined.Load(), len(list.Items))
	}
}

// Many machines with a token each want the same name at once.
func TestRaceForAName(t *testing.T) {
	wipe(t)
	d := openDoor(t, false)
	var joined atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		config := d.config(t, "site-a", identity.TokenOptions{})
		wg.Go(func() {
			switch _, err := bootstrap.Join(t.Context(), config); {
			case err == nil:
				joined.Add(1)
			case !errors.Is(err, bootstrap.NameTaken):
				t.Errorf("Join: %v", err)
			}
		})
	}
	wg.Wait()
	if joined.Load() != 1 {
		t.Errorf("%d joined under one name, want one", joined.Load())
	}
}

func TestKubectlApprovesAndDenies(t *testing.T) {
	for verb, want := range map[string]error{"approve": nil, "deny": bootstrap.Denied} {
		t.Run(verb, func(t *testing.T) {
			wipe(t)
			d := openDoor(t, true)
			config := d.config(t, "site-a", identity.TokenOptions{Site: "site-a"})
			done := make(chan error, 1)
			go func() {
				_, err := bootstrap.Join(t.Context(), config)
				done <- err
			}()
			var name string
			eventually(t, "request", func() bool {
				list, err := admin.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
				if err != nil || len(list.Items) == 0 {
					return false
				}
				name = list.Items[0].Name
				return true
			})
			if out, err := kubectl("certificate", verb, name); err != nil {
				t.Fatalf("kubectl certificate %s: %v: %s", verb, err, out)
			}
			select {
			case err := <-done:
				if !errors.Is(err, want) {
					t.Errorf("Join = %v, want %v", err, want)
				}
			case <-time.After(30 * time.Second):
				t.Error("Join does not notice")
			}
		})
	}
}

// A request that somebody else makes for the signer is never signed.
func TestForeignRequestIsNotSigned(t *testing.T) {
	wipe(t)
	openDoor(t, false)
	req := bootstraptest.NewRequest(t, "site-a")
	f := newFixture(t, admin, true)
	if err := f.Approve(t.Context(), req); !errors.Is(err, bootstrap.Pending) {
		t.Fatal(err)
	}
	list, err := admin.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d requests, %v", len(list.Items), err)
	}
	if out, err := kubectl("certificate", "approve", list.Items[0].Name); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var csr *certificatesv1.CertificateSigningRequest
	for range 20 { // two seconds: nobody is to act
		if csr, err = admin.CertificatesV1().CertificateSigningRequests().Get(t.Context(), list.Items[0].Name, metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if len(csr.Status.Certificate) > 0 {
		t.Error("it was signed")
	}
}
