package mux

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// shrinkAbove is how much must have been unread for the buffer to be given
// back once all was read, in bytes.
const shrinkAbove = 64 << 10

// A Stream is one byte stream of a session. It is a net.Conn, and its methods
// may be called at the same time. It must be closed.
type Stream struct {
	session *Session
	id      uint32
	ours    bool // we opened it

	writing chan struct{} // holds a token while a Write is under way

	// Owned by the Write under way.
	lightSince time.Duration
	lightSent  int

	// All that follows is guarded by session.mu.
	y       *yamux.Stream // nil before the stream is claimed, and when it is aborted
	changed sync.Cond     // a Write waits here
	credit  int64         // bytes that the peer takes
	unread  int           // bytes received and not read
	parked  int           // bytes received before the stream was claimed
	peak    int           // the most that unread was since the buffer was given back

	finIn, finOut bool  // one side has ended its data
	over          bool  // off the wire
	closed        bool  // by Close
	finished      bool  // by CloseWrite
	err           error // why it was aborted
	released      bool  // its slot is free again

	limit      *time.Timer // of Write
	limitSet   int         // counts, so that a stopped timer that fires all the same is known
	limitIsDue bool
}

var _ net.Conn = (*Stream)(nil)

// newStream takes note of a stream that is about to begin; s.mu is held.
func (s *Session) newStream(id uint32, ours bool) *Stream {
	st := &Stream{
		session: s,
		id:      id,
		ours:    ours,
		writing: make(chan struct{}, 1),
		credit:  firstWindow,
	}
	st.changed.L = &s.mu
	s.streams[id] = st
	s.unclaimed[id] = st
	s.live++
	if s.cfg.OnOpen != nil {
		s.cfg.OnOpen(1)
	}
	return st
}

// Read reads what the peer has written, or returns io.EOF after its end.
func (st *Stream) Read(p []byte) (int, error) {
	y, err := st.yamux("read")
	if err != nil {
		return 0, err
	}
	n, err := y.Read(p)
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := min(n, st.unread)
	st.unread -= taken
	s.unread -= taken
	if st.unread == 0 && st.peak > shrinkAbove {
		st.peak = 0
		y.Shrink()
	}
	if n > 0 || err == nil {
		return n, nil
	}
	return 0, st.readError(err)
}

// yamux returns what is below the stream, or why nothing is.
func (st *Stream) yamux(op string) (*yamux.Stream, error) {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	switch {
	case st.closed:
		return nil, st.fault(op, net.ErrClosed)
	case st.y == nil:
		return nil, st.fault(op, cmp.Or(st.err, ErrReset))
	}
	return st.y, nil
}

// readError says what yamux's error from Read means; session.mu is held.
func (st *Stream) readError(err error) error {
	switch {
	case st.closed:
		return st.fault("read", net.ErrClosed)
	case st.err != nil:
		return st.fault("read", st.err)
	case errors.Is(err, yamux.ErrTimeout):
		return st.fault("read", os.ErrDeadlineExceeded)
	case st.finIn && err == io.EOF:
		return io.EOF
	case st.session.err != nil:
		// yamux says EOF, which would make a truncated file look complete.
		return st.fault("read", st.session.err)
	case err == io.EOF:
		return st.fault("read", io.ErrUnexpectedEOF)
	}
	return st.fault("read", err)
}

// Write writes p. It returns when all of p was handed to the connection or the
// stream fails; nothing says that the peer has got it.
func (st *Stream) Write(p []byte) (written int, err error) {
	st.writing <- struct{}{}
	defer func() { <-st.writing }()
	for {
		y, n, err := st.await(len(p))
		if err != nil || n == 0 {
			return written, err
		}
		st.session.gate.enter(st.light(n))
		m, err := y.Write(p[:n])
		st.session.gate.leave()
		written += m
		if err != nil {
			return written, st.broken(err)
		}
		if p = p[n:]; len(p) == 0 {
			return written, nil
		}
	}
}

// await waits until something can be written, and returns how much of n.
func (st *Stream) await(n int) (*yamux.Stream, int, error) {
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := st.writeError(); err != nil {
			return nil, 0, err
		}
		if st.credit > 0 || n == 0 {
			n = int(min(int64(n), st.credit, s.frame.Load()))
			st.credit -= int64(n)
			return st.y, n, nil
		}
		st.changed.Wait()
	}
}

// light reports whether the stream sends little, so that n bytes more go first.
func (st *Stream) light(n int) bool {
	if now := st.session.now(); now-st.lightSince > lightSpan {
		st.lightSince, st.lightSent = now, 0
	}
	st.lightSent += n
	return st.lightSent <= lightBytes
}

// broken says what yamux's error from Write means.
func (st *Stream) broken(err error) error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if known := st.writeError(); known != nil {
		return known
	}
	return st.fault("write", err)
}

// writeError returns why nothing can be written; session.mu is held.
func (st *Stream) writeError() error {
	switch {
	case st.closed || st.finished:
		return st.fault("write", net.ErrClosed)
	case st.limitIsDue:
		return st.fault("write", os.ErrDeadlineExceeded)
	case st.err != nil:
		return st.fault("write", st.err)
	case st.session.err != nil:
		return st.fault("write", st.session.err)
	}
	return nil
}

func (st *Stream) fault(op string, err error) error {
	// A net.Error, as net.Conn demands: net/http looks at Timeout to tell the end
	// of its own waiting from that of the connection.
	return &net.OpError{Op: op, Net: "stream", Addr: streamAddr(st.id), Err: err}
}

// A streamAddr names a stream in errors.
type streamAddr uint32

func (a streamAddr) Network() string { return "stream" }
func (a streamAddr) String() string  { return fmt.Sprint(uint32(a)) }

// CloseWrite tells the peer that no more data comes; reading goes on.
func (st *Stream) CloseWrite() error {
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := st.writeError(); err != nil {
		return err
	}
	st.finished = true
	st.changed.Broadcast()
	y := st.y
	s.loops.Go(func() { y.Close() }) // which leaves reading open, and waits for the link
	return nil
}

// Close ends the stream in both directions: what was written still arrives,
// unless there was something left to read, as with TCP. It does not wait.
func (st *Stream) Close() error {
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.closed {
		return nil
	}
	switch {
	case st.over || s.err != nil:
	case st.unread > 0:
		s.abort(st, ErrReset) // the peer may be waiting for us to read
	case !st.finished:
		y := st.y
		s.loops.Go(func() { y.Close() })
	}
	if st.y != nil {
		st.y.SetReadDeadline(time.Unix(1, 0)) // wake the reader
	}
	st.shut()
	return nil
}

// shut marks st as closed by its user; session.mu is held.
func (st *Stream) shut() {
	s := st.session
	st.closed = true
	st.setLimit(time.Time{})
	st.changed.Broadcast()
	s.unread -= st.unread
	st.unread = 0
	s.live--
	if s.cfg.OnOpen != nil {
		s.cfg.OnOpen(-1)
	}
	st.release()
}

// release gives back the slot of a stream that is closed and off the wire, and
// stops counting what nobody can read any more. session.mu is held.
func (st *Stream) release() {
	s := st.session
	if st.err != nil {
		s.unread -= st.unread
		st.unread = 0
	}
	if !st.closed || !st.over || st.released {
		return
	}
	st.released = true
	if st.ours {
		<-s.slots
	} else {
		s.accepted--
	}
}

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	return errors.Join(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

// SetReadDeadline ends Reads at t; zero means never.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	switch {
	case st.closed:
		return st.fault("set deadline", net.ErrClosed)
	case st.y == nil:
		return nil // Reads end anyway, and must
	}
	return st.y.SetReadDeadline(t)
}

// SetWriteDeadline ends at t a Write that waits for the peer to read; zero means
// never. That harms neither the stream nor the session.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if st.closed {
		return st.fault("set deadline", net.ErrClosed)
	}
	st.setLimit(t)
	return nil
}

// setLimit sets the deadline of Write; session.mu is held.
func (st *Stream) setLimit(t time.Time) {
	if st.limit != nil {
		st.limit.Stop()
		st.limit = nil
	}
	st.limitSet++
	st.limitIsDue = false
	if t.IsZero() {
		return
	}
	call := st.limitSet
	st.limit = time.AfterFunc(time.Until(t), func() {
		st.session.mu.Lock()
		defer st.session.mu.Unlock()
		if st.limitSet == call {
			st.limitIsDue = true
			st.changed.Broadcast()
		}
	})
}

// LocalAddr returns the address of the session's connection.
func (st *Stream) LocalAddr() net.Addr { return st.session.guard.LocalAddr() }

// RemoteAddr returns the address of the session's peer.
func (st *Stream) RemoteAddr() net.Addr { return st.session.guard.RemoteAddr() }
