package pod

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	podresources "k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/internal/backoff"
)

// Namespaces that sysctls belong to, as messages name them.
const (
	ipcNamespace = "IPC"
	netNamespace = "Net"
)

// safeSysctls may be set by any pod: each belongs to one namespace, and what it
// does ends there. All kernels that a CRI runtime runs on have them.
var safeSysctls = map[string]string{
	"kernel.shm_rmid_forced":              ipcNamespace,
	"net.ipv4.ip_local_port_range":        netNamespace,
	"net.ipv4.tcp_syncookies":             netNamespace,
	"net.ipv4.ping_group_range":           netNamespace,
	"net.ipv4.ip_unprivileged_port_start": netNamespace,
	"net.ipv4.ip_local_reserved_ports":    netNamespace,
	"net.ipv4.tcp_keepalive_time":         netNamespace,
	"net.ipv4.tcp_fin_timeout":            netNamespace,
	"net.ipv4.tcp_keepalive_intvl":        netNamespace,
	"net.ipv4.tcp_keepalive_probes":       netNamespace,
	"net.ipv4.tcp_rmem":                   netNamespace,
	"net.ipv4.tcp_wmem":                   netNamespace,
	"net.ipv4.tcp_slow_start_after_idle":  netNamespace,
	"net.ipv4.tcp_notsent_lowat":          netNamespace,
}

// refuses says why the site cannot run a new pod; empty: it can. The caller
// holds m.admit.
func (m *Manager) refuses(pod *corev1.Pod) (reason, message string) {
	if os := pod.Spec.OS; os != nil && os.Name != corev1.Linux {
		return "PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"
	}
	if message := forbiddenSysctl(pod, m.Sysctls); message != "" {
		return "SysctlForbidden", "forbidden sysctl: " + message
	}
	others := m.running(pod)
	if reason, message := lacks(pod, others, m.Allocatable()); reason != "" {
		return reason, message
	}
	// A node that is not known yet forbids nothing: the scheduler has looked.
	if node, err := m.Objects.Node(); err == nil && node != nil {
		if fits, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node); err != nil || !fits {
			return "NodeAffinity", "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
		}
	}
	if portConflict(pod, others) {
		return "NodePorts", "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"
	}
	return "", ""
}

// running lists the pods that hold resources, without pod itself.
func (m *Manager) running(pod *corev1.Pod) []*corev1.Pod {
	var pods []*corev1.Pod
	for _, w := range m.all() {
		w.mu.Lock()
		over := w.record.Gone || w.record.Ended != nil || w.record.Status != nil && ended(w.record.Status.Phase)
		if w.uid != pod.UID && w.holds && !over && w.pod != nil {
			pods = append(pods, w.pod)
		}
		w.mu.Unlock()
	}
	return pods
}

// lacks says which resource is not left for pod beside others. What the site does
// not list is not limited.
func lacks(pod *corev1.Pod, others []*corev1.Pod, allocatable corev1.ResourceList) (reason, message string) {
	short := func(name corev1.ResourceName, requested, used, capacity int64) (string, string) {
		return "OutOf" + string(name), fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
			name, requested, used, capacity)
	}
	if limit, ok := allocatable[corev1.ResourcePods]; ok && int64(len(others))+1 > limit.Value() {
		return short(corev1.ResourcePods, 1, int64(len(others)), limit.Value())
	}
	requests := podresources.PodRequests(pod, podresources.PodResourcesOptions{})
	var taken []corev1.ResourceList
	for _, o := range others {
		taken = append(taken, podresources.PodRequests(o, podresources.PodResourcesOptions{}))
	}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage} {
		request, limit := requests[name], allocatable[name]
		if _, ok := allocatable[name]; !ok || request.IsZero() {
			continue
		}
		value := func(l corev1.ResourceList) int64 {
			q := l[name]
			if name == corev1.ResourceCPU {
				return q.MilliValue()
			}
			return q.Value()
		}
		used := int64(0)
		for _, t := range taken {
			used += value(t)
		}
		if value(requests)+used > value(allocatable) {
			return short(name, value(requests), used, value(corev1.ResourceList{name: limit}))
		}
	}
	return "", ""
}

// forbiddenSysctl names a sysctl that the pod must not set; allowed are those
// that the site permits besides the safe ones.
func forbiddenSysctl(pod *corev1.Pod, allowed []string) string {
	if pod.Spec.SecurityContext == nil {
		return ""
	}
	for _, s := range pod.Spec.SecurityContext.Sysctls {
		name := s.Name
		if !strings.Contains(name, ".") || strings.IndexByte(name, '/') >= 0 && strings.IndexByte(name, '/') < strings.IndexByte(name, '.') {
			// The kernel's own spelling, where a dot is a slash and the reverse.
			name = strings.NewReplacer("/", ".", ".", "/").Replace(name)
		}
		namespace, safe := safeSysctls[name]
		switch {
		case namespace == ipcNamespace && pod.Spec.HostIPC, namespace == netNamespace && pod.Spec.HostNetwork:
			return fmt.Sprintf("%q not allowed with host %s enabled", name, namespace)
		case !safe && !matchesAny(name, allowed):
			return fmt.Sprintf("%q not allowlisted", name)
		}
	}
	return ""
}

func matchesAny(name string, patterns []string) bool {
	for _, p := range patterns {
		prefix, open := strings.CutSuffix(p, "*")
		if name == p || open && strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// A hostPort is a port of the machine.
type hostPort struct {
	ip       string // empty: all
	protocol corev1.Protocol
	port     int32
}

func hostPorts(pod *corev1.Pod) []hostPort {
	var ports []hostPort
	add := func(containers []corev1.Container) {
		for i := range containers {
			for _, p := range containers[i].Ports {
				if pod.Spec.HostNetwork && p.HostPort == 0 {
					p.HostPort = p.ContainerPort
				}
				if p.HostPort == 0 {
					continue
				}
				if p.HostIP == "0.0.0.0" || p.HostIP == "::" {
					p.HostIP = ""
				}
				if p.Protocol == "" {
					p.Protocol = corev1.ProtocolTCP
				}
				ports = append(ports, hostPort{p.HostIP, p.Protocol, p.HostPort})
			}
		}
	}
	add(pod.Spec.InitContainers)
	add(pod.Spec.Containers)
	return ports
}

func portConflict(pod *corev1.Pod, others []*corev1.Pod) bool {
	mine := hostPorts(pod)
	if len(mine) == 0 {
		return false
	}
	for _, o := range others {
		for _, theirs := range hostPorts(o) {
			for _, p := range mine {
				if p.port == theirs.port && p.protocol == theirs.protocol && (p.ip == theirs.ip || p.ip == "" || theirs.ip == "") {
					return true
				}
			}
		}
	}
	return false
}

// resizable are the resources that can change while a pod runs.
var resizable = []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory}

// A Resize is a change of a pod's resources that is not done yet.
type Resize struct {
	Pending string // Deferred or Infeasible: the site has no room; empty: it has
	Message string
	Running bool   // it has been allocated, and containers are being changed
	Error   string // why that does not succeed
}

// sameResources reports whether a and b ask for the same of what can be resized.
func sameResources(a, b *corev1.ResourceRequirements) bool {
	return len(changed(a, b)) == 0
}

// changed names the resources in which a and b differ.
func changed(a, b *corev1.ResourceRequirements) []corev1.ResourceName {
	var names []corev1.ResourceName
	for _, name := range resizable {
		ar, al := a.Requests[name], a.Limits[name]
		br, bl := b.Requests[name], b.Limits[name]
		if ar.Cmp(br) != 0 || al.Cmp(bl) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// needsRestart reports whether c must be restarted for its resources to become
// what is allocated to it.
func needsRestart(c *corev1.Container, applied *corev1.ResourceRequirements) bool {
	for _, name := range changed(&c.Resources, applied) {
		for _, p := range c.ResizePolicy {
			if p.ResourceName == name && p.RestartPolicy == corev1.RestartContainer {
				return true
			}
		}
	}
	return false
}

// allocate gives the pod the resources that it asks for, if the site has them,
// and makes w.current the pod with those that it has.
func (w *worker) allocate() {
	pod := w.current
	same := true
	for c := range criconfig.Containers(pod) {
		m := w.obs.Memory[c.Name]
		if m.Allocated == nil {
			m.Allocated = c.Resources.DeepCopy()
			w.obs.Memory[c.Name] = m
		}
		same = same && sameResources(&c.Resources, m.Allocated)
	}
	w.resize.Pending, w.resize.Message = "", ""
	if same || w.record.Ended != nil {
		return
	}
	w.m.admit.Lock()
	defer w.m.admit.Unlock()
	allocatable := w.m.Allocatable()
	if _, message := lacks(pod, nil, allocatable); message != "" {
		w.resize.Pending, w.resize.Message = corev1.PodReasonInfeasible, message
	} else if _, message := lacks(pod, w.m.running(pod), allocatable); message != "" {
		w.resize.Pending, w.resize.Message = corev1.PodReasonDeferred, message
	}
	if w.resize.Pending == "" {
		w.event("", corev1.EventTypeNormal, "ResizeStarted", "Pod resize started")
		for c := range criconfig.Containers(pod) {
			m := w.obs.Memory[c.Name]
			m.Allocated, m.ResizeRetry = c.Resources.DeepCopy(), time.Time{}
			w.obs.Memory[c.Name] = m
		}
		w.resize = Resize{Running: true}
		return
	}
	// What it has, it keeps.
	pod = pod.DeepCopy()
	for c := range criconfig.Containers(pod) {
		c.Resources = *w.obs.Memory[c.Name].Allocated.DeepCopy()
	}
	w.current = pod
}

// resized notes how far a resize has come.
func (w *worker) resized() {
	running := false
	for _, run := range w.obs.Containers {
		m := w.obs.Memory[run.Name]
		running = running || run.State == cri.ContainerState_CONTAINER_RUNNING &&
			m.Allocated != nil && m.Applied != nil && !sameResources(m.Allocated, m.Applied)
	}
	if w.resize.Running && !running {
		w.event("", corev1.EventTypeNormal, "ResizeCompleted", "Pod resize completed")
		w.resize.Error = ""
	}
	w.resize.Running = running
}

// resizeContainer changes the limits of a running container. If the runtime
// refuses, as when it uses more memory than it is to have, it is asked again later.
func (w *worker) resizeContainer(ctx context.Context, spec Spec, a ResizeContainer) error {
	c := specOf(spec.Pod, a.Name)
	m := w.obs.Memory[a.Name]
	err := w.m.Runtime.UpdateContainerResources(ctx, a.ID, criconfig.Resources(spec.Pod, c, w.m.Memory, w.m.pageSizes))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		if w.resize.Error != text(err) {
			w.event(a.Name, corev1.EventTypeWarning, "ResizeError", "Error: "+text(err))
		}
		w.resize.Error = text(err)
		m.ResizeRetry = time.Now().Add(retryBase + backoff.Delay(4, retryBase, retryLimit))
	default:
		m.Applied, m.ResizeRetry = c.Resources.DeepCopy(), time.Time{}
	}
	w.obs.Memory[a.Name] = m
	return nil
}

// reportedResources are those that a container has: what was applied to it while
// it runs, what is allocated to it while it does not.
func reportedResources(c *corev1.Container, run Container, m Memory) *corev1.ResourceRequirements {
	r := c.Resources.DeepCopy()
	if run.State != cri.ContainerState_CONTAINER_RUNNING || m.Applied == nil {
		return r
	}
	for _, name := range resizable {
		if q, ok := m.Applied.Requests[name]; ok && r.Requests != nil {
			r.Requests[name] = q.DeepCopy()
		}
		if q, ok := m.Applied.Limits[name]; ok && r.Limits != nil {
			r.Limits[name] = q.DeepCopy()
		}
	}
	return r
}

// resizeConditions are the conditions of a resize that is not done.
func (s *situation) resizeConditions() []corev1.PodCondition {
	var all []corev1.PodCondition
	if s.resize.Pending != "" {
		all = append(all, corev1.PodCondition{
			Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: s.resize.Pending, Message: s.resize.Message,
		})
	}
	if s.resize.Running {
		c := corev1.PodCondition{Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue}
		if s.resize.Error != "" {
			c.Reason, c.Message = corev1.PodReasonError, s.resize.Error
		}
		all = append(all, c)
	}
	return all
}
