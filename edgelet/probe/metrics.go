package probe

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"

	"k8s.io/apimachinery/pkg/types"
)

// WriteMetrics writes how often each probe of a running container has been
// executed, as Prometheus text, under the names of a kubelet's /metrics/probes.
func (m *Manager) WriteMetrics(w io.Writer) error {
	var b bytes.Buffer
	b.WriteString("# HELP prober_probe_total Cumulative number of a liveness, readiness or startup probe for a container by result.\n" +
		"# TYPE prober_probe_total counter\n")
	for _, s := range m.samples() {
		fmt.Fprintf(&b, "prober_probe_total{container=%q,namespace=%q,pod=%q,pod_uid=%q,probe_type=%q,result=%q} %d\n",
			s.container, s.namespace, s.pod, s.uid, s.kind, s.result, s.count)
	}
	_, err := w.Write(b.Bytes())
	return err
}

type sample struct {
	namespace, pod, container string
	uid                       types.UID
	kind                      kind
	result                    string
	count                     uint64
}

func (m *Manager) samples() []sample {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []sample
	for uid, p := range m.pods {
		for name, c := range p.containers {
			for k, probe := range c.probes {
				if probe == nil {
					continue
				}
				n := probe.counted
				for _, r := range []struct {
					result string
					count  uint64
				}{{"successful", n[success] + n[warning]}, {"failed", n[failure]}, {"unknown", n[unknown]}} {
					if r.count > 0 {
						all = append(all, sample{p.spec.Namespace, p.spec.Name, name, uid, kind(k), r.result, r.count})
					}
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b sample) int {
		return cmp.Or(cmp.Compare(a.uid, b.uid), cmp.Compare(a.container, b.container),
			cmp.Compare(a.kind, b.kind), cmp.Compare(a.result, b.result))
	})
	return all
}
