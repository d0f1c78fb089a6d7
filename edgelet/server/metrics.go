package server

import (
	"bytes"
	"fmt"
	"io"
	"net/http"

	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// summary is what the node, its pods and their containers use.
func (s *server) summary(w http.ResponseWriter, r *http.Request) error {
	all, err := s.Stats.Summary(r.Context())
	if err != nil {
		return err
	}
	if boolean(r.URL.Query(), "only_cpu_and_memory") {
		all = cpuAndMemory(all)
	}
	return reply(w, all)
}

// cpuAndMemory is a summary of nothing else.
func cpuAndMemory(all *stats.Summary) *stats.Summary {
	few := &stats.Summary{Node: stats.NodeStats{
		NodeName: all.Node.NodeName, StartTime: all.Node.StartTime, CPU: all.Node.CPU, Memory: all.Node.Memory,
	}}
	for _, c := range all.Node.SystemContainers {
		few.Node.SystemContainers = append(few.Node.SystemContainers, containerCPUAndMemory(c))
	}
	for _, p := range all.Pods {
		pod := stats.PodStats{PodRef: p.PodRef, StartTime: p.StartTime, CPU: p.CPU, Memory: p.Memory}
		for _, c := range p.Containers {
			pod.Containers = append(pod.Containers, containerCPUAndMemory(c))
		}
		few.Pods = append(few.Pods, pod)
	}
	return few
}

func containerCPUAndMemory(c stats.ContainerStats) stats.ContainerStats {
	return stats.ContainerStats{Name: c.Name, StartTime: c.StartTime, CPU: c.CPU, Memory: c.Memory}
}

// resourceMetrics is what metrics-server reads.
func (s *server) resourceMetrics(w http.ResponseWriter, r *http.Request) error {
	return replyMetrics(w, func(out io.Writer) error { return s.Stats.ResourceMetrics(r.Context(), out) })
}

func (s *server) probeMetrics(w http.ResponseWriter, r *http.Request) error {
	return replyMetrics(w, s.ProbeMetrics)
}

func (s *server) ownMetrics(w http.ResponseWriter, r *http.Request) error {
	s.Metrics.ServeHTTP(w, r)
	return nil
}

// containerMetrics is as much of cAdvisor's metrics as the summary can tell,
// under cAdvisor's names.
func (s *server) containerMetrics(w http.ResponseWriter, r *http.Request) error {
	all, err := s.Stats.Summary(r.Context())
	if err != nil {
		return err
	}
	return replyMetrics(w, func(out io.Writer) error {
		writeContainerMetrics(out, all)
		return nil
	})
}

// replyMetrics answers with Prometheus text, or with an error and none of it.
func replyMetrics(w http.ResponseWriter, write func(io.Writer) error) error {
	var b bytes.Buffer
	if err := write(&b); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(b.Bytes())
	return nil
}

// A family is one metric of cAdvisor's and how to read it from a container's or
// from a pod's statistics; nil: not known.
type family struct {
	name, kind, help string
	container        func(c *stats.ContainerStats) (value float64, ok bool)
	network          func(i *stats.InterfaceStats) *uint64
}

var families = []family{
	{"container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.",
		func(c *stats.ContainerStats) (float64, bool) {
			if c.CPU == nil || c.CPU.UsageCoreNanoSeconds == nil {
				return 0, false
			}
			return float64(*c.CPU.UsageCoreNanoSeconds) / 1e9, true
		}, nil},
	memory("container_memory_working_set_bytes", "Current working set in bytes.", func(m *stats.MemoryStats) *uint64 { return m.WorkingSetBytes }),
	memory("container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed.", func(m *stats.MemoryStats) *uint64 { return m.UsageBytes }),
	memory("container_memory_rss", "Size of RSS in bytes.", func(m *stats.MemoryStats) *uint64 { return m.RSSBytes }),
	{"container_fs_usage_bytes", "gauge", "Number of bytes that are consumed by the container on this filesystem.",
		func(c *stats.ContainerStats) (float64, bool) {
			if c.Rootfs == nil || c.Rootfs.UsedBytes == nil {
				return 0, false
			}
			return float64(*c.Rootfs.UsedBytes), true
		}, nil},
	{"container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.",
		func(c *stats.ContainerStats) (float64, bool) {
			return float64(c.StartTime.UnixNano()) / 1e9, !c.StartTime.IsZero()
		}, nil},
	{"container_network_receive_bytes_total", "counter", "Cumulative count of bytes received", nil, func(i *stats.InterfaceStats) *uint64 { return i.RxBytes }},
	{"container_network_receive_errors_total", "counter", "Cumulative count of errors encountered while receiving", nil, func(i *stats.InterfaceStats) *uint64 { return i.RxErrors }},
	{"container_network_transmit_bytes_total", "counter", "Cumulative count of bytes transmitted", nil, func(i *stats.InterfaceStats) *uint64 { return i.TxBytes }},
	{"container_network_transmit_errors_total", "counter", "Cumulative count of errors encountered while transmitting", nil, func(i *stats.InterfaceStats) *uint64 { return i.TxErrors }},
}

func memory(name, help string, read func(*stats.MemoryStats) *uint64) family {
	return family{name, "gauge", help, func(c *stats.ContainerStats) (float64, bool) {
		if c.Memory == nil || read(c.Memory) == nil {
			return 0, false
		}
		return float64(*read(c.Memory)), true
	}, nil}
}

func writeContainerMetrics(w io.Writer, all *stats.Summary) {
	for _, f := range families {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", f.name, f.help, f.name, f.kind)
		for i := range all.Pods {
			p := &all.Pods[i]
			for _, face := range interfaces(p) {
				if f.network == nil {
					break
				}
				if n := f.network(&face); n != nil {
					fmt.Fprintf(w, "%s{interface=%q,namespace=%q,pod=%q} %d\n", f.name, face.Name, p.PodRef.Namespace, p.PodRef.Name, *n)
				}
			}
			for j := range p.Containers {
				if f.container == nil {
					break
				}
				if value, ok := f.container(&p.Containers[j]); ok {
					fmt.Fprintf(w, "%s{container=%q,namespace=%q,pod=%q} %g\n", f.name, p.Containers[j].Name, p.PodRef.Namespace, p.PodRef.Name, value)
				}
			}
		}
	}
}

// interfaces are those of a pod, or the one that stands for all.
func interfaces(p *stats.PodStats) []stats.InterfaceStats {
	if p.Network == nil {
		return nil
	}
	if len(p.Network.Interfaces) == 0 {
		return []stats.InterfaceStats{p.Network.InterfaceStats}
	}
	return p.Network.Interfaces
}
