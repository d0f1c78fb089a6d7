package image

import (
	"maps"
	"sync"
	"time"
)

// A backOff spaces attempts after failures. There is no jitter: pods see times
// that double, and registries see one pull for all pods of a site.
type backOff struct {
	base, limit time.Duration // constant

	mu      sync.Mutex
	entries map[string]*failure // guarded by mu
}

type failure struct {
	message string
	delay   time.Duration
	at      time.Time
}

// waiting reports whether it is too early to try again, and why.
func (b *backOff) waiting(key string, now time.Time) (message string, waiting bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.entries[key]
	if f == nil || now.Sub(f.at) >= f.delay {
		return "", false
	}
	return f.message, true
}

// failed notes a failure. A failure long after the last one is a first one, and
// those that nobody has tried for so long are forgotten.
func (b *backOff) failed(key, message string, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.entries, func(_ string, f *failure) bool { return now.Sub(f.at) > 2*b.limit })
	delay := b.base
	if f := b.entries[key]; f != nil {
		delay = min(2*f.delay, b.limit)
	}
	b.entries[key] = &failure{message, delay, now}
}

func (b *backOff) succeeded(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, key)
}

func (b *backOff) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.entries)
}
