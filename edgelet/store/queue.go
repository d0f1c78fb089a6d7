package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
)

// A Queue is a bounded, durable first-in first-out queue. Items have sequence numbers
// that grow and never repeat; they may have gaps. When the queue is full the oldest
// items make room for the new one and are counted.
type Queue[T any] struct {
	db     *DB
	bucket string
	limit  Limit
}

// A Limit bounds a queue.
type Limit struct {
	Items int   // default 10,000
	Bytes int64 // of the encoded items; default 4 MiB
}

// An Item is what a queue holds.
type Item[T any] struct {
	Seq   uint64
	Value T
}

// counters are the state of a queue. They lie after the items, so that pushing changes
// one page and not two.
type counters struct {
	Next    uint64 `json:"next"` // sequence number of the next item, at least
	Items   int    `json:"items"`
	Bytes   int64  `json:"bytes"`
	Dropped uint64 `json:"dropped"`
}

// NewQueue returns the queue of that name. It makes nothing in the file.
func NewQueue[T any](d *DB, bucket string, limit Limit) *Queue[T] {
	if limit.Items == 0 {
		limit.Items = 10_000
	}
	if limit.Bytes == 0 {
		limit.Bytes = 4 << 20
	}
	return &Queue[T]{d, bucket, limit}
}

// Push appends v and returns its sequence number. It is on disk when Push returns nil.
func (q *Queue[T]) Push(v T) (seq uint64, err error) { return q.PushAll([]T{v}) }

// PushAll appends several items as one change, and returns the sequence number of the
// first; the others follow it without gaps.
func (q *Queue[T]) PushAll(vs []T) (first uint64, err error) {
	err = q.db.Update(func(tx *Tx) error {
		first, err = q.PushTx(tx, vs...)
		return err
	})
	return first, err
}

// PushTx is PushAll within tx.
func (q *Queue[T]) PushTx(tx *Tx, vs ...T) (first uint64, err error) {
	if err := tx.hasRoom(); err != nil {
		return 0, fmt.Errorf("%s: %w", q.bucket, err)
	}
	c, err := q.counters(tx)
	if err != nil {
		return 0, err
	}
	first = max(c.Next, tx.db.floor)
	c.Next = first
	for _, v := range vs {
		if err := q.append(tx, &c, v); err != nil {
			return 0, err
		}
	}
	if len(vs) == 0 {
		return first, nil
	}
	return first, tx.putJSON(q.bucket, countersKey, c)
}

// append adds an item with the number c.Next, and makes room for it first.
func (q *Queue[T]) append(tx *Tx, c *counters, v T) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: encode: %w", q.bucket, err)
	}
	size := int64(len(text))
	if size > q.limit.Bytes || size > MaxValue {
		return fmt.Errorf("%s: %w: %d bytes", q.bucket, ErrTooLarge, size)
	}
	for c.Items > 0 && (c.Items >= q.limit.Items || c.Bytes+size > q.limit.Bytes) {
		if err := q.removeOldest(tx, c); err != nil {
			return err
		}
		c.Dropped++
	}
	if err := tx.put(q.bucket, seqKey(c.Next), kindJSON, text); err != nil {
		return err
	}
	c.Next, c.Items, c.Bytes = c.Next+1, c.Items+1, c.Bytes+size
	return nil
}

// Peek returns the oldest items, at most n, and leaves them in the queue. Items that
// do not decode are left out, and logged; acknowledging a later one removes them.
func (q *Queue[T]) Peek(n int) ([]Item[T], error) {
	var items []Item[T]
	err := q.db.View(func(tx *Tx) error {
		items = nil
		return q.each(tx, func(seq uint64, text []byte) bool {
			if len(items) >= n {
				return false
			}
			item := Item[T]{Seq: seq}
			if err := json.Unmarshal(text, &item.Value); err != nil {
				q.db.log.Error("queue item does not decode", "queue", q.bucket, "seq", seq, "err", err)
				return true
			}
			items = append(items, item)
			return true
		})
	})
	return items, err
}

// Ack removes all items up to and including seq.
func (q *Queue[T]) Ack(seq uint64) error {
	return q.db.Update(func(tx *Tx) error { return q.AckTx(tx, seq) })
}

// AckTx is Ack within tx.
func (q *Queue[T]) AckTx(tx *Tx, seq uint64) error {
	c, err := q.counters(tx)
	if err != nil {
		return err
	}
	before := c.Items
	for c.Items > 0 {
		oldest, _, ok := q.oldest(tx)
		if !ok || oldest > seq {
			break
		}
		if err := q.removeOldest(tx, &c); err != nil {
			return err
		}
	}
	if c.Items == before {
		return nil
	}
	return tx.putJSON(q.bucket, countersKey, c)
}

// Len is the number of items.
func (q *Queue[T]) Len() (int, error) {
	c, err := q.stored()
	return c.Items, err
}

// Dropped is how many items were dropped because the queue was full, since the file
// was begun.
func (q *Queue[T]) Dropped() (uint64, error) {
	c, err := q.stored()
	return c.Dropped, err
}

func (q *Queue[T]) stored() (c counters, err error) {
	err = q.db.View(func(tx *Tx) error {
		c, err = q.counters(tx)
		return err
	})
	return c, err
}

// counters returns the queue's state.
func (q *Queue[T]) counters(tx *Tx) (c counters, err error) {
	_, content, err := tx.get(q.bucket, countersKey)
	if errors.Is(err, ErrNotFound) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(content, &c); err != nil {
		return c, fmt.Errorf("%s: counters: %w", q.bucket, err)
	}
	return c, nil
}

// recount makes the counters of a queue right after items were dropped as damaged, or
// the counters themselves.
func recount(tx *Tx, bucket string) error {
	q := Queue[struct{}]{tx.db, bucket, Limit{}}
	c, err := q.counters(tx)
	if err != nil {
		return err
	}
	found := counters{Next: c.Next, Dropped: c.Dropped}
	err = q.each(tx, func(seq uint64, text []byte) bool {
		found.Next, found.Items, found.Bytes = max(found.Next, seq+1), found.Items+1, found.Bytes+int64(len(text))
		return true
	})
	if err != nil || found == c {
		return err
	}
	return tx.putJSON(bucket, countersKey, found)
}

// removeOldest removes the oldest item and takes it off c.
func (q *Queue[T]) removeOldest(tx *Tx, c *counters) error {
	seq, size, ok := q.oldest(tx)
	if !ok {
		return fmt.Errorf("%s: %w", q.bucket, corruptf("%d items are missing", c.Items))
	}
	c.Items, c.Bytes = c.Items-1, c.Bytes-size
	return tx.delete(q.bucket, seqKey(seq))
}

// oldest returns number and size of the first item.
func (q *Queue[T]) oldest(tx *Tx) (seq uint64, size int64, ok bool) {
	b := tx.tx.Bucket([]byte(q.bucket))
	if b == nil {
		return 0, 0, false
	}
	k, v := b.Cursor().First()
	seq, ok = parseSeq(k)
	return seq, int64(len(v) - valueHeader), ok
}

// each calls fn with the items in order until it returns false.
func (q *Queue[T]) each(tx *Tx, fn func(seq uint64, text []byte) bool) error {
	b := tx.tx.Bucket([]byte(q.bucket))
	if b == nil {
		return nil
	}
	c := b.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		seq, ok := parseSeq(k)
		if !ok {
			continue
		}
		_, text, err := unframe(q.bucket, string(k), v)
		if err != nil {
			return fmt.Errorf("%s/%d: %w", q.bucket, seq, err)
		}
		if !fn(seq, text) {
			return nil
		}
	}
	return nil
}

// countersKey sorts after all sequence numbers.
const countersKey = "\xff\xff\xff\xff\xff\xff\xff\xff"

func seqKey(seq uint64) string {
	return string(binary.BigEndian.AppendUint64(nil, seq))
}

// parseSeq returns the sequence number of an item's key; counters have none.
func parseSeq(key []byte) (uint64, bool) {
	if len(key) != 8 {
		return 0, false
	}
	seq := binary.BigEndian.Uint64(key)
	return seq, seq != math.MaxUint64
}
