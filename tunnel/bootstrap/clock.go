package bootstrap

import (
	"sync"
	"time"
)

// wrongClock is how far a machine's clock may be off before a site goes by the
// provider's time instead.
const wrongClock = 5 * time.Minute

// A clock is the time that a site judges certificates by: the machine's, unless
// that is known to be wrong. It is safe for concurrent use.
type clock struct {
	wall func() time.Time // the machine's clock: time.Now, but in tests

	mu    sync.Mutex
	floor time.Time // it is not earlier than this
	told  time.Time // the provider's time at the moment at; zero: go by wall
	at    time.Time // has a monotonic reading, so steps of the machine's clock do not matter
}

func newClock() *clock { return &clock{wall: time.Now} }

// Now returns the time.
func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.told.IsZero() {
		return c.told.Add(time.Since(c.at))
	}
	return later(c.wall(), c.floor)
}

// atLeast notes that it is not earlier than floor.
func (c *clock) atLeast(floor time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.floor = later(c.floor, floor)
}

// behind reports whether the machine's clock cannot be right, and the right time
// is not known.
func (c *clock) behind() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told.IsZero() && c.wall().Before(c.floor)
}

// set takes the provider's word for the time. It reports whether the machine's
// clock is newly found to be wrong.
func (c *clock) set(told time.Time) (wrong bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off := c.wall().Sub(told); off.Abs() <= wrongClock {
		c.told = time.Time{}
		return false
	}
	wrong = c.told.IsZero()
	c.told, c.at = told, time.Now()
	return wrong
}
