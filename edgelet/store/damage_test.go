package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// The content of the sample: whatever happens to the file, nothing else may be read.
func sampleValue(key string, n int) record {
	return record{Name: key, Count: n, Extra: map[string]string{"pad": strings.Repeat("p", n%700)}}
}

// sample makes a store with tables of one page and of many, a sealed one and a queue,
// and returns the image of its file.
func sample(t testing.TB) []byte {
	t.Helper()
	d := openTemp(t)
	for n := range 150 {
		key := fmt.Sprintf("ns/pod-%03d/uid", n)
		must(t, NewTable[record](d, "desired/Pod").Put(key, sampleValue(key, n)))
	}
	for n := range 3 {
		key := fmt.Sprint(n)
		must(t, NewTable[record](d, "pods").Put(key, sampleValue(key, n)))
		must(t, NewSealedTable[record](d, "desired/Secret").Put(key, sampleValue(key, n)))
		_, err := NewQueue[record](d, "events", Limit{}).Push(sampleValue(key, n))
		must(t, err)
	}
	must(t, NewTable[record](d, "large").Put("large", record{Name: "large", Extra: map[string]string{"pad": strings.Repeat("p", 20_000)}}))
	must(t, d.Close())
	return readFile(t, d.path)
}

// surviving opens the image and reports how many of the sample's values it holds. It
// fails the test if one of them was never put.
func surviving(t testing.TB, image []byte) (d *DB, values int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "edge.db")
	must(t, os.WriteFile(path, image, 0o600))
	d, err := Open(Options{Path: path, Key: testKey(1)})
	must(t, err)
	defer d.Close()
	for name, tab := range map[string]*Table[record]{
		"desired": NewTable[record](d, "desired/Pod"), "pods": NewTable[record](d, "pods"), "sealed": NewSealedTable[record](d, "desired/Secret"),
	} {
		all, err := tab.All()
		must(t, err)
		for key, v := range all {
			if v.Name != key || len(v.Extra["pad"]) != v.Count%700 {
				t.Errorf("%s/%q reads %+v, which was never put", name, key, v)
			}
			values++
		}
		must(t, tab.Put("new", sampleValue("new", 1)))
	}
	q := NewQueue[record](d, "events", Limit{})
	items, err := q.Peek(100)
	must(t, err)
	if n, err := q.Len(); err != nil || n != len(items) {
		t.Errorf("queue of %d items has length %d, %v", len(items), n, err)
	}
	_, err = q.Push(record{Name: "new"})
	must(t, err)
	must(t, d.Check())
	return d, values + len(items)
}

const sampleSize = 150 + 3 + 3 + 3

func TestWholeFileSurvives(t *testing.T) {
	d, n := surviving(t, sample(t))
	if n != sampleSize || d.Fresh() || len(d.Damage()) != 0 {
		t.Errorf("%d values, fresh %v, damage %v", n, d.Fresh(), d.Damage())
	}
}

func TestTruncatedFileIsSetAside(t *testing.T) {
	image := sample(t)
	for _, size := range []int{0, 1, 100, 4095, 4096, 4200, 8192, 8200, 12288, 20000, len(image) / 2} {
		d, n := surviving(t, image[:size])
		if !d.Fresh() || n != 0 || len(d.Damage()) == 0 {
			t.Errorf("at %d bytes: %d values, fresh %v, damage %v", size, n, d.Fresh(), d.Damage())
		}
		aside, err := filepath.Glob(d.path + ".corrupt-*")
		must(t, err)
		if len(aside) != 1 || !bytes.Equal(readFile(t, aside[0]), image[:size]) {
			t.Errorf("at %d bytes: set aside: %v", size, aside)
		}
	}
}

// TestFlippedBitsAreFoundOrHarmless flips each byte of the file, verifies, and opens
// some of those that bbolt would be trusted with.
func TestFlippedBitsAreFoundOrHarmless(t *testing.T) {
	image := sample(t)
	pristine, err := verify(bytes.NewReader(image), int64(len(image)))
	must(t, err)
	rng := rand.New(rand.NewPCG(1, 2))
	whole, damaged, refused, opened := 0, 0, 0, 0
	for at := 0; at < len(image); at += 1 + rng.IntN(15) {
		bit := byte(1) << rng.IntN(8)
		image[at] ^= bit
		found, err := verify(bytes.NewReader(image), int64(len(image)))
		open := false
		switch {
		case err != nil && !errors.Is(err, ErrCorrupt):
			t.Fatal(err)
		case err != nil || found.bad >= 0:
			refused++
			open = rng.IntN(50) == 0
		case len(found.damaged) > 0:
			damaged++
			open = rng.IntN(50) == 0
		default:
			whole++
			open = rng.IntN(500) == 0
		}
		if err == nil && found.bad < 0 && found.values != pristine.values {
			t.Errorf("byte %d, bit %08b: %d of %d values are left, unnoticed", at, bit, found.values, pristine.values)
		}
		if open {
			opened++
			surviving(t, image)
		}
		image[at] ^= bit
	}
	t.Logf("of %d bytes: %d harmless, %d values dropped, %d refused; %d opened", len(image), whole, damaged, refused, opened)
	if damaged < 1000 || refused < 200 {
		t.Error("flipped bits were not found")
	}
}

func TestOverwrittenPagesNeverPanic(t *testing.T) {
	image := sample(t)
	for seed := range 150 {
		rng := rand.New(rand.NewPCG(uint64(seed), 3))
		broken := bytes.Clone(image)
		for range 1 + rng.IntN(3) {
			to, from := rng.IntN(len(image)/pageSize)*pageSize, rng.IntN(len(image)/pageSize)*pageSize
			switch rng.IntN(3) {
			case 0: // zeros, as after a power cut
				clear(broken[to : to+pageSize])
			case 1: // another page
				copy(broken[to:to+pageSize], image[from:])
			case 2: // half of it written
				copy(broken[to:to+512*(1+rng.IntN(7))], image[from:])
			}
		}
		surviving(t, broken)
	}
}

// TestLostLastCommitGoesBackByOne is what a disk does that acknowledges a flush and
// then loses pages of data, but not the meta page.
func TestLostLastCommitGoesBackByOne(t *testing.T) {
	d := openTemp(t)
	tab := NewTable[string](d, "pods")
	pad := strings.Repeat("x", 2000) // too large for the root page
	for _, v := range []string{"first" + pad, "second" + pad} {
		must(t, tab.PutAll(map[string]string{"a": v, "b": v, "c": v}, nil))
	}
	before := readFile(t, d.path)
	must(t, tab.Put("a", "third"+pad))
	must(t, d.Close())
	image := readFile(t, d.path)
	copy(image[2*pageSize:], before[2*pageSize:]) // all but the meta pages

	path := filepath.Join(t.TempDir(), "edge.db")
	must(t, os.WriteFile(path, image, 0o600))
	d = openAt(t, path)
	v, err := NewTable[string](d, "pods").Get("a")
	must(t, d.Check()) // the meta page is written again
	if err != nil || !strings.HasPrefix(v, "second") || d.Fresh() || len(d.Damage()) != 1 {
		t.Errorf("%.10q, %v, fresh %v, damage %v", v, err, d.Fresh(), d.Damage())
	}
}

func TestOnlyTheNewestCorruptFilesAreKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	for i := range 5 {
		must(t, os.WriteFile(path, []byte(fmt.Sprint("garbage ", i)), 0o600))
		d, err := Open(Options{Path: path})
		must(t, err)
		must(t, d.Close())
	}
	aside, err := filepath.Glob(path + ".corrupt-*")
	must(t, err)
	if len(aside) != keptAside || string(readFile(t, aside[1])) != "garbage 4" {
		t.Errorf("kept %v", aside)
	}
}

func TestStoreThatCannotBeMadeIsAnError(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, "link")))
	for name, path := range map[string]string{
		"no directory": filepath.Join(dir, "none", "edge.db"), "a directory": dir, "a symlink": filepath.Join(dir, "link"),
	} {
		if d, err := Open(Options{Path: path}); err == nil {
			d.Close()
			t.Errorf("%s: opened", name)
		}
	}
}

// TestFileThatShrinksWhileOpenIsAnError: the memory map then has pages that fault.
func TestFileThatShrinksWhileOpenIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	must(t, os.WriteFile(path, sample(t), 0o600))
	d, err := Open(Options{Path: path, Key: testKey(1)})
	must(t, err)
	must(t, os.Truncate(path, 0))
	tab := NewTable[record](d, "desired/Pod")
	if _, err := tab.All(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read: %v", err)
	}
	if err := tab.Put("k", record{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("write: %v", err)
	}
	must(t, d.Close())
	if d := openAt(t, path); !d.Fresh() {
		t.Error("an empty file was taken for a store")
	}
}

// TestHostileFilesAreVerifiedInBoundedSpace: pages that refer to themselves or claim
// to be huge.
func TestHostileFilesAreVerifiedInBoundedSpace(t *testing.T) {
	le := binary.LittleEndian
	for name, change := range map[string]func(page []byte){
		"a branch that is its own child": func(p []byte) { copy(p[pageHeader+8:], p[:8]) },
		"two children that are one page": func(p []byte) { copy(p[pageHeader+elementSize+8:][:8], p[pageHeader+8:]) },
		"a page of 16 TiB":               func(p []byte) { le.PutUint32(p[12:], 1<<32-1) },
		"65535 elements":                 func(p []byte) { le.PutUint16(p[10:], 1<<16-1) },
		"an element beyond the page":     func(p []byte) { le.PutUint32(p[pageHeader:], 1<<31) },
		"a key of 4 GiB":                 func(p []byte) { le.PutUint32(p[pageHeader+4:], 1<<32-1) },
		"a child outside of the file":    func(p []byte) { le.PutUint64(p[pageHeader+8:], 1<<63) },
		"no elements":                    func(p []byte) { le.PutUint16(p[10:], 0) },
	} {
		image := sample(t)
		for at := 2 * pageSize; at < len(image); at += pageSize { // free pages too
			if page := image[at : at+pageSize]; le.Uint16(page[8:]) == flagBranch {
				change(page)
			}
		}
		found, err := verify(bytes.NewReader(image), int64(len(image)))
		if err == nil && found.bad < 0 {
			t.Errorf("%s: not found", name)
		}
		surviving(t, image)
	}
}

// TestFailedWritesLoseNothing limits the size of files, which is what a full disk is
// to a program, in a process of its own.
func TestFailedWritesLoseNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	out := child(t, "full-disk", path)
	if !strings.Contains(out, "failed as it should") {
		t.Fatalf("child: %s", out)
	}
	d := openAt(t, path)
	all, err := NewTable[record](d, "pods").All()
	must(t, err)
	if want := strings.Count(out, "acked"); len(all) != want || want < 20 || len(d.Damage()) != 0 {
		t.Errorf("%d values, %d were acknowledged, damage %v", len(all), want, d.Damage())
	}
}

func fullDisk(path string) error {
	d, err := Open(Options{Path: path, Key: testKey(1)})
	if err != nil {
		return err
	}
	defer d.Close()
	tab := NewTable[record](d, "pods")
	put := func(n int) error {
		if err := tab.Put(fmt.Sprint(n), record{Name: strings.Repeat("x", 3000)}); err != nil {
			return err
		}
		fmt.Println("acked", n)
		return nil
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	n := 0
	for ; n < 10; n++ {
		if err := put(n); err != nil {
			return err
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 64 << 10, Max: old.Max}); err != nil {
		return err
	}
	for err = error(nil); err == nil && n < 100; n++ {
		err = put(n)
	}
	if !errors.Is(err, unix.EFBIG) && (err == nil || !strings.Contains(err.Error(), "file too large")) {
		return fmt.Errorf("with a full disk: %w", err)
	}
	if all, err := tab.All(); err != nil || len(all) != n-1 {
		return fmt.Errorf("read with a full disk: %d of %d, %w", len(all), n-1, err)
	}
	fmt.Println("failed as it should:", err)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	for end := n + 10; n < end; n++ {
		if err := put(n); err != nil {
			return fmt.Errorf("with room again: %w", err)
		}
	}
	return d.Check()
}

// TestFilesThatOtherToolsRewroteAreRead: those have a list of free pages, and perhaps
// pages of another size.
func TestFilesThatOtherToolsRewroteAreRead(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source.db")
	must(t, os.WriteFile(source, sample(t), 0o600))
	src, err := bbolt.Open(source, 0o600, nil)
	must(t, err)
	defer src.Close()
	for _, size := range []int{4 << 10, 16 << 10, 64 << 10} {
		path := filepath.Join(dir, fmt.Sprint(size))
		dst, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: size})
		must(t, err)
		must(t, bbolt.Compact(dst, src, 1<<20))
		must(t, dst.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("large")) })) // frees pages
		must(t, dst.Close())
		image := readFile(t, path)
		if d, n := surviving(t, image); n != sampleSize || len(d.Damage()) != 0 {
			t.Errorf("pages of %d bytes: %d values, damage %v", size, n, d.Damage())
		}
		if size == 4<<10 {
			continue
		}
		clear(image[:pageHeader+metaSize]) // the second meta page is found without the first
		if d, n := surviving(t, image); n < sampleSize || d.Fresh() || len(d.Damage()) == 0 {
			t.Errorf("pages of %d bytes without the first: %d values, damage %v", size, n, d.Damage())
		}
	}
}
