package mux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Config configures a session. The zero value means the defaults, which are
// those of the specification; both sides must agree on MaxStreams.
type Config struct {
	MaxStreams int // that each side may have open at once; default 256
	Window     int // unread bytes of one stream; default 512 KiB, at least 256 KiB
	Budget     int // unread bytes of all streams; default 4 MiB

	PingInterval time.Duration // default 15s on the client, 5m on the server
	Timeout      time.Duration // silence after which the peer is given up; default 28s

	// The following may be nil. They must return at once and not call the session.
	OnRTT   func(time.Duration) // after each measured round trip
	OnOpen  func(delta int)     // +1 when a stream begins, -1 when it is closed here
	OnQueue func(bytes int)     // how much should wait unsent below the connection
	OnEnd   func()              // once Done is closed
}

const (
	// probeGrace is how long before Timeout a silent peer is asked for a sign of
	// life. It also forgives a process that was itself suspended.
	probeGrace = 2 * time.Second

	// lingerTime is how long a stream that was closed here waits for its peer
	// to close too. Until then the peer may still read what was sent.
	lingerTime = 10 * time.Minute

	// writeTimeout is when yamux gives up a frame. Silence ends the session long before.
	writeTimeout = 10 * time.Minute
)

func (c Config) withDefaults(client bool) Config {
	interval := 5 * time.Minute
	if client {
		interval = 15 * time.Second
	}
	c.MaxStreams = cmp.Or(c.MaxStreams, 256)
	c.Window = max(cmp.Or(c.Window, 512<<10), firstWindow)
	c.Budget = max(cmp.Or(c.Budget, 4<<20), c.Window)
	c.PingInterval = cmp.Or(c.PingInterval, interval)
	c.Timeout = max(cmp.Or(c.Timeout, 28*time.Second), 2*probeGrace)
	return c
}

// A Session multiplexes streams over one connection, which it owns.
type Session struct {
	y       *yamux.Session
	guard   *guard
	gate    gate
	cfg     Config
	client  bool
	start   time.Time      // times below are since then
	slots   chan struct{}  // one token for each stream of ours that is not over
	opening chan struct{}  // holds a token while a stream is being opened
	done    chan struct{}  // closed by end
	loops   sync.WaitGroup // goroutines of ours

	received atomic.Int64 // when the last byte came, in ns since start
	frame    atomic.Int64 // bytes of data for one frame

	mu       sync.Mutex // guards the following, and the fields of streams that say so
	err      error      // why the session ended; set once
	closing  bool       // Close was called
	peerAway bool       // the peer said Go away
	refuse   bool       // accept no more streams

	streams   map[uint32]*Stream // those on the wire, by id
	unclaimed map[uint32]*Stream // those that neither Open nor Accept has returned yet
	live      int                // streams not closed by their user
	accepted  int                // streams of the peer's that are not both over and closed
	ourLast   uint32             // id of the last stream that we opened
	peerLast  uint32             // id of the last stream that the peer opened
	unread    int                // bytes received for all streams and not read
	parked    int                // bytes received for streams that are unclaimed
	pings     int                // answers to pings that are not sent yet

	replies  []header // of ours for the peer, at most maxReplies
	replying bool     // a goroutine is writing them
	inject   []header // of ours for yamux
	rtt      time.Duration
	pinging  bool // a ping is under way
	probed   bool // the peer was silent for long, and was sent a ping

	pingTimer, silenceTimer *time.Timer
}

// New starts a session over conn. The client is the side that dialed.
func New(conn net.Conn, client bool, cfg Config) (*Session, error) {
	cfg = cfg.withDefaults(client)
	s := &Session{
		cfg:       cfg,
		client:    client,
		start:     time.Now(),
		slots:     make(chan struct{}, cfg.MaxStreams),
		opening:   make(chan struct{}, 1),
		done:      make(chan struct{}),
		streams:   map[uint32]*Stream{},
		unclaimed: map[uint32]*Stream{},
	}
	s.frame.Store(firstFrame - headerSize)
	s.guard = newGuard(s, conn)
	yc := &yamux.Config{
		AcceptBacklog:          cfg.MaxStreams,
		EnableKeepAlive:        false,
		KeepAliveInterval:      cfg.PingInterval,
		ConnectionWriteTimeout: writeTimeout,
		MaxStreamWindowSize:    uint32(cfg.Window),
		StreamOpenTimeout:      0, // it would end the session
		StreamCloseTimeout:     lingerTime,
		LogOutput:              io.Discard, // what matters is in Err
	}
	// The timers' functions and yamux's goroutines wait for this until all is set.
	s.mu.Lock()
	defer s.mu.Unlock()
	begin := yamux.Server
	if client {
		begin = yamux.Client
	}
	var err error
	if s.y, err = begin(s.guard, yc); err != nil {
		return nil, fmt.Errorf("start session: %w", err)
	}
	s.pingTimer = time.AfterFunc(0, s.ping) // so that the round trip is known
	s.silenceTimer = time.AfterFunc(cfg.Timeout-probeGrace, s.checkSilence)
	return s, nil
}

// Open returns a new stream, waiting for one of Config.MaxStreams to be free.
func (s *Session) Open(ctx context.Context) (*Stream, error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("open stream: %d are open: %w", s.cfg.MaxStreams, context.Cause(ctx))
	case <-s.done:
		return nil, fmt.Errorf("open stream: %w", s.Err())
	}
	y, err := s.openOne(ctx)
	if err != nil {
		<-s.slots
		return nil, fmt.Errorf("open stream: %w", cmp.Or(s.Err(), err))
	}
	if st := s.claim(y); st != nil {
		return st, nil
	}
	return nil, fmt.Errorf("open stream: %w", cmp.Or(s.Err(), ErrClosed))
}

// openOne opens a stream when no other is being opened: yamux numbers streams
// before it sends them, so that two at once may reach the peer in wrong order.
func (s *Session) openOne(ctx context.Context) (*yamux.Stream, error) {
	select {
	case s.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.done:
		return nil, ErrClosed
	}
	defer func() { <-s.opening }()
	return s.y.OpenStream()
}

// Accept returns the next stream that the peer opens.
func (s *Session) Accept(ctx context.Context) (*Stream, error) {
	for {
		y, err := s.y.AcceptStreamWithContext(ctx)
		switch {
		case ctx.Err() != nil && y == nil:
			return nil, context.Cause(ctx)
		case err != nil:
			return nil, fmt.Errorf("accept stream: %w", cmp.Or(s.Err(), err))
		}
		if st := s.claim(y); st != nil {
			return st, nil
		}
		// Refused meanwhile.
	}
}

// claim returns the stream of ours for y.
func (s *Session) claim(y *yamux.Stream) *Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.unclaimed[y.StreamID()]
	delete(s.unclaimed, y.StreamID())
	if st != nil {
		s.parked -= st.parked
		if st.err == nil {
			st.y = y
		}
	}
	return st
}

// Refuse refuses all streams that the peer opens from now on, and those that
// were not accepted yet.
func (s *Session) Refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = true
	s.dropUnclaimed(false)
}

// dropUnclaimed closes streams that nobody has got yet, ours too if the session is over.
func (s *Session) dropUnclaimed(ours bool) {
	for id, st := range s.unclaimed {
		if st.ours && !ours {
			continue
		}
		delete(s.unclaimed, id)
		s.abort(st, ErrReset)
		st.shut()
	}
}

// Close tells the peer, for at most a second, and ends the session and with it
// all streams. It waits for the session's goroutines and returns nil.
func (s *Session) Close() error {
	s.mu.Lock()
	said := make(chan struct{})
	if !s.closing && s.err == nil {
		s.closing = true
		s.loops.Go(func() {
			defer close(said)
			s.y.GoAway()
		})
	} else {
		close(said)
	}
	s.mu.Unlock()
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-said:
	case <-s.done:
	case <-timer.C:
	}
	s.fail(ErrClosed)
	s.y.Close()
	s.loops.Wait()
	return nil
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns nil until Done is closed, then why.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// RTT returns the smoothed round trip time, 0 if none is known yet.
func (s *Session) RTT() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rtt
}

// Streams returns how many streams are not closed yet.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

// fail ends the session because of err, unless it has ended before. yamux ends
// by itself when its connection is closed.
func (s *Session) fail(err error) {
	if s.end(err) {
		s.guard.conn.Close() // not under the lock: it may wait for a Write
		if s.cfg.OnEnd != nil {
			s.cfg.OnEnd()
		}
	}
}

// end does what of fail needs the lock. It returns false if the session had ended before.
func (s *Session) end(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return false
	}
	switch {
	case s.closing:
		err = ErrClosed
	case s.peerAway && !errors.Is(err, ErrProtocol):
		err = ErrPeerClosed
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("connection lost: %w", io.ErrUnexpectedEOF)
	}
	s.err = err
	close(s.done)
	s.pingTimer.Stop()
	s.silenceTimer.Stop()
	s.refuse = true
	s.dropUnclaimed(true)
	for _, st := range s.streams {
		st.changed.Broadcast()
	}
	return true
}

// now returns the time since the session began.
func (s *Session) now() time.Duration { return time.Since(s.start) }

// ping measures the round trip and plans the next ping.
func (s *Session) ping() {
	s.mu.Lock()
	if s.err != nil || s.pinging {
		s.mu.Unlock()
		return
	}
	s.pinging = true
	s.loops.Add(1)
	s.mu.Unlock()
	defer s.loops.Done()

	took, err := s.y.Ping()

	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinging = false
	if s.err != nil {
		return
	}
	s.pingTimer.Reset(s.cfg.PingInterval)
	if err != nil {
		return
	}
	took = max(took, 1)
	if s.rtt == 0 {
		s.rtt = took
	}
	s.rtt += (took - s.rtt) / 8
	if s.cfg.OnRTT != nil {
		s.cfg.OnRTT(took)
	}
}

// checkSilence probes a peer that was silent for almost Timeout, and ends the
// session when the probe has brought nothing either.
func (s *Session) checkSilence() {
	silent := s.now() - time.Duration(s.received.Load())
	s.mu.Lock()
	probed := s.probed
	s.probed = false
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	next := s.cfg.Timeout - probeGrace - silent
	if next <= 0 && !probed {
		// The whole grace, even if this process slept through the time before.
		s.probed = true
		s.pingTimer.Reset(0)
		next = max(probeGrace, s.cfg.Timeout-silent)
	}
	if next > 0 {
		s.silenceTimer.Reset(next)
	}
	s.mu.Unlock()
	if next <= 0 {
		s.fail(fmt.Errorf("%w for %v", ErrTimeout, silent.Round(time.Second)))
	}
}
