// Package images builds container images from static programs, without a daemon
// and without a registry, and writes them as OCI archives, which
// "ctr images import", skopeo and "docker load" understand.
//
// The same input gives the same bytes: files carry no time and no owner but root.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A File is one entry of a root file system. Exactly one of Source, Data and Link
// says what it is; none of them: a directory.
type File struct {
	Path   string // in the image, absolute
	Mode   int64  // default 0755
	Source string // file of this machine to copy
	Data   []byte
	Link   string // target of a symbolic link
}

// A Config says how containers of an image run.
type Config struct {
	Entrypoint, Cmd []string
	User            string // default root
	WorkingDir      string // default /
	Env             []string
	Labels          map[string]string
}

// An Image is an image under its full reference, for one architecture or several.
type Image struct {
	Name  string
	index v1.ImageIndex
}

// New builds an image of the files for each architecture, GOARCH of linux.
func New(name string, config Config, files map[string][]File) (Image, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	archs := make([]string, 0, len(files))
	for arch := range files {
		archs = append(archs, arch)
	}
	slices.Sort(archs)
	for _, arch := range archs {
		platform := v1.Platform{OS: "linux", Architecture: arch}
		if arch == "arm" {
			platform.Variant = "v7"
		}
		image, err := build(platform, config, files[arch])
		if err != nil {
			return Image{}, fmt.Errorf("image %s for %s: %w", name, arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &platform},
		})
	}
	return Image{Name: name, index: index}, nil
}

// Busybox builds an image of a static busybox, one link for each of its applets.
func Busybox(ctx context.Context, name, busybox string) (Image, error) {
	list, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return Image{}, fmt.Errorf("list applets of %s: %w", busybox, err)
	}
	files := []File{
		{Path: "/bin/busybox", Source: busybox},
		{Path: "/tmp", Mode: 0o1777},
		{Path: "/etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{Path: "/etc/group", Mode: 0o644, Data: []byte("root:x:0:\nnobody:x:65534:\n")},
		{Path: "/root", Mode: 0o700},
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Path: "/bin/" + applet, Link: "busybox"})
		}
	}
	config := Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}}
	return New(name, config, map[string][]File{runtime.GOARCH: files})
}

// Program compiles a main package of this module, without cgo, for each of the
// architectures (default: this machine's) and builds an image that runs it.
func Program(ctx context.Context, name, pkg string, config Config, archs ...string) (Image, error) {
	if len(archs) == 0 {
		archs = []string{runtime.GOARCH}
	}
	dir, err := os.MkdirTemp("", "image")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(dir)
	files := map[string][]File{}
	target := "/" + path.Base(pkg)
	for _, arch := range archs {
		binary := filepath.Join(dir, arch)
		if err := compile(ctx, pkg, arch, binary); err != nil {
			return Image{}, err
		}
		data, err := os.ReadFile(binary)
		if err != nil {
			return Image{}, err
		}
		files[arch] = []File{{Path: target, Data: data}}
	}
	if config.Entrypoint == nil {
		config.Entrypoint = []string{target}
	}
	return New(name, config, files)
}

// Pause builds the sandbox image.
func Pause(ctx context.Context, name string, archs ...string) (Image, error) {
	return Program(ctx, name, "github.com/skerry-io/skerry/test/images/pause", Config{}, archs...)
}

// compile builds a static program with what can be left out of it left out.
func compile(ctx context.Context, pkg, arch, output string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", output, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOARM=7")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile %s for %s: %w: %s", pkg, arch, err, bytes.TrimSpace(out))
	}
	return nil
}

// build makes a single-layer image.
func build(platform v1.Platform, config Config, files []File) (v1.Image, error) {
	content, err := layerTar(files)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: platform.OS, Architecture: platform.Architecture, Variant: platform.Variant,
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: config.Entrypoint, Cmd: config.Cmd, User: config.User,
			WorkingDir: config.WorkingDir, Env: config.Env, Labels: config.Labels,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return mutate.AppendLayers(image, layer)
}

// layerTar writes the files, and the directories above them, as a tar stream.
func layerTar(files []File) ([]byte, error) {
	var buf bytes.Buffer
	out := tar.NewWriter(&buf)
	made := map[string]bool{".": true}
	for _, file := range files {
		name := strings.TrimPrefix(path.Clean("/"+file.Path), "/")
		if err := parents(out, made, path.Dir(name)); err != nil {
			return nil, err
		}
		if err := file.writeTo(out, name); err != nil {
			return nil, fmt.Errorf("file %s: %w", file.Path, err)
		}
		made[name] = true
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// parents writes the directories that lead to dir and dir itself, each once.
func parents(out *tar.Writer, made map[string]bool, dir string) error {
	if made[dir] {
		return nil
	}
	if err := parents(out, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, Format: tar.FormatPAX})
}

func (f File) writeTo(out *tar.Writer, name string) error {
	header := &tar.Header{Name: name, Mode: f.Mode, Format: tar.FormatPAX}
	if header.Mode == 0 {
		header.Mode = 0o755
	}
	data := f.Data
	switch {
	case f.Link != "":
		header.Typeflag, header.Linkname = tar.TypeSymlink, f.Link
	case f.Source != "":
		var err error
		if data, err = os.ReadFile(f.Source); err != nil {
			return err
		}
		fallthrough
	case f.Data != nil:
		header.Typeflag, header.Size = tar.TypeReg, int64(len(data))
	default:
		header.Typeflag, header.Name = tar.TypeDir, name+"/"
	}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err := out.Write(data)
	return err
}
