package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"golang.org/x/sys/unix"
)

// Names in a volume with content. No file of a pod's begins with two dots.
const (
	dataLink  = "..data"
	draftLink = "..data_tmp"
)

// A publisher writes the content of one volume.
type publisher struct {
	root *os.Root
	gid  *int64 // group of everything, that may read it; nil: root's
	step func(string)
}

// publish makes files the content of the volume, at once for whoever reads
// below ..data, unless they are already. Paths have passed checkItem.
func (w *publisher) publish(files content) error {
	current := w.current()
	if current == "" || !w.same(current, files) {
		name, err := w.write(files)
		if err != nil {
			return err
		}
		// What an interrupted update may have left.
		if err := w.root.RemoveAll(draftLink); err != nil {
			return err
		}
		w.step("symlink draft")
		if err := w.root.Symlink(name, draftLink); err != nil {
			return err
		}
		w.step("rename draft")
		if err := w.root.Rename(draftLink, dataLink); err != nil {
			return err
		}
		current = name
	}
	if err := w.link(files); err != nil {
		return err
	}
	return w.sweep(current, files)
}

// current is the directory that ..data leads to, "" if it leads to none.
func (w *publisher) current() string {
	name, err := w.root.Readlink(dataLink)
	if err != nil || !strings.HasPrefix(name, "..") || checkElement(name) != nil {
		return ""
	}
	info, err := w.root.Lstat(name)
	if err != nil || !info.IsDir() {
		return ""
	}
	return name
}

// same reports whether the directory current holds exactly files.
func (w *publisher) same(current string, files content) bool {
	for name, f := range files {
		if !w.sameFile(current+"/"+name, f) {
			return false
		}
	}
	n := 0
	err := fs.WalkDir(w.root.FS(), current, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if n++; n > len(files) {
				return fs.SkipAll
			}
		}
		return err
	})
	return err == nil && n == len(files)
}

func (w *publisher) sameFile(name string, want file) bool {
	// Not blocking, should it have become a pipe.
	f, err := w.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Mode() != w.fileMode(want.mode) || info.Size() != int64(len(want.data)) {
		return false
	}
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || want.uid != nil && int64(s.Uid) != *want.uid || w.gid != nil && int64(s.Gid) != *w.gid {
		return false
	}
	buffer := make([]byte, min(len(want.data), 32<<10))
	for rest := want.data; len(rest) > 0; {
		n, err := io.ReadFull(f, buffer[:min(len(buffer), len(rest))])
		if err != nil || !bytes.Equal(buffer[:n], rest[:n]) {
			return false
		}
		rest = rest[n:]
	}
	return true
}

// fileMode is the mode of a file in the volume, whose group may read it.
func (w *publisher) fileMode(mode os.FileMode) os.FileMode {
	if w.gid != nil {
		mode |= 0o440
	}
	return mode
}

// write writes files into a new directory and returns its name.
func (w *publisher) write(files content) (string, error) {
	var name string
	for {
		name = time.Now().UTC().Format("..2006_01_02_15_04_05.") + fmt.Sprintf("%09d", rand.N(1_000_000_000))
		w.step("mkdir content")
		err := w.root.Mkdir(name, 0o700)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		break
	}
	made := map[string]bool{}
	for file, f := range files {
		if dir := path.Dir(file); dir != "." && !made[dir] {
			if err := w.makeDirs(name, dir, made); err != nil {
				return "", err
			}
		}
		if err := w.writeFile(name+"/"+file, f); err != nil {
			return "", err
		}
	}
	return name, w.opened(name)
}

// makeDirs makes the directory dir of the content in base, and those above it.
func (w *publisher) makeDirs(base, dir string, made map[string]bool) error {
	done := base
	for e := range strings.SplitSeq(dir, "/") {
		done += "/" + e
		rel := done[len(base)+1:]
		if made[rel] {
			continue
		}
		if err := w.root.Mkdir(done, 0o700); err != nil {
			return err
		}
		if err := w.opened(done); err != nil {
			return err
		}
		made[rel] = true
	}
	return nil
}

// opened gives a directory its group and mode.
func (w *publisher) opened(name string) error {
	mode := os.FileMode(0o755)
	if w.gid != nil {
		mode |= os.ModeSetgid
		if err := w.root.Chown(name, -1, int(*w.gid)); err != nil {
			return err
		}
	}
	return w.root.Chmod(name, mode)
}

func (w *publisher) writeFile(name string, f file) error {
	w.step("write file")
	out, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = out.Write(f.data)
	if uid, gid := id(f.uid), id(w.gid); err == nil && (uid >= 0 || gid >= 0) {
		err = out.Chown(uid, gid)
	}
	if err == nil {
		err = out.Chmod(w.fileMode(f.mode)) // after chown, which takes bits away
	}
	return errors.Join(err, out.Close())
}

// id is what chown takes: -1 leaves the owner as it is.
func id(n *int64) int {
	if n == nil {
		return -1
	}
	return int(*n)
}

// link makes the links that a pod sees. A name that something is mounted on is
// a directory, and stays one.
func (w *publisher) link(files content) error {
	for name, f := range files {
		top, _, _ := strings.Cut(name, "/")
		if _, err := w.root.Lstat(top); !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return err
			}
			continue
		}
		w.step("symlink")
		if err := w.root.Symlink(dataLink+"/"+top, top); err != nil {
			return err
		}
		if uid, gid := id(f.uid), id(w.gid); uid >= 0 || gid >= 0 {
			if err := w.root.Lchown(top, uid, gid); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes what is of older content: links to files that are no more, and
// all that begins with two dots but the current directory.
func (w *publisher) sweep(current string, files content) error {
	tops := map[string]bool{dataLink: true, current: true}
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		tops[top] = true
	}
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(256)
		for _, e := range entries {
			name := e.Name()
			if tops[name] || !strings.HasPrefix(name, "..") && !w.isOurLink(name, e) {
				continue
			}
			w.step("sweep")
			if err := w.root.RemoveAll(name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *publisher) isOurLink(name string, e fs.DirEntry) bool {
	if e.Type() != fs.ModeSymlink {
		return false
	}
	target, err := w.root.Readlink(name)
	return err == nil && target == dataLink+"/"+name
}

// makeMountPoints makes the directories in a volume that other volumes of the
// pod are mounted on: the volume itself is read-only for the runtime.
func (m *Manager) makeMountPoints(root *os.Root, pod *corev1.Pod, volume string) error {
	for _, name := range nestedMountPoints(pod, volume) {
		top, _, _ := strings.Cut(name, "/")
		info, err := root.Lstat(top)
		if strings.HasPrefix(top, "..") || err == nil && !info.IsDir() {
			continue // part of the content: the runtime may find what it needs there
		}
		m.step("mkdir mount point")
		if err := root.MkdirAll(name, 0o755); err != nil {
			return fmt.Errorf("unable to create nested volume mountpoints: %w", err)
		}
	}
	return nil
}

// nestedMountPoints lists the paths in a volume at which containers of pod
// mount others, but for those within one another.
func nestedMountPoints(pod *corev1.Pod, volume string) []string {
	var points []string
	add := func(mounts []corev1.VolumeMount) {
		for _, mine := range mounts {
			if mine.Name != volume {
				continue
			}
			prefix := strings.TrimSuffix(path.Clean("/"+mine.MountPath), "/") + "/"
			for _, other := range mounts {
				below, ok := strings.CutPrefix(path.Clean("/"+other.MountPath), prefix)
				if !ok || below == "" {
					continue
				}
				between := false
				for _, third := range mounts {
					between = between || strings.HasPrefix(path.Clean("/"+third.MountPath), prefix) &&
						strings.HasPrefix(path.Clean("/"+other.MountPath), path.Clean("/"+third.MountPath)+"/")
				}
				if !between {
					points = append(points, below)
				}
			}
		}
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			add(list[i].VolumeMounts)
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		add(pod.Spec.EphemeralContainers[i].VolumeMounts)
	}
	return points
}
