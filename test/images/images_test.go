package images

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

func hello(t *testing.T, name string, archs ...string) Image {
	t.Helper()
	files := map[string][]File{}
	for _, arch := range archs {
		files[arch] = []File{{Path: "/etc/deep/hello", Mode: 0o644, Data: []byte(arch)}, {Path: "/bin/link", Link: "hello"}}
	}
	image, err := New(name, Config{Entrypoint: []string{"/bin/link"}, User: "7"}, files)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestArchiveNamesItsImages(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.tar")
	if err := Write(file, hello(t, "example.org/a:1", "amd64", "arm64"), hello(t, "example.org/b:1", "amd64")); err != nil {
		t.Fatal(err)
	}
	names, err := Names(file)
	if want := []string{"example.org/a:1", "example.org/b:1"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("Names = %v, %v; want %v", names, err, want)
	}
}

func TestSameInputGivesTheSameBytes(t *testing.T) {
	var archives [2][]byte
	for i := range archives {
		file := filepath.Join(t.TempDir(), "a.tar")
		if err := Write(file, hello(t, "example.org/a:1", "arm64", "amd64")); err != nil {
			t.Fatal(err)
		}
		archives[i], _ = os.ReadFile(file)
	}
	if len(archives[0]) == 0 || !bytes.Equal(archives[0], archives[1]) {
		t.Error("two archives of the same image differ")
	}
}

func TestEachArchitectureHasItsOwnFiles(t *testing.T) {
	index := hello(t, "a", "amd64", "arm").index
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []v1.Platform
	for _, m := range manifest.Manifests {
		got = append(got, *m.Platform)
	}
	if len(got) != 2 || got[0].Architecture != "amd64" || got[1].Variant != "v7" {
		t.Errorf("platforms = %v", got)
	}
	image, err := index.Image(manifest.Manifests[1].Digest)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(mutate.Extract(image)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"etc/deep/", "etc/deep/hello", "bin/link"} {
		if !bytes.Contains(buf.Bytes(), []byte(want)) {
			t.Errorf("the root file system has no %s", want)
		}
	}
	config, err := image.ConfigFile()
	if err != nil || config.Config.User != "7" || config.Config.Entrypoint[0] != "/bin/link" {
		t.Errorf("config = %+v, %v", config, err)
	}
}

func TestNamesOfWhatIsNoArchive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(file, []byte("not a tar"), 0o600); err != nil {
		t.Fatal(err)
	}
	if names, err := Names(file); err == nil {
		t.Errorf("Names = %v, want an error", names)
	}
}
