package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Bounds of a path, of file systems and of the kernel.
const (
	maxName = 255
	maxPath = 4095
)

// A podDir is the directory of one pod, held open.
type podDir struct {
	root *os.Root // for what happens by name, links confined
	fd   *os.File // O_PATH, for openat2
	path string
}

// openPod opens the directory of a pod, making it first if create says so.
// Without create the error is fs.ErrNotExist if there is none.
func (m *Manager) openPod(uid types.UID, create bool) (*podDir, error) {
	if err := checkElement(string(uid)); err != nil {
		return nil, fmt.Errorf("pod uid %w", err)
	}
	base, err := os.Open(m.dir)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	if create {
		m.step("mkdir pod")
		if err := mkdirAt(base, string(uid), 0o750); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	fd, err := openAt(base, string(uid), oPathDir, strict)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(m.dir, string(uid))
	root, err := os.OpenRoot(path)
	if err != nil {
		fd.Close()
		return nil, err
	}
	return &podDir{root: root, fd: fd, path: path}, nil
}

func (p *podDir) close() {
	p.root.Close()
	p.fd.Close()
}

// checkElement refuses what is not one plain element of a path.
func checkElement(s string) error {
	if s == "" || s == "." || s == ".." || len(s) > maxName || strings.ContainsAny(s, "/\x00") {
		return fmt.Errorf("%q is not a plain path element", s)
	}
	return nil
}

// kindOf returns the kind of a volume as it is in paths, "" if it is none of
// those that are supported.
func kindOf(v *corev1.Volume) string {
	switch {
	case v.EmptyDir != nil:
		return "empty-dir"
	case v.HostPath != nil:
		return "host-path"
	case v.ConfigMap != nil:
		return "configmap"
	case v.Secret != nil:
		return "secret"
	case v.DownwardAPI != nil:
		return "downward-api"
	case v.Projected != nil:
		return "projected"
	}
	return ""
}

// unsupportedKind returns the name that a kind has in a pod's spec.
func unsupportedKind(v *corev1.Volume) string {
	data, err := json.Marshal(v.VolumeSource)
	var sources map[string]json.RawMessage
	if err == nil && json.Unmarshal(data, &sources) == nil {
		for name := range sources { // the API allows one
			return name
		}
	}
	return "unknown"
}

// volumePath is where a volume is in its pod's directory.
func volumePath(kind, name string) (string, error) {
	if problems := validation.IsDNS1123Label(name); len(problems) > 0 {
		return "", fmt.Errorf("name %q: %s", name, strings.Join(problems, "; "))
	}
	return "volumes/kubernetes.io~" + kind + "/" + name, nil
}

// checkItem refuses a path of a file in a volume that is not relative, leads
// upwards, or is named like what this package makes. The result is clean.
func checkItem(path string) (string, error) {
	switch {
	case path == "":
		return "", errors.New("invalid path: must not be empty")
	case path[0] == '/':
		return "", fmt.Errorf("invalid path: must be relative path: %s", path)
	case len(path) > maxPath:
		return "", fmt.Errorf("invalid path: must be less than or equal to %d characters", maxPath)
	case strings.ContainsRune(path, 0):
		return "", fmt.Errorf("invalid path: must not contain NUL: %q", path)
	}
	for e := range strings.SplitSeq(path, "/") {
		if e == ".." {
			return "", fmt.Errorf("invalid path: must not contain '..': %s", path)
		}
		if len(e) > maxName {
			return "", fmt.Errorf("invalid path: filenames must be less than or equal to %d characters", maxName)
		}
	}
	clean := filepath.Clean(path)
	if clean == "." {
		return "", fmt.Errorf("invalid path: must name a file: %s", path)
	}
	if strings.HasPrefix(clean, "..") {
		return "", fmt.Errorf("invalid path: must not start with '..': %s", path)
	}
	return clean, nil
}

// checkSubPath refuses a subPath that is absolute or leads upwards.
func checkSubPath(path string) error {
	if filepath.IsAbs(path) {
		return fmt.Errorf("error SubPath `%s` must not be an absolute path", path)
	}
	for e := range strings.SplitSeq(path, "/") {
		if e == ".." {
			return fmt.Errorf("unable to provision SubPath `%s`: must not contain '..'", path)
		}
	}
	if len(path) > maxPath || strings.ContainsRune(path, 0) {
		return fmt.Errorf("unable to provision SubPath %.64q: not a path", path)
	}
	return nil
}
