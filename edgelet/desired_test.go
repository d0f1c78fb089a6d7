package edgelet

import (
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

// A memoryStore is an objectStore that can fail.
type memoryStore struct {
	objects map[string]edge.Object
	err     error
}

func (s *memoryStore) All() (map[string]edge.Object, error) { return maps.Clone(s.objects), nil }

func (s *memoryStore) Write(put map[string]edge.Object, remove []string) error {
	if s.err != nil {
		return s.err
	}
	maps.Copy(s.objects, put)
	for _, key := range remove {
		delete(s.objects, key)
	}
	return nil
}

// A recorder is an engine that remembers what it was told.
type recorder struct{ told []string }

func (r *recorder) Set(p *corev1.Pod) error { r.told = append(r.told, "set "+p.Name); return nil }
func (r *recorder) Remove(uid types.UID)    { r.told = append(r.told, "remove "+string(uid)) }
func (r *recorder) Changed(uid types.UID)   { r.told = append(r.told, "changed "+string(uid)) }

func (r *recorder) take() []string {
	told := r.told
	r.told = nil
	slices.Sort(told)
	return told
}

func object(t *testing.T, key edge.Key, version string, value any) edge.Object {
	t.Helper()
	o, err := edge.NewObject(key, version, value)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func podObject(t *testing.T, namespace, name string) edge.Object {
	t.Helper()
	uid := types.UID("uid-" + name)
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: uid}}
	return object(t, edge.Key{Kind: edge.KindPod, Namespace: namespace, Name: name, UID: uid}, "1", p)
}

func newSet(t *testing.T) (*desiredSet, *memoryStore, *recorder) {
	t.Helper()
	s := &memoryStore{objects: map[string]edge.Object{}}
	d, err := newDesiredSet(s, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{}
	d.start(r)
	return d, s, r
}

func TestDesiredSet(t *testing.T) {
	d, s, engine := newSet(t)
	settings := edge.Key{Kind: edge.KindConfigMap, Namespace: "a", Name: "settings"}
	token := edge.Key{Kind: edge.KindToken, Namespace: "a", Name: "t", UID: "uid-one"}
	one, two, other := podObject(t, "a", "one"), podObject(t, "a", "two"), podObject(t, "b", "other")
	for _, step := range []struct {
		name    string
		changes edge.Changes
		told    []string
	}{
		{"pods are set", edge.Changes{Upserts: []edge.Object{one, two, other}}, []string{"set one", "set other", "set two"}},
		{"a ConfigMap concerns the pods of its namespace", edge.Changes{Upserts: []edge.Object{object(t, settings, "1", corev1.ConfigMap{})}}, []string{"changed uid-one", "changed uid-two"}},
		{"a token concerns its pod", edge.Changes{Upserts: []edge.Object{object(t, token, "1-2", edge.Token{})}}, []string{"changed uid-one"}},
		{"a pod that goes is removed", edge.Changes{Removals: []edge.Key{two.Key}}, []string{"remove uid-two"}},
		{"nothing changes nothing", edge.Changes{}, nil},
		{"a removal of what is not held is harmless", edge.Changes{Removals: []edge.Key{settings, settings}}, nil},
	} {
		if err := d.Apply(t.Context(), step.changes); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if told := engine.take(); !slices.Equal(told, step.told) {
			t.Errorf("%s: the engine was told %q, want %q", step.name, told, step.told)
		}
	}
	held, err := d.Inventory(t.Context())
	if err != nil || len(held) != 3 {
		t.Errorf("Inventory = %v, %v; want two pods and a token", held, err)
	}
	t.Run("it comes back from the store", func(t *testing.T) {
		again, err := newDesiredSet(s, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		engine := &recorder{}
		again.start(engine)
		if told := engine.take(); !slices.Equal(told, []string{"set one", "set other"}) {
			t.Errorf("the engine was told %q", told)
		}
	})
}

func TestApplyIsAllOrNothing(t *testing.T) {
	d, s, engine := newSet(t)
	s.err = errors.New("disk full")
	if err := d.Apply(t.Context(), edge.Changes{Upserts: []edge.Object{podObject(t, "a", "one")}}); !errors.Is(err, s.err) {
		t.Errorf("Apply = %v", err)
	}
	if held, _ := d.Inventory(t.Context()); len(held) != 0 || engine.take() != nil {
		t.Errorf("what could not be stored is held: %v", held)
	}
}

func TestApplyRefusesKeysThatCannotBeStored(t *testing.T) {
	d, s, _ := newSet(t)
	token := edge.Key{Kind: edge.KindToken, Namespace: "a", Name: edge.TokenName("default", "https://b/c", 3600), UID: "u"}
	for name, key := range map[string]edge.Key{
		"no kind":                  {Namespace: "a", Name: "b"},
		"a slash in the kind":      {Kind: "Secret/x", Namespace: "a", Name: "b"},
		"a slash in the namespace": {Kind: edge.KindSecret, Namespace: "../a", Name: "b"},
		"a slash in the UID":       {Kind: edge.KindPod, Namespace: "a", Name: "b", UID: "../u"},
		"a name without end":       {Kind: edge.KindSecret, Namespace: "a", Name: strings.Repeat("x", 1<<20)},
	} {
		for _, changes := range []edge.Changes{{Upserts: []edge.Object{{Key: key, Version: "1"}, object(t, token, "1", edge.Token{})}}, {Removals: []edge.Key{key}}} {
			err := d.Apply(t.Context(), changes)
			if !errors.Is(err, edge.ErrInvalid) {
				t.Errorf("%s: Apply = %v, want ErrInvalid", name, err)
			} else if len(err.Error()) > 1000 {
				t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
			}
		}
	}
	if len(s.objects) != 0 {
		t.Errorf("%d objects were stored", len(s.objects))
	}
	if err := d.Apply(t.Context(), edge.Changes{Upserts: []edge.Object{object(t, token, "1", edge.Token{})}}); err != nil {
		t.Errorf("Apply of a token for an audience with slashes = %v", err)
	}
}

func TestApplyRefusesWhatIsNoPod(t *testing.T) {
	d, _, _ := newSet(t)
	wrong := podObject(t, "a", "one")
	wrong.UID = "another"
	garbage := podObject(t, "a", "two")
	garbage.Data = []byte(`{"metadata":[]}`)
	for _, o := range []edge.Object{wrong, garbage} {
		if err := d.Apply(t.Context(), edge.Changes{Upserts: []edge.Object{o}}); !errors.Is(err, edge.ErrInvalid) {
			t.Errorf("Apply(%s) = %v, want ErrInvalid", o.Key, err)
		}
	}
}

func TestObjectsAreKnownAbsentOrUnknown(t *testing.T) {
	d, _, _ := newSet(t)
	key := func(name string) edge.Key { return edge.Key{Kind: edge.KindSecret, Namespace: "a", Name: name} }
	err := d.Apply(t.Context(), edge.Changes{Upserts: []edge.Object{
		object(t, key("there"), "1", corev1.Secret{Data: map[string][]byte{"k": []byte("v")}}),
		{Key: key("absent"), Absent: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := d.Secret("a", "there"); err != nil || string(s.Data["k"]) != "v" {
		t.Errorf("there: %v, %v", s, err)
	}
	if _, err := d.Secret("a", "absent"); !errors.Is(err, edge.ErrAbsent) {
		t.Errorf("absent: %v", err)
	}
	if _, err := d.Secret("a", "else"); !errors.Is(err, edge.ErrUnknown) {
		t.Errorf("unknown: %v", err)
	}
}
