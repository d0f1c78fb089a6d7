package images

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// Annotations under which an archive keeps the reference of an image.
const (
	nameAnnotation = "io.containerd.image.name"
	refAnnotation  = "org.opencontainers.image.ref.name"
)

// maxIndex bounds index.json when an archive is read, in bytes.
const maxIndex = 1 << 20

// Write writes the images as one OCI archive, replacing the file as a whole.
func Write(file string, images ...Image) error {
	dir, err := os.MkdirTemp("", "oci")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	out, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	for _, image := range images {
		names := map[string]string{nameAnnotation: image.Name, refAnnotation: image.Name}
		if err := appendImage(out, image.index, names); err != nil {
			return fmt.Errorf("write %s: image %s: %w", file, image.Name, err)
		}
	}
	temp, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	if err := errors.Join(tarTree(temp, dir), temp.Chmod(0o644), temp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return os.Rename(temp.Name(), file)
}

// appendImage adds an image to a layout: an index when it is for several
// architectures, else the one manifest, which every importer understands.
func appendImage(out layout.Path, index v1.ImageIndex, names map[string]string) error {
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	if len(manifest.Manifests) != 1 {
		return out.AppendIndex(index, layout.WithAnnotations(names))
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	return out.AppendImage(image, layout.WithAnnotations(names), layout.WithPlatform(*manifest.Manifests[0].Platform))
}

// Names lists the references of the images in an OCI archive.
func Names(file string) ([]string, error) {
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	archive := tar.NewReader(in)
	for {
		header, err := archive.Next()
		if err != nil {
			return nil, fmt.Errorf("archive %s: index.json: %w", file, err)
		}
		if filepath.Clean(header.Name) != "index.json" {
			continue
		}
		var index v1.IndexManifest
		if err := json.NewDecoder(io.LimitReader(archive, maxIndex)).Decode(&index); err != nil {
			return nil, fmt.Errorf("archive %s: index.json: %w", file, err)
		}
		var names []string
		for _, manifest := range index.Manifests {
			if name := manifest.Annotations[nameAnnotation]; name != "" {
				names = append(names, name)
			}
		}
		return names, nil
	}
}

// tarTree writes the regular files below dir in lexical order, without times.
func tarTree(w io.Writer, dir string) error {
	out := tar.NewWriter(w)
	root := os.DirFS(dir)
	err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: info.Size(), Format: tar.FormatPAX}
		if err := out.WriteHeader(header); err != nil {
			return err
		}
		in, err := root.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(out, in)
		return err
	})
	return errors.Join(err, out.Close())
}
