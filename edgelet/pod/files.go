package pod

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// Bounds of termination messages.
const (
	maxMessage    = 4096 // bytes of the message file, from its end
	maxPodMessage = 12 << 10
	maxLogMessage = 2048 // bytes of log instead
	maxLogLines   = 80
	maxLogRead    = 64 << 10 // bytes of log file looked at
)

// Names below a pod's own directory.
const (
	hostsFile     = "etc-hosts"
	containersDir = "containers"
)

// inside runs f with dir opened so that no path can lead out of it. The pod's
// names have been checked.
func (w *worker) inside(dir string, f func(root *os.Root) error) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return f(root)
}

// logDir is the pod's log directory, below LogDir.
func (w *worker) logDir() (string, error) {
	if err := criconfig.Check(w.current); err != nil {
		return "", err
	}
	return filepath.Base(criconfig.LogDirectory("/", w.current.Namespace, w.current.Name, w.uid)), nil
}

// makeLogDir makes the directory of a container's logs, or only that of the pod.
func (w *worker) makeLogDir(container string) error {
	dir, err := w.logDir()
	if err != nil {
		return err
	}
	err = w.inside(w.m.LogDir, func(root *os.Root) error {
		return root.MkdirAll(path.Join(dir, container), 0o755)
	})
	if err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	return nil
}

// ownMounts are the mounts of a container that no volume makes: /etc/hosts and
// the file for its termination message.
func (w *worker) ownMounts(pod *corev1.Pod, c *corev1.Container, ips []string) ([]*cri.Mount, error) {
	var mounts []*cri.Mount
	err := w.inside(w.m.Dir, func(root *os.Root) error {
		uid := string(w.uid)
		dir := path.Join(uid, containersDir, c.Name)
		if err := root.MkdirAll(dir, 0o750); err != nil {
			return err
		}
		taken := func(at string) bool {
			for _, m := range c.VolumeMounts {
				if path.Clean(m.MountPath) == at {
					return true
				}
			}
			return false
		}
		if !taken("/etc/hosts") && (len(ips) > 0 || pod.Spec.HostNetwork) {
			name := path.Join(uid, hostsFile)
			if err := writeFile(root, name, w.m.Environments.Hosts(pod, ips), 0o644); err != nil {
				return err
			}
			readOnly := c.SecurityContext != nil && c.SecurityContext.ReadOnlyRootFilesystem != nil && *c.SecurityContext.ReadOnlyRootFilesystem
			mounts = append(mounts, &cri.Mount{
				ContainerPath: "/etc/hosts", HostPath: filepath.Join(w.m.Dir, name), Readonly: readOnly, SelinuxRelabel: true,
			})
		}
		if c.TerminationMessagePath == "" {
			return nil
		}
		// A name of its own for every run, so that no message is taken for another's.
		name := path.Join(dir, fmt.Sprintf("%08x", rand.Uint32()))
		if err := writeFile(root, name, nil, 0o666); err != nil {
			return err
		}
		mounts = append(mounts, &cri.Mount{
			ContainerPath: path.Join("/", c.TerminationMessagePath), HostPath: filepath.Join(w.m.Dir, name), SelinuxRelabel: true,
		})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("files of container %s: %w", c.Name, err)
	}
	return mounts, nil
}

// writeFile writes a file in place, because it may be mounted in containers.
func writeFile(root *os.Root, name string, data []byte, mode fs.FileMode) error {
	if err := root.WriteFile(name, data, mode); err != nil {
		return err
	}
	return root.Chmod(name, mode) // whatever the umask
}

// readMessage adds to c the message that the container has left.
func (w *worker) readMessage(c *Container, s *cri.ContainerStatus) {
	at := s.GetAnnotations()[criconfig.AnnotationMessagePath]
	fallback := s.GetAnnotations()[criconfig.AnnotationMessagePolicy] == string(corev1.TerminationMessageFallbackToLogsOnError) &&
		c.ExitCode != 0 && c.Reason != "ContainerCannotRun"
	message := ""
	for _, m := range s.Mounts {
		if at == "" || m.ContainerPath != path.Join("/", at) {
			continue
		}
		data, err := tail(w.m.Dir, m.HostPath, maxMessage)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			message = fmt.Sprintf("Error on reading termination log: %v", err)
		}
		message += string(data)
	}
	if message == "" && fallback {
		if dir, err := w.logDir(); err == nil {
			name := filepath.Join(w.m.LogDir, dir, criconfig.LogPath(c.Name, c.Attempt))
			data, err := tail(w.m.LogDir, name, maxLogRead)
			if message = lastLines(data); err != nil {
				message = fmt.Sprintf("Error on reading termination message from logs: %v", err)
			}
		}
	}
	// The messages of a pod share one bound.
	if most := maxPodMessage / max(len(w.current.Spec.Containers)+len(w.current.Spec.InitContainers), 1); len(message) > most {
		message = message[:most]
	}
	message = strings.ToValidUTF8(message, "\uFFFD")
	switch {
	case c.Message == "":
		c.Message = message
	case message != "":
		c.Message += ": " + message
	}
}

// tail returns the last n bytes of a file below dir.
func tail(dir, name string, n int64) ([]byte, error) {
	rel, err := filepath.Rel(dir, name)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if info, err := root.Lstat(rel); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", rel)
	}
	f, err := root.Open(rel)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(max(info.Size()-n, 0), io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, n))
}

// lastLines returns the end of what was logged, given the end of a log in CRI's
// format: "time stream tag text", where the tag P says that the line goes on.
func lastLines(data []byte) string {
	lines := bytes.SplitAfter(data, []byte("\n"))
	var out []byte
	texts := make([][]byte, 0, len(lines))
	for _, line := range lines {
		fields := bytes.SplitN(line, []byte(" "), 4)
		if len(fields) != 4 || string(fields[1]) != "stdout" && string(fields[1]) != "stderr" {
			continue // the first may be cut
		}
		text := fields[3]
		if bytes.HasPrefix(fields[2], []byte("P")) {
			text = bytes.TrimSuffix(text, []byte("\n"))
		}
		texts = append(texts, text)
	}
	for _, text := range texts[max(len(texts)-maxLogLines, 0):] {
		out = append(out, text...)
	}
	return string(out[max(len(out)-maxLogMessage, 0):])
}

// removeRun removes the log of one run of a container, rotated ones included.
func (w *worker) removeRun(container string, attempt uint32) {
	dir, err := w.logDir()
	if err != nil {
		return
	}
	err = w.inside(w.m.LogDir, func(root *os.Root) error {
		name := path.Join(dir, criconfig.LogPath(container, attempt))
		entries, err := fs.ReadDir(root.FS(), path.Dir(name))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Name() == path.Base(name) || strings.HasPrefix(e.Name(), path.Base(name)+".") {
				if err := root.Remove(path.Join(path.Dir(name), e.Name())); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.log().Warn("log of a removed container stays", "container", container, "err", err)
	}
}

// removeFiles removes the pod's logs and own files.
func (w *worker) removeFiles() error {
	err := w.inside(w.m.Dir, func(root *os.Root) error { return root.RemoveAll(string(w.uid)) })
	if err != nil {
		return fmt.Errorf("remove files: %w", err)
	}
	dir, err := w.logDir()
	if err != nil {
		return nil // it had none
	}
	if err := w.inside(w.m.LogDir, func(root *os.Root) error { return root.RemoveAll(dir) }); err != nil {
		return fmt.Errorf("remove logs: %w", err)
	}
	return nil
}

// removeCgroup removes the cgroups that the runtime has made for the pod and does
// not remove with it: of each hierarchy where there are several (cgroup v1).
func (w *worker) removeCgroup() error {
	hierarchies := []string{w.m.CgroupDir}
	if _, err := os.Lstat(filepath.Join(w.m.CgroupDir, "cgroup.controllers")); errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(w.m.CgroupDir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroups: %w", err)
		}
		hierarchies = nil
		for _, e := range entries {
			if e.IsDir() {
				hierarchies = append(hierarchies, filepath.Join(w.m.CgroupDir, e.Name()))
			}
		}
	}
	for _, dir := range hierarchies {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return fmt.Errorf("remove cgroups: %w", err)
		}
		// The class of a pod whose spec is lost is not known.
		for _, class := range []corev1.PodQOSClass{corev1.PodQOSGuaranteed, corev1.PodQOSBurstable, corev1.PodQOSBestEffort} {
			pod := corev1.Pod{ObjectMeta: w.current.ObjectMeta, Status: corev1.PodStatus{QOSClass: class}}
			name := criconfig.CgroupParent(w.m.CgroupRoot, w.m.CgroupDriver(), &pod)
			err = errors.Join(err, removeDirs(root, strings.TrimPrefix(name, "/")))
		}
		root.Close()
		if err != nil {
			return fmt.Errorf("remove cgroups: %w", err)
		}
	}
	return nil
}

// removeDirs removes a directory and those below it. The files in cgroups are the
// kernel's and go with them.
func removeDirs(root *os.Root, name string) error {
	entries, err := fs.ReadDir(root.FS(), name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeDirs(root, path.Join(name, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
