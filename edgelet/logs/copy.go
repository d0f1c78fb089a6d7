package logs

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"time"
)

// A Request says what of a container's log to copy.
type Request = struct {
	Path       string      // beneath the log root: namespace_pod_uid/container/restarts.log
	Follow     bool        // go on until the container has ended
	Timestamps bool        // before each line, its time
	Since      time.Time   // nothing older; zero: all
	Tail       int64       // no more than so many lines, from the end; negative: all
	Limit      int64       // no more than so many bytes; negative: all
	Stream     string      // "stdout" or "stderr"; empty: both
	Ended      func() bool // whether the container has ended; nil: it has. Called often
}

// bufferSize of reading and of writing, in bytes. It is what one copy holds.
const bufferSize = 64 << 10

// errEnough ends a copy that has reached its limit.
var errEnough = errors.New("limit reached")

// A Reader copies logs. It may be used from any goroutine, and holds nothing
// between copies.
type Reader struct {
	root   string
	poll   time.Duration // between looks at a log that is followed, should inotify miss something
	settle time.Duration // see there
	log    *slog.Logger
}

// NewReader returns a reader of the logs beneath root, normally /var/log/pods. A
// nil logger is slog.Default().
func NewReader(root string, log *slog.Logger) *Reader {
	return &Reader{root: root, poll: time.Second, settle: settle, log: cmp.Or(log, slog.Default())}
}

// Copy writes a container's log to w: its text, without what the runtime has
// added. If w has a method FlushError() error, as an http.ResponseWriter has, it
// is called whenever Copy has to wait for more. The error is fs.ErrNotExist when
// there is no such log.
func (r *Reader) Copy(ctx context.Context, w io.Writer, req Request) error {
	d, err := openDir(r.root, req.Path)
	if err != nil {
		return err
	}
	defer d.Close()
	files, err := d.snapshot()
	if err != nil {
		return err
	}
	c := newCopier(ctx, w, req)
	start, err := c.seek(files, req.Tail)
	closeAll(files[:start])
	files = files[start:]
	defer func() { closeAll(files) }()
	for err == nil && len(files) > 1 {
		if err = c.file(files[0]); err == nil {
			files[0].Close()
			files = files[1:]
		}
	}
	if err == nil && req.Follow {
		err = r.follow(ctx, d, c, &files[0])
	} else if err == nil {
		err = c.file(files[0])
	}
	if err == nil || errors.Is(err, errEnough) {
		err = c.flush()
	}
	if err != nil {
		return fmt.Errorf("copy log %s: %w", req.Path, err)
	}
	return nil
}

// A copier turns records into text. It is used by one goroutine.
type copier struct {
	ctx     context.Context
	w       io.Writer
	req     Request
	streams [2]bool        // wanted: stdout, stderr
	each    func(h header) // if set, is told of each wanted record, and nothing is copied

	skip int64 // lines still to be left out
	left int64 // bytes that may still be written

	in  []byte // what has been read and not yet understood is in[:held]
	out []byte // what has not been written yet

	held    int
	inside  bool // within a record's text
	keep    bool // of which the text is wanted
	full    bool // and which ends its line
	newLine bool // what is written next begins a line
}

func newCopier(ctx context.Context, w io.Writer, req Request) *copier {
	c := &copier{
		ctx: ctx, w: w, req: req, left: req.Limit, newLine: true,
		streams: [2]bool{req.Stream != "stderr", req.Stream != "stdout"},
		in:      make([]byte, bufferSize),
		out:     make([]byte, 0, bufferSize),
	}
	if req.Limit < 0 {
		c.left = math.MaxInt64
	}
	return c
}

// file copies one file from where it stands, to its end.
func (c *copier) file(f *os.File) error {
	var src io.Reader = f
	if compressed(f) {
		z, err := gzip.NewReader(f)
		if err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		src = z
	}
	if _, err := c.drain(src); err != nil {
		return err
	}
	return c.finish()
}

// more copies what f has got since the last time, and reports whether it was
// anything. A file that has become shorter has been truncated and begins anew.
func (c *copier) more(f *os.File) (bool, error) {
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return false, err
	}
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	switch {
	case info.Size() == at:
		return false, nil
	case compressed(f):
		if err := c.file(f); err != nil {
			return true, err
		}
		_, err := f.Seek(0, io.SeekEnd)
		return true, err
	case info.Size() < at:
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return false, err
		}
		if err := c.finish(); err != nil {
			return false, err
		}
	}
	n, err := c.drain(f)
	return n > 0, err
}

// drain copies what src has, up to its end for now, and returns how much that was.
func (c *copier) drain(src io.Reader) (total int64, err error) {
	for {
		if err := c.ctx.Err(); err != nil {
			return total, context.Cause(c.ctx)
		}
		n, err := src.Read(c.in[c.held:])
		total += int64(n)
		c.held += n
		used, werr := c.records(c.in[:c.held])
		c.held = copy(c.in, c.in[used:c.held])
		switch {
		case werr != nil:
			return total, werr
		case err == io.EOF:
			return total, nil
		case err != nil:
			return total, err
		}
	}
}

// finish ends a file: what is left of a record there will not be completed.
func (c *copier) finish() error {
	var err error
	if c.inside && c.keep && c.full {
		err = c.text([]byte{'\n'})
		c.newLine = true
	}
	c.inside, c.held = false, 0
	return err
}

// records takes in what it can of b, and returns how much that was: all but the
// beginning of a header. A text need not be there to its end.
func (c *copier) records(b []byte) (used int, err error) {
	for used < len(b) {
		if !c.inside {
			h, verdict := parseHeader(b[used:])
			if verdict == headerShort {
				return used, nil
			}
			used += h.size
			c.inside = true
			c.keep = verdict == headerGood && c.wanted(h)
			c.full = !h.partial
			if c.keep && c.req.Timestamps && c.newLine {
				if err := c.stamp(h.stamp); err != nil {
					return used, err
				}
			}
		}
		rest := b[used:]
		end := bytes.IndexByte(rest, '\n')
		if end >= 0 {
			c.inside = false
			used += end + 1
			if c.full {
				end++ // with its line feed
			}
			rest = rest[:end]
		} else {
			used = len(b)
		}
		if !c.keep {
			continue
		}
		if len(rest) > 0 {
			c.newLine = false
		}
		if err := c.text(rest); err != nil {
			return used, err
		}
		if !c.inside {
			c.newLine = c.full
		}
	}
	return used, nil
}

// wanted reports whether a record is to be copied, and counts the lines that are
// to be skipped.
func (c *copier) wanted(h header) bool {
	stream := 0
	if h.stderr {
		stream = 1
	}
	if !c.streams[stream] {
		return false
	}
	if c.each != nil {
		c.each(h)
		return false
	}
	if c.skip > 0 {
		if !h.partial {
			c.skip--
		}
		return false
	}
	return c.req.Since.IsZero() || !before(h.stamp, c.req.Since)
}

func (c *copier) stamp(stamp []byte) error {
	var b [maxStamp + 16]byte
	return c.text(append(appendStamp(b[:0], stamp), ' '))
}

// text writes a piece of text of no more than the buffer's size, by and by.
func (c *copier) text(p []byte) error {
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	if len(c.out)+len(p) > cap(c.out) {
		if err := c.flush(); err != nil {
			return err
		}
	}
	c.out = append(c.out, p...)
	c.left -= int64(len(p))
	if c.left == 0 {
		return errEnough
	}
	return nil
}

// flushThrough writes all that has been copied, and has it sent.
func (c *copier) flushThrough() error {
	if err := c.flush(); err != nil {
		return err
	}
	if f, ok := c.w.(interface{ FlushError() error }); ok {
		return f.FlushError()
	}
	return nil
}

// flush writes all that has been copied.
func (c *copier) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.w.Write(c.out)
	c.out = c.out[:0]
	return err
}
