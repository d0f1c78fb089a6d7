package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside is set in the process that has mounts of its own.
const inside = "SKERRY_VOLUME_TEST_NAMESPACE"

// TestMain runs the tests in a mount namespace of their own, so that no mount
// of theirs is seen outside or outlives them: as root directly, otherwise in a
// user namespace. Where neither can be had, tests that mount are skipped.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		// Some hosts let anyone have a user namespace but do nothing in it.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "no private mounts, tests that mount are skipped:", err)
			os.Unsetenv(inside)
		}
		if os.Getenv(victimDir) != "" {
			beKilled()
		}
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig is of the thread
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	err := cmd.Start()
	if err != nil {
		fmt.Fprintln(os.Stderr, "no mount namespace, tests that mount are skipped:", err)
		os.Exit(m.Run())
	}
	if exit := (*exec.ExitError)(nil); errors.As(cmd.Wait(), &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
}

// needMounts skips a test where mounting is not possible.
func needMounts(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("this user may neither mount nor make a user namespace")
	}
}

// group is a group that this process may give files to.
func group(t testing.TB) int64 {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Chown(-1, 2345) == nil {
		return 2345
	}
	return int64(os.Getegid())
}
