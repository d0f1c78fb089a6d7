package logs

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime is the part of CRI that a rotator needs. Package cri implements it.
type Runtime interface {
	ListContainers(ctx context.Context) ([]*cri.Container, error)
	ContainerStatus(ctx context.Context, id string) (*cri.ContainerStatus, error)
	// ReopenContainerLog makes the runtime close a container's log and begin a new one.
	ReopenContainerLog(ctx context.Context, id string) error
}

// RotatorConfig configures a [Rotator]. Runtime is required.
type RotatorConfig struct {
	Runtime  Runtime
	Root     string        // default /var/log/pods; logs elsewhere are left alone
	MaxSize  int64         // bytes of the current file, default 10 MiB; what is written within a look may come on top
	MaxFiles int           // of one log, the current one among them; default 5, at least 2
	Every    time.Duration // between two looks, default 10s; 1s while a log grows by half MaxSize within a look
	Log      *slog.Logger  // default slog.Default()
}

// A Rotator keeps the logs of running containers within bounds, in size and in
// number of files. What is rotated is compressed at the next rotation and not
// before, so that who reads it may finish. A kill or a power cut at any point
// loses no record and needs no repair but what the next look does by itself.
type Rotator struct {
	cfg  RotatorConfig
	logs map[string]openLog // as of the last look, by container ID; owned by Run
}

// An openLog is a log that the runtime is writing.
type openLog struct {
	path string // of the current file, beneath the root
	size int64  // at the last look, bytes; negative: there was none
}

// NewRotator returns a rotator that does nothing before Run.
func NewRotator(cfg RotatorConfig) *Rotator {
	cfg.Root = cmp.Or(cfg.Root, "/var/log/pods")
	cfg.MaxSize = cmp.Or(cfg.MaxSize, 10<<20)
	cfg.MaxFiles = max(cmp.Or(cfg.MaxFiles, 5), 2)
	cfg.Every = cmp.Or(cfg.Every, 10*time.Second)
	cfg.Log = cmp.Or(cfg.Log, slog.Default())
	return &Rotator{cfg: cfg}
}

// Run looks after the logs until ctx is done.
func (r *Rotator) Run(ctx context.Context) error {
	timer := time.NewTimer(r.cfg.Every)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		timer.Reset(r.look(ctx))
	}
}

// look rotates what is due and returns when to look again.
func (r *Rotator) look(ctx context.Context) time.Duration {
	running, err := r.running(ctx)
	if err != nil {
		r.cfg.Log.Warn("cannot list logs to rotate", "err", err)
		return r.cfg.Every
	}
	next := r.cfg.Every
	for id, log := range running {
		size, err := r.tend(ctx, id, log.path)
		if err != nil && ctx.Err() == nil {
			r.cfg.Log.Warn("cannot rotate log", "log", log.path, "container", id, "err", err)
		}
		if log.size >= 0 && size-log.size > r.cfg.MaxSize/2 {
			next = min(next, time.Second)
		}
		if log.size = size; size >= r.cfg.MaxSize {
			log.size = 0 // rotated
		}
		running[id] = log
	}
	r.logs = running
	return next
}

// running returns the logs of all running containers. Where a container's log is
// never changes, so that the runtime is asked but once.
func (r *Rotator) running(ctx context.Context) (map[string]openLog, error) {
	containers, err := r.cfg.Runtime.ListContainers(ctx)
	if err != nil {
		return nil, err
	}
	running := make(map[string]openLog, len(r.logs))
	for _, c := range containers {
		if c.State != cri.ContainerState_CONTAINER_RUNNING {
			continue
		}
		log, known := r.logs[c.Id]
		if !known {
			status, err := r.cfg.Runtime.ContainerStatus(ctx, c.Id)
			if err != nil {
				r.cfg.Log.Debug("cannot find log to rotate", "container", c.Id, "err", err)
				continue // it has gone, or will be asked for at the next look
			}
			log.size = -1
			if rel, err := filepath.Rel(r.cfg.Root, status.LogPath); err == nil && filepath.IsLocal(rel) {
				log.path = filepath.ToSlash(rel)
			}
		}
		if log.path != "" { // else without a log, or not ours
			running[c.Id] = log
		}
	}
	return running, nil
}

// tend rotates one log if it is due, and returns the size that it had.
func (r *Rotator) tend(ctx context.Context, id, path string) (size int64, err error) {
	d, err := openDir(r.cfg.Root, path)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	f, err := d.open(d.base)
	if errors.Is(err, fs.ErrNotExist) {
		// A crash between renaming and reopening: the runtime still writes to the
		// renamed file.
		return 0, r.cfg.Runtime.ReopenContainerLog(ctx, id)
	}
	if err != nil {
		return 0, err
	}
	info, err := f.Stat()
	f.Close()
	if err != nil || info.Size() < r.cfg.MaxSize {
		return info.Size(), err
	}
	return info.Size(), r.rotate(ctx, d, id)
}

// rotate makes room and then the current file the newest of the rotated ones. A
// file that cannot be compressed, on a full disk for one, stays as it is: it is
// more important that the log remains bounded.
func (r *Rotator) rotate(ctx context.Context, d *dir, id string) error {
	rotated, err := r.tidy(d)
	if err != nil {
		return err
	}
	for _, name := range rotated {
		if strings.HasSuffix(name, suffixGzip) {
			continue
		}
		if err := compress(ctx, d, name); err != nil {
			r.cfg.Log.Warn("cannot compress log", "log", d.Name()+"/"+name, "err", err)
		}
	}
	stamp := time.Now().UTC()
	if len(rotated) > 0 { // a clock that has been set back must not change the order
		newest := strings.TrimSuffix(rotated[len(rotated)-1], suffixGzip)
		if last, err := time.Parse(stampLayout, strings.TrimPrefix(newest, d.base+".")); err == nil && stamp.Sub(last) < time.Second {
			stamp = last.Add(time.Second)
		}
	}
	name := d.base + "." + stamp.Format(stampLayout)
	if err := d.rename(d.base, name); err != nil {
		return fmt.Errorf("rename to %s: %w", name, err)
	}
	if err := r.cfg.Runtime.ReopenContainerLog(ctx, id); err != nil {
		// Unless the runtime has begun a new file after all, put things back.
		if back := d.rename(name, d.base); back != nil && !errors.Is(back, fs.ErrExist) {
			err = errors.Join(err, back)
		}
		return fmt.Errorf("reopen: %w", err)
	}
	return nil
}

// tidy removes what crashes have left and files in excess, and returns the
// rotated files that remain, oldest first.
func (r *Rotator) tidy(d *dir) ([]string, error) {
	rotated, _, surplus, err := d.list()
	if err != nil {
		return nil, err
	}
	rotated = slices.DeleteFunc(rotated, func(name string) bool {
		done := slices.Contains(rotated, name+suffixGzip) // compressed, but not removed yet
		if done {
			surplus = append(surplus, name)
		}
		return done
	})
	// Two more will be there after the rotation: the one to be rotated, and a new one.
	excess := max(len(rotated)-(r.cfg.MaxFiles-2), 0)
	for _, name := range append(surplus, rotated[:excess]...) {
		if err := d.remove(name); err != nil {
			return nil, err
		}
	}
	return rotated[excess:], nil
}

// compress replaces a file by its compressed form, which is complete and on disk
// before it gets its name, and has the same time of modification.
func compress(ctx context.Context, d *dir, name string) (err error) {
	src, err := d.open(name)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	temp := name + suffixTemp
	dst, err := d.create(temp, info.Mode().Perm())
	if err != nil {
		return err
	}
	defer func() {
		dst.Close()
		if err != nil {
			d.remove(temp)
		}
	}()
	z, err := gzip.NewWriterLevel(dst, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(z, &cancellable{ctx, src}); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	if err := dst.Sync(); err != nil {
		return err
	}
	modified := unix.NsecToTimespec(info.ModTime().UnixNano())
	if err := unix.UtimesNanoAt(int(d.Fd()), temp, []unix.Timespec{modified, modified}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := d.rename(temp, name+suffixGzip); err != nil {
		return err
	}
	return d.remove(name)
}

// A cancellable reads until its context is done.
type cancellable struct {
	ctx context.Context
	io.Reader
}

func (c *cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}

// create makes a new file in the directory, which must not exist.
func (d *dir) create(name string, mode fs.FileMode) (*os.File, error) {
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(mode))
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// remove removes a file of the directory, if it is there.
func (d *dir) remove(name string) error {
	if err := unix.Unlinkat(int(d.Fd()), name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

// rename gives a file of the directory another name, which must not be taken.
func (d *dir) rename(from, to string) error {
	fd := int(d.Fd())
	err := unix.Renameat2(fd, from, fd, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // the file system cannot tell
		var there unix.Stat_t
		if unix.Fstatat(fd, to, &there, unix.AT_SYMLINK_NOFOLLOW) == nil {
			err = unix.EEXIST
		} else {
			err = unix.Renameat(fd, from, fd, to)
		}
	}
	if err != nil {
		return &fs.PathError{Op: "rename", Path: from, Err: err}
	}
	return nil
}
