// Command edgelet makes the machine that it runs on a node of a Kubernetes
// cluster, and tells people at the machine how it is doing.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/internal/version"
)

const (
	defaultConfig = "/etc/edgelet/config.yaml"
	defaultSocket = "/run/edgelet/edgelet.sock"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "edgelet:", err)
		os.Exit(exitCode(err))
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "edgelet",
		Short: "Run this machine as a node of a Kubernetes cluster",
		Long: `edgelet makes this machine a node of a Kubernetes cluster. It dials out to a
skerry-provider, runs the pods that are scheduled here through the local
container runtime, and carries on alone when the link is down.`,
		Example: `  # join a cluster with the line that skerry-provider token create printed
  edgelet join https://edge.example.com --token 4k2q1z.0123456789abcdef --ca-cert-hash sha256:…

  # see how the site is doing, with or without a link
  edgelet status
  edgelet ps
  edgelet logs -n default web-7d4b9 -f`,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(), joinCommand(), statusCommand(), psCommand(), logsCommand(), execCommand(), checkCommand(), resetCommand())
	return root
}

// logger writes text to standard error, where journald adds the time.
func logger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %w: use debug, info, warn or error", err)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}
