package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Errors that callers test for.
var (
	ErrNotFound = errors.New("not in the store")              // there is no value under that key
	ErrCorrupt  = errors.New("store is corrupt")              // what was read is not what was written
	ErrKey      = errors.New("wrong key of the store")        // sealed values cannot be read or written
	ErrSchema   = errors.New("store is of a newer edgelet")   // this program must not touch the file
	ErrLocked   = errors.New("another edgelet has the store") // the file's lock could not be had in time
	ErrFull     = errors.New("store is full")                 // nothing can be put before something is deleted
	ErrTooLarge = errors.New("value is too large")            // for the store, or for the queue
	ErrClosed   = errors.New("store is closed")
)

// MaxValue is the size of the largest value in bytes. The largest object of the
// Kubernetes API has 1.5 MiB.
const MaxValue = 4 << 20

const (
	pageSize    = 4 << 10 // bytes, whatever the machine's is: smaller commits than with 16 KiB
	keptAside   = 2       // corrupt files that are kept
	lockRetry   = 50 * time.Millisecond
	defaultWait = 5 * time.Second
	defaultMax  = 256 << 20
)

// Options say how to open a store. Only Path is needed.
type Options struct {
	Path    string        // of the file; its directory must be there
	Key     []byte        // KeySize bytes that encrypt sealed tables; nil: these fail with ErrKey
	Log     *slog.Logger  // nil: no logs
	Timeout time.Duration // to wait for another edgelet that has the file; default 5 s
	MaxSize int64         // of the file in bytes; default 256 MiB. Beyond three quarters puts fail with ErrFull, deletes do not
}

// A DB is an open store. Its methods may be called from any goroutine.
type DB struct {
	path   string
	log    *slog.Logger
	file   *os.File
	bolt   *bbolt.DB
	floor  uint64  // sequence numbers begin above, see SeqFloor
	sealer *sealer // nil if keyErr is set
	keyErr error
	fresh  bool
	lost   []string
	page   int64 // size of a page in bytes
	room   int64 // bytes that pages may use before nothing can be put

	failure atomic.Pointer[error] // set once the store can no longer be trusted
	failed  chan struct{}         // closed then

	mu        sync.Mutex // guards what follows
	waiting   []*call    // changes that no commit has taken yet, in order
	leading   bool       // a caller of Update is committing
	written   int64      // bytes since Open
	allocated int64      // bytes that bbolt has allocated for pages, as last seen
}

// Open opens the store at o.Path and begins a new one if there is none. It does what
// the package comment says about damage, and returns an error only if the file
// belongs to another edgelet (ErrLocked) or to a newer one (ErrSchema), or if it
// cannot be read or made at all.
func Open(o Options) (*DB, error) { return open(o, migrations()) }

func open(o Options, steps []migration) (*DB, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Timeout == 0 {
		o.Timeout = defaultWait
	}
	if o.MaxSize == 0 {
		o.MaxSize = defaultMax
	}
	d := &DB{path: o.Path, log: o.Log, failed: make(chan struct{}), room: o.MaxSize / 4 * 3}
	d.floor = uint64(max(time.Now().Unix(), 0)) << 20
	found, err := d.openFile(o)
	if errors.Is(err, ErrCorrupt) || errors.Is(err, unix.EIO) {
		if err := d.setAside(err); err != nil {
			return nil, err
		}
		found, err = d.openFile(o)
	}
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", d.path, err)
	}
	if err := d.prepare(o, found, steps); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// prepare brings the content of an opened file to what this program works with.
func (d *DB) prepare(o Options, found verdict, steps []migration) error {
	if err := d.migrate(steps, found.damaged); err != nil {
		return err
	}
	if found.bad >= 0 {
		d.damage("a meta page was unreadable or led to unreadable pages: the last commit may be undone")
		mend := func(tx *Tx) error { tx.dirty = true; return nil } // writes the page again
		if err := d.Update(mend); err != nil {
			return fmt.Errorf("store %s: mend: %w", d.path, err)
		}
	}
	return d.unlock(o.Key)
}

// openFile locks, verifies and opens the file, and makes it if there is none.
func (d *DB) openFile(o Options) (found verdict, err error) {
	f, err := lockFile(o.Path, o.Timeout)
	if errors.Is(err, fs.ErrNotExist) {
		if err := create(o.Path); err != nil {
			return found, err
		}
		f, err = lockFile(o.Path, o.Timeout)
	}
	if err != nil {
		return found, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return found, err
	}
	if info.Mode().Perm() != 0o600 {
		if err := f.Chmod(0o600); err != nil {
			return found, err
		}
	}
	if found, err = verify(f, info.Size()); err != nil {
		return found, err
	}
	if found.bad >= 0 {
		if err := invalidate(f, found.bad); err != nil {
			return found, err
		}
	}
	d.file, d.page = f, int64(found.page)
	return found, protect(func() error {
		options := boltOptions()
		options.MaxSize = int(min(o.MaxSize, math.MaxInt))
		options.OpenFile = func(string, int, os.FileMode) (*os.File, error) { return f, nil }
		d.bolt, err = bbolt.Open(o.Path, 0o600, options)
		return err
	})
}

func boltOptions() *bbolt.Options {
	return &bbolt.Options{
		PageSize:       pageSize,
		NoFreelistSync: true, // one page less per commit; opening reads all pages anyway
		FreelistType:   bbolt.FreelistMapType,
		Timeout:        defaultWait, // never waited for: we have the lock
	}
}

// invalidate makes a meta page invalid, so that the other one counts.
func invalidate(f *os.File, at int64) error {
	if _, err := f.WriteAt(make([]byte, pageHeader+metaSize), at); err != nil {
		return err
	}
	return f.Sync()
}

// create makes an empty store at path, whole or not at all.
func create(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	f.Close()
	b, err := bbolt.Open(f.Name(), 0o600, boltOptions())
	if err != nil {
		return err
	}
	err = b.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket([]byte(metaBucket))
		return err
	})
	if err := errors.Join(err, b.Sync(), b.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(path)
}

// lockFile opens path and waits for its lock, which bbolt takes once more on the
// same file.
func lockFile(path string, timeout time.Duration) (*os.File, error) {
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return f, nil
		}
		holder := lockHolder(f)
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock: %w", err)
		}
		select {
		case <-deadline.C:
			return nil, fmt.Errorf("%w%s: stop it, or wait until it has ended", ErrLocked, holder)
		case <-time.After(lockRetry):
		}
	}
}

// isAt reports whether f is still what path names, which it is not when another
// process has set it aside while we waited for the lock.
func isAt(f *os.File, path string) bool {
	ours, err := f.Stat()
	if err != nil {
		return false
	}
	theirs, err := os.Lstat(path)
	return err == nil && os.SameFile(ours, theirs)
}

// setAside renames the corrupt file and removes all but the newest of such files.
func (d *DB) setAside(cause error) error {
	aside := d.path + ".corrupt-" + time.Now().UTC().Format("20060102T150405.000Z")
	if err := os.Rename(d.path, aside); err != nil {
		return fmt.Errorf("store %s: set aside: %w", d.path, err)
	}
	if err := syncDir(d.path); err != nil {
		return fmt.Errorf("store %s: set aside: %w", d.path, err)
	}
	d.fresh = true
	d.damage("the file was set aside as %s (%v)", aside, cause)
	old, err := filepath.Glob(d.path + ".corrupt-*")
	if err != nil {
		return fmt.Errorf("store %s: %w", d.path, err)
	}
	slices.Sort(old) // by time
	for _, name := range old[:max(len(old)-keptAside, 0)] {
		if err := os.Remove(name); err != nil {
			return fmt.Errorf("store %s: remove an old corrupt file: %w", d.path, err)
		}
	}
	return nil
}

// damage notes that something was lost. It is called while d is opened.
func (d *DB) damage(format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	d.lost = append(d.lost, what)
	d.log.Error("store lost data", "path", d.path, "what", what)
}

// Close waits for transactions to end and closes the file.
func (d *DB) Close() error {
	if d.bolt == nil {
		return nil
	}
	if d.failure.Load() != nil {
		// bbolt may have panicked with its locks held, so only the file is given up,
		// and its lock, which the memory map would keep.
		return errors.Join(unix.Flock(int(d.file.Fd()), unix.LOCK_UN), d.file.Close())
	}
	if err := d.bolt.Close(); err != nil {
		return fmt.Errorf("store %s: close: %w", d.path, err)
	}
	return nil
}

// Fresh reports whether Open has begun a new file in the place of a corrupt one.
func (d *DB) Fresh() bool { return d.fresh }

// Damage lists what Open has found lost, each a sentence; normally nothing.
func (d *DB) Damage() []string { return d.lost }

// Failed is closed when the store can no longer be used and must be opened again.
func (d *DB) Failed() <-chan struct{} { return d.failed }

// Size is the size of the file in bytes.
func (d *DB) Size() (int64, error) {
	info, err := os.Stat(d.path)
	if err != nil {
		return 0, fmt.Errorf("store: %w", err)
	}
	return info.Size(), nil
}

// Written is how many bytes have been written to the file since Open.
func (d *DB) Written() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.written
}

// SeqFloor is a number at which sequences of this run may begin: it is above all that
// earlier runs can have given out, also when their file is lost, provided that the
// clock is right and fewer than a million were used a second. Whoever remembers a
// higher one goes on from there.
func (d *DB) SeqFloor() uint64 { return d.floor }

// Check reads the whole file and reports the first thing that is wrong with it.
func (d *DB) Check() error {
	// No other transaction may use pages again while they are read.
	return d.transact(func(*Tx) error {
		info, err := d.file.Stat()
		if err != nil {
			return fmt.Errorf("store %s: check: %w", d.path, err)
		}
		found, err := verify(d.file, info.Size())
		switch {
		case err != nil:
		case found.bad >= 0:
			err = corruptf("a meta page or what it leads to is unreadable")
		case len(found.damaged) > 0:
			err = corruptf("%d values are damaged, the first is %s/%q", len(found.damaged), found.damaged[0].bucket, found.damaged[0].key)
		default:
			return nil
		}
		return fmt.Errorf("store %s: check: %w", d.path, err)
	})
}
