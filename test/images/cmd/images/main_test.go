package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/test/images"
)

// TestManifestsNameTheImage sees that what is written is what is deployed.
func TestManifestsNameTheImage(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("..", "..", "..", "..", "manifests", "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var kustomization struct {
		Images []struct{ NewName, NewTag string }
	}
	if err := yaml.Unmarshal(data, &kustomization); err != nil {
		t.Fatal(err)
	}
	if len(kustomization.Images) != 1 {
		t.Fatalf("%d images", len(kustomization.Images))
	}
	if image := kustomization.Images[0]; image.NewName+":"+image.NewTag != defaultName {
		t.Errorf("manifests name %s:%s, want %s", image.NewName, image.NewTag, defaultName)
	}
}

func TestArchiveRunsAsAnOrdinaryUserOnEachArchitecture(t *testing.T) {
	dist := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		if err := os.MkdirAll(filepath.Join(dist, arch), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dist, arch, "skerry-provider"), []byte("program for "+arch), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(dist, defaultName); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dist, "skerry-provider.oci.tar")
	names, err := images.Names(archive)
	if err != nil || !slices.Equal(names, []string{defaultName}) {
		t.Errorf("the archive has %v, %v", names, err)
	}
	first, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	if err := run(dist, defaultName); err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		image := imageFor(t, archive, arch)
		config, err := image.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if c := config.Config; config.Architecture != arch || c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/skerry-provider"}) {
			t.Errorf("%s: config %+v of %s", arch, c, config.Architecture)
		}
		if files, err := io.ReadAll(mutate.Extract(image)); err != nil || !strings.Contains(string(files), "program for "+arch) {
			t.Errorf("%s: its program is not there: %v", arch, err)
		}
	}
	if second, err := os.ReadFile(archive); err != nil || !bytes.Equal(first, second) {
		t.Errorf("written again, the archive differs: %v", err)
	}
}

// imageFor reads the image for an architecture from an archive that has one image.
func imageFor(t *testing.T, archive, arch string) v1.Image {
	t.Helper()
	dir := t.TempDir()
	unpack(t, archive, dir)
	outer, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := outer.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	index, err := outer.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if manifest, err = index.IndexManifest(); err != nil {
		t.Fatal(err)
	}
	for _, m := range manifest.Manifests {
		if m.Platform.OS == "linux" && m.Platform.Architecture == arch {
			image, err := index.Image(m.Digest)
			if err != nil {
				t.Fatal(err)
			}
			return image
		}
	}
	t.Fatalf("no image for %s in %+v", arch, manifest.Manifests)
	return nil
}

func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	in, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for files := tar.NewReader(in); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(header.Name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}
