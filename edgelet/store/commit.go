package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	"go.etcd.io/bbolt"
)

// maxBatch is how many changes share one commit at most.
const maxBatch = 256

// A Tx is one transaction. What is read in it is one state of the store, and what
// is changed in it takes effect as a whole. It is valid only within the function
// that it was given to, and only in that function's goroutine.
type Tx struct {
	db    *DB
	tx    *bbolt.Tx
	dirty bool
}

// View runs fn in a transaction that reads. It never waits for writers. fn must not
// block: a long reader keeps pages from being used again, and the file grows.
func (d *DB) View(fn func(*Tx) error) error {
	return d.guard(func() error {
		return d.bolt.View(func(tx *bbolt.Tx) error { return fn(&Tx{db: d, tx: tx}) })
	})
}

// Update runs fn in a transaction that writes and returns nil when what it changed
// is on disk, alone or in one commit with what others change at the same time. If fn
// returns an error, nothing that it did is kept. fn may be run more than once, in
// another goroutine, and must not call Update or a method that does: it would wait
// for itself.
func (d *DB) Update(fn func(*Tx) error) error {
	c := &call{fn: fn, next: make(chan bool, 1)}
	d.mu.Lock()
	d.waiting = append(d.waiting, c)
	leads := !d.leading
	d.leading = true
	d.mu.Unlock()
	if !leads && !<-c.next {
		return c.err
	}

	// This caller commits for all that wait now, itself the first of them, then lets
	// the first of those that have come meanwhile do the same.
	d.mu.Lock()
	n := min(len(d.waiting), maxBatch)
	batch := slices.Clone(d.waiting[:n])
	d.waiting = slices.Delete(d.waiting, 0, n)
	d.mu.Unlock()
	d.commit(batch)
	for _, follower := range batch[1:] {
		follower.next <- false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.leading = len(d.waiting) > 0; d.leading {
		d.waiting[0].next <- true
	}
	return c.err
}

// A call is one change that waits to be committed.
type call struct {
	fn   func(*Tx) error
	err  error     // set before next is sent to
	next chan bool // true: commit for the others; false: done
}

// commit runs the calls in one transaction. Those that fail are run again alone, so
// that an error comes from a state that was really there.
func (d *DB) commit(batch []*call) {
	together, alone := slices.Clone(batch), []*call(nil)
	for len(together) > 0 {
		failed := -1
		err := d.transact(func(tx *Tx) error {
			for i, c := range together {
				if err := c.fn(tx); err != nil {
					failed = i
					return err
				}
			}
			return nil
		})
		if failed < 0 || len(batch) == 1 {
			for _, c := range together {
				c.err = err
			}
			break
		}
		alone = append(alone, together[failed])
		together = slices.Delete(together, failed, failed+1)
	}
	for _, c := range alone {
		c.err = d.transact(c.fn)
	}
}

// transact runs fn in a transaction of its own and commits what it changed.
func (d *DB) transact(fn func(*Tx) error) error {
	return d.guard(func() error {
		btx, err := d.bolt.Begin(true)
		if err != nil {
			return err
		}
		done := false
		defer func() {
			if !done { // fn panicked
				btx.Rollback()
			}
		}()
		tx := &Tx{db: d, tx: btx}
		err = fn(tx)
		done = true
		if err != nil || !tx.dirty {
			btx.Rollback()
			return err
		}
		id := btx.ID()
		err = btx.Commit()
		d.count(err == nil)
		if err == nil {
			return nil
		}
		return d.uncommitted(id, err)
	})
}

// uncommitted returns the error for a commit that failed. If it failed after its meta
// page was written, the memory map already shows a state that may never reach the
// disk while bbolt's list of free pages is that of the state before: no further
// write would be safe.
func (d *DB) uncommitted(id int, cause error) error {
	current := 0
	err := d.bolt.View(func(tx *bbolt.Tx) error {
		current = tx.ID()
		return nil
	})
	if err != nil || current >= id {
		return d.fail(fmt.Errorf("%w: commit failed halfway: %w", ErrCorrupt, cause))
	}
	return fmt.Errorf("store %s: commit: %w", d.path, cause)
}

// count adds up what a commit has written.
func (d *DB) count(committed bool) {
	stats := d.bolt.Stats()
	d.mu.Lock()
	defer d.mu.Unlock()
	pages := stats.TxStats.GetPageAlloc() // bytes, of all transactions
	d.written += pages - d.allocated
	d.allocated = pages
	if committed {
		d.written += d.page // the meta page
	}
}

// guard runs op, which uses bbolt. A panic in it fails the store.
func (d *DB) guard(op func() error) error {
	if failure := d.failure.Load(); failure != nil {
		return *failure
	}
	err := protect(op)
	if p, ok := errors.AsType[*panicError](err); ok {
		return d.fail(p)
	}
	if errors.Is(err, bbolt.ErrDatabaseNotOpen) {
		return fmt.Errorf("store %s: %w", d.path, ErrClosed)
	}
	return err
}

// protect runs op and returns a panic as an error. That is how bbolt reports
// corruption, and what becomes of a page that cannot be read from the memory map.
func protect(op func() error) (err error) {
	faults := debug.SetPanicOnFault(true) // of this goroutine
	defer func() {
		debug.SetPanicOnFault(faults)
		if p := recover(); p != nil {
			err = &panicError{p}
		}
	}()
	return op()
}

// panicError is a panic within bbolt, which is a corrupt file, or within a function
// that was given to a transaction, which is a bug.
type panicError struct{ value any }

func (e *panicError) Error() string { return fmt.Sprintf("%v: %v", ErrCorrupt, e.value) }
func (e *panicError) Unwrap() error { return ErrCorrupt }

// fail makes every later call fail like this one.
func (d *DB) fail(cause error) error {
	err := fmt.Errorf("store %s must be opened again: %w", d.path, cause)
	if d.failure.CompareAndSwap(nil, &err) {
		close(d.failed)
	}
	return err
}

// get returns kind and content of a value, which are valid during the transaction.
func (tx *Tx) get(bucket, key string) (byte, []byte, error) {
	var value []byte
	if b := tx.tx.Bucket([]byte(bucket)); b != nil {
		value = b.Get([]byte(key))
	}
	if value == nil {
		return 0, nil, fmt.Errorf("%s/%s: %w", bucket, key, ErrNotFound)
	}
	kind, content, err := unframe(bucket, key, value)
	if err != nil {
		return 0, nil, fmt.Errorf("%s/%s: %w", bucket, key, err)
	}
	return kind, content, nil
}

func (tx *Tx) put(bucket, key string, kind byte, content []byte) error {
	if len(content) > MaxValue {
		return fmt.Errorf("%s/%s: %w: %d bytes", bucket, key, ErrTooLarge, len(content))
	}
	b, err := tx.tx.CreateBucketIfNotExists([]byte(bucket))
	if err != nil {
		return fmt.Errorf("%s: %w", bucket, err)
	}
	tx.dirty = true
	if err := b.Put([]byte(key), frame(bucket, key, kind, content)); err != nil {
		return fmt.Errorf("%s/%s: %w", bucket, key, err)
	}
	return nil
}

// has reports whether there is a value under key, whatever it is.
func (tx *Tx) has(bucket, key string) bool {
	b := tx.tx.Bucket([]byte(bucket))
	return b != nil && b.Get([]byte(key)) != nil
}

func (tx *Tx) delete(bucket, key string) error {
	if !tx.has(bucket, key) {
		return nil
	}
	tx.dirty = true
	if err := tx.tx.Bucket([]byte(bucket)).Delete([]byte(key)); err != nil {
		return fmt.Errorf("%s/%s: %w", bucket, key, err)
	}
	return nil
}

// hasRoom fails if the file is so full that nothing may be put. Deleting needs free
// pages too, so puts must leave some.
func (tx *Tx) hasRoom() error {
	stats := tx.db.bolt.Stats() // of the last commit
	if tx.tx.Size()-int64(stats.FreePageN+stats.PendingPageN)*tx.db.page > tx.db.room {
		return ErrFull
	}
	return nil
}
