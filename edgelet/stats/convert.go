package stats

import (
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// value is nil for what the runtime does not tell.
func value(v *cri.UInt64Value) *uint64 {
	if v == nil {
		return nil
	}
	return new(v.Value)
}

func deref(p *uint64) uint64 {
	if p == nil {
		return 0
	}
	return *p
}

func timeOf(nanoseconds int64) metav1.Time { return metav1.NewTime(time.Unix(0, nanoseconds)) }

// bootTime reads from /proc/stat when the machine started.
func bootTime(text string) time.Time {
	for line := range strings.Lines(text) {
		if seconds, ok := strings.CutPrefix(line, "btime "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(seconds), 10, 40)
			return time.Unix(n, 0)
		}
	}
	return time.Time{}
}

func memoryOf(m *cri.MemoryUsage) *statsapi.MemoryStats {
	if m == nil {
		return nil
	}
	return &statsapi.MemoryStats{
		Time: timeOf(m.Timestamp), AvailableBytes: value(m.AvailableBytes), UsageBytes: value(m.UsageBytes), WorkingSetBytes: value(m.WorkingSetBytes),
		RSSBytes: value(m.RssBytes), PageFaults: value(m.PageFaults), MajorPageFaults: value(m.MajorPageFaults),
	}
}

func interfaceOf(i *cri.NetworkInterfaceUsage) statsapi.InterfaceStats {
	return statsapi.InterfaceStats{
		Name: printable(i.GetName()), RxBytes: value(i.GetRxBytes()), RxErrors: value(i.GetRxErrors()),
		TxBytes: value(i.GetTxBytes()), TxErrors: value(i.GetTxErrors()),
	}
}

// sumCPU adds up containers; nil if none has figures.
func sumCPU(list []statsapi.ContainerStats) *statsapi.CPUStats {
	var sum *statsapi.CPUStats
	for _, c := range list {
		if c.CPU == nil {
			continue
		}
		if sum == nil {
			sum = &statsapi.CPUStats{Time: c.CPU.Time, UsageCoreNanoSeconds: new(uint64)}
		}
		*sum.UsageCoreNanoSeconds += deref(c.CPU.UsageCoreNanoSeconds)
		if c.CPU.UsageNanoCores != nil {
			sum.UsageNanoCores = new(deref(sum.UsageNanoCores) + *c.CPU.UsageNanoCores)
		}
	}
	return sum
}

// sumMemory adds up containers; nil if none has figures.
func sumMemory(list []statsapi.ContainerStats) *statsapi.MemoryStats {
	var sum *statsapi.MemoryStats
	for _, c := range list {
		if c.Memory == nil {
			continue
		}
		if sum == nil {
			sum = &statsapi.MemoryStats{Time: c.Memory.Time, WorkingSetBytes: new(uint64), UsageBytes: new(uint64), RSSBytes: new(uint64)}
		}
		*sum.WorkingSetBytes += deref(c.Memory.WorkingSetBytes)
		*sum.UsageBytes += deref(c.Memory.UsageBytes)
		*sum.RSSBytes += deref(c.Memory.RSSBytes)
	}
	return sum
}
