package tunneltest

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// segment is how much a link with a rate sends at once, as a packet.
	segment = 1400
	// received is how much arrives that nobody reads, as with TCP's receive window.
	received = 1 << 20
	// headers is what TCP and IP add to a packet, with timestamps.
	headers = 52
)

// A Link is how good a connection is. The zero value is perfect.
type Link struct {
	Delay time.Duration // one way
	Rate  int           // bytes per second, each way; 0: unlimited
	Queue int           // bytes that wait to be sent before Write blocks; default 2 MiB, as a kernel's buffer
}

// A Conn is one end of a connection in memory that can be made to misbehave.
// Time and faults are those of its link, under fake time too.
type Conn struct {
	in, out *half
	name    string
}

// Pipe returns the two ends of a connection over link.
func Pipe(link Link) (a, b *Conn) {
	x, y := newHalf(link), newHalf(link)
	return &Conn{in: x, out: y, name: "a"}, &Conn{in: y, out: x, name: "b"}
}

// Read reads what has arrived.
func (c *Conn) Read(p []byte) (int, error) { return c.in.read(p) }

// Write returns when p is in the queue of what is to be sent.
func (c *Conn) Write(p []byte) (int, error) { return c.out.write(p) }

// Close ends the connection; what was written still arrives.
func (c *Conn) Close() error {
	c.out.change(func(h *half) { h.ended = true })
	c.in.change(func(h *half) { h.fault = net.ErrClosed })
	return nil
}

// Cut breaks the connection at once, as a reset does.
func (c *Conn) Cut() {
	for _, h := range []*half{c.in, c.out} {
		h.change(func(h *half) { h.fault = syscall.ECONNRESET })
	}
}

// Stall makes the connection half-open: nothing arrives at either end any
// more, and nobody is told.
func (c *Conn) Stall() {
	c.StallWrites()
	c.in.change(func(h *half) { h.stalled = true })
}

// StallWrites is like Stall for what this end writes only.
func (c *Conn) StallWrites() { c.out.change(func(h *half) { h.stalled = true }) }

// Resume ends a stall. Nothing is lost, as with TCP.
func (c *Conn) Resume() {
	for _, h := range []*half{c.in, c.out} {
		h.change(func(h *half) { h.stalled = false })
	}
}

// SetUnsent sets how much may wait to be sent, in bytes, as TCP_NOTSENT_LOWAT does.
func (c *Conn) SetUnsent(n int) { c.out.change(func(h *half) { h.queue = n }) }

// Cost returns what has passed in both directions as a link would bill it: with
// TCP's and IP's headers, and half as many acknowledgements as packets.
func (c *Conn) Cost() (bytes int64) {
	for _, h := range []*half{c.in, c.out} {
		h.mu.Lock()
		bytes += h.bytes + h.packets*headers + (h.packets+1)/2*headers
		h.mu.Unlock()
	}
	return bytes
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline ends Reads at t; zero means never.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.in.change(func(h *half) { h.readUntil = t })
	return nil
}

// SetWriteDeadline ends Writes at t; zero means never.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.change(func(h *half) { h.writeUntil = t })
	return nil
}

// LocalAddr returns a name.
func (c *Conn) LocalAddr() net.Addr { return addr(c.name) }

// RemoteAddr returns a name.
func (c *Conn) RemoteAddr() net.Addr { return addr("peer of " + c.name) }

type addr string

func (addr) Network() string  { return "memory" }
func (a addr) String() string { return string(a) }

// A half is one direction of a connection.
type half struct {
	delay time.Duration
	rate  int

	mu                    sync.Mutex // guards the following
	changed               sync.Cond
	waiting               []packet  // not read yet
	held                  int       // bytes of those
	free                  time.Time // when the link has sent all
	queue                 int
	ended                 bool // by its writer
	stalled               bool
	fault                 error
	readUntil, writeUntil time.Time
	bytes, packets        int64 // sent so far
}

type packet struct {
	data          []byte
	sent, arrives time.Time
}

func newHalf(link Link) *half {
	h := &half{delay: link.Delay, rate: link.Rate, queue: link.Queue}
	if h.queue == 0 {
		h.queue = 2 << 20
	}
	h.changed.L = &h.mu
	return h
}

// change changes h, and lets all who wait look again.
func (h *half) change(f func(*half)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(h)
	h.changed.Broadcast()
}

// wait waits for a change, or until t at most unless that is zero; h.mu is held.
func (h *half) wait(t time.Time) {
	if !t.IsZero() {
		timer := time.AfterFunc(time.Until(t), func() { h.change(func(*half) {}) })
		defer timer.Stop()
	}
	h.changed.Wait()
}

// first returns the earlier of two times, of which zero means never.
func first(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func due(t, now time.Time) bool { return !t.IsZero() && !t.After(now) }

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n < len(p) {
		m := len(p) - n
		if h.rate > 0 {
			m = min(m, segment)
		}
		now := time.Now()
		room, next := h.room(now, m)
		switch {
		case h.fault != nil:
			return n, h.fault
		case h.ended:
			return n, net.ErrClosed
		case due(h.writeUntil, now):
			return n, os.ErrDeadlineExceeded
		case !room:
			h.wait(first(next, h.writeUntil))
			continue
		}
		sent := now
		if h.free.After(now) {
			sent = h.free
		}
		if h.rate > 0 {
			sent = sent.Add(time.Duration(float64(m+headers) / float64(h.rate) * 1e9))
		}
		h.free = sent
		h.waiting = append(h.waiting, packet{append([]byte(nil), p[n:n+m]...), sent, sent.Add(h.delay)})
		h.held += m
		h.bytes += int64(m)
		h.packets += int64((m + segment - 1) / segment)
		n += m
		h.changed.Broadcast()
	}
	return n, nil
}

// room reports whether m bytes more may wait, or when that may be so.
func (h *half) room(now time.Time, m int) (ok bool, next time.Time) {
	unsent := 0
	for i := len(h.waiting) - 1; i >= 0 && (h.waiting[i].sent.After(now) || h.stalled); i-- {
		unsent += len(h.waiting[i].data)
		next = h.waiting[i].sent
	}
	if h.stalled {
		next = time.Time{}
	}
	if h.held > 0 && h.held+m > received+h.queue {
		return false, next
	}
	return unsent == 0 || unsent+m <= h.queue, next
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		now := time.Now()
		var arrives time.Time
		if len(h.waiting) > 0 && !h.stalled {
			arrives = h.waiting[0].arrives
		}
		switch {
		case h.fault != nil:
			return 0, h.fault
		case due(h.readUntil, now):
			return 0, os.ErrDeadlineExceeded
		case due(arrives, now):
			head := &h.waiting[0]
			n := copy(p, head.data)
			h.held -= n
			if head.data = head.data[n:]; len(head.data) == 0 {
				h.waiting = h.waiting[1:]
			}
			h.changed.Broadcast()
			return n, nil
		case len(h.waiting) == 0 && h.ended && !h.stalled:
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		h.wait(first(arrives, h.readUntil))
	}
}
