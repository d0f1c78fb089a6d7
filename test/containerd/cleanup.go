package containerd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Cleanup removes what an instance in dir has left outside of it and its state:
// processes, mounts, cgroups, the bridge and its rules. Images and logs stay. It
// needs nothing to be running and may be repeated; no directory is no error.
func Cleanup(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	cgroups := cgroupsOf(filepath.Join(dir, "runc"))
	errs := []error{killAll(dir), unmountAll(dir)}
	for _, cgroup := range cgroups {
		removeCgroup(cgroup)
	}
	if network, err := readNetwork(dir); err == nil {
		errs = append(errs, removeNetwork(network))
	}
	// The content store and the snapshots are consistent by themselves; all that
	// describes pods and running containers goes.
	for _, name := range []string{"runc", "state", "ipam", networkName, socketName, socketName + ".ttrpc",
		"root/io.containerd.grpc.v1.cri", "root/io.containerd.runtime.v2.task"} {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up %s: %w", dir, err)
	}
	return nil
}

// removePods removes all pods through CRI, several at once.
func removePods(ctx context.Context, client cri.RuntimeServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	pods, err := client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for _, pod := range pods.Items {
		group.Go(func() error {
			_, err := client.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.Id})
			if err != nil {
				return err
			}
			_, err = client.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.Id})
			return err
		})
	}
	return group.Wait()
}

// killAll kills the daemon of dir, its shims and everything below them. It looks
// again until nothing is left, since processes are born while it looks.
func killAll(dir string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids, err := processesOf(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v survive SIGKILL", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // it may be gone by now
		}
		time.Sleep(20 * time.Millisecond) // until the kernel has let go of them
	}
}

// processesOf lists the daemon and the shims of dir, which name its socket or its
// configuration in their arguments, and all their descendants.
func processesOf(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []int
	children := map[int][]int{}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		parent, zombie, err := stat(pid)
		if err != nil || zombie {
			continue
		}
		children[parent] = append(children[parent], pid)
		cmdline, _ := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		args := strings.Split(string(cmdline), "\x00")
		shim := slices.Contains(args, filepath.Join(dir, socketName)) && strings.Contains(args[0], "containerd-shim")
		if shim || slices.Contains(args, filepath.Join(dir, configName)) {
			found = append(found, pid)
		}
	}
	for n := 0; n < len(found); n++ {
		for _, child := range children[found[n]] {
			if !slices.Contains(found, child) {
				found = append(found, child)
			}
		}
	}
	return found, nil
}

// stat reads a process's parent and whether it is dead but not yet reaped.
func stat(pid int) (parent int, zombie bool, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false, err
	}
	// The name, in brackets, may contain anything; what follows the last one does not.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 2 {
		return 0, false, fmt.Errorf("process %d: short stat", pid)
	}
	parent, err = strconv.Atoi(fields[1])
	return parent, fields[0] == "Z", err
}

// unmountAll unmounts all below dir, the innermost first.
func unmountAll(dir string) error {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer file.Close()
	var points []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append(points, fields[4])
		}
	}
	errs := []error{lines.Err()}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// cgroupsOf lists the cgroups of the containers that runc has a record of.
func cgroupsOf(runcRoot string) []string {
	states, _ := filepath.Glob(filepath.Join(runcRoot, "*", "*", "state.json"))
	var paths []string
	for _, file := range states {
		var state struct {
			Paths map[string]string `json:"cgroup_paths"`
		}
		if data, err := os.ReadFile(file); err == nil && json.Unmarshal(data, &state) == nil {
			for _, path := range state.Paths {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// removeCgroup removes a cgroup and what containers have made below it. Removing
// a cgroup that has processes fails, which protects those of others.
func removeCgroup(path string) {
	if !strings.HasPrefix(path, "/sys/fs/cgroup/") {
		return
	}
	entries, _ := os.ReadDir(path)
	for _, entry := range entries {
		if entry.IsDir() {
			removeCgroup(filepath.Join(path, entry.Name()))
		}
	}
	_ = unix.Rmdir(path)
}

func readNetwork(dir string) (Network, error) {
	var network Network
	data, err := os.ReadFile(filepath.Join(dir, networkName))
	if err != nil {
		return network, err
	}
	return network, json.Unmarshal(data, &network)
}

// removeNetwork removes the bridge, the rules that mention the network, and the
// results that libcni remembers of it.
func removeNetwork(network Network) error {
	if network.Name == "" || network.Bridge == "" {
		return nil
	}
	if _, err := os.Stat("/sys/class/net/" + network.Bridge); err == nil {
		if out, err := exec.Command("ip", "link", "delete", network.Bridge).CombinedOutput(); err != nil {
			return fmt.Errorf("delete bridge %s: %w: %s", network.Bridge, err, out)
		}
	}
	results, _ := filepath.Glob("/var/lib/cni/results/" + network.Name + "-*")
	for _, result := range results {
		_ = os.Remove(result)
	}
	return removeRules(network.Name)
}

// removeRules removes the NAT rules whose comment names the network, and the
// chains that only those rules led to.
func removeRules(network string) error {
	saved, err := exec.Command("iptables-save", "-t", "nat").Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("save iptables: %w", err)
	}
	undo := undoRules(saved, network)
	if undo == nil {
		return nil
	}
	cmd := exec.Command("iptables-restore", "--noflush", "--wait")
	cmd.Stdin = bytes.NewReader(undo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("remove iptables rules of %s: %w: %s", network, err, out)
	}
	return nil
}

// undoRules makes, from what iptables-save says of the nat table, the input of
// iptables-restore that removes a network's rules; nil if it has none. The CNI
// plugins write name: "<network>" into the comment of the rules that lead to a
// chain of their own, CNI-… for masquerading and CNI-DN-… for host ports.
func undoRules(saved []byte, network string) []byte {
	mark := []byte(`name: \"` + network + `\"`)
	var rules, chains [][]byte
	for line := range bytes.Lines(saved) {
		rule, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("-A "))
		if !ok || !bytes.Contains(rule, mark) {
			continue
		}
		rules = append(rules, append([]byte("-D "), rule...))
		if _, target, ok := bytes.Cut(rule, []byte(" -j CNI-")); ok {
			name, _, _ := bytes.Cut(target, []byte(" "))
			chains = append(chains, append([]byte("CNI-"), name...))
		}
	}
	if rules == nil {
		return nil
	}
	var out bytes.Buffer
	out.WriteString("*nat\n")
	for _, rule := range rules {
		if !slices.ContainsFunc(chains, func(c []byte) bool { return bytes.HasPrefix(rule[3:], append(slices.Clone(c), ' ')) }) {
			fmt.Fprintf(&out, "%s\n", rule)
		}
	}
	slices.SortFunc(chains, bytes.Compare)
	chains = slices.CompactFunc(chains, bytes.Equal)
	for _, chain := range chains {
		fmt.Fprintf(&out, "-F %s\n", chain)
	}
	for _, chain := range chains {
		fmt.Fprintf(&out, "-X %s\n", chain)
	}
	out.WriteString("COMMIT\n")
	return out.Bytes()
}
