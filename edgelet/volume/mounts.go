package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"golang.org/x/sys/unix"
)

// Mounts returns the mounts of a container, in the order of its spec, after
// making those of subPaths. env is the container's environment.
func (m *Manager) Mounts(ctx context.Context, pod *corev1.Pod, container *corev1.Container, env []*cri.KeyValue) ([]*cri.Mount, error) {
	if len(container.VolumeDevices) > 0 {
		return nil, fmt.Errorf("container %q: block devices as volumes are not supported on this site", container.Name)
	}
	unlock := m.lock(pod.UID)
	defer unlock()
	p, err := m.openPod(pod.UID, true)
	if err != nil {
		return nil, err
	}
	defer p.close()
	mounts := make([]*cri.Mount, 0, len(container.VolumeMounts))
	for i := range container.VolumeMounts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		mount, err := m.mount(p, pod, container, i, env)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, mount)
	}
	return mounts, nil
}

// mount returns the mount of the container's volume mount of that index.
func (m *Manager) mount(p *podDir, pod *corev1.Pod, container *corev1.Container, index int, env []*cri.KeyValue) (*cri.Mount, error) {
	vm := &container.VolumeMounts[index]
	i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == vm.Name })
	if i < 0 {
		return nil, fmt.Errorf("cannot find volume %q to mount into container %q", vm.Name, container.Name)
	}
	v := &pod.Spec.Volumes[i]
	host, err := m.hostPath(p, v)
	if err != nil {
		return nil, fmt.Errorf("cannot find volume %q to mount into container %q: %w", vm.Name, container.Name, err)
	}
	sub := vm.SubPath
	if vm.SubPathExpr != "" {
		if sub, err = m.expandSubPath(vm.SubPathExpr, env); err != nil {
			return nil, err
		}
	}
	if sub != "" {
		if err := checkSubPath(sub); err != nil {
			return nil, err
		}
		target, err := subPathTarget(v.Name, container.Name, index)
		if err != nil {
			return nil, err
		}
		m.step("subPath")
		if err := m.bindSubPath(p, host, sub, target); err != nil {
			m.config.Log.Warn("subPath", "pod", pod.Namespace+"/"+pod.Name, "container", container.Name, "volume", v.Name, "error", err)
			return nil, &subPathError{vm.Name, container.Name, err}
		}
		host = filepath.Join(p.path, target)
	}
	propagation, err := propagationOf(vm)
	if err != nil {
		return nil, err
	}
	recursive, err := m.recursiveReadOnly(pod, vm)
	if err != nil {
		return nil, err
	}
	return &cri.Mount{
		ContainerPath:     path.Clean("/" + vm.MountPath),
		HostPath:          host,
		Readonly:          vm.ReadOnly || v.EmptyDir == nil && v.HostPath == nil, // content is not the pod's to change
		SelinuxRelabel:    m.selinux && v.HostPath == nil,
		Propagation:       propagation,
		RecursiveReadOnly: recursive,
	}, nil
}

// hostPath is where a volume is on the host.
func (m *Manager) hostPath(p *podDir, v *corev1.Volume) (string, error) {
	if v.HostPath != nil {
		// Checked again: Setup may have been given another spec.
		return v.HostPath.Path, checkHostPath(v.HostPath)
	}
	kind := kindOf(v)
	if kind == "" {
		return "", fmt.Errorf("volumes of kind %s are not supported on this site", unsupportedKind(v))
	}
	rel, err := volumePath(kind, v.Name)
	if err != nil {
		return "", err
	}
	if info, err := p.root.Lstat(rel); err != nil || !info.IsDir() {
		return "", errors.New("it has not been set up")
	}
	return filepath.Join(p.path, rel), nil
}

func (m *Manager) expandSubPath(expr string, env []*cri.KeyValue) (string, error) {
	var missing []string
	sub := m.config.Expand(expr, func(name string) (string, bool) {
		i := slices.IndexFunc(env, func(kv *cri.KeyValue) bool { return kv.Key == name })
		if i < 0 || len(env[i].Value) == 0 {
			missing = append(missing, name)
			return "", true
		}
		return string(env[i].Value), true
	})
	if len(missing) > 0 {
		slices.Sort(missing)
		return "", fmt.Errorf("missing value for %s", strings.Join(slices.Compact(missing), ", "))
	}
	return sub, nil
}

// A subPathError does not say why: the reason could tell a pod about the host.
// The reason is in the log.
type subPathError struct {
	volume, container string
	err               error
}

func (e *subPathError) Error() string {
	return fmt.Sprintf("failed to prepare subPath for volumeMount %q of container %q", e.volume, e.container)
}

func (e *subPathError) Unwrap() error { return e.err }

// subPathTarget is where a subPath is mounted, in the pod's directory.
func subPathTarget(volume, container string, index int) (string, error) {
	for _, name := range []string{volume, container} {
		if problems := validation.IsDNS1123Label(name); len(problems) > 0 {
			return "", fmt.Errorf("name %q: %s", name, strings.Join(problems, "; "))
		}
	}
	return "volume-subpaths/" + volume + "/" + container + "/" + strconv.Itoa(index), nil
}

// bindSubPath mounts the subPath sub of the volume at host onto target. The
// subPath is opened once, within the volume, and what was opened is mounted, so
// that nothing that a pod exchanges meanwhile matters. A missing subPath becomes
// a directory.
func (m *Manager) bindSubPath(p *podDir, host, sub, target string) error {
	root, err := os.OpenFile(host, oPathDir, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	source, err := resolve(root, host, sub)
	if errors.Is(err, fs.ErrNotExist) {
		m.step("mkdir subPath")
		// Somebody else may make it meanwhile, which is as good.
		if err := makeDirs(root, host, sub); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		source, err = resolve(root, host, sub)
	}
	if err != nil {
		return err
	}
	defer source.Close()
	return m.bindOnto(p, source, target)
}

// bindOnto mounts source onto target, unless it is there already. Whatever else
// is mounted there is detached: containers that use it keep it.
func (m *Manager) bindOnto(p *podDir, source *os.File, target string) error {
	want, err := source.Stat()
	if err != nil {
		return err
	}
	if have, err := p.root.Lstat(target); err == nil && os.SameFile(want, have) {
		return nil
	}
	if err := detachAll(p, target); err != nil {
		return err
	}
	// Not with what is in it: should it be mounted after all, that is the pod's.
	if err := p.root.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := p.root.MkdirAll(path.Dir(target), 0o750); err != nil {
		return err
	}
	m.step("make target")
	if want.IsDir() {
		err = p.root.Mkdir(target, 0o750)
	} else {
		err = p.root.WriteFile(target, nil, 0o640) // for anything but a directory
	}
	if err != nil {
		return err
	}
	f, err := openAt(p.fd, target, oPath|unix.O_NOFOLLOW, strict)
	if err != nil {
		return err
	}
	defer f.Close()
	m.step("bind")
	return bind(source, f)
}

// detachAll detaches all mounts on target.
func detachAll(p *podDir, target string) error {
	for range maxRounds {
		err := unmount(p.fd, target)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: more than %d mounts on it", target, maxRounds)
}

func propagationOf(vm *corev1.VolumeMount) (cri.MountPropagation, error) {
	mode := corev1.MountPropagationNone
	if vm.MountPropagation != nil {
		mode = *vm.MountPropagation
	}
	switch mode {
	case corev1.MountPropagationNone:
		return cri.MountPropagation_PROPAGATION_PRIVATE, nil
	case corev1.MountPropagationHostToContainer:
		return cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, nil
	case corev1.MountPropagationBidirectional:
		return cri.MountPropagation_PROPAGATION_BIDIRECTIONAL, nil
	}
	return 0, fmt.Errorf("invalid MountPropagation mode: %q", mode)
}

func (m *Manager) recursiveReadOnly(pod *corev1.Pod, vm *corev1.VolumeMount) (bool, error) {
	mode := corev1.RecursiveReadOnlyDisabled
	if vm.RecursiveReadOnly != nil {
		mode = *vm.RecursiveReadOnly
	}
	if mode == corev1.RecursiveReadOnlyDisabled {
		return false, nil
	}
	if !vm.ReadOnly {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not read-only", vm.Name)
	}
	if vm.MountPropagation != nil && *vm.MountPropagation != corev1.MountPropagationNone {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not compatible with propagation %q", vm.Name, *vm.MountPropagation)
	}
	able := m.config.RecursiveReadOnly(pod)
	switch mode {
	case corev1.RecursiveReadOnlyIfPossible:
		return able, nil
	case corev1.RecursiveReadOnlyEnabled:
		if !able {
			return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not supported by the runtime", vm.Name)
		}
		return true, nil
	}
	return false, fmt.Errorf("unknown recursive read-only mode %q", mode)
}

// Open opens a regular file of a volume of pod for reading, for fileKeyRef. It
// never leaves the volume. fs.ErrNotExist: there is no such file.
func (m *Manager) Open(pod *corev1.Pod, volume, name string) (*os.File, error) {
	i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == volume })
	if i < 0 {
		return nil, fmt.Errorf("cannot find the volume %q", volume)
	}
	p, err := m.openPod(pod.UID, false)
	if err != nil {
		return nil, err
	}
	defer p.close()
	host, err := m.hostPath(p, &pod.Spec.Volumes[i])
	if err != nil {
		return nil, err
	}
	root, err := os.OpenFile(host, oPathDir, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Not blocking, should it be a pipe.
	f, err := openAt(root, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, within)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
