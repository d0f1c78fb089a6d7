// Package mux carries many streams over one connection with yamux, and adds
// what a link of weeks over bad networks, with a peer that may be hostile,
// needs and yamux leaves to its users:
//
//   - a cap on streams, and on what all of them together hold unread;
//   - a stream that was idle is served before those that are busy, in frames
//     that take some milliseconds at the link's rate, so that a typed
//     character does not wait for a file that is being copied;
//   - silence ends a session ([Config.Timeout]); a slow link does not;
//   - the end of a session is an error to its streams, not an end of file;
//   - Close frees readers and writers on both sides.
//
// It does so from outside: between yamux and the connection sits a guard that
// reads the header of each frame in either direction, and around each stream
// a [Stream] that never asks yamux for more than it can do at once.
//
// A [Session] has two goroutines, both yamux's. tunnel/SPEC.md, sections 3, 4
// and 7, is the specification.
package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	headerSize = 12

	// maxBody bounds the body of a Data frame that we take.
	maxBody = 64 << 10

	// firstWindow is what may be sent on a stream before the peer says more; yamux fixes it.
	firstWindow = 256 << 10

	// maxReplies bounds the frames of our own (answers to refused streams), and
	// maxPings the answers to pings, that wait to be sent.
	maxReplies = 1024
	maxPings   = 16
)

const (
	typeData uint8 = iota
	typeWindow
	typePing
	typeGoAway
)

const (
	flagSYN uint16 = 1 << iota
	flagACK
	flagFIN
	flagRST
)

// Why a session or a stream ended.
var (
	// ErrClosed is what is left of a session after Close.
	ErrClosed = errors.New("session closed")
	// ErrPeerClosed means that the peer closed the session in good order.
	ErrPeerClosed = errors.New("session closed by peer")
	// ErrTimeout means that the peer was silent for Config.Timeout.
	ErrTimeout = errors.New("nothing received from peer")
	// ErrProtocol means that the peer, or something between, broke the protocol.
	ErrProtocol = errors.New("protocol error")
	// ErrFlood means that the peer asks for answers faster than it takes them.
	ErrFlood = fmt.Errorf("%w: more answers wanted than taken", ErrProtocol)
	// ErrReset is returned by a stream that the peer has aborted or refused.
	ErrReset = errors.New("stream reset by peer")
	// ErrUnread is returned by a stream that was aborted because too much of
	// what the session received was not read, most of it of this stream.
	ErrUnread = errors.New("stream aborted: too much received and not read")
)

// A header is the fixed start of every frame.
type header struct {
	version uint8
	kind    uint8
	flags   uint16
	id      uint32 // of the stream; 0 for Ping and Go away
	length  uint32 // of the body for Data; else a value
}

func parseHeader(b []byte) header {
	return header{
		version: b[0],
		kind:    b[1],
		flags:   binary.BigEndian.Uint16(b[2:]),
		id:      binary.BigEndian.Uint32(b[4:]),
		length:  binary.BigEndian.Uint32(b[8:]),
	}
}

func (h header) appendTo(b []byte) []byte {
	b = append(b, h.version, h.kind)
	b = binary.BigEndian.AppendUint16(b, h.flags)
	b = binary.BigEndian.AppendUint32(b, h.id)
	return binary.BigEndian.AppendUint32(b, h.length)
}

// body returns how many bytes follow h.
func (h header) body() int {
	if h.kind == typeData {
		return int(h.length)
	}
	return 0
}

// check returns an error if no peer may ever send h.
func (h header) check() error {
	switch {
	case h.version != 0:
		return protocolError("frame of version %d", h.version)
	case h.kind > typeGoAway:
		return protocolError("frame of type %d", h.kind)
	case h.kind <= typeWindow && h.id == 0:
		return protocolError("frame for stream 0")
	case h.kind == typeData && h.length > maxBody:
		return protocolError("frame of %d bytes", h.length)
	}
	return nil
}

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
