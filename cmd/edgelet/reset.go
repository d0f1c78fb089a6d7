package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgelet"
	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/edgelet/store"
	"github.com/skerry-io/skerry/edgelet/volume"
)

func resetCommand() *cobra.Command {
	var path string
	var yes bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Undo join: stop all pods of this site and forget the cluster",
		Long: `reset stops and removes the pods that the edgelet runs on this machine, with
their volumes, and deletes its identity, store and configuration. The Node stays
in the cluster until somebody deletes it there.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readConfig(path)
			if err == nil {
				c, err = c.WithDefaults()
			}
			if err != nil {
				return err
			}
			if !yes {
				return fmt.Errorf("this stops all pods of site %s and deletes %s: say --yes if that is meant", c.Site, c.DataDir)
			}
			return reset(cmd, c, path)
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "configuration file that edgelet join has written")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	return cmd
}

func reset(cmd *cobra.Command, c edgelet.Config, path string) error {
	// Whoever has the store is the edgelet: none may run meanwhile.
	db, err := store.Open(store.Options{Path: filepath.Join(c.DataDir, "edgelet.db"), Timeout: time.Second})
	if errors.Is(err, store.ErrLocked) {
		return errors.New("the edgelet is running: systemctl disable --now edgelet first")
	}
	if err == nil {
		defer db.Close()
	}
	if err := removePods(cmd, c); err != nil {
		return err
	}
	volumes, err := volume.New(volume.Config{Dir: filepath.Join(c.DataDir, "pods")})
	if err != nil {
		return err
	}
	left, err := volumes.Present()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, uid := range left {
		if err := volumes.Teardown(cmd.Context(), uid); err != nil {
			return fmt.Errorf("volumes of pod %s: %w", uid, err)
		}
	}
	if err := errors.Join(os.RemoveAll(c.DataDir), os.Remove(path)); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "Site %s is forgotten here. On a machine with kubectl: kubectl delete node %s\n", c.Site, c.Site)
	return nil
}

// removePods removes the sandboxes that are ours, and their containers with them.
func removePods(cmd *cobra.Command, c edgelet.Config) error {
	runtime, err := cri.Dial(cri.Config{Endpoint: c.RuntimeEndpoint})
	if err != nil {
		return err
	}
	defer runtime.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Minute)
	defer cancel()
	sandboxes, err := runtime.ListPodSandbox(ctx)
	if err != nil {
		return fmt.Errorf("%w (is the container runtime running?)", err)
	}
	for _, s := range sandboxes {
		if _, ours := s.Labels[criconfig.LabelManaged]; !ours {
			continue
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Removing pod %s/%s\n", s.Metadata.GetNamespace(), s.Metadata.GetName())
		if err := runtime.StopPodSandbox(ctx, s.Id); err != nil {
			return err
		}
		if err := runtime.RemovePodSandbox(ctx, s.Id); err != nil {
			return err
		}
	}
	return nil
}
