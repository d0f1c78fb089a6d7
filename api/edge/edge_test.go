package edge

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A peer is both ends' implementation, as a test scripts it.
type peer struct {
	held    []Held
	err     error
	applied []Changes
	ack     Ack
}

func (p *peer) Inventory(context.Context) ([]Held, error) { return p.held, p.err }
func (p *peer) Apply(_ context.Context, c Changes) error {
	p.applied = append(p.applied, c)
	return p.err
}
func (p *peer) Report(context.Context, Report) (Ack, error) { return p.ack, p.err }

// wire returns p as seen through the handlers and clients of this package.
func wire(t *testing.T, p *peer) (Edge, Cloud) {
	mux := http.NewServeMux()
	HandleEdge(mux, p)
	HandleCloud(mux, p)
	rt := roundTripper(func(r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		return w.Result(), nil
	})
	return NewEdgeClient(rt), NewCloudClient(rt)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestWire(t *testing.T) {
	key := Key{Kind: KindPod, Namespace: "default", Name: "web", UID: "u1"}
	object, err := NewObject(key, "7", corev1.Pod{})
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{held: []Held{{key, "7"}}, ack: Ack{Pods: map[types.UID]uint64{"u1": 3}, RetryAfter: time.Second}}
	e, c := wire(t, p)
	if held, err := e.Inventory(t.Context()); err != nil || !reflect.DeepEqual(held, p.held) {
		t.Errorf("Inventory = %v, %v", held, err)
	}
	want := Changes{Upserts: []Object{object}, Removals: []Key{key}, Complete: true}
	if err := e.Apply(t.Context(), want); err != nil || !reflect.DeepEqual(p.applied, []Changes{want}) {
		t.Errorf("Apply: %v, received %+v", err, p.applied)
	}
	if ack, err := c.Report(t.Context(), Report{Pods: []PodStatus{{UID: "u1", Seq: 3}}}); err != nil || !reflect.DeepEqual(ack, p.ack) {
		t.Errorf("Report = %+v, %v", ack, err)
	}
}

func TestErrorsCrossTheWire(t *testing.T) {
	for _, kind := range []error{ErrAbsent, ErrUnknown, ErrInvalid} {
		e, _ := wire(t, &peer{err: fmt.Errorf("apply: %w", kind)})
		if err := e.Apply(t.Context(), Changes{}); !errors.Is(err, kind) {
			t.Errorf("Apply = %v, want %v", err, kind)
		}
	}
	e, _ := wire(t, &peer{err: errors.New("disk full")})
	if err := e.Apply(t.Context(), Changes{}); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("Apply = %v, want the peer's text", err)
	}
}

func TestBodiesAreBounded(t *testing.T) {
	p := &peer{}
	e, _ := wire(t, p)
	huge := Object{Key: Key{Kind: KindSecret}, Data: []byte(`"` + strings.Repeat("x", MaxBody) + `"`)}
	if err := e.Apply(t.Context(), Changes{Upserts: []Object{huge}}); !errors.Is(err, ErrInvalid) || p.applied != nil {
		t.Errorf("Apply of more than MaxBody = %v, want ErrInvalid", err)
	}
	p.held = []Held{{Key{Name: strings.Repeat("x", MaxBody)}, ""}}
	if _, err := e.Inventory(t.Context()); err == nil {
		t.Error("an inventory of more than MaxBody was accepted")
	}
}

func TestSplit(t *testing.T) {
	object := func(size int) Object { return Object{Data: make([]byte, size)} }
	all := Changes{
		Upserts:  []Object{object(400), object(400), object(5000), object(10)},
		Removals: []Key{{Kind: KindPod}}, Complete: true,
	}
	var joined Changes
	steps := Split(all, 2000)
	for i, step := range steps {
		joined.Upserts = append(joined.Upserts, step.Upserts...)
		joined.Removals = append(joined.Removals, step.Removals...)
		if step.Complete != (i == len(steps)-1) {
			t.Errorf("step %d: Complete = %v; only the last may be", i, step.Complete)
		}
	}
	joined.Complete = true
	if len(steps) != 3 || !reflect.DeepEqual(joined, all) {
		t.Errorf("Split into %d steps, joined %+v", len(steps), joined)
	}
	if steps := Split(Changes{}, 2000); len(steps) != 0 {
		t.Errorf("nothing was split into %d steps", len(steps))
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add("Pod/default/web/u1")
	f.Add("Token/ns/sa/3600/https://x/y/u1")
	f.Add("Cluster///")
	f.Fuzz(func(t *testing.T, s string) {
		if key, err := ParseKey(s); err == nil && key.String() != s {
			t.Errorf("ParseKey(%q).String() = %q", s, key)
		}
	})
}

func FuzzParseTokenVersion(f *testing.F) {
	f.Add("1-2")
	f.Fuzz(func(t *testing.T, s string) {
		issued, expires, err := ParseTokenVersion(s)
		if err != nil {
			return
		}
		i, e, err := ParseTokenVersion(TokenVersion(issued, expires))
		if err != nil || !i.Equal(issued) || !e.Equal(expires) {
			t.Errorf("%q: %v-%v came back as %v-%v, %v", s, issued, expires, i, e, err)
		}
	})
}
