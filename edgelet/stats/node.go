package stats

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// How often what is looked at, and how much of it is told.
const (
	conditionPeriod = 10 * time.Second
	imagePeriod     = time.Minute
	maxImages       = 50
	maxImageNames   = 5
	maxAddresses    = 16
)

// cached is what Status keeps between calls.
type cached struct {
	images     []corev1.ContainerImage
	imagesMade time.Time
	version    string // of the runtime, once known
	ready      corev1.NodeCondition
}

// Run calls changed with the node's status now and whenever it has changed, as
// seen every ten seconds, until ctx is done, and returns its cause then.
func (n *Node) Run(ctx context.Context, changed func(edge.NodeStatus)) error {
	ticker := time.NewTicker(conditionPeriod)
	defer ticker.Stop()
	var last edge.NodeStatus
	for first := true; ; first = false {
		status, err := n.Status(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			n.config.Log.Warn("node status", "error", err)
		case first || !equality.Semantic.DeepEqual(last, status):
			last = status
			changed(status)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// Status tells all about the node but its labels. Seq is left to the caller. While
// the runtime does not answer, the node is not ready, and what only the runtime
// knows is as it was last.
func (n *Node) Status(ctx context.Context) (edge.NodeStatus, error) {
	memory, err := n.machine.memory()
	if err != nil {
		return edge.NodeStatus{}, err
	}
	disk, err := n.config.Statfs(n.config.DataDir)
	if err != nil {
		return edge.NodeStatus{}, err
	}
	capacity, allocatable := n.resources(memory, disk)
	status := edge.NodeStatus{
		Capacity: capacity, Allocatable: allocatable,
		Info: n.machine.systemInfo(), Addresses: n.addresses(),
	}
	if memory.SwapTotal > 0 {
		status.Info.Swap = &corev1.NodeSwapStatus{Capacity: new(int64(memory.SwapTotal))}
	}
	if err := n.acquire(ctx); err != nil {
		return edge.NodeStatus{}, err
	}
	defer n.release()
	now := time.Now()
	runtime, runtimeErr := n.config.Runtime.Status(ctx)
	if runtimeErr == nil {
		n.refresh(ctx, now)
	}
	if ctx.Err() != nil {
		return edge.NodeStatus{}, context.Cause(ctx)
	}
	status.Images, status.Info.ContainerRuntimeVersion = n.status.images, n.status.version
	status.RuntimeHandlers = handlers(runtime)
	n.pressure = Pressures(n.config.Thresholds, n.pressure, n.observe(memory, disk), now)
	n.status.ready = readiness(n.status.ready, runtime, runtimeErr, now)
	status.Conditions = append(n.pressure.Conditions(), n.status.ready)
	return status, nil
}

// refresh asks the runtime for what seldom changes. The caller holds the lock.
func (n *Node) refresh(ctx context.Context, now time.Time) {
	if n.status.version == "" || now.Sub(n.status.imagesMade) >= imagePeriod {
		if v, err := n.config.Runtime.Version(ctx); err == nil {
			n.status.version = printable(v.RuntimeName + "://" + v.RuntimeVersion)
		}
		if images, err := n.config.Runtime.ListImages(ctx); err == nil {
			n.status.images, n.status.imagesMade = largest(images), now
		}
		if info, err := n.config.Runtime.ImageFsInfo(ctx); err == nil && len(info.ImageFilesystems) > 0 {
			n.imageDir = info.ImageFilesystems[0].GetFsId().GetMountpoint()
		}
	}
}

// observe reads what pressure depends on. The caller holds the lock.
func (n *Node) observe(memory Memory, disk Filesystem) Observation {
	o := Observation{Memory: &memory, Node: &disk}
	if n.imageDir != "" {
		if fs, err := n.config.Statfs(n.imageDir); err == nil {
			o.Image = &fs
		}
	}
	if now, most := n.machine.processes(); now > 0 && most > 0 {
		o.Processes = &Processes{now, most}
	}
	return o
}

// resources returns what the machine has and what of it pods may have.
func (n *Node) resources(memory Memory, disk Filesystem) (capacity, allocatable corev1.ResourceList) {
	bytes := func(n uint64) resource.Quantity {
		return *resource.NewQuantity(int64(min(n, 1<<62)), resource.BinarySI)
	}
	capacity = corev1.ResourceList{
		corev1.ResourceCPU:              *resource.NewQuantity(n.machine.cpus(), resource.DecimalSI),
		corev1.ResourceMemory:           bytes(memory.Total),
		corev1.ResourceEphemeralStorage: bytes(disk.Capacity),
		corev1.ResourcePods:             *resource.NewQuantity(n.config.MaxPods, resource.DecimalSI),
	}
	withheld := corev1.ResourceList{
		corev1.ResourceMemory:           bytes(uint64(max(n.config.Thresholds.Memory, 0))),
		corev1.ResourceEphemeralStorage: bytes(disk.Capacity / 100 * uint64(max(n.config.Thresholds.Node, 0))),
	}
	for size, total := range n.machine.hugepages() {
		page := bytes(size)
		capacity[corev1.ResourceName(corev1.ResourceHugePagesPrefix+page.String())] = bytes(total)
		huge := withheld[corev1.ResourceMemory]
		huge.Add(bytes(total)) // ordinary memory no more
		withheld[corev1.ResourceMemory] = huge
	}
	allocatable = capacity.DeepCopy()
	for _, less := range []corev1.ResourceList{withheld, n.config.Reserved} {
		for name, quantity := range less {
			left, ok := allocatable[name]
			if !ok {
				continue
			}
			if left.Sub(quantity); left.Sign() < 0 {
				left.Set(0)
			}
			allocatable[name] = left
		}
	}
	return capacity, allocatable
}

// readiness is the condition Ready, by the runtime's own.
func readiness(before corev1.NodeCondition, status *cri.StatusResponse, err error, now time.Time) corev1.NodeCondition {
	ready := corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", Message: "kubelet is posting ready status"}
	problems := problemsOf(status, err)
	if len(problems) > 0 {
		ready.Status, ready.Reason, ready.Message = corev1.ConditionFalse, "KubeletNotReady", strings.Join(problems, ", ")
	}
	ready.LastTransitionTime = before.LastTransitionTime
	if before.Status != ready.Status {
		ready.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second))
	}
	return ready
}

func problemsOf(status *cri.StatusResponse, err error) (problems []string) {
	if err != nil {
		return []string{"container runtime is down: " + printable(err.Error())}
	}
	seen := map[string]bool{}
	for _, c := range status.GetStatus().GetConditions() {
		seen[c.Type] = true
		if c.Status || c.Type != cri.RuntimeReady && c.Type != cri.NetworkReady {
			continue
		}
		what := "container runtime"
		if c.Type == cri.NetworkReady {
			what = "container runtime network"
		}
		problems = append(problems, printable(fmt.Sprintf("%s not ready: %s=false reason:%s message:%s", what, c.Type, c.Reason, c.Message)))
	}
	if !seen[cri.RuntimeReady] {
		problems = append(problems, "container runtime status is missing "+cri.RuntimeReady)
	}
	return problems
}

func handlers(status *cri.StatusResponse) []corev1.NodeRuntimeHandler {
	var list []corev1.NodeRuntimeHandler
	for _, h := range status.GetRuntimeHandlers() {
		list = append(list, corev1.NodeRuntimeHandler{Name: h.Name, Features: &corev1.NodeRuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: new(h.GetFeatures().GetRecursiveReadOnlyMounts()),
			UserNamespaces:          new(h.GetFeatures().GetUserNamespaces()),
		}})
	}
	slices.SortFunc(list, func(a, b corev1.NodeRuntimeHandler) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// largest describes the largest images, with a few of each one's names.
func largest(images []*cri.Image) []corev1.ContainerImage {
	list := make([]corev1.ContainerImage, 0, len(images))
	for _, image := range images {
		names := slices.Concat(image.RepoDigests, image.RepoTags)
		if len(names) > 0 {
			list = append(list, corev1.ContainerImage{Names: names[:min(len(names), maxImageNames)], SizeBytes: int64(image.Size)})
		}
	}
	slices.SortFunc(list, func(a, b corev1.ContainerImage) int {
		return cmp.Or(cmp.Compare(b.SizeBytes, a.SizeBytes), cmp.Compare(a.Names[0], b.Names[0]))
	})
	return list[:min(len(list), maxImages)]
}

// addresses lists the node's addresses, the primary of each family first: the one
// that traffic to the outside comes from, or else the first of an interface.
func (n *Node) addresses() []string {
	if len(n.config.Addresses) > 0 {
		return n.config.Addresses
	}
	var primary []netip.Addr
	// Connecting a datagram socket sends nothing; it asks for the route.
	for _, target := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		conn, err := net.Dial("udp", target)
		if err != nil {
			continue
		}
		if local, err := netip.ParseAddrPort(conn.LocalAddr().String()); err == nil {
			primary = append(primary, local.Addr().Unmap())
		}
		conn.Close()
	}
	return order(primary, n.interfaceAddresses())
}

// interfaceAddresses lists the addresses of interfaces that are up and neither
// bridges nor pods' own.
func (n *Node) interfaceAddresses() (list []netip.Addr) {
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		_, err := os.Stat(filepath.Join(n.config.Root, "sys/class/net", i.Name, "bridge"))
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 || err == nil || strings.HasPrefix(i.Name, "veth") {
			continue
		}
		addresses, _ := i.Addrs()
		for _, a := range addresses {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				list = append(list, prefix.Addr().Unmap())
			}
		}
	}
	return list
}

// order puts the primary address of each family before the others, without
// repetition and without those that only this link or machine knows.
func order(primary, others []netip.Addr) []string {
	var chosen []netip.Addr
	for _, four := range []bool{true, false} {
		for _, a := range slices.Concat(primary, others) {
			if a.Is4() == four && a.IsGlobalUnicast() {
				chosen = append(chosen, a)
				break
			}
		}
	}
	for _, a := range others {
		if a.IsGlobalUnicast() && !slices.Contains(chosen, a) && len(chosen) < maxAddresses {
			chosen = append(chosen, a)
		}
	}
	list := make([]string, 0, len(chosen))
	for _, a := range chosen {
		list = append(list, a.String())
	}
	return list
}
