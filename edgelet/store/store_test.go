package store

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

type record struct {
	Name  string            `json:"name"`
	Count int               `json:"count"`
	Extra map[string]string `json:"extra,omitempty"`
}

func testKey(b byte) []byte { return bytes.Repeat([]byte{b}, KeySize) }

func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// openAt opens a store and closes it, verified, when the test ends.
func openAt(t testing.TB, path string) *DB {
	t.Helper()
	d, err := Open(Options{Path: path, Key: testKey(1), Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Check(); err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		d.Close()
	})
	return d
}

func openTemp(t testing.TB) *DB { return openAt(t, filepath.Join(t.TempDir(), "edge.db")) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTableKeepsWhatWasPutAcrossReopening(t *testing.T) {
	for name, table := range map[string]func(*DB) *Table[record]{
		"plain":  func(d *DB) *Table[record] { return NewTable[record](d, "pods") },
		"sealed": func(d *DB) *Table[record] { return NewSealedTable[record](d, "desired/Secret") },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "edge.db")
			d := openAt(t, path)
			tab := table(d)
			if _, err := tab.Get("a"); !errors.Is(err, ErrNotFound) {
				t.Fatalf("get from an empty table: %v", err)
			}
			if all, err := tab.All(); err != nil || len(all) != 0 {
				t.Fatalf("empty table: %v, %v", all, err)
			}
			must(t, tab.Put("a", record{Name: "one", Count: 1}))
			must(t, tab.PutAll(map[string]record{"b": {Name: "two"}, "c": {Name: "three"}}, []string{"c", "none"}))
			must(t, tab.Update("a", func(r *record) error { r.Count++; return nil }))
			must(t, tab.Delete("none"))
			must(t, d.Close())

			tab = table(openAt(t, path))
			all, err := tab.All()
			must(t, err)
			if len(all) != 2 || all["a"].Count != 2 || all["b"].Name != "two" {
				t.Fatalf("after reopening: %v", all)
			}
		})
	}
}

func TestOneTransactionChangesSeveralTablesOrNone(t *testing.T) {
	d := openTemp(t)
	pods, secrets := NewTable[record](d, "pods"), NewSealedTable[record](d, "desired/Secret")
	events := NewQueue[string](d, "events", Limit{})
	change := func(fail error) error {
		return d.Update(func(tx *Tx) error {
			if _, err := events.PushTx(tx, "changed"); err != nil {
				return err
			}
			return errors.Join(pods.PutTx(tx, "p", record{Name: "p"}), secrets.PutTx(tx, "s", record{Name: "s"}), fail)
		})
	}
	refuse := errors.New("refused")
	if err := change(refuse); !errors.Is(err, refuse) {
		t.Fatal(err)
	}
	if n, _ := events.Len(); n != 0 {
		t.Errorf("%d events of a refused change", n)
	}
	if _, err := pods.Get("p"); !errors.Is(err, ErrNotFound) {
		t.Errorf("pod of a refused change: %v", err)
	}
	must(t, change(nil))
	if s, err := secrets.Get("s"); err != nil || s.Name != "s" {
		t.Errorf("secret: %v, %v", s, err)
	}
}

func TestUnchangedValuesAreNotWritten(t *testing.T) {
	d := openTemp(t)
	for name, tab := range map[string]*Table[record]{
		"plain":  NewTable[record](d, "pods"),
		"sealed": NewSealedTable[record](d, "desired/Secret"),
	} {
		r := record{Name: "x", Extra: map[string]string{"b": "2", "a": "1", "c": "3"}}
		must(t, tab.Put("k", r))
		before, image := d.Written(), readFile(t, d.path)
		for range 10 {
			must(t, tab.Put("k", r))
			must(t, tab.Delete("none"))
		}
		if d.Written() != before || !bytes.Equal(image, readFile(t, d.path)) {
			t.Errorf("%s: %d bytes were written for nothing", name, d.Written()-before)
		}
		r.Count++
		must(t, tab.Put("k", r))
		if d.Written() == before {
			t.Errorf("%s: a change was not written", name)
		}
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func TestConcurrentWritersShareCommitsAndFailAlone(t *testing.T) {
	d := openTemp(t)
	tab := NewTable[record](d, "pods")
	refuse := errors.New("refused")
	const writers, rounds = 32, 10
	var wg sync.WaitGroup
	before := d.Written()
	for w := range writers {
		wg.Go(func() {
			for i := range rounds {
				key := fmt.Sprintf("%d-%d", w, i)
				err := d.Update(func(tx *Tx) error {
					if err := tab.PutTx(tx, key, record{Count: i}); err != nil {
						return err
					}
					if w%8 == 0 {
						return refuse
					}
					return nil
				})
				if (w%8 == 0) != errors.Is(err, refuse) || w%8 != 0 && err != nil {
					t.Errorf("%s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	all, err := tab.All()
	must(t, err)
	if want := writers * 7 / 8 * rounds; len(all) != want {
		t.Errorf("%d values, want %d", len(all), want)
	}
	commits := (d.Written() - before) / (3 * pageSize)
	t.Logf("%d changes in at most %d commits", len(all), commits)
	if commits > int64(len(all)) {
		t.Errorf("changes made at once did not share commits")
	}
}

// TestWrittenCountsBytes compares the count with what the kernel saw.
func TestWrittenCountsBytes(t *testing.T) {
	d := openTemp(t)
	tab := NewTable[record](d, "pods")
	must(t, tab.Put("warm", record{}))
	count, kernel := d.Written(), writtenByProcess(t)
	for i := range 50 {
		must(t, tab.Put("k", record{Count: i + 1}))
	}
	count, kernel = d.Written()-count, writtenByProcess(t)-kernel
	if diff := count - kernel; diff < -kernel/10 || diff > kernel/10 { // the test writes, too
		t.Errorf("counted %d bytes, the kernel %d", count, kernel)
	}
	t.Logf("%d bytes a commit", count/50)
}

func writtenByProcess(t *testing.T) (n int64) {
	t.Helper()
	for line := range strings.Lines(string(readFile(t, "/proc/self/io"))) {
		if _, err := fmt.Sscanf(line, "wchar: %d", &n); err == nil {
			return n
		}
	}
	t.Fatal("no wchar in /proc/self/io")
	return 0
}

func TestSecondOpenerIsTurnedAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	d := openAt(t, path)
	start := time.Now()
	_, err := Open(Options{Path: path, Timeout: 100 * time.Millisecond})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("second open: %v", err)
	}
	if d := time.Since(start); d < 100*time.Millisecond || d > 2*time.Second {
		t.Errorf("waited %v", d)
	}
	must(t, d.Close())
	openAt(t, path)
}

func TestFileIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	must(t, openAt(t, path).Close())
	must(t, os.Chmod(path, 0o644))
	must(t, openAt(t, path).Close())
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("files left over: %v", entries)
	}
}

func TestMeta(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	d := openAt(t, path)
	if site, err := d.Meta().Site(); site != "" || err != nil {
		t.Errorf("site of a new store: %q, %v", site, err)
	}
	must(t, d.Meta().SetSite("berlin"))
	for _, step := range []struct{ raise, want uint64 }{{3, 3}, {2, 3}, {3, 3}, {9, 9}} {
		got, err := d.Meta().RaiseEpoch(step.raise)
		if err != nil || got != step.want {
			t.Errorf("raise %d: %d, %v", step.raise, got, err)
		}
	}
	must(t, d.Close())
	d = openAt(t, path)
	site, err := d.Meta().Site()
	must(t, err)
	epoch, err := d.Meta().Epoch()
	must(t, err)
	schema, err := d.Meta().Schema()
	must(t, err)
	if site != "berlin" || epoch != 9 || schema != len(migrations()) {
		t.Errorf("site %q, epoch %d, schema %d", site, epoch, schema)
	}
}

func TestMigrationsRunOnceInOrderAndNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	must(t, openAt(t, path).Close())
	var ran []int
	step := func(n int, err error) migration {
		return migration{fmt.Sprint(n), func(tx *Tx) error {
			ran = append(ran, n)
			return errors.Join(err, tx.putJSON("new", fmt.Sprint(n), n))
		}}
	}
	broken := errors.New("broken")
	if _, err := open(Options{Path: path}, append(migrations(), step(2, nil), step(3, broken))); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	d, err := open(Options{Path: path}, append(migrations(), step(2, nil), step(3, nil)))
	must(t, err)
	if fmt.Sprint(ran) != "[2 3 3]" {
		t.Errorf("ran %v", ran)
	}
	all, err := NewTable[int](d, "new").All()
	must(t, err)
	if all["2"] != 2 || all["3"] != 3 {
		t.Errorf("migrated: %v", all)
	}
	must(t, d.Close())
	image := readFile(t, path)
	_, err = Open(Options{Path: path, Key: testKey(1)})
	if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), "schema 3") {
		t.Errorf("older program: %v", err)
	}
	if !bytes.Equal(image, readFile(t, path)) {
		t.Error("the older program has changed the file")
	}
}

func TestValueAndFileSizesAreBounded(t *testing.T) {
	d, err := Open(Options{Path: filepath.Join(t.TempDir(), "edge.db"), MaxSize: 128 << 20}) // several steps of 16 MiB, by which bbolt grows a file
	must(t, err)
	defer d.Close()
	tab := NewTable[string](d, "pods")
	if err := tab.Put("k", strings.Repeat("x", MaxValue)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("large value: %v", err)
	}
	stored := 0
	for err = error(nil); err == nil && stored < 1000; stored++ {
		err = tab.Put(fmt.Sprint(stored), strings.Repeat("x", 200<<10))
	}
	if !errors.Is(err, ErrFull) || stored < 10 {
		t.Fatalf("after %d values: %v", stored, err)
	}
	t.Logf("after %d values: %v", stored, err)
	for i := range 10 {
		must(t, tab.Delete(fmt.Sprint(i)))
	}
	for i := range 5 {
		must(t, tab.Put(fmt.Sprint(i), strings.Repeat("y", 200<<10)))
	}
	must(t, d.Check())
	if size, err := d.Size(); err != nil || size > 128<<20 {
		t.Errorf("size %d, %v", size, err)
	}
}

func TestClosedStoreSaysSo(t *testing.T) {
	d := openTemp(t)
	tab := NewTable[int](d, "pods")
	must(t, d.Close())
	_, err := tab.Get("k")
	for _, err := range []error{tab.Put("k", 1), err, d.Close()} {
		if err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
	if err := tab.Put("k", 1); err == nil {
		t.Error("put into a closed store")
	}
}

func TestPanicInATransactionFailsTheStoreAndNotTheProgram(t *testing.T) {
	d, err := Open(Options{Path: filepath.Join(t.TempDir(), "edge.db")})
	must(t, err)
	tab := NewTable[int](d, "pods")
	must(t, tab.Put("k", 1))
	if err := d.Update(func(*Tx) error { panic("bug") }); !errors.Is(err, ErrCorrupt) {
		t.Errorf("update: %v", err)
	}
	select {
	case <-d.Failed():
	default:
		t.Error("not failed")
	}
	if _, err := tab.Get("k"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("get afterwards: %v", err)
	}
	must(t, d.Close())
	if v, err := NewTable[int](openAt(t, d.path), "pods").Get("k"); v != 1 || err != nil {
		t.Errorf("opened again: %v, %v", v, err)
	}
}

func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 16} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			d := openTemp(b)
			tab := NewTable[record](d, "pods")
			for i := range 100 {
				must(b, tab.Put(fmt.Sprint(i), record{Name: strings.Repeat("x", 500)}))
			}
			b.ReportAllocs()
			b.ResetTimer()
			before := d.Written()
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for i := w; i < b.N; i += writers {
						if err := tab.Put(fmt.Sprint(i%100), record{Name: strings.Repeat("y", 500), Count: i}); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(d.Written()-before)/float64(b.N), "written-B/op")
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "edge.db")
	d := openAt(b, path)
	values := map[string]record{}
	for i := range 2000 {
		values[fmt.Sprint(i)] = record{Name: strings.Repeat("x", 4000)}
	}
	must(b, NewTable[record](d, "pods").PutAll(values, nil))
	size, _ := d.Size()
	must(b, d.Close())
	for b.Loop() {
		d, err := Open(Options{Path: path, Key: testKey(1)})
		must(b, err)
		must(b, d.Close())
	}
	b.ReportMetric(float64(size), "file-B")
}
