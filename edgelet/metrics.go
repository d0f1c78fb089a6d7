package edgelet

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// registerMetrics adds what the edgelet says of itself; the parts add their own.
func (e *Edgelet) registerMetrics() {
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	e.config.Registerer.MustRegister(
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "edgelet_store_written_bytes_total", Help: "Bytes written to the store, which flash has to bear.",
		}, func() float64 { return float64(e.db.Written()) }),
		gauge("edgelet_store_size_bytes", "Size of the store.", func() float64 {
			size, err := e.db.Size()
			if err != nil {
				return -1
			}
			return float64(size)
		}),
		gauge("edgelet_connected", "1 while there is a session with the provider.", func() float64 {
			if e.Status().Connected {
				return 1
			}
			return 0
		}),
		gauge("edgelet_pods", "Pods of this site.", func() float64 { return float64(len(e.pods.Pods())) }),
	)
}
