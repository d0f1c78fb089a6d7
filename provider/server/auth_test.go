package server

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func testGuard(reviews *fakeReviews) *guard {
	return newGuard(Config{Authenticator: reviews, Authorizer: reviews, ClientCAs: func() *x509.CertPool { return nil }})
}

func bearer(t *testing.T, value string) *http.Request {
	r, err := http.NewRequestWithContext(t.Context(), "GET", "/pods", nil)
	must(t, err)
	r.Header.Set("Authorization", value)
	return r
}

func TestTokensAreRememberedAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reviews := &fakeReviews{tokens: map[string]User{"good": {Name: "u"}}}
		g := testGuard(reviews)
		for _, step := range []struct {
			after    time.Duration
			token    string
			ok       bool
			reviewed int
		}{
			{0, "good", true, 1}, {tokenLife - 1, "good", true, 1}, {1, "good", true, 2},
			{0, "bad", false, 3}, {badTokenLife - 1, "bad", false, 3}, {1, "bad", false, 4},
		} {
			time.Sleep(step.after)
			user, err := g.authenticate(bearer(t, "Bearer "+step.token))
			if (err == nil) != step.ok || step.ok && user.Name != "u" || !step.ok && !errors.Is(err, ErrUnauthenticated) || reviews.reviewed != step.reviewed {
				t.Errorf("%+v: %v, %v, %d reviews", step, user, err, reviews.reviewed)
			}
		}
		reviews.failing = errors.New("no connection")
		if _, err := g.authenticate(bearer(t, "Bearer new")); err == nil || errors.Is(err, ErrUnauthenticated) {
			t.Errorf("a failed review: %v", err)
		}
		reviews.failing, reviews.tokens["new"] = nil, User{Name: "n"}
		if user, err := g.authenticate(bearer(t, "bearer new")); err != nil || user.Name != "n" {
			t.Errorf("after a failed review: %v, %v", user, err)
		}
	})
}

func TestCredentialsThatAreNotReviewed(t *testing.T) {
	reviews := &fakeReviews{tokens: map[string]User{"": {Name: "empty"}, "x": {}}}
	g := testGuard(reviews)
	for _, value := range []string{"", "Bearer", "Bearer ", "Basic dTpw", "good", "Bearer " + strings.Repeat("x", maxToken+1)} {
		if _, err := g.authenticate(bearer(t, value)); !errors.Is(err, ErrUnauthenticated) || reviews.reviewed > 0 {
			t.Errorf("%.20q: %v, %d reviews", value, err, reviews.reviewed)
		}
	}
	if _, err := g.authenticate(bearer(t, "Bearer x")); !errors.Is(err, ErrUnauthenticated) {
		t.Errorf("a user without a name: %v", err)
	}
}

func TestPermissionsAreRememberedAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reviews := &fakeReviews{allowed: map[string]bool{"u get stats": true}}
		g := testGuard(reviews)
		for _, step := range []struct {
			after time.Duration
			sub   string
			ok    bool
			asked int
		}{
			{0, "stats", true, 1}, {permissionLife - 1, "stats", true, 1}, {1, "stats", true, 2},
			{0, "proxy", false, 3}, {refusalLife - 1, "proxy", false, 3}, {1, "proxy", false, 4},
		} {
			time.Sleep(step.after)
			ok, err := g.authorize(t.Context(), User{Name: "u"}, []Attributes{{"get", step.sub, "berlin"}})
			if ok != step.ok || err != nil || len(reviews.asked) != step.asked {
				t.Errorf("%+v: %v, %v, asked %d", step, ok, err, len(reviews.asked))
			}
		}
		// Whatever differs is another question.
		asked := len(reviews.asked)
		for i, user := range []User{{Name: "u", UID: "1"}, {Name: "u", Groups: []string{"a"}}, {Name: "u", Groups: []string{"a", "b"}}, {Name: "u", Groups: []string{"a,b"}}, {Name: "u", Extra: map[string][]string{"k": {"v"}}}} {
			g.authorize(t.Context(), user, []Attributes{{"get", "stats", "berlin"}})
			if len(reviews.asked) != asked+i+1 {
				t.Errorf("%+v was not asked for", user)
			}
		}
		g.authorize(t.Context(), User{Name: "u"}, []Attributes{{"get", "stats", "oslo"}})
		if len(reviews.asked) != asked+6 {
			t.Error("another site was not asked for")
		}
		// What cannot be found out is not allowed, and not remembered.
		reviews.failing = errors.New("no connection")
		if ok, err := g.authorize(t.Context(), User{Name: "v"}, []Attributes{{"get", "stats", "berlin"}}); ok || err == nil {
			t.Errorf("a failed review: %v, %v", ok, err)
		}
		if ok, err := g.authorize(t.Context(), User{Name: "v"}, []Attributes{{"", "stats", "berlin"}}); ok || err != nil {
			t.Errorf("a method without a verb: %v, %v", ok, err)
		}
	})
}

func TestReviewsAtTheSameTimeAreOneAndOutliveWhoAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var calls atomic.Int32
		g := testGuard(&fakeReviews{})
		g.authenticator = authenticatorFunc(func(ctx context.Context, _ string) (User, error) {
			calls.Add(1)
			select {
			case <-release:
				return User{Name: "u"}, nil
			case <-ctx.Done():
				return User{}, ctx.Err()
			}
		})
		first, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := g.authenticate(bearer(t, "Bearer x").WithContext(first)); !errors.Is(err, context.Canceled) {
				t.Errorf("who left: %v", err)
			}
		})
		synctest.Wait()
		for range 10 {
			wg.Go(func() {
				if user, err := g.authenticate(bearer(t, "Bearer x")); err != nil || user.Name != "u" {
					t.Errorf("%v, %v", user, err)
				}
			})
		}
		synctest.Wait()
		leave()
		synctest.Wait()
		close(release)
		wg.Wait()
		if n := calls.Load(); n != 1 {
			t.Errorf("%d reviews", n)
		}

		// A review that hangs ends, and the number of reviews under way is bounded.
		release = make(chan struct{})
		start := time.Now()
		for i := range maxReviews + 5 {
			wg.Go(func() {
				if _, err := g.authenticate(bearer(t, fmt.Sprintf("Bearer hang-%d", i))); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("hanging: %v", err)
				}
			})
		}
		synctest.Wait()
		if n := calls.Load(); n != 1+maxReviews {
			t.Errorf("%d reviews at once", n-1)
		}
		wg.Wait()
		if d := time.Since(start); d != reviewTimeout {
			t.Errorf("took %v", d)
		}
	})
}

type authenticatorFunc func(context.Context, string) (User, error)

func (f authenticatorFunc) Authenticate(ctx context.Context, token string) (User, error) {
	return f(ctx, token)
}

func TestFailedReviewsAreNotForbiddenButUnavailable(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	f.reviews.failing = errors.New("dial tcp 10.0.0.1:443: secret address")
	for _, who := range []string{"t-admin", apiServer} {
		_, _, resp := f.upgrade(who, "GET", "berlin", "/pods", "")
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 503 || strings.Contains(string(body), "secret") {
			t.Errorf("%s: %d %s", who, resp.StatusCode, body)
		}
	}
}

func TestCacheIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache[int, int](100)
		for i := range 1000 {
			c.put(i, i, time.Minute)
			if len(c.entries) > 100 {
				t.Fatalf("%d entries", len(c.entries))
			}
			if v, ok := c.get(i); !ok || v != i {
				t.Fatalf("what was just put: %d, %v", v, ok)
			}
		}
		time.Sleep(time.Minute)
		c.put(-1, 0, time.Hour)
		for i := range 99 {
			c.put(i, i, time.Minute)
		}
		if _, ok := c.get(-1); !ok {
			t.Error("made room although others had expired")
		}
	})
}

func TestReviewsSayWhatAKubeletSays(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview)
		switch review.Spec.Token {
		case "good":
			review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: authenticationv1.UserInfo{Username: "u", UID: "1", Groups: []string{"g"}, Extra: map[string]authenticationv1.ExtraValue{"k": {"v"}}}}
		case "error":
			return true, nil, errors.New("no connection")
		}
		return true, review, nil
	})
	var asked authorizationv1.SubjectAccessReviewSpec
	answer := authorizationv1.SubjectAccessReviewStatus{Allowed: true}
	client.PrependReactor("create", "subjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authorizationv1.SubjectAccessReview)
		asked = review.Spec
		review.Status = answer
		return true, review, nil
	})
	r := Reviews{Client: client}
	user, err := r.Authenticate(t.Context(), "good")
	if err != nil || fmt.Sprint(user) != "{u 1 [g] map[k:[v]]}" {
		t.Errorf("%v, %v", user, err)
	}
	if _, err := r.Authenticate(t.Context(), "bad"); !errors.Is(err, ErrUnauthenticated) {
		t.Errorf("bad token: %v", err)
	}
	if _, err := r.Authenticate(t.Context(), "error"); err == nil || errors.Is(err, ErrUnauthenticated) {
		t.Errorf("failed review: %v", err)
	}
	ok, err := r.Authorize(t.Context(), user, Attributes{"create", "proxy", "berlin"})
	want := authorizationv1.ResourceAttributes{Verb: "create", Version: "v1", Resource: "nodes", Subresource: "proxy", Name: "berlin"}
	if !ok || err != nil || asked.ResourceAttributes == nil || *asked.ResourceAttributes != want || asked.User != "u" || asked.UID != "1" || asked.Groups[0] != "g" || asked.Extra["k"][0] != "v" {
		t.Errorf("%v, %v: %+v", ok, err, asked)
	}
	answer.Denied = true
	if ok, err := r.Authorize(t.Context(), user, Attributes{"create", "proxy", "berlin"}); ok || err != nil {
		t.Errorf("allowed and denied: %v, %v", ok, err)
	}
}

func TestClientAuthorityFollowsTheCluster(t *testing.T) {
	one, two := newAuthority(t), newAuthority(t)
	config := func(text string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: authenticationNamespace, Name: authenticationConfig}, Data: map[string]string{clientCAKey: text}}
	}
	encode := func(a *authority) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
	}
	client := fake.NewClientset(config(encode(one)))
	c := NewClientCA(client, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if c.Pool() != nil {
		t.Error("an authority before it can be known")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	becomes := func(want *x509.CertPool) {
		t.Helper()
		for range 500 {
			if c.Pool() != nil && c.Pool().Equal(want) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatal("the authority did not change")
	}
	becomes(one.pool())
	configs := client.CoreV1().ConfigMaps(authenticationNamespace)
	_, err := configs.Update(t.Context(), config("rubbish"), metav1.UpdateOptions{})
	must(t, err)
	both := one.pool()
	both.AddCert(two.cert)
	_, err = configs.Update(t.Context(), config(encode(one)+encode(two)), metav1.UpdateOptions{})
	must(t, err)
	becomes(both)
	must(t, configs.Delete(t.Context(), authenticationConfig, metav1.DeleteOptions{}))
	stop()
	must(t, <-done)
	if !c.Pool().Equal(both) {
		t.Error("forgotten when the ConfigMap was deleted")
	}
}
