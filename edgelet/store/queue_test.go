package store

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func TestQueueKeepsOrderAndAcknowledges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	d := openAt(t, path)
	q := NewQueue[string](d, "events", Limit{})
	if items, err := q.Peek(10); err != nil || len(items) != 0 {
		t.Fatalf("empty queue: %v, %v", items, err)
	}
	var seqs []uint64
	for _, v := range []string{"a", "b", "c", "d"} {
		seq, err := q.Push(v)
		must(t, err)
		seqs = append(seqs, seq)
	}
	must(t, q.Ack(seqs[1]))
	must(t, q.Ack(seqs[0])) // late, without effect
	must(t, d.Close())

	q = NewQueue[string](openAt(t, path), "events", Limit{})
	items, err := q.Peek(1)
	must(t, err)
	if len(items) != 1 || items[0] != (Item[string]{seqs[2], "c"}) {
		t.Fatalf("oldest after reopening: %v", items)
	}
	items, err = q.Peek(10)
	must(t, err)
	if n, _ := q.Len(); len(items) != 2 || n != 2 {
		t.Fatalf("%d items, length %d", len(items), n)
	}
	before := q.db.Written()
	must(t, q.Ack(seqs[1]))
	if q.db.Written() != before {
		t.Error("acknowledging nothing was written")
	}
	must(t, q.Ack(seqs[3]+100))
	if n, _ := q.Len(); n != 0 {
		t.Errorf("length %d after all were acknowledged", n)
	}
}

func TestSequenceNumbersNeverRepeat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	last := uint64(0)
	for _, clock := range []uint64{1000, 5, 5, 2000, 0} { // floors, as clocks give them
		d := openAt(t, path)
		d.floor = clock
		q := NewQueue[int](d, "events", Limit{Items: 3})
		for i := range 5 {
			seq, err := q.Push(i)
			must(t, err)
			if seq <= last || seq < clock {
				t.Fatalf("number %d after %d, floor %d", seq, last, clock)
			}
			last = seq
		}
		must(t, q.Ack(last))
		must(t, d.Close())
	}
}

func TestFullQueueDropsTheOldestAndCountsThem(t *testing.T) {
	d := openTemp(t)
	for name, limit := range map[string]Limit{
		"by items": {Items: 3},
		"by bytes": {Bytes: 3 * 102}, // quotes are encoded too
	} {
		q := NewQueue[string](d, name, limit)
		for i := range 10 {
			_, err := q.Push(strings.Repeat(string(rune('0'+i)), 100))
			must(t, err)
		}
		items, err := q.Peek(10)
		must(t, err)
		dropped, err := q.Dropped()
		must(t, err)
		if len(items) != 3 || items[0].Value[0] != '7' || dropped != 7 {
			t.Errorf("%s: %d items, %d dropped", name, len(items), dropped)
		}
	}
	if _, err := NewQueue[string](d, "small", Limit{Bytes: 10}).Push("more than ten"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("item larger than the queue: %v", err)
	}
}

func TestSeveralItemsArePushedAsOneChange(t *testing.T) {
	d := openTemp(t)
	q := NewQueue[string](d, "events", Limit{Items: 5, Bytes: 100})
	first, err := q.PushAll([]string{"a", "b", "c", "d"})
	must(t, err)
	if _, err := q.PushAll([]string{"e", strings.Repeat("x", 200)}); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	if _, err := q.PushAll(nil); err != nil {
		t.Fatal(err)
	}
	second, err := q.PushAll([]string{"e", "f"})
	must(t, err)
	items, err := q.Peek(10)
	must(t, err)
	if second != first+4 || len(items) != 5 || items[0] != (Item[string]{first + 1, "b"}) || items[4] != (Item[string]{first + 5, "f"}) {
		t.Errorf("first %d, second %d, items %v", first, second, items)
	}
}

func TestItemsOfAnotherTypeDoNotBlockTheQueue(t *testing.T) {
	d := openTemp(t)
	_, err := NewQueue[string](d, "events", Limit{}).Push("not a number")
	must(t, err)
	q := NewQueue[int](d, "events", Limit{})
	seq, err := q.Push(7)
	must(t, err)
	items, err := q.Peek(1)
	if err != nil || len(items) != 1 || items[0].Value != 7 {
		t.Fatalf("%v, %v", items, err)
	}
	must(t, q.Ack(seq))
	if n, _ := q.Len(); n != 0 {
		t.Errorf("length %d", n)
	}
}
