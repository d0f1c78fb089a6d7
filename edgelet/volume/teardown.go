package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"golang.org/x/sys/unix"
)

const (
	// maxRounds bounds how often something is unmounted that is mounted again.
	maxRounds = 16
	// maxDepth bounds the directories that are open at once while a tree is
	// removed. What is deeper is moved up first, as a pod may nest as deep as
	// it likes.
	maxDepth = 64
)

// Teardown unmounts and removes all that there is of a pod. It can be called
// again after it failed or was interrupted, and for a pod that has nothing.
func (m *Manager) Teardown(ctx context.Context, uid types.UID) error {
	unlock := m.lock(uid)
	defer unlock()
	p, err := m.openPod(uid, false)
	if errors.Is(err, fs.ErrNotExist) {
		m.forget(uid)
		return nil
	}
	if err != nil {
		return fmt.Errorf("teardown of volumes: %w", err)
	}
	defer p.close()
	if err := m.unmountAll(ctx, p); err != nil {
		return fmt.Errorf("teardown of volumes: %w", err)
	}
	base, err := os.Open(m.dir)
	if err != nil {
		return fmt.Errorf("teardown of volumes: %w", err)
	}
	defer base.Close()
	r := &remover{ctx: ctx, trash: p.fd, step: m.step}
	if err := r.empty(p.fd); err != nil {
		return fmt.Errorf("teardown of volumes: %w", err)
	}
	m.step("rmdir pod")
	if err := unix.Unlinkat(int(base.Fd()), string(uid), unix.AT_REMOVEDIR); err != nil {
		return fmt.Errorf("teardown of volumes: rmdir %s: %w", uid, err)
	}
	m.forget(uid)
	return nil
}

// Present lists the pods of which something is left on disk.
func (m *Manager) Present() ([]types.UID, error) {
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return nil, fmt.Errorf("volume directory: %w", err)
	}
	var uids []types.UID
	for _, e := range entries {
		if e.IsDir() {
			uids = append(uids, types.UID(e.Name()))
		}
	}
	return uids, nil
}

// forget drops what is remembered of a pod.
func (m *Manager) forget(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.stale, func(k staleKey, _ string) bool { return k.pod == uid })
}

// unmountAll detaches everything that is mounted below the pod's directory.
func (m *Manager) unmountAll(ctx context.Context, p *podDir) error {
	var last error
	for range maxRounds {
		below, err := mountsBelow(p.path)
		if err != nil || len(below) == 0 {
			return err
		}
		// Deepest first, and of several on one path the latest first.
		slices.Reverse(below)
		slices.SortStableFunc(below, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
		for _, path := range below {
			if err := ctx.Err(); err != nil {
				return err
			}
			m.step("unmount")
			// It may be gone with one above; what counts is what is left.
			if err := unmount(p.fd, path); err != nil {
				last = err
			}
		}
	}
	return fmt.Errorf("something is still mounted below %s: %w", p.path, last)
}

// A remover removes trees without following links or crossing mounts.
type remover struct {
	ctx   context.Context
	trash *os.File // where what is nested too deep is moved; is emptied itself
	moved int
	step  func(string)
}

// empty removes all that is in the directory that dir has open.
func (r *remover) empty(dir *os.File) error { return r.emptyAt(dir, 0) }

func (r *remover) emptyAt(handle *os.File, depth int) error {
	// A handle of its own: the other may be O_PATH, and this one has a position.
	dir, err := openAt(handle, ".", unix.O_RDONLY|unix.O_DIRECTORY, strict|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		// Removing changes what is read next, so that every batch begins anew.
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
		names, err := dir.Readdirnames(256)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := r.remove(dir, name, depth); err != nil {
				return err
			}
		}
	}
}

// remove removes one entry of dir with all that is in it.
func (r *remover) remove(dir *os.File, name string, depth int) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	r.step("unlink")
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return &os.PathError{Op: "unlinkat", Path: name, Err: err}
	}
	if depth >= maxDepth {
		return r.moveUp(dir, name)
	}
	child, err := openAt(dir, name, oPathDir|unix.O_NOFOLLOW, strict|unix.RESOLVE_NO_XDEV)
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("%s: something is mounted there, not removing it", name)
	}
	if err != nil {
		return err
	}
	defer child.Close()
	if err := r.emptyAt(child, depth+1); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}

// moveUp moves a directory to the top of the tree, which is read until it is
// empty, so that it comes up again.
func (r *remover) moveUp(dir *os.File, name string) error {
	for {
		r.moved++
		err := unix.Renameat(int(dir.Fd()), name, int(r.trash.Fd()), ".deep-"+strconv.Itoa(r.moved))
		if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) {
			continue // left by a teardown that was interrupted
		}
		if err != nil {
			return &os.PathError{Op: "renameat", Path: name, Err: err}
		}
		return nil
	}
}
