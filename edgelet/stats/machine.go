package stats

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// maxFile bounds what is read of one file of the system, in bytes.
const maxFile = 256 << 10

// A machine is read through its files, below a root that tests can choose.
type machine struct{ root string }

// read returns the start of a file.
func (m machine) read(path string) (string, error) {
	file, err := os.Open(filepath.Join(m.root, path))
	if err != nil {
		return "", err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return string(data), nil
}

// line returns the first of the files that has something in it, in one line; ""
// if none does.
func (m machine) line(paths ...string) string {
	for _, path := range paths {
		text, err := m.read(path)
		first, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
		// Device trees end their strings with a zero byte.
		if first = strings.Trim(first, " \x00"); err == nil && first != "" {
			return printable(first)
		}
	}
	return ""
}

// number reads a file that has one number in it; 0 if it does not.
func (m machine) number(path string) uint64 {
	n, _ := strconv.ParseUint(m.line(path), 10, 64)
	return n
}

// memory reads the state of memory.
func (m machine) memory() (Memory, error) {
	text, err := m.read("proc/meminfo")
	if err != nil {
		return Memory{}, err
	}
	return parseMeminfo(text)
}

// cpus counts the processors that are online.
func (m machine) cpus() int64 {
	if n := parseCPUList(m.line("sys/devices/system/cpu/online")); n > 0 {
		return n
	}
	return int64(runtime.NumCPU())
}

// hugepages returns the bytes reserved for huge pages, by page size in bytes.
func (m machine) hugepages() map[uint64]uint64 {
	const dir = "sys/kernel/mm/hugepages"
	entries, _ := os.ReadDir(filepath.Join(m.root, dir))
	pages := map[uint64]uint64{}
	for _, entry := range entries {
		text, ok := strings.CutSuffix(strings.TrimPrefix(entry.Name(), "hugepages-"), "kB")
		size, err := strconv.ParseUint(text, 10, 32)
		if !ok || err != nil || size == 0 {
			continue
		}
		pages[size<<10] = min(m.number(filepath.Join(dir, entry.Name(), "nr_hugepages")), 1<<40/size) * size << 10
	}
	return pages
}

// processes returns how many processes and threads there are and may be.
func (m machine) processes() (now, most uint64) {
	now = parseLoadavg(m.line("proc/loadavg"))
	most = m.number("proc/sys/kernel/pid_max")
	if threads := m.number("proc/sys/kernel/threads-max"); threads > 0 {
		most = min(most, threads)
	}
	return now, most
}

// systemInfo reads who the machine is. The runtime and the versions of Kubernetes
// are left to others.
func (m machine) systemInfo() corev1.NodeSystemInfo {
	release, _ := m.read("etc/os-release")
	if release == "" {
		release, _ = m.read("usr/lib/os-release")
	}
	id := m.line("etc/machine-id", "var/lib/dbus/machine-id")
	uuid := m.line("sys/class/dmi/id/product_uuid", "proc/device-tree/serial-number")
	if uuid == "" {
		uuid = id
	}
	return corev1.NodeSystemInfo{
		MachineID:       id,
		SystemUUID:      uuid,
		BootID:          m.line("proc/sys/kernel/random/boot_id"),
		KernelVersion:   m.line("proc/sys/kernel/osrelease"),
		OSImage:         parseOSRelease(release),
		OperatingSystem: "linux",
		Architecture:    runtime.GOARCH,
	}
}

// A Filesystem is the space on a file system, in bytes and inodes. A file system
// without a fixed number of inodes, such as btrfs, has none.
type Filesystem struct {
	Capacity, Available uint64
	Inodes, InodesFree  uint64
}

func statfs(path string) (Filesystem, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return Filesystem{}, fmt.Errorf("file system of %s: %w", path, err)
	}
	size := uint64(fs.Bsize)
	return Filesystem{fs.Blocks * size, fs.Bavail * size, fs.Files, fs.Ffree}, nil
}
