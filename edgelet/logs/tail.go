package logs

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
)

// A tailer counts lines from the end of a log towards its beginning.
type tailer struct {
	c       *copier
	limit   int64 // lines
	lines   int64 // found so far
	started bool  // a record has been seen
}

// seek finds the last n lines in files, which are oldest first; negative: all of
// them. It returns the file where they begin, at its right place, and sets what
// the copier has to skip of it.
func (c *copier) seek(files []*os.File, n int64) (start int, err error) {
	if n < 0 {
		return 0, nil
	}
	t := &tailer{c: c, limit: n}
	for i := len(files) - 1; i >= 0; i-- {
		var done bool
		if compressed(files[i]) {
			done, err = t.gzip(files[i])
		} else {
			done, err = t.plain(files[i])
		}
		if done || err != nil {
			return i, err
		}
	}
	return 0, nil
}

// see counts one record, the next towards the beginning, and reports whether the
// lines begin behind it.
func (t *tailer) see(h header) (done bool) {
	stream := 0
	if h.stderr {
		stream = 1
	}
	if !t.c.streams[stream] {
		return false
	}
	if !t.started || !h.partial {
		t.lines++ // the last line counts even if it has not ended yet
		t.started = true
	}
	return t.lines > t.limit
}

// plain reads f backwards in blocks. If the lines begin in it, it is left there,
// else at its beginning.
func (t *tailer) plain(f *os.File) (done bool, err error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, err
	}
	if t.limit == 0 {
		return true, nil
	}
	if end == 0 {
		return false, nil
	}
	next := end // where the record behind the one in question begins
	for end > 0 {
		if err := t.c.ctx.Err(); err != nil {
			return false, context.Cause(t.c.ctx)
		}
		begin := max(end-int64(len(t.c.in)-maxHeader), 0)
		// Some bytes more, so that the header of a record that begins at the
		// block's end can be read.
		n, err := f.ReadAt(t.c.in[:min(int64(len(t.c.in)), end-begin+maxHeader)], begin)
		if err != nil && err != io.EOF {
			return false, err
		}
		if int64(n) < end-begin {
			return false, fmt.Errorf("%s: file has become shorter while it was read", f.Name())
		}
		block := t.c.in[:n]
		for i := int(end - begin); i >= 0; {
			if i = bytes.LastIndexByte(block[:i], '\n'); i < 0 && begin > 0 {
				break
			}
			// A record begins behind each line feed, and at the file's beginning.
			if at := begin + int64(i) + 1; at < next {
				if h, verdict := parseHeader(block[i+1:]); verdict == headerGood && t.see(h) {
					_, err := f.Seek(next, io.SeekStart)
					return true, err
				}
				next = at
			}
		}
		end = begin
	}
	_, err = f.Seek(0, io.SeekStart)
	return false, err
}

// gzip reads f forwards, as there is no other way. If the lines begin in it, the
// copier gets to know how many lines stand before them.
func (t *tailer) gzip(f *os.File) (done bool, err error) {
	z, err := gzip.NewReader(f)
	if err != nil {
		return false, fmt.Errorf("%s: %w", f.Name(), err)
	}
	var full, open int64 // lines that end here, and 1 if another begins at the end
	count := *t.c
	count.held = 0
	count.each = func(h header) {
		open = 1
		if !h.partial {
			full++
			open = 0
		}
	}
	if _, err := count.drain(z); err != nil {
		return false, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	if !t.started && full+open > 0 {
		t.started = true
		t.lines = open
	}
	if t.lines+full <= t.limit {
		t.lines += full
		return false, nil
	}
	t.c.skip = t.lines + full - t.limit
	return true, nil
}
