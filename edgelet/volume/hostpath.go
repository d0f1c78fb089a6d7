package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// checkHostPath checks that the path of a hostPath volume is what its type says,
// and makes it where the type says so. The path is the host's: links on it are
// the host's business and are followed.
func checkHostPath(v *corev1.HostPathVolumeSource) error {
	if slices.Contains(strings.Split(v.Path, "/"), "..") {
		return fmt.Errorf("invalid HostPath `%s`: must not contain '..'", v.Path)
	}
	if !strings.HasPrefix(v.Path, "/") || strings.ContainsRune(v.Path, 0) {
		return fmt.Errorf("invalid HostPath %q: must be an absolute path", v.Path)
	}
	kind := corev1.HostPathUnset
	if v.Type != nil {
		kind = *v.Type
	}
	wanted, ok := map[corev1.HostPathType]string{
		corev1.HostPathUnset:             "",
		corev1.HostPathDirectoryOrCreate: "directory",
		corev1.HostPathDirectory:         "directory",
		corev1.HostPathFileOrCreate:      "file",
		corev1.HostPathFile:              "file",
		corev1.HostPathSocket:            "socket file",
		corev1.HostPathCharDev:           "character device",
		corev1.HostPathBlockDev:          "block device",
	}[kind]
	switch {
	case !ok:
		return fmt.Errorf("%s is an invalid volume type", kind)
	case wanted == "":
		return nil
	}
	info, err := os.Stat(v.Path)
	if errors.Is(err, fs.ErrNotExist) {
		switch kind {
		case corev1.HostPathDirectoryOrCreate:
			return os.MkdirAll(v.Path, 0o755)
		case corev1.HostPathFileOrCreate:
			return makeFile(v.Path)
		}
		return fmt.Errorf("hostPath type check failed: %s is not a %s, it does not exist", v.Path, wanted)
	}
	if err != nil {
		return fmt.Errorf("hostPath type check failed: %s is not a %s, unable to determine its type: %w", v.Path, wanted, err)
	}
	if is := fileKind(info.Mode()); is != wanted {
		return fmt.Errorf("hostPath type check failed: %s is not a %s, it is a %s", v.Path, wanted, is)
	}
	return nil
}

func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil // just made by somebody else
	}
	if err != nil {
		return err
	}
	return f.Close()
}

func fileKind(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "directory"
	case mode.IsRegular():
		return "file"
	case mode&fs.ModeSocket != 0:
		return "socket file"
	case mode&fs.ModeCharDevice != 0:
		return "character device"
	case mode&fs.ModeDevice != 0:
		return "block device"
	}
	return "file of another kind"
}
