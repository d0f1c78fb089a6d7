package mux

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

const (
	// keptFrame is the size of a buffer that an idle session keeps.
	keptFrame = 1 << 10

	// maxParked bounds what is received for streams that nobody has accepted yet.
	maxParked = 2 << 20

	// lastWords is how long after a failed write the peer's reason may take to be read.
	lastWords = 200 * time.Millisecond
)

// A guard is the connection as yamux sees it. It takes note of each frame that
// passes, keeps from yamux what the peer must not send, and adds frames that
// yamux has no call for. yamux reads with one goroutine and writes with another.
type guard struct {
	s    *Session
	conn net.Conn

	// Owned by Read.
	in    *bufio.Reader
	read  []byte // the frame that yamux gets…
	rest  []byte // …and what it has not taken of it
	small bool   // the last frame had no body

	out chan struct{} // holds a token while conn is written to, always whole frames

	// Owned by who holds the token.
	pace pacer
	buf  []byte

	// Owned by Write.
	hold header // of a Data frame whose body is yet to come
	held bool
	drop bool // that body is not to be sent
}

func newGuard(s *Session, conn net.Conn) *guard {
	g := &guard{s: s, conn: conn, out: make(chan struct{}, 1), pace: pacer{frame: firstFrame, queue: firstQueue}}
	g.in = bufio.NewReaderSize(readerFunc(func(p []byte) (int, error) {
		n, err := conn.Read(p)
		if n > 0 {
			s.received.Store(int64(s.now()))
		}
		return n, err
	}), 4<<10)
	return g
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Read gives yamux what it may see, and of that only whole frames: yamux locks
// a stream while it takes a frame, so one that trickles in would block its reader.
func (g *guard) Read(p []byte) (int, error) {
	for len(g.rest) == 0 {
		if g.rest = g.s.injected(); len(g.rest) > 0 {
			break
		}
		if err := g.next(); err != nil {
			return 0, g.failed(err)
		}
	}
	n := copy(p, g.rest)
	g.rest = g.rest[n:]
	return n, nil
}

// failed keeps the first reason for which the session ends.
func (g *guard) failed(err error) error {
	if err != nil {
		g.s.fail(err)
	}
	return err
}

// next reads a frame, and keeps it if it is for yamux.
func (g *guard) next() error {
	if cap(g.read) > keptFrame && g.in.Buffered() == 0 && g.small {
		g.read = nil // idle, perhaps: keep no large buffer for it
	}
	g.read = slices.Grow(g.read[:0], headerSize)[:headerSize]
	if _, err := io.ReadFull(g.in, g.read); err != nil {
		return err
	}
	h := parseHeader(g.read)
	err := h.check()
	pass := false
	if err == nil {
		pass, err = g.s.incoming(h)
	}
	if err != nil {
		return err
	}
	n := h.body()
	g.small = n == 0
	if !pass {
		_, err = io.CopyN(io.Discard, g.in, int64(n))
		return err
	}
	g.read = slices.Grow(g.read, n)[:headerSize+n]
	if _, err := io.ReadFull(g.in, g.read[headerSize:]); err != nil {
		return err
	}
	g.rest = g.read
	return nil
}

// Write takes from yamux one header, or the one body that follows it. The two
// are written together: as one TLS record, and never with another frame between.
func (g *guard) Write(p []byte) (int, error) {
	if g.held {
		g.held = false
		if g.drop {
			return len(p), nil
		}
		return len(p), g.write(g.hold, p)
	}
	if len(p) != headerSize {
		return 0, fmt.Errorf("header of %d bytes", len(p))
	}
	h := parseHeader(p)
	pass := g.s.outgoing(h)
	if h.body() > 0 {
		g.hold, g.held, g.drop = h, true, !pass
		return len(p), nil
	}
	if !pass {
		return len(p), nil
	}
	return len(p), g.write(h, nil)
}

// write writes one frame.
func (g *guard) write(h header, body []byte) error {
	g.out <- struct{}{}
	g.buf = append(h.appendTo(g.buf[:0]), body...)
	began := time.Now()
	_, err := g.conn.Write(g.buf)
	changed := g.pace.wrote(len(g.buf), time.Since(began))
	frame, queue := g.pace.frame, g.pace.queue
	if h.kind == typePing && cap(g.buf) > keptFrame {
		g.buf = nil // idle, perhaps: keep no large buffer for it
	}
	<-g.out
	if err != nil {
		// What the peer has said last, such as a TLS alert, says more: let the reader find it.
		timer := time.NewTimer(lastWords)
		defer timer.Stop()
		select {
		case <-g.s.done:
		case <-timer.C:
		}
		return g.failed(err)
	}
	g.s.frame.Store(int64(frame - headerSize))
	if changed && g.s.cfg.OnQueue != nil {
		g.s.cfg.OnQueue(queue)
	}
	return nil
}

// writeReplies writes the frames that Session.reply has queued.
func (g *guard) writeReplies() {
	for {
		h, ok := g.s.nextReply()
		if !ok || g.write(h, nil) != nil {
			return
		}
	}
}

// Close is called by yamux only, when it ends the session for a reason of its own.
func (g *guard) Close() error {
	g.s.fail(protocolError("refused by yamux"))
	return g.conn.Close()
}

func (g *guard) LocalAddr() net.Addr  { return g.conn.LocalAddr() }
func (g *guard) RemoteAddr() net.Addr { return g.conn.RemoteAddr() }

// incoming takes note of a frame from the peer, and says whether yamux is to see it.
func (s *Session) incoming(h header) (pass bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch h.kind {
	case typePing:
		if h.flags&flagACK == 0 {
			if s.pings++; s.pings > maxPings {
				return false, ErrFlood
			}
		}
		return true, nil
	case typeGoAway:
		if h.length != 0 {
			return false, fmt.Errorf("peer went away for reason %d", h.length)
		}
		s.peerAway = true
		return true, nil
	}
	st, err := s.find(h)
	if st == nil || err != nil {
		return false, err
	}
	if h.kind == typeWindow {
		if st.credit += int64(h.length); st.credit > 1<<32-1 {
			return false, protocolError("stream %d: window of %d bytes", st.id, st.credit)
		}
	} else if !s.takes(st, int(h.length)) {
		return false, nil
	}
	s.ended(st, h.flags)
	return true, nil
}

// find returns the stream that h is for, nil if it is over or refused. s.mu is held.
func (s *Session) find(h header) (*Stream, error) {
	ours := h.id&1 == 1 == s.client
	if h.flags&flagSYN == 0 {
		if ours && h.id > s.ourLast || !ours && h.id > s.peerLast {
			return nil, protocolError("frame for stream %d, which was never opened", h.id)
		}
		return s.streams[h.id], nil
	}
	if ours || h.id <= s.peerLast {
		return nil, protocolError("stream %d opened again", h.id)
	}
	s.peerLast = h.id
	if s.refuse || s.closing || s.accepted >= s.cfg.MaxStreams {
		return nil, s.reply(header{kind: typeWindow, flags: flagACK | flagRST, id: h.id})
	}
	s.accepted++
	return s.newStream(h.id, false), nil
}

// takes notes n bytes for st and returns whether they may be kept. s.mu is held.
func (s *Session) takes(st *Stream, n int) bool {
	switch {
	case n == 0:
		return true
	case st.finIn:
		s.abort(st, protocolError("stream %d: data after its end", st.id))
		return false
	case st.closed:
		s.abort(st, ErrReset) // nobody is going to read it
		return false
	}
	if s.unclaimed[st.id] == st {
		// yamux keeps what nobody has accepted, even after an abort.
		if s.parked+n > maxParked {
			s.abort(st, ErrUnread)
			return false
		}
		s.parked += n
		st.parked += n
	}
	st.unread += n
	st.peak = max(st.peak, st.unread)
	s.unread += n
	for s.unread > s.cfg.Budget {
		worst := st
		for _, other := range s.streams {
			if other.unread > worst.unread {
				worst = other
			}
		}
		s.abort(worst, ErrUnread)
		if worst == st {
			return false
		}
	}
	return true
}

// ended notes how the peer has ended st, if it has. s.mu is held.
func (s *Session) ended(st *Stream, flags uint16) {
	if flags&flagFIN != 0 {
		st.finIn = true
	}
	if flags&flagRST != 0 {
		st.err = ErrReset
		st.y = nil
	}
	if st.err != nil || st.finIn && st.finOut {
		s.forget(st)
	}
	st.changed.Broadcast()
}

// outgoing takes note of a frame that yamux sends, and says whether the peer is to see it.
func (s *Session) outgoing(h header) (pass bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.kind == typePing {
		if h.flags&flagACK != 0 {
			s.pings--
		}
		return true
	}
	if h.kind == typeGoAway {
		return true
	}
	if h.flags&flagSYN != 0 {
		s.ourLast = h.id
		s.newStream(h.id, true)
		return true
	}
	st := s.streams[h.id]
	if st == nil {
		return false // it is over, which yamux does not know yet
	}
	if h.flags&flagFIN != 0 {
		st.finOut = true
	}
	if h.flags&flagRST != 0 || st.finIn && st.finOut {
		s.forget(st)
	}
	return true
}

// abort ends st at once for err: for the peer, for yamux and for its user. s.mu is held.
func (s *Session) abort(st *Stream, err error) {
	if s.streams[st.id] != st {
		return
	}
	rst := header{kind: typeWindow, flags: flagRST, id: st.id}
	if s.reply(rst) != nil {
		// The peer takes nothing. It may lose one refusal, but not an abort.
		s.replies[len(s.replies)-1] = rst
	}
	s.inject = append(s.inject, rst) // at most one for each stream
	st.err = err
	s.forget(st)
	st.changed.Broadcast()
	if st.y != nil {
		st.y.SetReadDeadline(time.Unix(1, 0)) // wake its reader
		st.y = nil                            // with what nobody is going to read
	}
}

// forget takes st, which is over, off the wire. s.mu is held.
func (s *Session) forget(st *Stream) {
	delete(s.streams, st.id)
	st.over = true
	st.release()
}

// injected returns frames for yamux that do not come from the peer.
func (s *Session) injected() (frames []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.inject {
		frames = h.appendTo(frames)
	}
	s.inject = s.inject[:0]
	return frames
}

// reply has a frame of our own written. s.mu is held.
func (s *Session) reply(h header) error {
	if s.err != nil {
		return nil
	}
	if len(s.replies) >= maxReplies {
		return ErrFlood
	}
	s.replies = append(s.replies, h)
	if !s.replying {
		// Not by the caller, who reads: if both sides only wrote, both would wait.
		s.replying = true
		s.loops.Go(s.guard.writeReplies)
	}
	return nil
}

func (s *Session) nextReply() (h header, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.replies) == 0 || s.err != nil {
		s.replying = false
		return h, false
	}
	h = s.replies[0]
	s.replies = s.replies[:copy(s.replies, s.replies[1:])]
	return h, true
}
