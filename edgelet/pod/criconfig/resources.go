package criconfig

import (
	"path"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Cgroup drivers, as CRI's RuntimeConfig names them.
const (
	DriverSystemd  = "systemd"
	DriverCgroupfs = "cgroupfs"
)

const (
	minShares   = 2       // what the kernel accepts at least
	cpuPeriod   = 100_000 // microseconds
	minCPUQuota = 1000    // microseconds
)

// OOM score adjustments. Burstable containers lie between the two.
const (
	oomGuaranteed = -997
	oomBestEffort = 1000
)

// CgroupParent is the cgroup of a pod below root (as "kubepods"): of its class of
// service, then of the pod itself.
func CgroupParent(root, driver string, pod *corev1.Pod) string {
	class := ""
	switch QOS(pod) {
	case corev1.PodQOSBurstable:
		class = "burstable"
	case corev1.PodQOSBestEffort:
		class = "besteffort"
	}
	if driver != DriverSystemd {
		return path.Join("/", root, class, "pod"+string(pod.UID))
	}
	// A dash separates the levels of slices, so none may be within a name.
	levels := []string{strings.ReplaceAll(root, "-", "_")}
	if class != "" {
		levels = append(levels, class)
	}
	levels = append(levels, "pod"+strings.ReplaceAll(string(pod.UID), "-", "_"))
	full := "/"
	for i := range levels {
		full = path.Join(full, strings.Join(levels[:i+1], "-")+".slice")
	}
	return full
}

// QOS is the class of service that a pod's requests and limits put it in. The API
// server has computed it for every pod; it is computed here where that is missing.
func QOS(pod *corev1.Pod) corev1.PodQOSClass {
	if pod.Status.QOSClass != "" {
		return pod.Status.QOSClass
	}
	if r := pod.Spec.Resources; r != nil {
		return qos([]corev1.ResourceRequirements{*r})
	}
	var all []corev1.ResourceRequirements
	for i := range pod.Spec.InitContainers {
		all = append(all, pod.Spec.InitContainers[i].Resources)
	}
	for i := range pod.Spec.Containers {
		all = append(all, pod.Spec.Containers[i].Resources)
	}
	return qos(all)
}

func qos(all []corev1.ResourceRequirements) corev1.PodQOSClass {
	any, guaranteed := false, true
	for _, r := range all {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			request, limit := r.Requests[name], r.Limits[name]
			any = any || !request.IsZero() || !limit.IsZero()
			// A request that is missing is the limit.
			guaranteed = guaranteed && !limit.IsZero() && (request.IsZero() || request.Cmp(limit) == 0)
		}
	}
	switch {
	case !any:
		return corev1.PodQOSBestEffort
	case guaranteed:
		return corev1.PodQOSGuaranteed
	}
	return corev1.PodQOSBurstable
}

// Resources are the limits of one container. Memory is the machine's in bytes;
// pageSizes are its huge page sizes, as "2MB", each of which is limited to what
// the container asks for, so to nothing if it does not.
func Resources(pod *corev1.Pod, c *corev1.Container, memory int64, pageSizes []string) *cri.LinuxContainerResources {
	limit := func(name corev1.ResourceName) resource.Quantity {
		q := c.Resources.Limits[name]
		if q.IsZero() && pod.Spec.Resources != nil {
			q = pod.Spec.Resources.Limits[name]
		}
		return q
	}
	cpuLimit, memoryLimit := limit(corev1.ResourceCPU), limit(corev1.ResourceMemory)
	request, ok := c.Resources.Requests[corev1.ResourceCPU]
	if !ok {
		request = cpuLimit
	}
	r := &cri.LinuxContainerResources{
		CpuPeriod:          cpuPeriod,
		CpuShares:          Shares(request.MilliValue()),
		CpuQuota:           quota(cpuLimit.MilliValue()),
		MemoryLimitInBytes: memoryLimit.Value(),
		OomScoreAdj:        oomScore(pod, c, memory),
	}
	for _, size := range pageSizes {
		r.HugepageLimits = append(r.HugepageLimits, &cri.HugepageLimit{
			PageSize: size, Limit: hugePages(size, pod, c),
		})
	}
	return r
}

// Shares are the CPU shares of a request in thousandths of a CPU.
func Shares(milli int64) int64 { return max(milli*1024/1000, minShares) }

// quota is how many microseconds of each period a limit allows; 0 is no limit.
func quota(milli int64) int64 {
	if milli == 0 {
		return 0
	}
	return max(milli*cpuPeriod/1000, minCPUQuota)
}

// hugePages returns the limit in bytes for pages of one size.
func hugePages(size string, pod *corev1.Pod, c *corev1.Container) uint64 {
	unit := map[byte]string{'K': "Ki", 'M': "Mi", 'G': "Gi"}
	if len(size) < 3 || unit[size[len(size)-2]] == "" {
		return 0
	}
	name := corev1.ResourceName(corev1.ResourceHugePagesPrefix + size[:len(size)-2] + unit[size[len(size)-2]])
	if q, ok := c.Resources.Limits[name]; ok {
		return uint64(q.Value())
	}
	if pod.Spec.Resources != nil {
		q := pod.Spec.Resources.Limits[name]
		return uint64(q.Value())
	}
	return 0
}

// PageSize is how runtimes name the huge pages that the kernel calls entry in
// /sys/kernel/mm/hugepages, as "2MB" for "hugepages-2048kB"; empty if it is none.
func PageSize(entry string) string {
	digits, ok := strings.CutPrefix(entry, "hugepages-")
	digits, ok2 := strings.CutSuffix(digits, "kB")
	kb, err := strconv.ParseUint(digits, 10, 40)
	if !ok || !ok2 || err != nil || kb == 0 {
		return ""
	}
	for _, unit := range []string{"KB", "MB", "GB"} {
		if kb < 1024 || kb%1024 != 0 {
			return strconv.FormatUint(kb, 10) + unit
		}
		kb /= 1024
	}
	return strconv.FormatUint(kb, 10) + "TB"
}

// oomScore ranks the container for the kernel's OOM killer: the more of the
// machine's memory it has asked for, the later it is killed.
func oomScore(pod *corev1.Pod, c *corev1.Container, memory int64) int64 {
	if pod.Spec.PriorityClassName == "system-node-critical" {
		return oomGuaranteed
	}
	switch QOS(pod) {
	case corev1.PodQOSGuaranteed:
		return oomGuaranteed
	case corev1.PodQOSBestEffort:
		return oomBestEffort
	}
	if memory <= 0 {
		return oomBestEffort - 1
	}
	request := memoryRequest(c)
	if isInit(pod, c) && IsSidecar(c) {
		// A sidecar must not die before the containers that need it.
		least := request
		for i := range pod.Spec.Containers {
			if m := memoryRequest(&pod.Spec.Containers[i]); i == 0 || m < least {
				least = m
			}
		}
		request = max(request, least)
	}
	score := 1000 - 1000*request/memory
	return min(max(score, 1000+oomGuaranteed), oomBestEffort-1)
}

func memoryRequest(c *corev1.Container) int64 { return c.Resources.Requests.Memory().Value() }

func isInit(pod *corev1.Pod, c *corev1.Container) bool {
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == c.Name {
			return true
		}
	}
	return false
}
