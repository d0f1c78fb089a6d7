package edgelet

import (
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/store"
)

// TestKindsOfANewerProviderAreKept: a provider one version newer may send kinds
// that this edgelet does not know; its pods must arrive all the same.
func TestKindsOfANewerProviderAreKept(t *testing.T) {
	db, err := store.Open(store.Options{Path: filepath.Join(t.TempDir(), "edge.db"), Key: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	open := func() *desiredSet {
		d, err := newDesiredSet(newObjectTables(db), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	future := edge.Object{Key: edge.Key{Kind: "Device", Namespace: "a", Name: "pump"}, Version: "1", Data: []byte("{}")}
	one := podObject(t, "a", "one")
	d := open()
	if err := d.Apply(t.Context(), edge.Changes{Upserts: []edge.Object{future, one}}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*desiredSet{d, open()} {
		if held, err := d.Inventory(t.Context()); err != nil || len(held) != 2 {
			t.Errorf("held: %v, %v; want the pod and what is not known", held, err)
		}
	}
	if err := d.Apply(t.Context(), edge.Changes{Removals: []edge.Key{future.Key}}); err != nil {
		t.Fatal(err)
	}
	if held, err := open().Inventory(t.Context()); err != nil || len(held) != 1 {
		t.Errorf("held after the removal: %v, %v; want the pod", held, err)
	}
}
