package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	oPath    = unix.O_PATH | unix.O_CLOEXEC
	oPathDir = oPath | unix.O_DIRECTORY

	// strict: below the directory, and no links at all. For what only this
	// package makes, and for what has been resolved.
	strict = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
	// within: links may lead anywhere below the directory.
	within = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS
)

// openAt opens path below dir as resolve says.
func openAt(dir *os.File, path string, flags int, resolve uint64) (*os.File, error) {
	how := &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(int(dir.Fd()), path, how)
		// EAGAIN: something was renamed meanwhile, so that the kernel cannot say
		// whether a .. stayed below dir.
		if (err == unix.EAGAIN || err == unix.EINTR) && tries < 128 {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

func mkdirAt(dir *os.File, name string, mode uint32) error {
	if err := unix.Mkdirat(int(dir.Fd()), name, mode); err != nil {
		return &os.PathError{Op: "mkdirat", Path: name, Err: err}
	}
	return nil
}

// procFD is a path to what f has open, whatever has become of its name.
func procFD(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// resolve opens path in the volume that root has open, following links as long
// as they stay in the volume. rootPath is the volume's path on the host: an
// absolute link is meant for the host, and stays in the volume if it leads there
// by that path.
func resolve(root *os.File, rootPath, path string) (*os.File, error) {
	f, err := openAt(root, path, oPath, within)
	if !errors.Is(err, unix.EXDEV) {
		return f, err
	}
	base, err := filepath.EvalSymlinks(rootPath)
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(filepath.Join(base, path))
	if err != nil {
		return nil, err
	}
	rel, err := filepath.Rel(base, real)
	if err != nil || !filepath.IsLocal(rel) {
		return nil, fmt.Errorf("%s leads outside the volume", path)
	}
	// The links may have changed since: only what needs none is opened.
	return openAt(root, rel, oPath, strict)
}

// makeDirs makes the missing directories of path in the volume that root has
// open, with the mode of the volume itself.
func makeDirs(root *os.File, rootPath, path string) error {
	var volume unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &volume); err != nil {
		return err
	}
	elements := strings.Split(filepath.Clean(path), "/")
	// The longest part that exists; "." always does.
	var parent *os.File
	n := len(elements) - 1
	for ; ; n-- {
		var err error
		parent, err = resolve(root, rootPath, filepath.Join(".", filepath.Join(elements[:n]...)))
		if err == nil {
			break
		}
		if n == 0 || !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	defer func() { parent.Close() }()
	for _, name := range elements[n:] {
		if err := mkdirAt(parent, name, volume.Mode&0o7777); err != nil {
			return err
		}
		// A pod can exchange the new directory for another one or a file of its
		// volume, which it can read in any case, but not for a link.
		child, err := openAt(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, strict|unix.RESOLVE_NO_XDEV)
		if err != nil {
			return err
		}
		parent.Close()
		parent = child
		// The umask applied before.
		if err := unix.Fchmod(int(child.Fd()), volume.Mode&0o7777); err != nil {
			return &os.PathError{Op: "fchmod", Path: name, Err: err}
		}
	}
	return nil
}
