package logs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the files of one log, beside the current one.
const (
	stampLayout = "20060102-150405" // of the time of rotation, UTC
	suffixGzip  = ".gz"
	suffixTemp  = ".tmp"
)

// Most files of one log that are read. A rotator leaves far fewer.
const maxChain = 100

// A dir is an open directory that holds the files of one log.
type dir struct {
	*os.File
	base string // name of the current file
}

// openDir opens the directory of the log at name beneath root. No part of name
// may be a symbolic link, or lead upwards; root itself may be a link.
func openDir(root, name string) (*dir, error) {
	parts := strings.Split(name, "/")
	for _, part := range parts {
		if part == "" || part == "." || part == ".." || strings.ContainsRune(part, 0) {
			return nil, fmt.Errorf("open log %q: %w: not a path beneath the log root", name, fs.ErrInvalid)
		}
	}
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open log root", Path: root, Err: err}
	}
	base := parts[len(parts)-1]
	for _, part := range parts[:len(parts)-1] {
		next, err := openat(fd, part, unix.O_RDONLY|unix.O_DIRECTORY)
		unix.Close(fd)
		if err != nil {
			return nil, &fs.PathError{Op: "open log", Path: name, Err: err}
		}
		fd = next
	}
	return &dir{os.NewFile(uintptr(fd), path.Dir(name)), base}, nil
}

func openat(fd int, name string, flags int) (int, error) {
	for {
		got, err := unix.Openat(fd, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

// open opens one regular file of the directory for reading.
func (d *dir) open(name string) (*os.File, error) {
	fd, err := openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_NONBLOCK) // a FIFO must not block
	if err != nil {
		return nil, &fs.PathError{Op: "open log", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open log", Path: name, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// names lists the files of the log, oldest first, the current one last if there
// is one. Of a file that is there both plain and compressed, as after a crash,
// the plain one is named.
func (d *dir) names() ([]string, error) {
	rotated, current, _, err := d.list()
	if err != nil {
		return nil, err
	}
	rotated = slices.DeleteFunc(rotated, func(name string) bool {
		plain, compressed := strings.CutSuffix(name, suffixGzip)
		return compressed && slices.Contains(rotated, plain)
	})
	if current {
		rotated = append(rotated, d.base)
	}
	return rotated[max(len(rotated)-maxChain, 0):], nil
}

// list is what the directory holds of this log: the rotated files, oldest first;
// whether there is a current one; and what is left of compressions.
func (d *dir) list() (rotated []string, current bool, temporary []string, err error) {
	if _, err := d.Seek(0, 0); err != nil {
		return nil, false, nil, err
	}
	all, err := d.Readdirnames(-1)
	if err != nil {
		return nil, false, nil, err
	}
	for _, name := range all {
		switch rest, ok := strings.CutPrefix(name, d.base); {
		case !ok:
		case rest == "":
			current = true
		case rest[0] != '.':
		case strings.HasSuffix(rest, suffixTemp):
			temporary = append(temporary, name)
		default:
			rotated = append(rotated, name)
		}
	}
	slices.SortFunc(rotated, func(a, b string) int {
		return strings.Compare(strings.TrimSuffix(a, suffixGzip), strings.TrimSuffix(b, suffixGzip))
	})
	return rotated, current, temporary, nil
}

// snapshot opens all files of the log, oldest first. It tries again when files
// are rotated meanwhile, so that no record is missed or had twice.
func (d *dir) snapshot() (files []*os.File, err error) {
	for range 10 {
		files, err = d.tryOpen()
		if err == nil && files != nil {
			return files, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err == nil {
		err = fmt.Errorf("open log %s/%s: its files keep changing", d.Name(), d.base)
	}
	return nil, err
}

// tryOpen returns nil without an error when the files have changed under it.
func (d *dir) tryOpen() (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	before, err := d.names()
	if err != nil {
		return nil, err
	}
	if len(before) == 0 {
		return nil, &fs.PathError{Op: "open log", Path: path.Join(d.Name(), d.base), Err: fs.ErrNotExist}
	}
	for _, name := range before {
		f, err := d.open(name)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	after, err := d.names()
	if err != nil {
		return files, err
	}
	if !slices.Equal(before, after) {
		closeAll(files)
		return nil, nil
	}
	return files, nil
}

// current opens the current file, or returns nil if there is none.
func (d *dir) current() (*os.File, error) {
	f, err := d.open(d.base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// after opens the files that follow f in the log, oldest first. A file that has
// been compressed since it was opened is known by its time of modification.
func (d *dir) after(f *os.File) ([]*os.File, error) {
	files, err := d.snapshot()
	if err != nil {
		return nil, err
	}
	own, err := f.Stat()
	if err != nil {
		closeAll(files)
		return nil, err
	}
	for i, g := range files {
		info, err := g.Stat()
		if err != nil {
			closeAll(files)
			return nil, err
		}
		if os.SameFile(own, info) || compressed(g) && info.ModTime().Equal(own.ModTime()) {
			closeAll(files[:i+1])
			return files[i+1:], nil
		}
	}
	return files, nil // f has been removed as the oldest, so all others are newer
}

func compressed(f *os.File) bool { return strings.HasSuffix(f.Name(), suffixGzip) }

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
