// Command images writes the OCI archive of skerry-provider from the binaries that
// make cross has built, without a container daemon.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/skerry-io/skerry/test/images"
)

// defaultName is the image that the manifests name.
const defaultName = "ghcr.io/skerry-io/skerry-provider:v0.1.0"

func main() {
	dist := flag.String("dist", "dist", "folder that holds <arch>/skerry-provider and gets the archive")
	name := flag.String("name", defaultName, "full reference of the image")
	flag.Parse()
	if err := run(*dist, *name); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(dist, name string) error {
	files := map[string][]images.File{}
	for _, arch := range []string{"amd64", "arm64"} {
		files[arch] = []images.File{{Path: "/skerry-provider", Source: filepath.Join(dist, arch, "skerry-provider")}}
	}
	image, err := images.New(name, images.Config{Entrypoint: []string{"/skerry-provider"}, User: "65532:65532"}, files)
	if err != nil {
		return err
	}
	archive := filepath.Join(dist, "skerry-provider.oci.tar")
	if err := images.Write(archive, image); err != nil {
		return err
	}
	info, err := os.Stat(archive)
	if err != nil {
		return err
	}
	fmt.Printf("  %s: %s for amd64 and arm64, %.1f MB\n", archive, name, float64(info.Size())/1e6)
	return nil
}
