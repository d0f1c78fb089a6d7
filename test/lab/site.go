package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/test/containerd"
)

// A Site is one edgelet, on a containerd of its own.
type Site struct {
	Name       string
	Dir        string
	Link       *Link // to the provider; nil after JoinSite
	Containerd *containerd.Instance
	Edgelet    *cluster.Process

	lab *Lab
}

// AddSite starts a containerd, joins the site with a token as a user would, and
// runs its edgelet. It does not wait until the Node is Ready.
func (l *Lab) AddSite(ctx context.Context, name string) (*Site, error) {
	link, err := NewLink(l.Address, l.ProviderAddress())
	if err != nil {
		return nil, fmt.Errorf("site %s: %w", name, err)
	}
	line, err := l.Token(ctx, "--site="+name, "--server=https://"+link.Address)
	if err != nil {
		link.Close()
		return nil, fmt.Errorf("site %s: %w", name, err)
	}
	return l.joinSite(ctx, &Site{Name: name, Link: link}, line)
}

// JoinSite is AddSite for a site that was given its join line, and has no Link.
func (l *Lab) JoinSite(ctx context.Context, name, line string) (*Site, error) {
	return l.joinSite(ctx, &Site{Name: name}, line)
}

func (l *Lab) joinSite(ctx context.Context, s *Site, line string) (_ *Site, err error) {
	s.Dir, s.lab = filepath.Join(l.Dir, s.Name), l
	l.sites = append(l.sites, s) // from here on Close cleans up after it
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	s.Containerd, err = containerd.Start(ctx, containerd.Options{Dir: filepath.Join(s.Dir, "c"), Archives: []string{l.images}})
	if err != nil {
		return nil, fmt.Errorf("site %s: containerd: %w", s.Name, err)
	}
	if err := s.join(ctx, line); err != nil {
		return nil, fmt.Errorf("site %s: %w", s.Name, err)
	}
	return s, s.Run(ctx)
}

// join runs the line that `skerry-provider token create` prints, with the folders
// of this site added.
func (s *Site) join(ctx context.Context, line string) error {
	argv := strings.Fields(line)
	argv[0] = filepath.Join(s.lab.options.Bin, argv[0])
	argv = append(argv, "--data-dir="+s.dataDir(), "--config="+s.config(), "--socket="+s.Socket(),
		"--runtime-endpoint="+s.Containerd.Endpoint, "--log-dir="+filepath.Join(s.Dir, "logs"), "--start=false")
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// Token runs skerry-provider token create and returns the join line that it prints.
func (l *Lab) Token(ctx context.Context, args ...string) (string, error) {
	argv := append([]string{"token", "create", "--kubeconfig=" + l.Cluster.Kubeconfig, "--namespace=" + Namespace}, args...)
	out, err := exec.CommandContext(ctx, filepath.Join(l.options.Bin, "skerry-provider"), argv...).Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		return "", fmt.Errorf("token create: %w: %s", err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), nil
}

// Run starts the edgelet, the first time or after it was killed.
func (s *Site) Run(ctx context.Context) (err error) {
	s.Edgelet, err = s.lab.Cluster.Run("edgelet-"+s.Name, filepath.Join(s.lab.options.Bin, "edgelet"), "run", "--config="+s.config())
	return err
}

// Command is a local edgelet command at the site, as ps or logs.
func (s *Site) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = slices.Insert(slices.Clone(args), 1, "--socket="+s.Socket()) // before any "--"
	return exec.CommandContext(ctx, filepath.Join(s.lab.options.Bin, "edgelet"), args...)
}

// Socket is the edgelet's local socket.
func (s *Site) Socket() string { return filepath.Join(s.Dir, "s.sock") }

func (s *Site) dataDir() string { return filepath.Join(s.Dir, "data") }
func (s *Site) config() string  { return filepath.Join(s.Dir, "edgelet.yaml") }

// close ends the site. The containers go with their containerd.
func (s *Site) close(ctx context.Context) error {
	if s.Edgelet != nil {
		s.Edgelet.Stop(10 * time.Second)
	}
	if s.Link != nil {
		s.Link.Close()
	}
	var err error
	if s.Containerd != nil {
		err = s.Containerd.Stop(ctx)
	}
	return errors.Join(err, unmountBelow(s.Dir))
}

// get is nil if url answers 200.
func get(url string) error {
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}
