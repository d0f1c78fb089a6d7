package containerd

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"text/template"

	"golang.org/x/sys/unix"
)

// Names in an instance's directory by which Cleanup finds what belongs to it.
const (
	socketName  = "containerd.sock"
	configName  = "config.toml"
	networkName = "network.json"
)

// configTemplate is a version 2 configuration, which containerd 1.x and 2.x read.
// Without CAP_SYS_RESOURCE a negative OOM score cannot be set, so it is restricted.
var configTemplate = template.Must(template.New("config").Parse(`version = 2
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper"]

[grpc]
  address = "{{.Socket}}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{{.Dir}}/opt"

[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{{.Pause}}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{{.PluginDir}}"
    conf_dir = "{{.Dir}}/cni"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{{.Snapshotter}}"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{{.Dir}}/runc"

{{.Extra}}
`))

// writeConfig writes the daemon's and the network's configuration.
func (i *Instance) writeConfig() error {
	plugins := i.options.PluginDir
	for _, dir := range []string{"/usr/lib/cni", "/opt/cni/bin"} {
		if _, err := os.Stat(filepath.Join(dir, "bridge")); err == nil {
			plugins = cmp.Or(plugins, dir)
		}
	}
	if plugins == "" {
		return errors.New("the CNI plugins are missing: install the package containernetworking-plugins")
	}
	var config bytes.Buffer
	err := configTemplate.Execute(&config, map[string]string{
		"Dir": i.Dir, "Socket": i.socket(), "Pause": i.pauseImage(), "PluginDir": plugins,
		"Snapshotter": snapshotter(i.Dir), "Extra": i.options.ExtraTOML,
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(i.configFile(), config.Bytes(), 0o600); err != nil {
		return err
	}
	network, err := json.Marshal(i.Network)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(i.Dir, networkName), network, 0o600); err != nil {
		return err
	}
	conflist, err := i.Network.conflist(filepath.Join(i.Dir, "ipam"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(i.Dir, "cni"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(i.Dir, "cni", "10-bridge.conflist"), conflist, 0o600)
}

// snapshotter is overlayfs, unless dir lies on an overlay itself.
func snapshotter(dir string) string {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err == nil && fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return "native"
	}
	return "overlayfs"
}

// A Network is the bridge that the pods of an instance are on.
type Network struct {
	Name    string `json:"name"`    // of the CNI network
	Bridge  string `json:"bridge"`  // interface, made with the first pod
	Subnet  string `json:"subnet"`  // of the pods
	Gateway string `json:"gateway"` // address of Bridge
}

// claimNetwork finds a bridge name and subnet that nothing uses. The listener
// keeps other processes from taking it too, until it is closed.
func claimNetwork() (net.Listener, Network, error) {
	first := os.Getpid() // so that processes do not all look at the same numbers
	for n := range 250 {
		n = 1 + (first+n)%250
		network := Network{
			Name:    fmt.Sprintf("skerry-test-%d", n),
			Bridge:  fmt.Sprintf("skt%d", n),
			Subnet:  fmt.Sprintf("10.99.%d.0/24", n),
			Gateway: fmt.Sprintf("10.99.%d.1", n),
		}
		if _, err := net.InterfaceByName(network.Bridge); err == nil {
			continue
		}
		if claim, err := net.Listen("unix", "@"+network.Name); err == nil {
			return claim, network, nil
		}
	}
	return nil, Network{}, errors.New("no free subnet below 10.99.0.0/16")
}

// conflist is the CNI configuration: bridge, addresses, masquerading, host ports.
func (n Network) conflist(dataDir string) ([]byte, error) {
	type object = map[string]any
	return json.Marshal(object{
		"cniVersion": "0.4.0",
		"name":       n.Name,
		"plugins": []object{
			{
				"type": "bridge", "bridge": n.Bridge,
				"isGateway": true, "ipMasq": true, "hairpinMode": true,
				"ipam": object{
					"type": "host-local", "dataDir": dataDir,
					"ranges": [][]object{{{"subnet": n.Subnet}}},
					"routes": []object{{"dst": "0.0.0.0/0"}},
				},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	})
}
