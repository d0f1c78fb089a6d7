package critest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// newImage makes up an image; its digest follows from its name.
func newImage(name string) *cri.Image {
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name)))
	repo, _, _ := strings.Cut(name, "@")
	if i := strings.LastIndexByte(repo, ':'); i > strings.LastIndexByte(repo, '/') {
		repo = repo[:i]
	}
	return &cri.Image{Id: digest, RepoTags: []string{name}, RepoDigests: []string{repo + "@" + digest}, Size: 1 << 20, Spec: &cri.ImageSpec{Image: name}}
}

// findImage finds an image by name, digest reference or id.
func (f *Fake) findImage(ref string) *cri.Image {
	for _, image := range f.images {
		if image.Id == ref || slices.Contains(image.RepoTags, ref) || slices.Contains(image.RepoDigests, ref) {
			return image
		}
	}
	return nil
}

// PullImage makes an image present.
func (f *Fake) PullImage(ctx context.Context, image *cri.ImageSpec, auth *cri.AuthConfig, _ *cri.PodSandboxConfig) (ref string, err error) {
	if f.options.Pull != nil {
		if err := f.options.Pull(ctx, image.Image, auth); err != nil {
			return "", err
		}
	}
	err = f.call(ctx, Call{Method: "PullImage", Object: image.Image}, func() error {
		pulled := newImage(image.Image)
		f.images[image.Image], ref = pulled, pulled.Id
		return nil
	})
	return onlyIf(ref, err)
}

// ImageStatus describes an image; nil if it is not present.
func (f *Fake) ImageStatus(ctx context.Context, image *cri.ImageSpec) (result *cri.Image, err error) {
	err = f.call(ctx, Call{Method: "ImageStatus", Object: image.Image}, func() error {
		if found := f.findImage(image.Image); found != nil {
			result = proto.CloneOf(found)
		}
		return nil
	})
	return result, err
}

// ListImages lists the images that are present.
func (f *Fake) ListImages(ctx context.Context) (list []*cri.Image, err error) {
	err = f.call(ctx, Call{Method: "ListImages"}, func() error {
		for _, name := range slices.Sorted(maps.Keys(f.images)) {
			list = append(list, proto.CloneOf(f.images[name]))
		}
		return nil
	})
	return list, err
}

// RemoveImage removes an image. Idempotent.
func (f *Fake) RemoveImage(ctx context.Context, image *cri.ImageSpec) error {
	return f.call(ctx, Call{Method: "RemoveImage", Object: image.Image}, func() error {
		if found := f.findImage(image.Image); found != nil {
			delete(f.images, found.Spec.Image)
		}
		return nil
	})
}

// ExecSync answers as the options say, in a container that runs.
func (f *Fake) ExecSync(ctx context.Context, id string, command []string, _ time.Duration) (stdout, stderr []byte, exit int32, err error) {
	var config *cri.ContainerConfig
	err = f.call(ctx, Call{"ExecSync", id, f.podOf(id)}, func() error {
		c := f.containers[id]
		if c == nil || c.status.State != cri.ContainerState_CONTAINER_RUNNING {
			return notFound("running container", id)
		}
		config = proto.CloneOf(c.config)
		return nil
	})
	if err != nil || f.options.Exec == nil {
		return nil, nil, 0, err
	}
	return f.options.Exec(config, command)
}

// ReopenContainerLog does nothing, as a log that is written at the start needs.
func (f *Fake) ReopenContainerLog(ctx context.Context, id string) error {
	return f.call(ctx, Call{"ReopenContainerLog", id, f.podOf(id)}, func() error { return nil })
}

// A logFile is a container's log; nil is one that nobody wants.
type logFile struct{ file *os.File }

// openLog opens a log, in a directory that is made as containerd makes it.
func openLog(path string) (*logFile, error) {
	if path == "" {
		return nil, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, err
	}
	return &logFile{file}, nil
}

func (l *logFile) write(lines []string) {
	if l == nil {
		return
	}
	for _, line := range lines {
		fmt.Fprintf(l.file, "%s stdout F %s\n", time.Now().Format(time.RFC3339Nano), line)
	}
}

func (l *logFile) close() {
	if l != nil {
		_ = l.file.Close()
	}
}
