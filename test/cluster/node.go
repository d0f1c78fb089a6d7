package cluster

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"sigs.k8s.io/yaml"
)

// Node is the cluster's own node: a real kubelet, to run what is deployed to the
// cloud, or to compare with.
type Node struct {
	Name    string // of the Node object
	Runtime string // CRI endpoint, as unix:///run/containerd/containerd.sock
	Address string // of this machine, not loopback
	PodCIDR string // pod network that kube-proxy takes as inside the cluster
}

// StartNode starts a kubelet, and a kube-proxy, so that pods reach services, and
// returns when both are healthy; the Node becomes Ready a little later. The files
// of pods stay below the cluster's Dir and their cgroups below one of the cluster's
// own, so that an edgelet may run beside it. There can be one such node on a
// machine: kube-proxy takes all chains KUBE-… to be its own. StopNode removes what
// it has made, but for the sysctls that every kubelet sets (vm.overcommit_memory,
// kernel.panic and the like).
func (c *Cluster) StartNode(ctx context.Context, n Node) error {
	c.node = &n
	ports, err := freePorts("127.0.0.1", 3)
	if err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	if err := c.startKubelet(ctx, n, ports[0]); err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	p, err := c.kube("kube-proxy", "--kubeconfig="+c.ca.path("kube-proxy.kubeconfig"), "--hostname-override="+n.Name,
		"--cluster-cidr="+n.PodCIDR, "--proxy-mode=iptables", "--iptables-localhost-nodeports=false", "--oom-score-adj=0", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
		"--conntrack-tcp-timeout-close-wait=0", "--healthz-bind-address=127.0.0.1:"+ports[1], "--metrics-bind-address=127.0.0.1:"+ports[2])
	if err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	if err := p.waitFor(ctx, time.Minute, healthy("http://127.0.0.1:"+ports[1]+"/livez")); err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	return nil
}

func (c *Cluster) startKubelet(ctx context.Context, n Node, healthz string) error {
	subject := pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}
	kubeconfig, err := c.ca.kubeconfig("kubelet-"+n.Name, c.Server, subject)
	if err != nil {
		return err
	}
	if err := c.ca.issue("kubelet-serving", subject, n.Address, n.Name); err != nil {
		return err
	}
	port, err := freePorts(n.Address, 1)
	if err != nil {
		return err
	}
	if err := errors.Join(c.removeLeftovers(ctx), makeCgroups(cgroup)); err != nil {
		return err
	}
	dir := c.kubeletDir()
	config, err := yaml.Marshal(map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication":           map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true}, "x509": map[string]any{"clientCAFile": c.CA()}},
		"authorization":            map[string]any{"mode": "Webhook"},
		"address":                  n.Address,
		"port":                     mustPort(port[0]),
		"healthzPort":              mustPort(healthz),
		"tlsCertFile":              c.ca.path("kubelet-serving.crt"),
		"tlsPrivateKeyFile":        c.ca.path("kubelet-serving.key"),
		"containerRuntimeEndpoint": n.Runtime,
		"cgroupDriver":             "cgroupfs",
		"cgroupRoot":               cgroup,
		"failCgroupV1":             false,
		"failSwapOn":               false,
		"oomScoreAdj":              0, // a negative one needs CAP_SYS_RESOURCE
		"enforceNodeAllocatable":   []string{},
		"podLogsDir":               filepath.Join(dir, "logs"),
		"volumePluginDir":          filepath.Join(dir, "plugins-exec"),
		"makeIPTablesUtilChains":   false,
		"evictionHard":             map[string]string{"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "logs"), 0o755); err != nil {
		return err
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return err
	}
	p, err := c.kube("kubelet", "--config="+file, "--kubeconfig="+kubeconfig, "--root-dir="+dir,
		"--hostname-override="+n.Name, "--node-ip="+n.Address)
	if err != nil {
		return err
	}
	return p.waitFor(ctx, time.Minute, healthy("http://127.0.0.1:"+healthz+"/healthz"))
}

// mustPort is a port that freePorts has found, as a number.
func mustPort(port string) int {
	n, _ := net.LookupPort("tcp", port)
	return n
}
