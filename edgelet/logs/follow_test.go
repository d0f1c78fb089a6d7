package logs

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A following is a copy that runs and what has come of it so far.
type following struct {
	t     *testing.T
	ended atomic.Bool // the container has

	mu      sync.Mutex
	got     strings.Builder
	flushed string
	done    chan struct{}
	err     error
}

func (f *following) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.got.Write(p)
}

func (f *following) FlushError() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flushed = f.got.String()
	return nil
}

func (s *site) follow(t *testing.T, ctx context.Context, req Request) *following {
	f := &following{t: t, done: make(chan struct{})}
	req.Path, req.Follow, req.Ended = podDir+"/c/0.log", true, f.ended.Load
	go func() {
		defer close(f.done)
		f.err = s.r.Copy(ctx, f, req)
	}()
	return f
}

// expect waits until the text has been sent.
func (f *following) expect(want string) {
	f.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		f.mu.Lock()
		got := f.flushed
		f.mu.Unlock()
		if got == want {
			return
		}
		select {
		case <-deadline:
			f.t.Fatalf("sent %q after 10 s, want %q", got, want)
		case <-f.done:
			f.t.Fatalf("ended with %v after %q, want %q", f.err, got, want)
		case <-time.After(time.Millisecond):
		}
	}
}

// end waits for the end of the copy, and what it has copied by then.
func (f *following) end(want string) {
	f.t.Helper()
	select {
	case <-f.done:
	case <-time.After(10 * time.Second):
		f.t.Fatal("copy does not end")
	}
	if f.err != nil || f.got.String() != want {
		f.t.Errorf("ended with %v after %q, want %q", f.err, f.got.String(), want)
	}
}

func TestFollowSendsAtOnceAndEndsWithTheContainer(t *testing.T) {
	s := newSite(t)
	s.r.poll = time.Hour // inotify alone must do
	s.write("0.log", lines(0, 3))
	f := s.follow(t, t.Context(), with(func(r *Request) { r.Tail = 2 }))
	f.expect(texts(1, 2))
	s.append("0.log", lines(3, 1))
	f.expect(texts(1, 3))
	half := len(lines(4, 1)) - 3
	s.append("0.log", lines(4, 1)[:half])
	f.expect(texts(1, 4)[:len(texts(1, 4))-3])
	s.append("0.log", lines(4, 1)[half:])
	f.expect(texts(1, 4))
	f.ended.Store(true)
	s.append("0.log", lines(5, 2)) // the last words
	f.end(texts(1, 6))
}

func TestFollowWaitsForTheLastWords(t *testing.T) {
	s := newSite(t)
	s.r.poll, s.r.settle = 5*time.Millisecond, time.Second
	s.write("0.log", lines(0, 1))
	f := s.follow(t, t.Context(), all())
	f.expect(texts(0, 1))
	f.ended.Store(true)
	time.Sleep(100 * time.Millisecond)
	s.append("0.log", lines(1, 1))
	f.end(texts(0, 2))
}

func TestFollowWithoutInotify(t *testing.T) {
	s := newSite(t)
	s.write("0.log", "")
	d, err := openDir(s.root, podDir+"/c/0.log")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w := &watch{timer: time.NewTimer(0)}
	defer w.close()
	begun := time.Now()
	<-w.timer.C
	if err := w.wait(t.Context(), 30*time.Millisecond); err != nil || time.Since(begun) < 30*time.Millisecond {
		t.Errorf("waited %v, error %v", time.Since(begun), err)
	}
}

func TestFollowGoesThroughRotations(t *testing.T) {
	s := newSite(t)
	s.r.poll = 20 * time.Millisecond
	s.write("0.log", lines(0, 1))
	f := s.follow(t, t.Context(), all())
	f.expect(texts(0, 1))
	os.Rename(s.path("0.log"), s.path("0.log.20260102-100000"))
	s.append("0.log.20260102-100000", lines(1, 1)) // the runtime has not reopened yet
	f.expect(texts(0, 2))
	s.append("0.log", lines(2, 1))
	s.append("0.log.20260102-100000", "") // nothing more
	f.expect(texts(0, 3))

	// Two rotations at once, as seen by a client that reads slowly.
	os.Rename(s.path("0.log"), s.path("0.log.20260102-110000"))
	s.append("0.log", lines(3, 1))
	os.Rename(s.path("0.log"), s.path("0.log.20260102-120000"))
	s.append("0.log", lines(4, 1))
	f.expect(texts(0, 5))

	// Truncated, as logrotate does with copytruncate.
	if err := os.Truncate(s.path("0.log"), 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	s.append("0.log", lines(5, 1))
	f.expect(texts(0, 6))
	f.ended.Store(true)
	f.end(texts(0, 6))
}

func TestFollowGoesOnAfterAFileThatWasCompressedMeanwhile(t *testing.T) {
	s := newSite(t)
	s.write("0.log", lines(0, 1))
	d, err := openDir(s.root, podDir+"/c/0.log")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := d.open("0.log")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	os.Rename(s.path("0.log"), s.path("0.log.20260102-110000"))
	s.write("0.log.20260102-100000.gz", lines(9, 1))
	s.write("0.log.20260102-120000", lines(1, 1))
	s.write("0.log", lines(2, 1))
	if err := compress(t.Context(), d, "0.log.20260102-110000"); err != nil {
		t.Fatal(err)
	}
	files, err := d.after(f)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(files)
	if len(files) != 2 || files[0].Name() != "0.log.20260102-120000" || files[1].Name() != "0.log" {
		t.Errorf("%d files follow, first %s", len(files), files[0].Name())
	}
}

func TestFollowEndsWithItsContextAndItsLimit(t *testing.T) {
	s := newSite(t)
	s.write("0.log", lines(0, 1))
	ctx, cancel := context.WithCancel(t.Context())
	f := s.follow(t, ctx, all())
	f.expect(texts(0, 1))
	cancel()
	<-f.done
	if !errors.Is(f.err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", f.err)
	}
	f = s.follow(t, t.Context(), with(func(r *Request) { r.Limit = 3 }))
	f.end("lin")
}

func TestFollowOfALogThatBecomesALinkEnds(t *testing.T) {
	s := newSite(t)
	s.r.poll = 10 * time.Millisecond
	s.write("0.log", lines(0, 1))
	f := s.follow(t, t.Context(), all())
	f.expect(texts(0, 1))
	os.Remove(s.path("0.log"))
	if err := os.Symlink("/etc/passwd", s.path("0.log")); err != nil {
		t.Fatal(err)
	}
	<-f.done
	if f.err == nil || f.got.String() != texts(0, 1) {
		t.Errorf("error %v after %q, want an error", f.err, f.got.String())
	}
}
