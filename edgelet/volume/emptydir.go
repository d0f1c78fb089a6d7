package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
)

// setupEmptyDir makes an emptyDir. One that is there is left alone: it belongs
// to the pod.
func (m *Manager) setupEmptyDir(p *podDir, pod *corev1.Pod, v *corev1.Volume, path string) error {
	gid := fsGroup(pod)
	mode := uint32(0o777)
	switch v.EmptyDir.Medium {
	case corev1.StorageMediumDefault:
		if v.EmptyDir.Mode != nil {
			mode = uint32(*v.EmptyDir.Mode)
		}
		return m.makeDir(p, path, writable(mode, gid), gid)
	case corev1.StorageMediumMemory:
		mode = 0o1777 // what a tmpfs has by default, and so what a kubelet's has
		if v.EmptyDir.Mode != nil {
			mode = uint32(*v.EmptyDir.Mode)
		}
		if err := m.makeDir(p, path, 0o755, nil); err != nil {
			return err
		}
		return m.mountTmpfs(p, path, tmpfs{mode: writable(mode, gid), gid: gid, size: memorySize(pod, v.EmptyDir)})
	}
	return fmt.Errorf("unknown storage medium %q", v.EmptyDir.Medium)
}

// writable adds to the mode of a directory what a group needs that owns it.
func writable(mode uint32, gid *int64) uint32 {
	if gid != nil {
		mode |= 0o2770
	}
	return mode & 0o7777
}

// memorySize is the size of an emptyDir in memory, in bytes: its limit, or all
// the memory that the pod may use if that is less, 0 if neither is limited.
func memorySize(pod *corev1.Pod, e *corev1.EmptyDirVolumeSource) int64 {
	limited := true
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			limited = limited && !list[i].Resources.Limits.Memory().IsZero()
		}
	}
	if pod.Spec.Resources != nil && !pod.Spec.Resources.Limits.Memory().IsZero() {
		limited = true
	}
	var size int64
	if limited {
		limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
		size = limits.Memory().Value()
	}
	if e.SizeLimit != nil && e.SizeLimit.Value() > 0 && (size <= 0 || e.SizeLimit.Value() < size) {
		size = e.SizeLimit.Value()
	}
	return max(size, 0)
}

// makeDir makes the directory path of p with that mode and group. It gets its
// name when it is complete; one that has its name is left alone.
func (m *Manager) makeDir(p *podDir, path string, mode uint32, gid *int64) error {
	info, err := p.root.Lstat(path)
	if err == nil && !info.IsDir() {
		return fmt.Errorf("%s is not a directory", path)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent, name := filepath.Split(path)
	if err := p.root.MkdirAll(filepath.Clean(parent), 0o750); err != nil {
		return err
	}
	draft := parent + ".new-" + name // no volume has such a name
	if err := p.root.RemoveAll(draft); err != nil {
		return err
	}
	m.step("mkdir draft")
	if err := p.root.Mkdir(draft, 0o700); err != nil {
		return err
	}
	if gid != nil {
		m.step("chown draft")
		if err := p.root.Chown(draft, -1, int(*gid)); err != nil {
			return err
		}
	}
	m.step("chmod draft")
	if err := p.root.Chmod(draft, fileMode(mode)); err != nil {
		return err
	}
	m.step("rename draft")
	return p.root.Rename(draft, path)
}

// fileMode is the os's form of a mode in the kernel's.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}
