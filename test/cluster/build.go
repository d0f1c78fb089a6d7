package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Version is the Kubernetes release that kube/go.mod names.
const Version = "v1.37.2"

// programs are built by [Build], each from the package beside it.
var programs = [][2]string{
	{"kube", "."},
	{"kubectl", "k8s.io/kubernetes/cmd/kubectl"},
	{"etcd", "go.etcd.io/etcd/server/v3"},
}

// Build makes sure that the programs of the control plane are in the cache and
// returns the folder that holds them. Built cold, on two cores, it takes about
// seven minutes and tells progress on out. Concurrent calls wait for each other.
func Build(ctx context.Context, out io.Writer) (bin string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("build control plane: %w", err)
	}
	module := sourceDir("kube")
	sum, err := digest(module)
	if err != nil {
		return "", fmt.Errorf("build control plane: %w", err)
	}
	bin = filepath.Join(cache, "skerry", "kubernetes-"+Version+"-"+sum)
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", fmt.Errorf("build control plane: %w", err)
	}
	unlock, err := lock(filepath.Join(bin, ".lock"))
	if err != nil {
		return "", fmt.Errorf("build control plane: %w", err)
	}
	defer unlock()
	for i, p := range programs {
		if err := buildOne(ctx, out, module, bin, p, i+1); err != nil {
			return "", fmt.Errorf("build control plane: %w", err)
		}
	}
	return bin, nil
}

func buildOne(ctx context.Context, out io.Writer, module, bin string, program [2]string, n int) error {
	name, pkg := program[0], program[1]
	target := filepath.Join(bin, name)
	if _, err := os.Stat(target); err == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	const module1, module2 = "k8s.io/component-base/version", "k8s.io/client-go/pkg/version"
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags",
		"-s -w -X "+module1+".gitVersion="+Version+" -X "+module2+".gitVersion="+Version,
		"-o", target+".part", pkg)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	start := time.Now()
	done := make(chan error, 1)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { done <- cmd.Wait() }()
	tick := time.NewTicker(20 * time.Second)
	defer tick.Stop()
	fmt.Fprintf(out, "  [%d/%d] building %s %s…\n", n, len(programs), name, Version)
	for {
		select {
		case <-tick.C:
			fmt.Fprintf(out, "  [%d/%d] building %s… %s\n", n, len(programs), name, time.Since(start).Round(time.Second))
		case err := <-done:
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", name, err, output.Bytes())
			}
			return os.Rename(target+".part", target)
		}
	}
}

// digest names what the programs are built from, so that a changed module or
// toolchain gets a cache of its own.
func digest(module string) (string, error) {
	h := sha256.New()
	io.WriteString(h, runtime.Version()+runtime.GOARCH)
	for _, name := range []string{"go.mod", "go.sum", "main.go"} {
		data, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", err
		}
		h.Write(data)
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

// sourceDir is a folder beside this file in the source tree.
func sourceDir(name string) string {
	_, file, _, _ := runtime.Caller(0)
	if !filepath.IsAbs(file) { // built with -trimpath: the tree is where the command runs
		file = filepath.Join("test", "cluster", filepath.Base(file))
	}
	return filepath.Join(filepath.Dir(file), name)
}

func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", strings.TrimSuffix(path, "/.lock"), err)
		}
	}
}
