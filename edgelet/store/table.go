package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A Table is a bucket with values of one type, encoded as JSON. Methods without a
// transaction run in one of their own; a value that they return is the caller's.
type Table[T any] struct {
	db     *DB
	bucket string
	kind   byte
}

// NewTable returns the table of that name. It makes nothing in the file.
func NewTable[T any](d *DB, bucket string) *Table[T] {
	return &Table[T]{d, bucket, kindJSON}
}

// NewSealedTable returns a table whose values are encrypted, with bucket and key
// authenticated. Its bucket has the prefix "sealed/", which is added to a name that
// lacks it. Without the right key every method that reads or writes a value fails with
// ErrKey.
func NewSealedTable[T any](d *DB, bucket string) *Table[T] {
	return &Table[T]{d, sealedPrefix + strings.TrimPrefix(bucket, sealedPrefix), kindSealed}
}

// Get returns the value under key, or ErrNotFound.
func (t *Table[T]) Get(key string) (v T, err error) {
	err = t.db.View(func(tx *Tx) error {
		v, err = t.GetTx(tx, key)
		return err
	})
	return v, err
}

// Put sets the value under key. It is on disk when Put returns nil.
func (t *Table[T]) Put(key string, v T) error {
	text, err := t.encode(key, v)
	if err != nil {
		return err
	}
	return t.db.Update(func(tx *Tx) error { return t.set(tx, key, text) })
}

// Delete removes the value under key, if there is one.
func (t *Table[T]) Delete(key string) error {
	return t.db.Update(func(tx *Tx) error { return t.DeleteTx(tx, key) })
}

// All returns all values by key.
func (t *Table[T]) All() (map[string]T, error) {
	var all map[string]T
	err := t.db.View(func(tx *Tx) error {
		all = map[string]T{}
		return t.EachTx(tx, func(key string, v T) error {
			all[key] = v
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// PutAll sets the values of puts and then removes those under deletes, as one change.
func (t *Table[T]) PutAll(puts map[string]T, deletes []string) error {
	return t.db.Update(func(tx *Tx) error {
		for key, v := range puts {
			if err := t.PutTx(tx, key, v); err != nil {
				return err
			}
		}
		for _, key := range deletes {
			if err := t.DeleteTx(tx, key); err != nil {
				return err
			}
		}
		return nil
	})
}

// Update replaces the value under key by what fn makes of it, as one change; the
// zero value if there is none. An error of fn changes nothing and is returned. fn may
// be called more than once.
func (t *Table[T]) Update(key string, fn func(v *T) error) error {
	return t.db.Update(func(tx *Tx) error {
		v, err := t.GetTx(tx, key)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if err := fn(&v); err != nil {
			return err
		}
		return t.PutTx(tx, key, v)
	})
}

// GetTx is Get within tx.
func (t *Table[T]) GetTx(tx *Tx, key string) (v T, err error) {
	text, err := t.text(tx, key)
	if err != nil {
		return v, err
	}
	return t.decode(key, text)
}

// PutTx is Put within tx.
func (t *Table[T]) PutTx(tx *Tx, key string, v T) error {
	text, err := t.encode(key, v)
	if err != nil {
		return err
	}
	return t.set(tx, key, text)
}

// DeleteTx is Delete within tx.
func (t *Table[T]) DeleteTx(tx *Tx, key string) error { return tx.delete(t.bucket, key) }

// EachTx calls fn with each value in key order until it returns an error. fn must not
// change the table.
func (t *Table[T]) EachTx(tx *Tx, fn func(key string, v T) error) error {
	b := tx.tx.Bucket([]byte(t.bucket))
	if b == nil {
		return nil
	}
	return b.ForEach(func(k, _ []byte) error {
		key := string(k)
		v, err := t.GetTx(tx, key)
		if err != nil {
			return err
		}
		return fn(key, v)
	})
}

// set writes text under key unless it is there already.
func (t *Table[T]) set(tx *Tx, key string, text []byte) error {
	old, err := t.text(tx, key)
	if err == nil && bytes.Equal(old, text) {
		return nil
	}
	if errors.Is(err, ErrKey) { // never mix the values of two keys
		return err
	}
	if err := tx.hasRoom(); err != nil {
		return fmt.Errorf("%s/%s: %w", t.bucket, key, err)
	}
	content := text
	if t.kind == kindSealed {
		if tx.db.sealer == nil {
			return fmt.Errorf("%s/%s: %w", t.bucket, key, tx.db.keyErr)
		}
		content = tx.db.sealer.seal(t.bucket, key, text)
	}
	return tx.put(t.bucket, key, t.kind, content)
}

// text returns the JSON under key, valid during the transaction.
func (t *Table[T]) text(tx *Tx, key string) ([]byte, error) {
	kind, content, err := tx.get(t.bucket, key)
	if err != nil || t.kind == kindJSON && kind == kindJSON {
		return content, err
	}
	if kind != t.kind {
		return nil, fmt.Errorf("%s/%s: %w", t.bucket, key, corruptf("value of kind %d", kind))
	}
	if tx.db.sealer == nil {
		return nil, fmt.Errorf("%s/%s: %w", t.bucket, key, tx.db.keyErr)
	}
	text, err := tx.db.sealer.open(t.bucket, key, content)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", t.bucket, key, err)
	}
	return text, nil
}

func (t *Table[T]) encode(key string, v T) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: encode: %w", t.bucket, key, err)
	}
	return text, nil
}

func (t *Table[T]) decode(key string, text []byte) (v T, err error) {
	if err := json.Unmarshal(text, &v); err != nil {
		return v, fmt.Errorf("%s/%s: decode: %w", t.bucket, key, err)
	}
	return v, nil
}
