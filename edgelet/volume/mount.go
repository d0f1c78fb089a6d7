package volume

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// tmpfs is how a tmpfs is mounted.
type tmpfs struct {
	mode  uint32 // of the root directory
	gid   *int64 // its group, root's if nil
	size  int64  // bytes; 0 is the kernel's default, half of the memory
	flags uintptr
}

// mountTmpfs makes sure that a tmpfs is mounted on the directory path of p.
func (m *Manager) mountTmpfs(p *podDir, path string, t tmpfs) error {
	if mounted, err := isTmpfs(p, path); mounted || err != nil {
		return err
	}
	target, err := openAt(p.fd, path, oPathDir, strict)
	if err != nil {
		return err
	}
	defer target.Close()
	options := fmt.Sprintf("mode=%04o", t.mode)
	if t.gid != nil {
		options += fmt.Sprintf(",gid=%d", *t.gid)
	}
	if t.size > 0 {
		options += fmt.Sprintf(",size=%d", t.size)
	}
	m.step("mount tmpfs")
	err = unix.Mount("tmpfs", procFD(target), "tmpfs", t.flags, options+",noswap")
	if errors.Is(err, unix.EINVAL) { // before Linux 6.4
		err = unix.Mount("tmpfs", procFD(target), "tmpfs", t.flags, options)
	}
	if err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", path, err)
	}
	mounted, err := isTmpfs(p, path)
	if err == nil && !mounted {
		err = fmt.Errorf("mount tmpfs on %s: it is not there", path)
	}
	return err
}

// isTmpfs reports whether a tmpfs is mounted on the directory path of p.
func isTmpfs(p *podDir, path string) (bool, error) {
	var dir, parent unix.Stat_t
	var fs unix.Statfs_t
	f, err := openAt(p.fd, path, oPathDir, strict)
	if err != nil {
		return false, err
	}
	defer f.Close()
	up, err := openAt(p.fd, filepath.Dir(path), oPathDir, strict)
	if err != nil {
		return false, err
	}
	defer up.Close()
	err = errors.Join(unix.Fstat(int(f.Fd()), &dir), unix.Fstat(int(up.Fd()), &parent), unix.Fstatfs(int(f.Fd()), &fs))
	if err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	if dir.Dev == parent.Dev {
		return false, nil
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return false, fmt.Errorf("%s: something else than a tmpfs is mounted there", path)
	}
	return true, nil
}

// bind mounts what source has open, a file or directory, onto target, without
// what is mounted below it. Neither is looked up by name.
func bind(source, target *os.File) error {
	fd, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("open_tree %s: %w", source.Name(), err)
	}
	tree := os.NewFile(uintptr(fd), source.Name())
	defer tree.Close()
	err = unix.MoveMount(fd, "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("move_mount %s to %s: %w", source.Name(), target.Name(), err)
	}
	return nil
}

// unmount detaches the uppermost mount at path below dir, which no link leads
// to. unix.EINVAL: nothing is mounted there.
func unmount(dir *os.File, path string) error {
	target, err := openAt(dir, path, oPath|unix.O_NOFOLLOW, strict)
	if err != nil {
		return err
	}
	defer target.Close()
	if err := unix.Unmount(procFD(target), unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "umount2", Path: path, Err: err}
	}
	return nil
}

// mountsBelow lists what is mounted below the directory dir, by paths relative
// to it, a mount after those that it is mounted upon.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMountInfo(f, dir)
}

// maxMountLine bounds a line of mountinfo, which has two paths and options of
// at most a page each.
const maxMountLine = 256 << 10

// parseMountInfo reads the format of proc_pid_mountinfo(5).
func parseMountInfo(r io.Reader, dir string) ([]string, error) {
	var below []string
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), maxMountLine)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), " ", 6)
		if len(fields) < 6 {
			continue
		}
		path, ok := strings.CutPrefix(unescape(fields[4]), dir+"/")
		if ok && path != "" {
			below = append(below, path)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("mountinfo: %w", err)
	}
	return below, nil
}

// unescape undoes the octal escapes of space, tab, newline and backslash.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
