package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"golang.org/x/sys/unix"
)

func TestTeardown(t *testing.T) {
	needMounts(t)
	volume, outside := tree(t)
	o := &objects{secrets: map[string]map[string]string{"keys": {"k": "s"}}}
	host, memory, disk := hostPathVolume(volume, ""), emptyDirVolume(corev1.StorageMediumMemory), emptyDirVolume("")
	host.Name, memory.Name, disk.Name = "h", "m", "d"
	m, pod := manager(t, o), podOf(secretVolume("keys"), host, memory, disk)
	setup(t, m, pod)
	c := &corev1.Container{Name: "main", VolumeMounts: []corev1.VolumeMount{
		{Name: "h", MountPath: "/h", SubPath: "dir"}, {Name: "h", MountPath: "/f", SubPath: "file"}, {Name: "m", MountPath: "/m", SubPath: "made"},
	}}
	mounts, err := m.Mounts(t.Context(), pod, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	write(t, mounts[0].HostPath+"/by-pod", "data")
	// What pods do to be remembered: links out, odd names, mounts upon mounts, a file of others.
	empty := filepath.Join(m.dir, "u-1/volumes/kubernetes.io~empty-dir/d")
	for _, err := range []error{
		os.Symlink(outside, empty+"/link"), os.Symlink("/", empty+"/root"), os.MkdirAll(empty+"/a b\\040c\n/d", 0o700),
		unix.Mkfifo(empty+"/pipe", 0o600), os.Chmod(empty, 0),
		unix.Mount("tmpfs", empty+"/a b\\040c\n/d", "tmpfs", 0, ""), unix.Mount("tmpfs", empty+"/a b\\040c\n/d", "tmpfs", 0, ""),
		unix.Mount(outside, empty+"/a b\\040c\n", "", unix.MS_BIND, ""),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	write(t, m.dir+"/u-1/etc-hosts", "hosts")
	if uids, err := m.Present(); err != nil || !reflect.DeepEqual(uids, []types.UID{"u-1"}) {
		t.Errorf("Present = %v, %v", uids, err)
	}
	for range 2 { // the second finds nothing to do
		if err := m.Teardown(t.Context(), "u-1"); err != nil {
			t.Fatalf("Teardown: %v", err)
		}
	}
	if below, err := mountsBelow(m.dir); err != nil || len(below) > 0 {
		t.Errorf("still mounted: %q, %v", below, err)
	}
	if uids, err := m.Present(); err != nil || len(uids) != 0 {
		t.Errorf("Present = %v, %v", uids, err)
	}
	if read(t, outside+"/file") != "outside" || read(t, volume+"/dir/file") != "in dir" || read(t, volume+"/dir/by-pod") != "data" {
		t.Error("what is not the pod's was removed")
	}
}

func TestTeardownRefusesOtherPaths(t *testing.T) {
	m := manager(t, &objects{})
	other := write(t, filepath.Dir(m.dir)+"/other/file", "keep")
	if err := os.Symlink("../other", m.dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, uid := range []types.UID{"", ".", "..", "../other", "/etc", "a/b", "a\x00b", "link", types.UID(strings.Repeat("x", 256))} {
		if err := m.Teardown(t.Context(), uid); err == nil {
			t.Errorf("Teardown(%q) did not refuse", uid)
		}
	}
	if err := m.Teardown(t.Context(), "never-seen"); err != nil {
		t.Errorf("Teardown of a pod without anything: %v", err)
	}
	if read(t, other) != "keep" {
		t.Error("a file outside was removed")
	}
}

func TestRemovalCrossesNoMounts(t *testing.T) {
	needMounts(t)
	dir := t.TempDir()
	keep := write(t, dir+"/other/file", "keep")
	for _, target := range []string{"tree/a/dir", "tree/a"} {
		if err := os.MkdirAll(dir+"/"+target, 0o755); err != nil {
			t.Fatal(err)
		}
		// A bind mount of the same file system, which a device number does not show.
		if err := unix.Mount(dir+"/other", dir+"/"+target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		tree, err := os.Open(dir + "/tree")
		if err != nil {
			t.Fatal(err)
		}
		r := &remover{ctx: t.Context(), trash: tree, step: func(string) {}}
		if err := r.empty(tree); err == nil || !strings.Contains(err.Error(), "something is mounted there") {
			t.Errorf("removing a tree with a mount on %s = %v", target, err)
		}
		tree.Close()
		if err := unix.Unmount(dir+"/"+target, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	if read(t, keep) != "keep" {
		t.Error("a file behind a mount was removed")
	}
}

func TestTeardownOfDeepAndWideTrees(t *testing.T) {
	m, pod := manager(t, &objects{}), podOf(emptyDirVolume(""))
	setup(t, m, pod)
	at, err := os.Open(dirOf(m, "empty-dir"))
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 { // deeper than paths are long and than files may be open
		if err := mkdirAt(at, "deep", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := openAt(at, "deep", unix.O_RDONLY|unix.O_DIRECTORY, strict)
		if err != nil {
			t.Fatal(err)
		}
		at.Close()
		at = next
	}
	at.Close()
	for i := range 1500 {
		write(t, dirOf(m, "empty-dir")+"/"+strings.Repeat("w", 1+i%200)+"-"+string(rune('a'+i%26))+"/"+string(rune('a'+i%7)), "")
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	lower := limit
	lower.Cur = 256
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lower); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err := m.Teardown(t.Context(), pod.UID); err != nil {
		t.Errorf("Teardown: %v", err)
	}
	if uids, err := m.Present(); err != nil || len(uids) != 0 {
		t.Errorf("Present = %v, %v", uids, err)
	}
}

func TestCancelledContext(t *testing.T) {
	m, pod := manager(t, &objects{}), podOf(emptyDirVolume(""))
	setup(t, m, pod)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Setup(ctx, pod); !errors.Is(err, context.Canceled) {
		t.Errorf("Setup = %v", err)
	}
	if err := m.Teardown(ctx, pod.UID); !errors.Is(err, context.Canceled) {
		t.Errorf("Teardown = %v", err)
	}
	if err := m.Teardown(t.Context(), pod.UID); err != nil {
		t.Errorf("Teardown = %v", err)
	}
}
