package mux

import (
	"sync"
	"time"
)

const (
	// One frame, header included. The larger fits a TLS record.
	minFrame   = 2 << 10
	firstFrame = 4 << 10
	maxFrame   = 16 << 10

	// What may wait unsent below the connection.
	minQueue   = 4 << 10
	firstQueue = 16 << 10
	maxQueue   = 256 << 10

	// frameTime is how long one frame may keep the link busy, queueTime what
	// waits below the connection, both at the rate last measured.
	frameTime = 10 * time.Millisecond
	queueTime = 40 * time.Millisecond

	// rateSpan is for how long a rate is measured, in time spent writing.
	rateSpan = 50 * time.Millisecond
)

// A pacer derives from the link's rate how much to hand down at a time.
type pacer struct {
	frame int // bytes to write at once
	queue int // bytes that may wait below, last told to Config.OnQueue

	sent  int           // bytes of this measurement…
	spent time.Duration // …and the time that writing them took
}

// wrote notes that the connection took n bytes within took, and returns whether
// queue has changed much.
//
// What the queue below swallows at once says nothing of the link. So only a
// write that took long ends a measurement early, and until then many queues'
// worth must pass before the queue may grow, by no more than double.
func (p *pacer) wrote(n int, took time.Duration) bool {
	if n < minFrame {
		return false
	}
	p.sent += n
	p.spent += took
	if p.spent < rateSpan && p.sent < 8*p.queue {
		return false
	}
	rate := float64(p.sent) / max(p.spent, time.Microsecond).Seconds()
	p.sent, p.spent = 0, 0
	p.frame = clamp(rate*frameTime.Seconds(), minFrame, min(2*p.frame, maxFrame))
	queue := clamp(rate*queueTime.Seconds(), minQueue, min(2*p.queue, maxQueue))
	if queue >= p.queue*3/4 && queue <= p.queue*4/3 {
		return false
	}
	p.queue = queue
	return true
}

func clamp(v float64, least, most int) int {
	return int(max(min(v, float64(most)), float64(least)))
}

const (
	// A stream that sends less than lightBytes in lightSpan goes first.
	lightBytes = 4 << 10
	lightSpan  = 100 * time.Millisecond

	// maxLight is how many of those go before one of the others has its turn.
	maxLight = 4
)

// A gate lets one stream at a time hand a frame to yamux, whose own queue
// knows no order but that of arrival.
type gate struct {
	mu     sync.Mutex // guards the following
	taken  bool
	light  []chan struct{} // streams of little data that wait
	heavy  []chan struct{} // the others
	streak int             // turns of light streams in a row
}

// enter waits for a turn. Every enter is followed by a leave.
func (g *gate) enter(light bool) {
	g.mu.Lock()
	if !g.taken {
		g.taken = true
		g.mu.Unlock()
		return
	}
	turn := make(chan struct{})
	if light {
		g.light = append(g.light, turn)
	} else {
		g.heavy = append(g.heavy, turn)
	}
	g.mu.Unlock()
	<-turn
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	from := &g.heavy
	if len(g.light) > 0 && (g.streak < maxLight || len(g.heavy) == 0) {
		from = &g.light
		g.streak++
	} else {
		g.streak = 0
	}
	if len(*from) == 0 {
		g.taken = false
		return
	}
	close((*from)[0]) // the turn passes on without the gate being free between
	*from = append((*from)[:0], (*from)[1:]...)
}
