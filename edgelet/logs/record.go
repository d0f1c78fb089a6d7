package logs

import (
	"bytes"
	"time"
)

// Bounds of a record's header, in bytes.
const (
	minStamp  = len("2006-01-02T15:04:05Z")
	maxStamp  = 64  // generous: 35 suffice for nanoseconds and a zone
	maxHeader = 128 // with stream and tags
)

// A header is what stands before the text of a record.
type header struct {
	size    int    // bytes up to the text
	stamp   []byte // aliases the buffer
	stderr  bool
	partial bool
}

// The results of [parseHeader].
const (
	headerGood  = iota
	headerShort // there is not enough of it yet to tell
	headerBad
)

// parseHeader reads the header at the beginning of b.
func parseHeader(b []byte) (h header, verdict int) {
	sp := bytes.IndexByte(b[:min(len(b), maxStamp)], ' ')
	if sp < minStamp || b[4] != '-' || b[10] != 'T' || len(b) < sp+10 || bytes.IndexByte(b[:sp], '\n') >= 0 {
		return h, incomplete(b)
	}
	switch string(b[sp+1 : sp+8]) {
	case "stdout ":
	case "stderr ":
		h.stderr = true
	default:
		return h, incomplete(b)
	}
	h.stamp, h.partial = b[:sp], b[sp+8] == 'P'
	if (h.partial || b[sp+8] == 'F') && b[sp+9] == ' ' {
		h.size = sp + 10
		return h, headerGood
	}
	// Other tags than one letter: the first decides, the rest is for the future.
	tags := b[sp+8 : min(len(b), maxHeader)]
	end := bytes.IndexByte(tags, ' ')
	if nl := bytes.IndexByte(tags, '\n'); end < 0 || nl >= 0 && nl < end {
		return h, incomplete(b)
	}
	first, _, _ := bytes.Cut(tags[:end], []byte{':'})
	h.partial = string(first) == "P"
	h.size = sp + 8 + end + 1
	return h, headerGood
}

// incomplete tells a header that is not all there from one that is none.
func incomplete(b []byte) int {
	if len(b) < maxHeader && bytes.IndexByte(b, '\n') < 0 {
		return headerShort
	}
	return headerBad
}

// before reports whether a record's time is before since; so is what is no time.
func before(stamp []byte, since time.Time) bool {
	var t time.Time
	return t.UnmarshalText(stamp) != nil || t.Before(since)
}

// appendStamp appends a record's time with all nine digits of its fraction, which
// is how kubectl shows it.
func appendStamp(out, stamp []byte) []byte {
	const seconds = len("2006-01-02T15:04:05")
	out = append(out, stamp[:seconds]...)
	rest := stamp[seconds:]
	out = append(out, '.')
	digits := 0
	if len(rest) > 0 && rest[0] == '.' {
		rest = rest[1:]
		for len(rest) > 0 && '0' <= rest[0] && rest[0] <= '9' {
			if digits < 9 {
				out = append(out, rest[0])
				digits++
			}
			rest = rest[1:]
		}
	}
	out = append(out, "000000000"[digits:]...)
	return append(out, rest...)
}
