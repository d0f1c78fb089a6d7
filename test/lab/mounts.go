package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/test/containerd"
)

// removeLeftovers removes dir and what a lab there has left that was killed. Control
// plane, provider and edgelets have ended with it, containerds and pods have not.
func removeLeftovers(dir string) error {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// Others can write to the folder for temporary files, and this is for root.
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(s.Uid) != os.Getuid() {
		return fmt.Errorf("%s is somebody else's", dir)
	}
	configs, err := filepath.Glob(filepath.Join(dir, "*", "*", "network.json"))
	more, err2 := filepath.Glob(filepath.Join(dir, "*", "network.json"))
	errs := []error{err, err2}
	for _, config := range append(configs, more...) {
		errs = append(errs, containerd.Cleanup(filepath.Dir(config)))
	}
	return errors.Join(append(errs, unmountBelow(dir), os.RemoveAll(dir))...)
}

// unmountBelow unmounts what pods that were running have left below dir.
func unmountBelow(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var below []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			below = append(below, fields[4])
		}
	}
	slices.Sort(below)
	slices.Reverse(below) // the deepest first
	var errs []error
	for _, path := range below {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}
