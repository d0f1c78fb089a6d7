package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version names the runtime. A runtime without CRI v1 is code Unimplemented.
func (c *Client) Version(ctx context.Context) (*cri.VersionResponse, error) {
	resp, err := do(ctx, c.query("version of runtime", c.config.Endpoint), c.runtime.Version, &cri.VersionRequest{})
	if unimplemented(err) {
		// Docker's packages of containerd come with CRI switched off.
		return nil, fmt.Errorf("%w: it does not serve CRI v1; if it is containerd, remove \"cri\" from disabled_plugins in /etc/containerd/config.toml and restart it", err)
	}
	return resp, err
}

// Status tells whether runtime and network are ready, and what the runtime can do.
func (c *Client) Status(ctx context.Context) (*cri.StatusResponse, error) {
	return do(ctx, c.query("status of runtime", ""), c.runtime.Status, &cri.StatusRequest{})
}

// UpdatePodCIDR tells the runtime the range of pod addresses, for runtimes that
// write their own network configuration.
func (c *Client) UpdatePodCIDR(ctx context.Context, cidr string) error {
	req := &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: cidr}}}
	_, err := do(ctx, c.change("configure runtime", ""), c.runtime.UpdateRuntimeConfig, req)
	return err
}

// A CgroupDriver is the one who makes cgroups, and thus the form of their names.
type CgroupDriver string

// The drivers: paths such as /kubepods/burstable, or slices of systemd.
const (
	Cgroupfs CgroupDriver = "cgroupfs"
	Systemd  CgroupDriver = "systemd"
)

// CgroupDriver asks the runtime for its driver. Runtimes that do not know the
// call are asked for their configuration, and if that does not say either, it is
// what a runtime would choose: systemd where that runs and cgroups are v2.
func (c *Client) CgroupDriver(ctx context.Context) (CgroupDriver, error) {
	resp, err := do(ctx, c.query("configuration of runtime", ""), c.runtime.RuntimeConfig, &cri.RuntimeConfigRequest{})
	if err == nil && resp.Linux != nil {
		if resp.Linux.CgroupDriver == cri.CgroupDriver_SYSTEMD {
			return Systemd, nil
		}
		return Cgroupfs, nil
	}
	if err != nil && !unimplemented(err) {
		return "", err
	}
	verbose, err := do(ctx, c.query("status of runtime", ""), c.runtime.Status, &cri.StatusRequest{Verbose: true})
	if err != nil {
		return "", err
	}
	if driver, ok := configuredDriver([]byte(verbose.Info["config"])); ok {
		return driver, nil
	}
	_, err = os.Stat("/run/systemd/system")
	return likelyDriver(err == nil, unifiedCgroups()), nil
}

// SandboxImage is the image of sandboxes, as far as the runtime tells; "" if it does
// not. Runtimes before 2023 do not show it as pinned, so whoever removes images
// must know.
func (c *Client) SandboxImage(ctx context.Context) (string, error) {
	verbose, err := do(ctx, c.query("status of runtime", ""), c.runtime.Status, &cri.StatusRequest{Verbose: true})
	if err != nil {
		return "", err
	}
	return configuredSandboxImage([]byte(verbose.Info["config"])), nil
}

// configuredSandboxImage reads the configuration of containerd 1.x, or of 2.x.
func configuredSandboxImage(config []byte) string {
	var parsed struct {
		SandboxImage string            `json:"sandboxImage"`
		PinnedImages map[string]string `json:"pinnedImages"`
	}
	if json.Unmarshal(config, &parsed) != nil {
		return ""
	}
	if parsed.SandboxImage != "" {
		return parsed.SandboxImage
	}
	return parsed.PinnedImages["sandbox"]
}

// configuredDriver reads containerd's configuration as its verbose status shows it.
func configuredDriver(config []byte) (CgroupDriver, bool) {
	var parsed struct {
		Containerd struct {
			DefaultRuntime string `json:"defaultRuntimeName"`
			Runtimes       map[string]struct {
				Options map[string]any `json:"options"`
			} `json:"runtimes"`
		} `json:"containerd"`
		SystemdCgroup bool `json:"systemdCgroup"`
	}
	if json.Unmarshal(config, &parsed) != nil {
		return "", false
	}
	runtime, ok := parsed.Containerd.Runtimes[parsed.Containerd.DefaultRuntime]
	if !ok {
		return "", false
	}
	if systemd, _ := runtime.Options["SystemdCgroup"].(bool); systemd || parsed.SystemdCgroup {
		return Systemd, true
	}
	return Cgroupfs, true
}

func likelyDriver(systemd, unified bool) CgroupDriver {
	if systemd && unified {
		return Systemd
	}
	return Cgroupfs
}

// unifiedCgroups reports whether the machine has cgroup v2 alone.
func unifiedCgroups() bool {
	var fs unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}
