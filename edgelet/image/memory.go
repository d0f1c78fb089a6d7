package image

import (
	"maps"
	"sync"
	"time"
)

// Memory keeps times by name under a few keys, across restarts. It is written
// seldom: when an image has been pulled, and when one is no longer used.
type Memory interface {
	Load(key string) (map[string]time.Time, error) // empty if there is nothing
	Save(key string, times map[string]time.Time) error
}

// Keys of a memory.
const (
	grantsKey = "image-grants" // pod UID and image -> when it was pulled for that pod
	usedKey   = "image-used"   // image id -> when it was last seen in use
)

// forgetful is the memory of those who have none.
type forgetful struct{}

func (forgetful) Load(string) (map[string]time.Time, error) { return nil, nil }
func (forgetful) Save(string, map[string]time.Time) error   { return nil }

// maxGrants bounds the grants that are remembered; the oldest go first.
const maxGrants = 1000

// grants knows which image has been pulled for which pod.
type grants struct {
	memory Memory

	mu    sync.Mutex
	times map[string]time.Time // guarded by mu
}

func (g *grants) has(key string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, ok := g.times[key]
	return ok
}

// add remembers a grant; what is known already is not written again.
func (g *grants) add(key string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.times[key]; ok {
		return nil
	}
	if g.times == nil {
		g.times = map[string]time.Time{}
	}
	g.times[key] = time.Now()
	for len(g.times) > maxGrants {
		oldest := key
		for k, at := range g.times {
			if at.Before(g.times[oldest]) {
				oldest = k
			}
		}
		delete(g.times, oldest)
	}
	return g.memory.Save(grantsKey, maps.Clone(g.times))
}
