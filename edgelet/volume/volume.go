// Package volume prepares the volumes of pods: emptyDir, hostPath, configMap,
// secret, downwardAPI and projected. What it does is what a pod sees of a
// kubelet, down to the names of links and the texts of errors.
//
// # On disk
//
//	<Dir>/<pod uid>/                                          0750
//	    volumes/kubernetes.io~<kind>/<volume>/                a volume; with medium Memory and for
//	                                                          what may be secret, a tmpfs is mounted here
//	    volume-subpaths/<volume>/<container>/<mount index>    a bind mount of a subPath
//
// The tree of a pod may hold files of others (a hosts file, say);
// [Manager.Teardown] removes them too.
//
// Volumes with content (configMap, secret, downwardAPI, projected) hold
//
//	..2026_07_01_12_00_00.123456789/   the files as they were written then
//	..data -> ..2026_07_01_12_00_00.123456789
//	name   -> ..data/name              for the first element of each file's path
//
// An update writes a new directory and renames a new link over ..data, so that
// a reader sees all of the old content or all of the new. Secret, downwardAPI
// and projected volumes are on tmpfs only, so that no secret reaches the disk.
//
// # Interruption
//
// Whatever is half made when the process is killed is completed by the next
// Setup or removed by the next Teardown. A directory gets its name when it is
// complete; a tmpfs has its mode, group and size from the moment it is mounted;
// content is compared with what it should be and not assumed.
//
// # Pods are not trusted
//
// A pod controls what is inside its volumes, at any time, also while it is being
// removed. Paths from a pod's spec and everything below a volume are therefore
// opened with openat2(2) relative to a directory that is held open, never by
// name from the root; what was opened is what is mounted. Removal follows no
// links and crosses no mounts. All this needs Linux 5.6; there is no other way
// for older kernels.
//
// fsGroupChangePolicy has nothing to act on: it concerns volumes that outlive a
// pod, and none of these kinds does. A group is set when a volume is made.
package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Objects reads what volumes refer to. Errors wrap edge.ErrAbsent or
// edge.ErrUnknown. What it returns is not changed.
type Objects interface {
	ConfigMap(namespace, name string) (*corev1.ConfigMap, error)
	Secret(namespace, name string) (*corev1.Secret, error)
	// Token returns a current token of pod's service account. An empty audience
	// is the API server's.
	Token(pod *corev1.Pod, audience string, expirationSeconds int64) (string, error)
}

// Fields reads what downwardAPI shows. Package podenv implements it.
type Fields interface {
	Field(pod *corev1.Pod, path string) (string, error)
	Resource(pod *corev1.Pod, container string, selector *corev1.ResourceFieldSelector) (string, error)
}

// Config configures a Manager. Objects, Fields and Expand are required.
type Config struct {
	// Dir holds a directory for each pod. Default /var/lib/edgelet/pods.
	Dir string

	Objects Objects
	Fields  Fields

	// Expand replaces $(NAME) in a subPathExpr, as podenv.Expand does.
	Expand func(s string, lookup func(name string) (string, bool)) string

	// RecursiveReadOnly says whether the runtime of pod can make mounts read-only
	// with all that is mounted below them. Default no.
	RecursiveReadOnly func(pod *corev1.Pod) bool

	Log *slog.Logger // default slog.Default()
}

// A Manager prepares and removes volumes. Its methods may be called from any
// goroutine; calls for one pod wait for each other.
type Manager struct {
	config  Config
	dir     string // Config.Dir without links, as mountinfo has it
	selinux bool   // the host labels files

	// step is called before each change of the file system, for tests to
	// interrupt there; otherwise it does nothing.
	step func(what string)

	mu    sync.Mutex // guards the following fields
	busy  map[types.UID]*podLock
	stale map[staleKey]string // volumes that keep their last content, and why
}

type staleKey struct {
	pod    types.UID
	volume string
}

// New returns a Manager, after making its directory.
func New(config Config) (*Manager, error) {
	if config.Objects == nil || config.Fields == nil || config.Expand == nil {
		return nil, errors.New("volume: Objects, Fields and Expand are required")
	}
	if config.Dir == "" {
		config.Dir = "/var/lib/edgelet/pods"
	}
	if config.RecursiveReadOnly == nil {
		config.RecursiveReadOnly = func(*corev1.Pod) bool { return false }
	}
	if config.Log == nil {
		config.Log = slog.Default()
	}
	if err := os.MkdirAll(config.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("volume directory: %w", err)
	}
	dir, err := filepath.Abs(config.Dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("volume directory: %w", err)
	}
	_, err = os.Stat("/sys/fs/selinux/enforce")
	return &Manager{
		config:  config,
		dir:     dir,
		selinux: err == nil,
		step:    func(string) {},
		busy:    map[types.UID]*podLock{},
		stale:   map[staleKey]string{},
	}, nil
}

// Setup makes all volumes of pod present and their content current. The error
// joins one for each volume that it could not make; the others are ready. A
// volume that has had its content keeps it while what it refers to cannot be
// read, which is logged and no error, so that a pod outlives its objects.
func (m *Manager) Setup(ctx context.Context, pod *corev1.Pod) error {
	unlock := m.lock(pod.UID)
	defer unlock()
	p, err := m.openPod(pod.UID, true)
	if err != nil {
		return err
	}
	defer p.close()
	var errs []error
	for i := range pod.Spec.Volumes {
		if err := ctx.Err(); err != nil {
			return err
		}
		v := &pod.Spec.Volumes[i]
		if err := m.setup(p, pod, v); err != nil {
			errs = append(errs, fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", v.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) setup(p *podDir, pod *corev1.Pod, v *corev1.Volume) error {
	kind := kindOf(v)
	switch {
	case kind == "":
		return fmt.Errorf("volumes of kind %s are not supported on this site, only configMap, downwardAPI, emptyDir, hostPath, projected and secret are", unsupportedKind(v))
	case v.HostPath != nil:
		return checkHostPath(v.HostPath)
	}
	path, err := volumePath(kind, v.Name)
	if err != nil {
		return err
	}
	if v.EmptyDir != nil {
		return m.setupEmptyDir(p, pod, v, path)
	}
	return m.setupContent(p, pod, v, path)
}

// An EmptyDir is an emptyDir volume of a pod, for those who measure it.
type EmptyDir struct {
	Name   string
	Path   string // on the host
	Limit  int64  // bytes that it may hold, 0 if that is not limited
	Memory bool   // a tmpfs, which keeps to its limit by itself
}

// EmptyDirs lists the emptyDir volumes of pod, made or not.
func (m *Manager) EmptyDirs(pod *corev1.Pod) []EmptyDir {
	var list []EmptyDir
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		path, err := volumePath(kindOf(v), v.Name)
		if v.EmptyDir == nil || err != nil {
			continue
		}
		e := EmptyDir{Name: v.Name, Path: filepath.Join(m.dir, string(pod.UID), path), Memory: v.EmptyDir.Medium == corev1.StorageMediumMemory}
		if v.EmptyDir.SizeLimit != nil {
			e.Limit = v.EmptyDir.SizeLimit.Value()
		}
		list = append(list, e)
	}
	return list
}

// A podLock makes the calls for one pod wait for each other.
type podLock struct {
	sync.Mutex
	users int // guarded by Manager.mu; the lock is dropped with the last
}

func (m *Manager) lock(uid types.UID) (unlock func()) {
	m.mu.Lock()
	l := m.busy[uid]
	if l == nil {
		l = &podLock{}
		m.busy[uid] = l
	}
	l.users++
	m.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		m.mu.Lock()
		defer m.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(m.busy, uid)
		}
	}
}
