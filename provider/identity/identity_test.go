package identity_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/skerry-io/skerry/provider/identity"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
	"github.com/skerry-io/skerry/tunnel/bootstrap/bootstraptest"
)

const namespace = identity.DefaultNamespace

type keeper struct {
	*identity.Tokens
	*identity.Authority
}

// newFixture keeps things in the cluster of client.
func newFixture(t *testing.T, client kubernetes.Interface, manual bool) bootstraptest.Fixture {
	t.Helper()
	tokens, err := identity.NewTokens(identity.TokensConfig{Client: client, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	authority, err := identity.NewAuthority(identity.AuthorityConfig{Client: client, Manual: manual})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	return bootstraptest.Fixture{
		Keeper: keeper{tokens, authority},
		Token: func(site string, replace bool, life time.Duration) string {
			token, err := identity.CreateToken(t.Context(), client, namespace, identity.TokenOptions{
				Site: site, Replace: replace, TTL: max(life, time.Hour), Description: "for a test",
			})
			must(err)
			if life < 0 {
				expireToken(t, client, token, time.Now().Add(life))
			}
			return token
		},
		Revoke: func(site, why string) {
			must(identity.Revoke(t.Context(), client, namespace, site, why))
		},
		Take: func(name string) {
			_, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
			must(err)
		},
	}
}

func expireToken(t *testing.T, client kubernetes.Interface, token string, when time.Time) {
	t.Helper()
	patch, err := json.Marshal(corev1.Secret{Data: map[string][]byte{"expiration": []byte(when.UTC().Format(time.RFC3339))}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.CoreV1().Secrets(namespace).Patch(t.Context(), "bootstrap-token-"+token[:6], types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSuiteOnAFake(t *testing.T) {
	bootstraptest.RunSuite(t, func(t *testing.T) bootstraptest.Fixture {
		return newFixture(t, fake.NewClientset(), false)
	})
}

func TestTokenKeepsNoSecret(t *testing.T) {
	client := fake.NewClientset()
	token, err := identity.CreateToken(t.Context(), client, namespace, identity.TokenOptions{Site: "site-a"})
	if err != nil {
		t.Fatal(err)
	}
	if !bootstrap.ValidToken(token) {
		t.Errorf("token %q is not a token", token)
	}
	secret, err := client.CoreV1().Secrets(namespace).Get(t.Context(), "bootstrap-token-"+token[:6], metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if secret.Type != "bootstrap.kubernetes.io/token" {
		t.Errorf("type %q", secret.Type)
	}
	for key, value := range secret.Data {
		if strings.Contains(string(value), token[7:]) || key == "token-secret" || key == "usage-bootstrap-authentication" {
			t.Errorf("%s = %q must not be in the Secret", key, value)
		}
	}
	line := identity.JoinCommand("https://host:443", token, "sha256:00", "site-a")
	if want := "edgelet join https://host:443 --token " + token + " --ca-cert-hash sha256:00 --site site-a"; line != want {
		t.Errorf("join line %q, want %q", line, want)
	}
}

func TestTokenOptions(t *testing.T) {
	for name, options := range map[string]identity.TokenOptions{
		"a name that is none":       {Site: "Site_A"},
		"replace without a site":    {Replace: true},
		"reusable for one site":     {Reusable: true, Site: "site-a"},
		"longer than a year":        {TTL: 400 * 24 * time.Hour},
		"an end that lies backward": {TTL: -time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := identity.CreateToken(t.Context(), fake.NewClientset(), namespace, options); err == nil {
				t.Error("CreateToken = nil, want an error")
			}
		})
	}
}

func TestReusableToken(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, false)
	token, err := identity.CreateToken(t.Context(), client, namespace, identity.TokenOptions{Reusable: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, site := range []string{"site-a", "site-b"} {
		if err := f.Redeem(t.Context(), token, site, "key of "+site); err != nil {
			t.Errorf("Redeem for %s: %v", site, err)
		}
		if grant, err := f.Check(t.Context(), token); err != nil || grant.UsedKey != "" {
			t.Errorf("Check = %+v, %v, want it unused", grant, err)
		}
	}
}

// Somebody else's Secret, or one that has been tampered with, is no token.
func TestSecretsThatAreNoTokens(t *testing.T) {
	for name, change := range map[string]func(*corev1.Secret){
		"another type":    func(s *corev1.Secret) { s.Type = corev1.SecretTypeOpaque },
		"another ID":      func(s *corev1.Secret) { s.Data["token-id"] = []byte("zzzzzz") },
		"another usage":   func(s *corev1.Secret) { delete(s.Data, "usage-skerry-join") },
		"without a hash":  func(s *corev1.Secret) { delete(s.Data, "token-sha256") },
		"without an end":  func(s *corev1.Secret) { delete(s.Data, "expiration") },
		"without any use": func(s *corev1.Secret) { s.Data = nil },
	} {
		t.Run(name, func(t *testing.T) {
			client := fake.NewClientset()
			f := newFixture(t, client, false)
			token := f.Token("", false, time.Hour)
			secret, err := client.CoreV1().Secrets(namespace).Get(t.Context(), "bootstrap-token-"+token[:6], metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			change(secret)
			if _, err := client.CoreV1().Secrets(namespace).Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Check(t.Context(), token); !errors.Is(err, bootstrap.TokenUnknown) && !errors.Is(err, bootstrap.TokenExpired) {
				t.Errorf("Check = %v, want it refused", err)
			}
			if err := f.Redeem(t.Context(), token, "site-a", "key"); err == nil {
				t.Error("Redeem = nil, want it refused")
			}
		})
	}
}

func TestExpiredTokensAreRemovedADayLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		f := newFixture(t, client, false)
		short, long := f.Token("", false, time.Hour), f.Token("", false, 30*24*time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Keeper.(keeper).Tokens.Run(ctx) }()
		left := func() int {
			synctest.Wait()
			tokens, err := identity.ListTokens(ctx, client, namespace)
			if err != nil {
				t.Fatal(err)
			}
			return len(tokens)
		}
		time.Sleep(24 * time.Hour)
		if _, err := f.Check(ctx, short); !errors.Is(err, bootstrap.TokenExpired) || left() != 2 {
			t.Errorf("after a day: %v, %d tokens, want it expired but there", err, left())
		}
		time.Sleep(3 * time.Hour)
		if _, err := f.Check(ctx, short); !errors.Is(err, bootstrap.TokenUnknown) || left() != 1 {
			t.Errorf("after 27 hours: %v, %d tokens, want it gone", err, left())
		}
		if _, err := f.Check(ctx, long); err != nil {
			t.Errorf("the token that is good: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestReplicasMakeOneCA(t *testing.T) {
	client := fake.NewClientset()
	var mu sync.Mutex
	pins := map[string]int{}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ca, err := identity.LoadCA(t.Context(), identity.CAConfig{Client: client, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			pins[ca.Pin()]++
		})
	}
	wg.Wait()
	if len(pins) != 1 {
		t.Errorf("%d CAs, want one", len(pins))
	}
}

func TestBrokenCAIsNotReplaced(t *testing.T) {
	client := fake.NewClientset(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "skerry-ca"},
		Data:       map[string][]byte{"tls.crt": []byte("nonsense")},
	})
	if _, err := identity.LoadCA(t.Context(), identity.CAConfig{Client: client}); err == nil || !strings.Contains(err.Error(), "skerry-ca") {
		t.Errorf("LoadCA = %v, want an error that names the Secret", err)
	}
}

// An answer of the API server that is lost changes nothing.
func TestLostAnswersOfTheAPIServer(t *testing.T) {
	client := fake.NewClientset()
	tracker := client.Tracker()
	lose := true
	client.PrependReactor("patch", "*", func(action clienttesting.Action) (bool, runtime.Object, error) {
		handled, object, err := clienttesting.ObjectReaction(tracker)(action)
		if lose && err == nil {
			return true, nil, apierrors.NewTimeoutError("lost", 1)
		}
		return handled, object, err
	})
	f := newFixture(t, client, false)
	token := f.Token("", false, time.Hour)
	if err := f.Redeem(t.Context(), token, "site-a", "key"); err != nil {
		t.Errorf("Redeem = %v, want nil as it was done", err)
	}
	if err := f.Redeem(t.Context(), token, "site-a", "other"); !errors.Is(err, bootstrap.TokenUsed) {
		t.Errorf("Redeem = %v, want %v", err, bootstrap.TokenUsed)
	}
	if err := f.Commit(t.Context(), "site-a", bootstrap.Record{}, bootstrap.Record{Serial: "1"}); err != nil {
		t.Errorf("Commit = %v", err)
	}
	if err := f.Commit(t.Context(), "site-a", bootstrap.Record{Serial: "1"}, bootstrap.Record{Serial: "2"}); err != nil {
		t.Errorf("Commit = %v, want nil as it was done", err)
	}
}

// The Lease is shared with whoever owns the site's session.
func TestCommitLeavesTheRestOfTheLease(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, false)
	leases := client.CoordinationV1().Leases(namespace)
	if err := f.Commit(t.Context(), "site-a", bootstrap.Record{}, bootstrap.Record{Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	patch := `{"metadata":{"annotations":{"other":"kept"}},"spec":{"holderIdentity":"replica-1","leaseTransitions":7}}`
	if _, err := leases.Patch(t.Context(), "site-site-a", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(t.Context(), "site-a", bootstrap.Record{Serial: "1"}, bootstrap.Record{Serial: "2"}); err != nil {
		t.Fatal(err)
	}
	lease, err := leases.Get(t.Context(), "site-site-a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if lease.Annotations["other"] != "kept" || *lease.Spec.HolderIdentity != "replica-1" || *lease.Spec.LeaseTransitions != 7 {
		t.Errorf("lease = %+v, want others' parts kept", lease)
	}
	if lease.Annotations[identity.AnnotationSerial] != "2" {
		t.Errorf("serial = %q, want 2", lease.Annotations[identity.AnnotationSerial])
	}
}

// A Lease that the owner of the session made first knows nothing of identities.
func TestCommitIntoALeaseOfOthers(t *testing.T) {
	for name, annotations := range map[string]map[string]string{
		"without annotations":           nil,
		"with an empty set":             {},
		"with another annotation":       {"other": "kept"},
		"with a revocation made before": {identity.AnnotationRevoked: "false"},
	} {
		t.Run(name, func(t *testing.T) {
			client := fake.NewClientset(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace, Name: identity.LeaseName("site-a"), Annotations: annotations,
			}})
			f := newFixture(t, client, false)
			if err := f.Commit(t.Context(), "site-a", bootstrap.Record{}, bootstrap.Record{Serial: "1"}); err != nil {
				t.Fatal(err)
			}
			if record, err := f.Lookup(t.Context(), "site-a"); err != nil || record.Serial != "1" {
				t.Errorf("Lookup = %+v, %v", record, err)
			}
		})
	}
}

func TestManualApproval(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, true)
	req := bootstraptest.NewRequest(t, "site-a")
	err := f.Approve(t.Context(), req)
	if !errors.Is(err, bootstrap.Pending) || !strings.Contains(err.Error(), "kubectl certificate approve skerry-site-a-") {
		t.Fatalf("Approve = %v, want it pending with the command to run", err)
	}
	csrs := client.CertificatesV1().CertificateSigningRequests()
	list, err := csrs.List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d requests, %v, want one", len(list.Items), err)
	}
	csr := &list.Items[0]
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Reason: "KubectlDeny", Message: "not ours",
	})
	if _, err := csrs.UpdateApproval(t.Context(), csr.Name, csr, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Approve(t.Context(), req); !errors.Is(err, bootstrap.Denied) || !strings.Contains(err.Error(), "not ours") {
		t.Errorf("Approve = %v, want it denied, and why", err)
	}
	renewal := bootstraptest.NewRequest(t, "site-a")
	renewal.Renewal = true
	if err := f.Approve(t.Context(), renewal); err != nil {
		t.Errorf("Approve of a renewal = %v, want nil: nobody may come by", err)
	}
}

// An object that somebody else made under the request's name is not used.
func TestForeignRequestObject(t *testing.T) {
	client := fake.NewClientset()
	f := newFixture(t, client, true)
	req, other := bootstraptest.NewRequest(t, "site-a"), bootstraptest.NewRequest(t, "site-a")
	if err := f.Approve(t.Context(), req); !errors.Is(err, bootstrap.Pending) {
		t.Fatal(err)
	}
	csrs := client.CertificatesV1().CertificateSigningRequests()
	list, err := csrs.List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	csr := &list.Items[0]
	csr.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: other.CSR.Raw})
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue}}
	if _, err := csrs.Update(t.Context(), csr, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Approve(t.Context(), req); err == nil {
		t.Error("Approve = nil although the object is another's")
	}
}
