package store

import (
	"encoding/json"
	"errors"
	"fmt"
)

const (
	metaBucket = "meta"
	metaSchema = "schema"
	metaSite   = "site"
	metaEpoch  = "epoch"
	metaKey    = "key"
)

// Meta are the single values of a store.
type Meta struct{ db *DB }

// Meta returns the single values of the store.
func (d *DB) Meta() Meta { return Meta{d} }

// Schema is the number of the newest migration that has run.
func (m Meta) Schema() (int, error) { return metaValue[int](m.db, metaSchema) }

// Site is the name of the site that the store belongs to, "" before it is set.
func (m Meta) Site() (string, error) { return metaValue[string](m.db, metaSite) }

// SetSite sets the name of the site.
func (m Meta) SetSite(name string) error {
	return m.db.Update(func(tx *Tx) error { return tx.putJSON(metaBucket, metaSite, name) })
}

// Epoch is the highest owner epoch that was seen, 0 before the first.
func (m Meta) Epoch() (uint64, error) { return metaValue[uint64](m.db, metaEpoch) }

// RaiseEpoch remembers an epoch if it is higher than the highest so far, and returns
// the highest: the epoch is that of the current owner if they are equal.
func (m Meta) RaiseEpoch(epoch uint64) (highest uint64, err error) {
	err = m.db.Update(func(tx *Tx) error {
		highest, err = metaIn[uint64](tx, metaEpoch)
		if err != nil || epoch <= highest {
			return err
		}
		highest = epoch
		return tx.putJSON(metaBucket, metaEpoch, epoch)
	})
	return highest, err
}

func metaValue[T any](d *DB, key string) (v T, err error) {
	err = d.View(func(tx *Tx) error {
		v, err = metaIn[T](tx, key)
		return err
	})
	return v, err
}

// metaIn returns a single value, or the zero value before it is set.
func metaIn[T any](tx *Tx, key string) (v T, err error) {
	_, content, err := tx.get(metaBucket, key)
	if errors.Is(err, ErrNotFound) {
		return v, nil
	}
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(content, &v); err != nil {
		return v, fmt.Errorf("%s/%s: %w", metaBucket, key, err)
	}
	return v, nil
}

func (tx *Tx) putJSON(bucket, key string, v any) error {
	content, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s/%s: %w", bucket, key, err)
	}
	return tx.put(bucket, key, kindJSON, content)
}
