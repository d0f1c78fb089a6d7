package server

import (
	"sync"
	"time"
)

// A cache is a bounded map whose entries expire. Its methods may be called at once.
type cache[K comparable, V any] struct {
	limit int

	mu      sync.Mutex // guards entries
	entries map[K]entry[V]
}

type entry[V any] struct {
	value   V
	expires time.Time
}

func newCache[K comparable, V any](limit int) *cache[K, V] {
	return &cache[K, V]{limit: limit, entries: map[K]entry[V]{}}
}

func (c *cache[K, V]) get(key K) (v V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok || !time.Now().Before(e.expires) {
		return v, false
	}
	return e.value, true
}

// put remembers a value. When the cache is full, what has expired makes room, and if
// that is not enough, a quarter of the rest, whichever it is.
func (c *cache[K, V]) put(key K, v V, life time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if len(c.entries) >= c.limit {
		for k, e := range c.entries {
			if !now.Before(e.expires) {
				delete(c.entries, k)
			}
		}
		for k := range c.entries {
			if len(c.entries) <= c.limit*3/4 {
				break
			}
			delete(c.entries, k)
		}
	}
	c.entries[key] = entry[V]{v, now.Add(life)}
}
