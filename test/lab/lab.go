package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/test/images"
)

// Busybox is an image that every site has: sh and the usual tools.
const Busybox = "skerry.test/busybox:1"

// Namespace is where the provider lives in the cluster.
const Namespace = "skerry-system"

// Options say what to set up. All fields may be left zero.
type Options struct {
	Bin string    // folder of skerry-provider and edgelet; default bin at the root of the source tree
	Net int       // third byte of the lab's address, 10.98.<Net>.1; labs at the same time need different ones
	Out io.Writer // progress; default none
}

// A Lab is a control plane, with a provider and sites added as needed.
type Lab struct {
	Cluster  *cluster.Cluster
	Dir      string // holds all state; Close removes it
	Address  string // of the lab's bridge: API server, provider and links listen here
	Provider *cluster.Process

	options Options
	bridge  string
	claim   net.Listener // of the lab's number
	images  string
	sites   []*Site
}

// Start sets up a control plane, after removing what a lab of the same number has
// left that was killed.
func Start(ctx context.Context, o Options) (_ *Lab, err error) {
	o.Bin = cmp.Or(o.Bin, filepath.Join(Root(), "bin"))
	if o.Out == nil {
		o.Out = io.Discard
	}
	l := &Lab{
		Dir:     filepath.Join(os.TempDir(), fmt.Sprintf("skerry-lab-%d", o.Net)),
		Address: fmt.Sprintf("10.98.%d.1", o.Net),
		options: o, bridge: fmt.Sprintf("skerry-lab%d", o.Net),
	}
	if l.claim, err = net.Listen("unix", "@"+l.bridge); err != nil {
		return nil, fmt.Errorf("lab %d is in use: %w", o.Net, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(context.WithoutCancel(ctx)))
		}
	}()
	if err := removeLeftovers(l.Dir); err != nil {
		return nil, fmt.Errorf("lab %d: %w", o.Net, err)
	}
	if err := os.Mkdir(l.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := cluster.AddBridge(l.bridge, l.Address+"/24"); err != nil {
		return nil, err
	}
	if l.images, err = l.writeImages(ctx); err != nil {
		return nil, err
	}
	dir := filepath.Join(l.Dir, "cluster")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if l.Cluster, err = cluster.Start(ctx, cluster.Options{Dir: dir, Address: l.Address, Out: o.Out}); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Lab) writeImages(ctx context.Context) (string, error) {
	busybox, err := images.Busybox(ctx, Busybox, "/bin/busybox")
	if err != nil {
		return "", err
	}
	file := filepath.Join(l.Dir, "images.tar")
	return file, images.Write(file, busybox)
}

// StartProvider installs the provider's account and rights and runs the provider
// beside the cluster, or runs it again after it was killed.
func (l *Lab) StartProvider(ctx context.Context, args ...string) error {
	if _, err := l.Kubectl(ctx, "apply", "-k", filepath.Join(Root(), "manifests", "rbac")); err != nil {
		return err
	}
	kubeconfig, err := l.accountKubeconfig(ctx)
	if err != nil {
		return err
	}
	l.Provider, err = l.Cluster.Run("skerry-provider", append([]string{filepath.Join(l.options.Bin, "skerry-provider"), "run",
		"--kubeconfig=" + kubeconfig, "--namespace=" + Namespace, "--replica=lab",
		"--address=" + l.Address, "--listen=" + l.ProviderAddress(), "--public-name=" + l.Address,
		"--metrics-listen=" + net.JoinHostPort(l.Address, "9090")}, args...)...)
	if err != nil {
		return err
	}
	return l.Until(ctx, time.Minute, "the provider is ready", func() error {
		select {
		case <-l.Provider.Done():
			return fmt.Errorf("skerry-provider ended:\n%s", l.Provider.Tail())
		default:
		}
		return get("http://" + net.JoinHostPort(l.Address, "9090") + "/readyz")
	})
}

// ProviderAddress is where edgelets reach the provider.
func (l *Lab) ProviderAddress() string { return net.JoinHostPort(l.Address, "8443") }

// accountKubeconfig writes a kubeconfig of the provider's service account.
func (l *Lab) accountKubeconfig(ctx context.Context) (string, error) {
	token, err := l.Kubectl(ctx, "-n", Namespace, "create", "token", "skerry-provider", "--duration=24h")
	if err != nil {
		return "", err
	}
	path := filepath.Join(l.Dir, "provider.kubeconfig")
	for _, args := range [][]string{
		{"set-cluster", "lab", "--server=" + l.Cluster.Server, "--certificate-authority=" + l.Cluster.CA()},
		{"set-credentials", "skerry-provider", "--token=" + strings.TrimSpace(token)},
		{"set-context", "lab", "--cluster=lab", "--user=skerry-provider"},
		{"use-context", "lab"},
	} {
		out, err := exec.CommandContext(ctx, l.Cluster.Kubectl, append([]string{"--kubeconfig=" + path, "config"}, args...)...).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("kubectl config %s: %w: %s", args[0], err, out)
		}
	}
	return path, nil
}

// Command is a kubectl command line as an administrator runs it.
func (l *Lab) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, l.Cluster.Kubectl, append([]string{"--kubeconfig=" + l.Cluster.Kubeconfig}, args...)...)
}

// Kubectl runs kubectl and returns its standard output; the error has what it
// wrote to standard error.
func (l *Lab) Kubectl(ctx context.Context, args ...string) (string, error) {
	return l.KubectlInput(ctx, "", args...)
}

// KubectlInput is Kubectl with a standard input, as for apply -f -.
func (l *Lab) KubectlInput(ctx context.Context, input string, args ...string) (string, error) {
	cmd := l.Command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Until polls check until it is nil or limit has passed; what says what is awaited.
func (l *Lab) Until(ctx context.Context, limit time.Duration, what string, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not after %s: %s: %w", limit, what, err)
		case <-tick.C:
		}
	}
}

// Close ends everything and removes what was made.
func (l *Lab) Close(ctx context.Context) error {
	var errs []error
	for _, s := range l.sites {
		errs = append(errs, s.close(ctx))
	}
	if l.Provider != nil {
		l.Provider.Stop(10 * time.Second)
	}
	if l.Cluster != nil {
		l.Cluster.Stop()
	}
	cluster.DeleteBridge(l.bridge)
	return errors.Join(append(errs, os.RemoveAll(l.Dir), l.claim.Close())...)
}

// Root is the root of the source tree.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	if !filepath.IsAbs(file) { // built with -trimpath: the tree is where the command runs
		return "."
	}
	return filepath.Join(filepath.Dir(file), "..", "..")
}
