package stats

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// WriteResourceMetrics writes what a kubelet serves at /metrics/resource, in
// Prometheus' text format. Scrape is the error of the summary, which may be nil
// with it.
func WriteResourceMetrics(w io.Writer, summary *statsapi.Summary, scrape error) error {
	var out exposition
	if summary != nil {
		out.node(summary.Node)
		out.containers(summary.Pods)
		out.pods(summary.Pods)
	}
	failed := "0"
	if scrape != nil {
		failed = "1"
	}
	for _, name := range []string{"resource_scrape_error", "scrape_error"} {
		out.family(name, "gauge", "1 if there was an error while getting container metrics, 0 otherwise")
		fmt.Fprintf(&out, "%s %s\n", name, failed)
	}
	_, err := w.Write(out.Bytes())
	return err
}

// An exposition is a text of metrics in the making.
type exposition struct{ bytes.Buffer }

func (e *exposition) family(name, kind, help string) {
	fmt.Fprintf(e, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value, and nothing if there is none.
func (e *exposition) sample(name string, labels []string, value *float64, at time.Time) {
	if value == nil {
		return
	}
	e.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		separator := ","
		if i == 0 {
			separator = "{"
		}
		fmt.Fprintf(e, `%s%s="%s"`, separator, labels[i], escape.Replace(labels[i+1]))
	}
	if len(labels) > 0 {
		e.WriteByte('}')
	}
	e.WriteByte(' ')
	e.WriteString(strconv.FormatFloat(*value, 'g', -1, 64))
	if !at.IsZero() {
		e.WriteByte(' ')
		e.WriteString(strconv.FormatInt(at.UnixMilli(), 10))
	}
	e.WriteByte('\n')
}

// escape is Prometheus' quoting of label values.
var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// cpu and memory pick a figure and its time; nil if it is not known.
func cpu(stats *statsapi.CPUStats) (*float64, time.Time) {
	if stats == nil || stats.UsageCoreNanoSeconds == nil {
		return nil, time.Time{}
	}
	return new(float64(*stats.UsageCoreNanoSeconds) / 1e9), stats.Time.Time
}

func memory(stats *statsapi.MemoryStats) (*float64, time.Time) {
	if stats == nil || stats.WorkingSetBytes == nil {
		return nil, time.Time{}
	}
	return new(float64(*stats.WorkingSetBytes)), stats.Time.Time
}

func swap(stats *statsapi.SwapStats) (*float64, time.Time) {
	if stats == nil || stats.SwapUsageBytes == nil {
		return nil, time.Time{}
	}
	return new(float64(*stats.SwapUsageBytes)), stats.Time.Time
}

func (e *exposition) node(node statsapi.NodeStats) {
	value, at := cpu(node.CPU)
	e.family("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds")
	e.sample("node_cpu_usage_seconds_total", nil, value, at)
	value, at = memory(node.Memory)
	e.family("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes")
	e.sample("node_memory_working_set_bytes", nil, value, at)
	value, at = swap(node.Swap)
	e.family("node_swap_usage_bytes", "gauge", "Current swap usage of the node in bytes")
	e.sample("node_swap_usage_bytes", nil, value, at)
}

func (e *exposition) containers(pods []statsapi.PodStats) {
	families := []struct {
		name, kind, help string
		value            func(statsapi.ContainerStats) (*float64, time.Time)
	}{
		{"container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the container in core-seconds",
			func(c statsapi.ContainerStats) (*float64, time.Time) { return cpu(c.CPU) }},
		{"container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes",
			func(c statsapi.ContainerStats) (*float64, time.Time) { return memory(c.Memory) }},
		{"container_swap_usage_bytes", "gauge", "Current amount of the container swap usage in bytes",
			func(c statsapi.ContainerStats) (*float64, time.Time) { return swap(c.Swap) }},
		{"container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds", startTime},
	}
	for _, f := range families {
		e.family(f.name, f.kind, f.help)
		for _, pod := range pods {
			for _, c := range pod.Containers {
				value, at := f.value(c)
				e.sample(f.name, []string{"container", c.Name, "namespace", pod.PodRef.Namespace, "pod", pod.PodRef.Name}, value, at)
			}
		}
	}
}

// startTime has no time of its own: it does not change.
func startTime(c statsapi.ContainerStats) (*float64, time.Time) {
	if c.StartTime.UnixNano() <= 0 {
		return nil, time.Time{}
	}
	return new(float64(c.StartTime.UnixNano()) / 1e9), time.Time{}
}

func (e *exposition) pods(pods []statsapi.PodStats) {
	e.family("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds")
	for _, pod := range pods {
		value, at := cpu(pod.CPU)
		e.sample("pod_cpu_usage_seconds_total", []string{"namespace", pod.PodRef.Namespace, "pod", pod.PodRef.Name}, value, at)
	}
	e.family("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes")
	for _, pod := range pods {
		value, at := memory(pod.Memory)
		e.sample("pod_memory_working_set_bytes", []string{"namespace", pod.PodRef.Namespace, "pod", pod.PodRef.Name}, value, at)
	}
}
