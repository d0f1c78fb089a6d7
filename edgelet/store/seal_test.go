package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestSealedValuesAreNeverInTheFileInClear(t *testing.T) {
	const canary = "c4n4ry-of-a-secret"
	d := openTemp(t)
	tab := NewSealedTable[string](d, "desired/Secret")
	found := func() bool { return bytes.Contains(readFile(t, d.path), []byte(canary)) }
	for i := range 20 {
		must(t, tab.Put("ns/name", canary+strings.Repeat("x", i*300)))
		if found() {
			t.Fatal("in the file while it is stored")
		}
	}
	must(t, tab.Delete("ns/name"))
	if found() {
		t.Error("in the file after it was deleted")
	}
	must(t, NewTable[string](d, "plain").Put("k", canary))
	if !found() {
		t.Error("this test cannot find what is there")
	}
}

func TestWrongKeyLocksSealedTablesOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	d := openAt(t, path)
	must(t, NewSealedTable[string](d, "s").Put("k", "secret"))
	must(t, NewTable[string](d, "p").Put("k", "plain"))
	must(t, d.Close())
	for name, key := range map[string][]byte{"wrong key": testKey(2), "no key": nil} {
		d, err := Open(Options{Path: path, Key: key})
		must(t, err)
		tab := NewSealedTable[string](d, "s")
		_, errGet := tab.Get("k")
		_, errAll := tab.All()
		for _, err := range []error{errGet, errAll, tab.Put("k", "other"), tab.Put("new", "other")} {
			if !errors.Is(err, ErrKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if v, err := NewTable[string](d, "p").Get("k"); v != "plain" || err != nil {
			t.Errorf("%s: plain table: %q, %v", name, v, err)
		}
		if d.Fresh() || len(d.Damage()) > 0 {
			t.Errorf("%s was taken for damage: %v", name, d.Damage())
		}
		must(t, d.Close())
	}
	if _, err := Open(Options{Path: path, Key: []byte("short")}); !errors.Is(err, ErrKey) {
		t.Errorf("short key: %v", err)
	}
	d = openAt(t, path)
	if v, err := NewSealedTable[string](d, "s").Get("k"); v != "secret" || err != nil {
		t.Errorf("right key again: %q, %v", v, err)
	}
}

func TestResealBeginsAnewWithAnotherKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	d := openAt(t, path)
	must(t, NewSealedTable[string](d, "s").Put("k", "secret"))
	must(t, NewTable[string](d, "p").Put("k", "plain"))
	must(t, d.Close())
	d, err := Open(Options{Path: path, Key: testKey(2)})
	must(t, err)
	must(t, d.Reseal(testKey(2)))
	if len(d.Damage()) != 1 {
		t.Errorf("damage: %v", d.Damage())
	}
	tab := NewSealedTable[string](d, "s")
	if _, err := tab.Get("k"); !errors.Is(err, ErrNotFound) {
		t.Errorf("old value: %v", err)
	}
	must(t, tab.Put("k", "new"))
	must(t, d.Close())
	d, err = Open(Options{Path: path, Key: testKey(2)})
	must(t, err)
	defer d.Close()
	if v, err := NewSealedTable[string](d, "s").Get("k"); v != "new" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	if v, err := NewTable[string](d, "p").Get("k"); v != "plain" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
}

func TestSealedValueIsBoundToItsPlace(t *testing.T) {
	d := openTemp(t)
	tab, other := NewSealedTable[string](d, "s"), NewSealedTable[string](d, "other")
	must(t, tab.Put("a", "secret of a"))
	// Move it, with a checksum that is right for the new place.
	must(t, d.Update(func(tx *Tx) error {
		_, content, err := tx.get(tab.bucket, "a")
		if err != nil {
			return err
		}
		return errors.Join(tx.put(tab.bucket, "b", kindSealed, content), tx.put(other.bucket, "a", kindSealed, content))
	}))
	for name, get := range map[string]func() (string, error){
		"another key":   func() (string, error) { return tab.Get("b") },
		"another table": func() (string, error) { return other.Get("a") },
	} {
		if v, err := get(); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %q, %v", name, v, err)
		}
	}
	if _, err := NewTable[string](d, tab.bucket).Get("a"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read as a plain table: %v", err)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	keys := make([][]byte, 16)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			key, err := LoadKey(path)
			if err != nil {
				t.Error(err)
			}
			keys[i] = key
		})
	}
	wg.Wait()
	for _, key := range keys {
		if len(key) != KeySize || !bytes.Equal(key, keys[0]) {
			t.Fatal("callers at the same time got different keys")
		}
	}
	if bytes.Equal(keys[0], make([]byte, KeySize)) {
		t.Error("the key is not random")
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	info, err := os.Stat(path)
	must(t, err)
	if len(entries) != 1 || info.Mode().Perm() != 0o600 {
		t.Errorf("files %v, mode %v", entries, info.Mode())
	}

	must(t, os.Chmod(path, 0o640))
	if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), "0600") {
		t.Errorf("file that others may read: %v", err)
	}
	for name, content := range map[string][]byte{"empty": nil, "short": make([]byte, 31), "long": make([]byte, 33)} {
		must(t, os.WriteFile(path, content, 0o600))
		must(t, os.Chmod(path, 0o600))
		if _, err := LoadKey(path); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := LoadKey(filepath.Join(t.TempDir(), "none", "key")); err == nil {
		t.Error("key in a directory that is not there")
	}
}
