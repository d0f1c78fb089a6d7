package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/edgelet"
	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

type joinOptions struct {
	token, hash, config string
	replace, start      bool
	labels              []string
	edgelet.Config
}

func joinCommand() *cobra.Command {
	var o joinOptions
	cmd := &cobra.Command{
		Use:   "join SERVER",
		Short: "Make this machine a site of a cluster",
		Long: `join makes this machine a site: it checks that SERVER has the pinned CA, makes a
private key that never leaves the machine, gets a certificate for it, and writes
the configuration that edgelet run reads. Doing it again is harmless.

The whole line is what skerry-provider token create prints.`,
		Example: `  edgelet join https://edge.example.com --token 4k2q1z.0123456789abcdef --ca-cert-hash sha256:… --site shop-1`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Server = args[0]
			return o.join(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.token, "token", "", "join token")
	f.StringVar(&o.hash, "ca-cert-hash", "", "pin of the provider's CA, sha256:<hex>")
	f.StringVar(&o.Site, "site", "", "name of the site and of its Node; default the host name")
	f.StringSliceVar(&o.labels, "labels", nil, "labels of the Node, as zone=harbour,tier=gold")
	f.StringVar(&o.config, "config", defaultConfig, "configuration file to write")
	f.StringVar(&o.DataDir, "data-dir", "", "what the site remembers; default /var/lib/edgelet")
	f.StringVar(&o.LogDir, "log-dir", "", "logs of containers; default /var/log/pods")
	f.StringVar(&o.Socket, "socket", "", "socket for local commands; default "+defaultSocket)
	f.StringVar(&o.RuntimeEndpoint, "runtime-endpoint", "", "CRI socket, as unix:///run/containerd/containerd.sock; default the first that is found")
	f.StringVar(&o.Transport, "transport", "", "way to the provider: auto, direct, or http2 through a layer-7 proxy; default auto")
	f.BoolVar(&o.replace, "replace", false, "join anew although the machine has an identity")
	f.BoolVar(&o.start, "start", true, "start the systemd service afterwards, if there is one")
	cmd.MarkFlagRequired("token")
	cmd.MarkFlagRequired("ca-cert-hash")
	return cmd
}

func (o *joinOptions) join(cmd *cobra.Command) error {
	out := cmd.OutOrStdout()
	if o.Site == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("--site is missing, and the host has none: %w", err)
		}
		o.Site = strings.ToLower(name)
	}
	o.Labels = map[string]string{}
	for _, label := range o.labels {
		key, value, _ := strings.Cut(label, "=")
		o.Labels[key] = value
	}
	config, err := o.Config.WithDefaults()
	if err != nil {
		return err
	}
	if _, err := cri.Discover(); err != nil && o.RuntimeEndpoint == "" {
		fmt.Fprintf(out, "Note: no container runtime is running here yet (%v); install containerd or CRI-O before pods are scheduled.\n", err)
	}
	log, err := logger("warn")
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Joining %s as site %s…\n", o.Server, o.Site)
	dialer := &tunnel.Dialer{Server: o.Server, Transport: config.Transport}
	identity, err := bootstrap.Join(cmd.Context(), bootstrap.JoinConfig{
		Server: o.Server, Token: o.token, CACertHash: o.hash, Site: o.Site,
		Dir: edgelet.IdentityDir(config), Replace: o.replace, Log: log,
		Dial: dialer.DialContext,
	})
	if err != nil {
		return err
	}
	if err := o.write(); err != nil {
		return err
	}
	fmt.Fprintf(out, "Joined. The certificate is good until %s and renews itself.\n", identity.Certificate().NotAfter.Local().Format("2006-01-02"))
	return o.startService(cmd)
}

// write writes the configuration: only what differs from the defaults.
func (o *joinOptions) write() error {
	data, err := yaml.Marshal(o.Config)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.config), 0o755); err != nil {
		return err
	}
	part := o.config + ".part"
	if err := os.WriteFile(part, data, 0o644); err != nil {
		return err
	}
	return os.Rename(part, o.config)
}

// startService starts the systemd unit where there is one.
func (o *joinOptions) startService(cmd *cobra.Command) error {
	const unit = "edgelet.service"
	out := cmd.OutOrStdout()
	if _, err := os.Stat("/run/systemd/system"); !o.start || errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(out, "Start it with: edgelet run --config %s\n", o.config)
		return nil
	}
	if text, err := exec.CommandContext(cmd.Context(), "systemctl", "enable", "--now", unit).CombinedOutput(); err != nil {
		return fmt.Errorf("joined, but systemctl enable --now %s failed: %w: %s (install manifests/systemd/%s, or run: edgelet run)", unit, err, strings.TrimSpace(string(text)), unit)
	}
	fmt.Fprintf(out, "%s is running. On a machine with kubectl: kubectl get node %s\n", unit, o.Site)
	return nil
}
