package stats

import (
	"cmp"
	"context"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// freshness is how long a summary is good for.
const freshness = time.Second

// Summary tells what the node and its pods use, as of at most a second ago. With
// an error of the runtime comes a summary of the node alone. The caller must not
// change it.
func (n *Node) Summary(ctx context.Context) (*statsapi.Summary, error) {
	if err := n.acquire(ctx); err != nil {
		return nil, err
	}
	defer n.release()
	if now := time.Now(); n.summary == nil || now.Sub(n.made) >= freshness {
		summary := &statsapi.Summary{}
		summary.Node = n.nodeStats(now)
		pods, err := n.pods(ctx)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		summary.Pods = pods
		n.addFilesystems(ctx, summary, now)
		n.summary, n.failed, n.made = summary, err, now
	}
	return n.summary, n.failed
}

// nodeStats reads the machine's own figures.
func (n *Node) nodeStats(now time.Time) statsapi.NodeStats {
	at := metav1.NewTime(now)
	node := statsapi.NodeStats{NodeName: n.hostname()}
	if text, err := n.machine.read("proc/stat"); err == nil {
		node.StartTime = metav1.NewTime(bootTime(text))
		if busy, err := parseCPU(text); err == nil {
			node.CPU = &statsapi.CPUStats{Time: at, UsageCoreNanoSeconds: &busy, UsageNanoCores: n.rate("", now, busy)}
		}
	}
	if memory, err := n.machine.memory(); err == nil {
		vmstat, _ := n.machine.read("proc/vmstat")
		faults, major := parseVmstat(vmstat)
		node.Memory = &statsapi.MemoryStats{
			Time: at, AvailableBytes: new(memory.Available()), UsageBytes: new(sub(memory.Total, memory.Free)),
			WorkingSetBytes: new(memory.WorkingSet()), RSSBytes: new(memory.Anonymous), PageFaults: &faults, MajorPageFaults: &major,
		}
		node.Swap = &statsapi.SwapStats{Time: at, SwapAvailableBytes: new(memory.SwapFree), SwapUsageBytes: new(sub(memory.SwapTotal, memory.SwapFree))}
	}
	if text, err := n.machine.read("proc/net/dev"); err == nil {
		routes, _ := n.machine.read("proc/net/route")
		node.Network = networkOf(at, parseNetDev(text), parseRoute(routes))
	}
	if count, most := n.machine.processes(); most > 0 {
		node.Rlimit = &statsapi.RlimitStats{Time: at, MaxPID: new(int64(most)), NumOfRunningProcesses: new(int64(count))}
	}
	return node
}

// networkOf lists interfaces, the main one twice, as the format wants it.
func networkOf(at metav1.Time, list []Interface, main string) *statsapi.NetworkStats {
	network := &statsapi.NetworkStats{Time: at}
	for _, i := range list {
		one := statsapi.InterfaceStats{Name: i.Name, RxBytes: new(i.RxBytes), RxErrors: new(i.RxErrors), TxBytes: new(i.TxBytes), TxErrors: new(i.TxErrors)}
		network.Interfaces = append(network.Interfaces, one)
		if i.Name == main {
			network.InterfaceStats = one
		}
	}
	return network
}

// rate is the use since the last sample, in nanocores; nil for a first sample or a
// counter that has started anew. A sample right after another repeats its rate.
func (n *Node) rate(key string, at time.Time, value uint64) *uint64 {
	before, ok := n.previous[key]
	elapsed := at.Sub(before.at)
	if ok && elapsed < freshness/2 {
		return before.rate
	}
	next := sample{at: at, value: value}
	if ok && value >= before.value {
		next.rate = new(uint64(float64(value-before.value) / elapsed.Seconds()))
	}
	n.previous[key] = next
	return next.rate
}

// pods asks the runtime about all running pods.
func (n *Node) pods(ctx context.Context) ([]statsapi.PodStats, error) {
	stats, err := n.config.Runtime.ListPodSandboxStats(ctx)
	if err != nil {
		return nil, err
	}
	sandboxes, err := n.config.Runtime.ListPodSandbox(ctx)
	if err != nil {
		return nil, err
	}
	containers, err := n.config.Runtime.ListContainers(ctx)
	if err != nil {
		return nil, err
	}
	created := make(map[string]time.Time, len(sandboxes)+len(containers))
	for _, s := range sandboxes {
		created[s.Id] = time.Unix(0, s.CreatedAt)
	}
	for _, c := range containers {
		created[c.Id] = time.Unix(0, c.CreatedAt)
	}
	pods := make([]statsapi.PodStats, 0, len(stats))
	for _, s := range stats {
		pods = append(pods, n.pod(s, created))
	}
	for key := range n.previous {
		if _, ok := created[key]; !ok && key != "" {
			delete(n.previous, key)
		}
	}
	slices.SortFunc(pods, func(a, b statsapi.PodStats) int {
		return cmp.Or(cmp.Compare(a.PodRef.Namespace, b.PodRef.Namespace), cmp.Compare(a.PodRef.Name, b.PodRef.Name), cmp.Compare(a.PodRef.UID, b.PodRef.UID))
	})
	return pods, nil
}

// pod translates one pod's figures. What the runtime does not count for the pod is
// the sum of its containers.
func (n *Node) pod(s *cri.PodSandboxStats, created map[string]time.Time) statsapi.PodStats {
	meta := s.GetAttributes().GetMetadata()
	id := s.GetAttributes().GetId()
	pod := statsapi.PodStats{
		PodRef:     statsapi.PodReference{Name: meta.GetName(), Namespace: meta.GetNamespace(), UID: meta.GetUid()},
		StartTime:  metav1.NewTime(created[id]),
		Containers: []statsapi.ContainerStats{},
		CPU:        n.cpu(id, s.GetLinux().GetCpu()),
		Memory:     memoryOf(s.GetLinux().GetMemory()),
	}
	for _, c := range newest(s.GetLinux().GetContainers()) {
		pod.Containers = append(pod.Containers, n.container(c, created))
	}
	if pod.CPU == nil {
		pod.CPU = sumCPU(pod.Containers)
	}
	if pod.Memory == nil {
		pod.Memory = sumMemory(pod.Containers)
	}
	if network := s.GetLinux().GetNetwork(); network != nil {
		pod.Network = &statsapi.NetworkStats{Time: timeOf(network.Timestamp), InterfaceStats: interfaceOf(network.DefaultInterface)}
		for _, i := range network.Interfaces[:min(len(network.Interfaces), maxInterfaces)] {
			pod.Network.Interfaces = append(pod.Network.Interfaces, interfaceOf(i))
		}
	}
	if count := value(s.GetLinux().GetProcess().GetProcessCount()); count != nil {
		pod.ProcessStats = &statsapi.ProcessStats{ProcessCount: count}
	}
	return pod
}

// newest keeps of containers with one name the latest attempt, and drops those of
// which nothing is known.
func newest(list []*cri.ContainerStats) []*cri.ContainerStats {
	latest := map[string]*cri.ContainerStats{}
	for _, c := range list {
		meta := c.GetAttributes().GetMetadata()
		if c.Cpu == nil && c.Memory == nil {
			continue
		}
		if old := latest[meta.GetName()]; old == nil || old.GetAttributes().GetMetadata().GetAttempt() < meta.GetAttempt() {
			latest[meta.GetName()] = c
		}
	}
	kept := make([]*cri.ContainerStats, 0, len(latest))
	for _, c := range latest {
		kept = append(kept, c)
	}
	slices.SortFunc(kept, func(a, b *cri.ContainerStats) int {
		return cmp.Compare(a.GetAttributes().GetMetadata().GetName(), b.GetAttributes().GetMetadata().GetName())
	})
	return kept
}

func (n *Node) container(c *cri.ContainerStats, created map[string]time.Time) statsapi.ContainerStats {
	id := c.GetAttributes().GetId()
	out := statsapi.ContainerStats{
		Name:      c.GetAttributes().GetMetadata().GetName(),
		StartTime: metav1.NewTime(created[id]),
		CPU:       n.cpu(id, c.Cpu),
		Memory:    memoryOf(c.Memory),
	}
	if swap := c.GetSwap(); swap != nil {
		out.Swap = &statsapi.SwapStats{Time: timeOf(swap.Timestamp), SwapAvailableBytes: value(swap.SwapAvailableBytes), SwapUsageBytes: value(swap.SwapUsageBytes)}
	}
	if layer := c.GetWritableLayer(); layer != nil {
		out.Rootfs = &statsapi.FsStats{Time: timeOf(layer.Timestamp), UsedBytes: value(layer.UsedBytes), InodesUsed: value(layer.InodesUsed)}
	}
	return out
}

func (n *Node) cpu(id string, cpu *cri.CpuUsage) *statsapi.CPUStats {
	total := value(cpu.GetUsageCoreNanoSeconds())
	if total == nil {
		return nil
	}
	stats := &statsapi.CPUStats{Time: timeOf(cpu.Timestamp), UsageCoreNanoSeconds: total, UsageNanoCores: value(cpu.UsageNanoCores)}
	if rate := n.rate(id, stats.Time.Time, *total); stats.UsageNanoCores == nil {
		stats.UsageNanoCores = rate
	}
	return stats
}

// addFilesystems adds the space on the node's and the images' file systems, to
// which containers' layers belong. The caller holds the lock.
func (n *Node) addFilesystems(ctx context.Context, summary *statsapi.Summary, now time.Time) {
	node := n.filesystem(n.config.DataDir, now)
	summary.Node.Fs = node
	info, err := n.config.Runtime.ImageFsInfo(ctx)
	if err != nil || len(info.ImageFilesystems) == 0 {
		return
	}
	n.imageDir = info.ImageFilesystems[0].GetFsId().GetMountpoint()
	images := n.filesystem(n.imageDir, now)
	if images == nil {
		return
	}
	summary.Node.Runtime = &statsapi.RuntimeStats{ImageFs: new(*images), ContainerFs: new(*images)}
	summary.Node.Runtime.ImageFs.UsedBytes = value(info.ImageFilesystems[0].UsedBytes)
	summary.Node.Runtime.ImageFs.InodesUsed = value(info.ImageFilesystems[0].InodesUsed)
	for p := range summary.Pods {
		pod := &summary.Pods[p]
		storage := statsapi.FsStats{Time: metav1.NewTime(now), UsedBytes: new(uint64), InodesUsed: new(uint64)}
		if node != nil {
			storage.AvailableBytes, storage.CapacityBytes = node.AvailableBytes, node.CapacityBytes
			storage.Inodes, storage.InodesFree = node.Inodes, node.InodesFree
		}
		for c := range pod.Containers {
			if root := pod.Containers[c].Rootfs; root != nil {
				root.AvailableBytes, root.CapacityBytes = images.AvailableBytes, images.CapacityBytes
				root.Inodes, root.InodesFree = images.Inodes, images.InodesFree
				*storage.UsedBytes += deref(root.UsedBytes)
				*storage.InodesUsed += deref(root.InodesUsed)
			}
		}
		pod.EphemeralStorage = &storage
	}
}

// filesystem is nil when path cannot be looked at.
func (n *Node) filesystem(path string, now time.Time) *statsapi.FsStats {
	fs, err := n.config.Statfs(path)
	if err != nil {
		return nil
	}
	return &statsapi.FsStats{
		Time: metav1.NewTime(now), CapacityBytes: &fs.Capacity, AvailableBytes: &fs.Available, UsedBytes: new(sub(fs.Capacity, fs.Available)),
		Inodes: &fs.Inodes, InodesFree: &fs.InodesFree, InodesUsed: new(sub(fs.Inodes, fs.InodesFree)),
	}
}
