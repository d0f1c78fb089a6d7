package bootstrap

import (
	"net/netip"
	"sync"
	"time"
)

// A limiter bounds how often something may happen: overall, and per source
// address. It is safe for concurrent use and remembers a bounded number of
// sources.
type limiter struct {
	perSource, overall rate

	mu      sync.Mutex // guards what follows
	all     bucket
	sources map[netip.Prefix]*bucket
	swept   time.Time // when the quiet sources were last forgotten
}

// A rate is a token bucket's: so many per second, so many at once.
type rate struct{ perSecond, burst float64 }

// maxSources is how many sources a limiter remembers; beyond it, those that have
// been quiet are forgotten, and if there are none, the new one is refused.
const maxSources = 8192

type bucket struct {
	level float64 // what has been used; leaks away at the rate
	at    time.Time
}

func newLimiter(perSource, overall rate) *limiter {
	return &limiter{perSource: perSource, overall: overall, sources: map[netip.Prefix]*bucket{}}
}

// allow reports whether source, an address with port, may do it now.
func (l *limiter) allow(source string, now time.Time) bool {
	key := sourceKey(source)
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.sources[key]
	if !ok {
		if len(l.sources) >= maxSources && now.Sub(l.swept) >= time.Second {
			l.forget(now)
		}
		if len(l.sources) >= maxSources {
			return false
		}
		b = &bucket{}
		l.sources[key] = b
	}
	// The source first, so that one that floods does not use up what is for all.
	return b.take(l.perSource, now) && l.all.take(l.overall, now)
}

// forget drops the sources whose buckets have emptied.
func (l *limiter) forget(now time.Time) {
	l.swept = now
	for key, b := range l.sources {
		if b.leak(l.perSource, now); b.level == 0 {
			delete(l.sources, key)
		}
	}
}

func (b *bucket) leak(r rate, now time.Time) {
	b.level = max(0, b.level-now.Sub(b.at).Seconds()*r.perSecond)
	b.at = now
}

func (b *bucket) take(r rate, now time.Time) bool {
	b.leak(r, now)
	if b.level+1 > r.burst {
		return false
	}
	b.level++
	return true
}

// sourceKey is the address of a source without its port; of IPv6, the /64 that
// one machine can roam in. What does not parse shares one bucket.
func sourceKey(source string) netip.Prefix {
	addr, err := netip.ParseAddrPort(source)
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := addr.Addr().Unmap().WithZone(""), 64
	if ip.Is4() {
		bits = 32
	}
	key, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return key
}
