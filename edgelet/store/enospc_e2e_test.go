//go:build e2e

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFullDiskLosesNothing needs root, for a small tmpfs.
func TestFullDiskLosesNothing(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("store-test", dir, "tmpfs", 0, "size=512k,mode=700"))
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "edge.db")
	d := openAt(t, path)
	tab := NewTable[record](d, "pods")
	n, err := 0, error(nil)
	for ; err == nil && n < 1000; n++ {
		err = tab.Put(fmt.Sprint(n), record{Name: strings.Repeat("x", 3000)})
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("after %d values: %v", n, err)
	}
	n-- // the last was refused
	if all, err := tab.All(); err != nil || len(all) != n {
		t.Errorf("read with a full disk: %d of %d, %v", len(all), n, err)
	}
	must(t, d.Close())

	// Opening needs no room, and with room again writing goes on.
	d = openAt(t, path)
	if len(d.Damage()) != 0 {
		t.Errorf("damage: %v", d.Damage())
	}
	must(t, unix.Mount("store-test", dir, "tmpfs", unix.MS_REMOUNT, "size=8m"))
	tab = NewTable[record](d, "pods")
	must(t, tab.Put("more", record{}))
	if all, err := tab.All(); err != nil || len(all) != n+1 {
		t.Errorf("with room again: %d of %d, %v", len(all), n+1, err)
	}
	must(t, d.Close())
	must(t, os.Remove(path))
}
