package cluster

import (
	"fmt"
	"os/exec"
	"strings"
)

// AddBridge makes a bridge with an address of its own, as 10.98.0.1/24: API
// servers refuse to proxy to nodes on loopback. A bridge that an ended run has
// left is taken over. DeleteBridge removes it.
func AddBridge(name, cidr string) error {
	DeleteBridge(name) // an error means that there was none
	for _, args := range [][]string{
		{"link", "add", name, "type", "bridge"},
		{"addr", "add", cidr, "dev", name},
		{"link", "set", name, "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// DeleteBridge removes what AddBridge has made.
func DeleteBridge(name string) error { return exec.Command("ip", "link", "delete", name).Run() }
