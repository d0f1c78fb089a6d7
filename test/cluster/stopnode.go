package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cgroupfs is where the cgroup hierarchies are mounted.
const cgroupfs = "/sys/fs/cgroup"

// cgroup is the parent of all that the kubelet makes. The default, /kubepods, is
// where an edgelet has its pods too, and a kubelet ends whatever it doesn't know.
const cgroup = "/skerry-node"

// containerLogs is where every kubelet links the logs of its containers.
const containerLogs = "/var/log/containers"

// forgotten is a chain that kube-proxy makes and its --cleanup leaves.
const forgotten = "KUBE-FIREWALL"

// StopNode ends kubelet and kube-proxy, removes the node's pods from its runtime,
// and then what all of them have left on the machine: mounts, cgroups, links and
// rules. Without a node it does nothing.
func (c *Cluster) StopNode(ctx context.Context) error {
	if c.node == nil {
		return nil
	}
	node := c.node
	c.node = nil
	for _, name := range []string{"kubelet", "kube-proxy"} {
		if p := c.Process(name); p != nil {
			p.Stop(10 * time.Second)
		}
	}
	err := errors.Join(removePods(ctx, node.Runtime), c.removeLeftovers(ctx), c.removeRules(ctx))
	if err != nil {
		return fmt.Errorf("stop node: %w", err)
	}
	return nil
}

// removeLeftovers removes what a kubelet leaves on the machine, one that was killed
// in an earlier run included, if the cluster's Dir is still the same.
func (c *Cluster) removeLeftovers(ctx context.Context) error {
	return errors.Join(unmountAll(c.kubeletDir()), removeCgroups(ctx, cgroup), removeLinks(containerLogs, c.kubeletDir()))
}

// kubeletDir holds the kubelet's state and the volumes of its pods.
func (c *Cluster) kubeletDir() string { return filepath.Join(c.Dir, "kubelet") }

// hierarchies are the folders below which cgroups are made: one with cgroup v2,
// one for each controller with v1.
func hierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupfs, "cgroup.controllers")); err == nil {
		return []string{cgroupfs}, nil
	}
	found, err := filepath.Glob(filepath.Join(cgroupfs, "*", "cgroup.procs"))
	for i := range found {
		found[i] = filepath.Dir(found[i])
	}
	return found, err
}

func makeCgroups(name string) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// removeCgroups removes a cgroup and all below it. The kernel lets go of the
// processes of a container that has ended a moment later.
func removeCgroups(ctx context.Context, name string) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, dir := range dirs {
		for {
			err := removeCgroup(filepath.Join(dir, name))
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			select {
			case <-ctx.Done():
				return err
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir) // rmdir, which fails while there are processes
}

// removePods removes all pods of a runtime, which has no others than the node's.
func removePods(ctx context.Context, endpoint string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := cri.NewRuntimeServiceClient(conn)
	pods, err := client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, pod := range pods.Items {
		_, err := client.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.Id})
		if err == nil {
			_, err = client.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.Id})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove pod %s: %w", pod.Metadata.GetName(), err))
		}
	}
	return errors.Join(errs...)
}

// unmountAll unmounts the volumes of pods, the innermost first, and dir itself,
// which a kubelet mounts onto itself to share what is mounted below.
func unmountAll(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && (fields[4] == dir || strings.HasPrefix(fields[4], dir+"/")) {
			points = append(points, fields[4])
		}
	}
	var errs []error
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// removeLinks removes the symbolic links in dir that point below target.
func removeLinks(dir, target string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, entry := range entries {
		link := filepath.Join(dir, entry.Name())
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, target+"/") {
			errs = append(errs, os.Remove(link))
		}
	}
	return errors.Join(errs...)
}

// removeRules lets kube-proxy take back its rules, and takes back what it forgets.
func (c *Cluster) removeRules(ctx context.Context) error {
	// It fails too if what it doesn't find is all that it could not remove.
	out, err := exec.CommandContext(ctx, filepath.Join(c.bin, "kube"), "kube-proxy", "--cleanup", "--proxy-mode=iptables").CombinedOutput()
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, args := range [][]string{{"-D", "INPUT", "-j", forgotten}, {"-D", "OUTPUT", "-j", forgotten}, {"-F", forgotten}, {"-X", forgotten}} {
			// What counts is what is left.
			_ = exec.CommandContext(ctx, family, append([]string{"--wait", "--table=filter"}, args...)...).Run()
		}
		saved, saveErr := exec.CommandContext(ctx, family+"-save").Output()
		if saveErr != nil {
			return fmt.Errorf("%s-save: %w", family, saveErr)
		}
		if strings.Contains(string(saved), ":KUBE-") {
			return fmt.Errorf("rules are left after kube-proxy --cleanup: %v: %s", err, out)
		}
	}
	return nil
}
