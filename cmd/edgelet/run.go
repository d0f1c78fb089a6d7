package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/skerry-io/skerry/edgelet"
)

// memoryGoal is what the garbage collector aims at, in bytes: more is allowed,
// but then it works harder. GOMEMLIMIT overrides it.
const memoryGoal = 24 << 20

func runCommand() *cobra.Command {
	var config, level string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the agent",
		Long: `run is the agent itself, usually started by systemd. It runs the pods of this
site, with or without a link, until it is told to stop; pods go on without it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger(level)
			if err != nil {
				return err
			}
			c, err := readConfig(config)
			if err != nil {
				return err
			}
			c.Log = log
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(memoryGoal)
			}
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(50)
			}
			e, err := edgelet.New(c)
			if err != nil {
				return err
			}
			return e.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&config, "config", defaultConfig, "configuration file that edgelet join has written")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return cmd
}

func readConfig(path string) (c edgelet.Config, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("%s is missing: this machine has not joined a cluster; on a machine with kubectl run skerry-provider token create, and here the line that it prints", path)
	}
	if err != nil {
		return c, err
	}
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}
