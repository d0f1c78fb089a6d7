package logs

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settle is how long a file that seems to be complete, because the container has
// ended or the file was rotated, is watched for a last record: a runtime tells of
// the end, and opens the next file, a moment before it has written all.
const settle = 100 * time.Millisecond

// coalesce is the least time between two rounds of reading: the first line after
// a quiet moment is sent at once, a torrent in pieces of a sensible size.
const coalesce = 20 * time.Millisecond

// follow copies *f and the files that come after it until the container has
// ended. It leaves the last of them in *f, for the caller to close.
func (r *Reader) follow(ctx context.Context, d *dir, c *copier, f **os.File) error {
	watch, err := newWatch(d)
	if err != nil {
		r.log.Debug("a log is followed without inotify", "log", c.req.Path, "err", err)
	}
	defer watch.close()
	complete := false // *f seemed to be, already in the round before
	for {
		begun := time.Now()
		ended := c.req.Ended == nil || c.req.Ended() // asked before reading, so that nothing is missed
		rotated, err := replaced(d, *f)
		if err != nil {
			return err
		}
		any, err := c.more(*f)
		if err != nil {
			return err
		}
		if (ended || rotated) && complete && !any {
			if !rotated {
				return c.finish()
			}
			if err := r.advance(d, c, f); err != nil {
				return err
			}
			complete = false
			continue
		}
		complete = ended || rotated
		if err := c.flushThrough(); err != nil {
			return err
		}
		if complete {
			err = watch.pause(ctx, r.settle)
		} else {
			err = watch.wait(ctx, r.poll)
		}
		if rest := coalesce - time.Since(begun); rest > 0 && err == nil {
			err = watch.pause(ctx, rest)
		}
		if err != nil {
			return err
		}
	}
}

// advance goes on to the file after *f, and through all but the last of those
// that have been written since.
func (r *Reader) advance(d *dir, c *copier, f **os.File) error {
	files, err := d.after(*f)
	if err != nil || len(files) == 0 {
		return err
	}
	if err := c.finish(); err != nil {
		closeAll(files)
		return err
	}
	for i, next := range files {
		(*f).Close()
		*f = next
		if i == len(files)-1 {
			break
		}
		if err := c.file(next); err != nil {
			closeAll(files[i+1:])
			return err
		}
	}
	return nil
}

// replaced reports whether the current file is another than f. While there is
// none, between a rotation and the runtime's next record, f is still written to.
func replaced(d *dir, f *os.File) (bool, error) {
	current, err := d.current()
	if err != nil || current == nil {
		return false, err
	}
	defer current.Close()
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := current.Stat()
	if err != nil {
		return false, err
	}
	return !os.SameFile(a, b), nil
}

// A watch waits for changes in a directory. It works, if less quickly, also
// where there are no more inotify instances to be had.
type watch struct {
	*fsnotify.Watcher // nil: none
	timer             *time.Timer
}

// newWatch returns a watch in any case, and with it why it has no inotify.
func newWatch(d *dir) (*watch, error) {
	w := &watch{timer: time.NewTimer(0)}
	w.timer.Stop()
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return w, err
	}
	// By its descriptor, so that it is the directory that was opened.
	if err := notify.Add("/proc/self/fd/" + strconv.Itoa(int(d.Fd()))); err != nil {
		return w, errors.Join(err, notify.Close())
	}
	w.Watcher = notify
	return w, nil
}

func (w *watch) close() {
	w.timer.Stop()
	if w.Watcher != nil {
		w.Watcher.Close()
	}
}

// pause returns after d, whatever happens.
func (w *watch) pause(ctx context.Context, d time.Duration) error {
	w.timer.Reset(d)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-w.timer.C:
		return nil
	}
}

// wait returns after a change or after limit, whichever is first.
func (w *watch) wait(ctx context.Context, limit time.Duration) error {
	var events chan fsnotify.Event
	var errs chan error
	if w.Watcher != nil {
		events, errs = w.Events, w.Errors
	}
	w.timer.Reset(limit)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-w.timer.C:
	case <-errs: // as an overflow: something has changed
	case <-events:
	}
	return nil
}
