package tunnel

import (
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Classes of traffic, unless Metrics.Class says otherwise.
const (
	classControl = "control" // hellos
	classRequest = "request" // plain HTTP
	classStream  = "stream"  // after an Upgrade: exec, attach, port-forward
)

// Metrics counts what goes on in the tunnels of one process. A nil *Metrics
// counts nothing.
type Metrics struct {
	// Class names the class of a request for the byte counters, from a small
	// fixed set. Default: "stream" for an Upgrade, else "request". Set it before use.
	Class func(*http.Request) string

	sessions prometheus.Gauge
	streams  prometheus.Gauge
	rtt      *prometheus.HistogramVec
	lastRTT  *prometheus.GaugeVec
	bytes    *prometheus.CounterVec
	wire     *prometheus.CounterVec
	failures *prometheus.CounterVec
	ends     *prometheus.CounterVec
}

// NewMetrics returns metrics that are registered with reg, unless that is nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	name := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "skerry", Subsystem: "tunnel", Name: name, Help: help}
	}
	counter := func(n, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts(name(n, help)), labels)
	}
	m := &Metrics{
		sessions: prometheus.NewGauge(prometheus.GaugeOpts(name("sessions", "Sessions that stand."))),
		streams:  prometheus.NewGauge(prometheus.GaugeOpts(name("open_streams", "Streams of all sessions that are not closed."))),
		rtt: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "skerry", Subsystem: "tunnel", Name: "rtt_seconds", Help: "Round trips measured by ping.",
			Buckets: []float64{.001, .003, .01, .03, .1, .3, 1, 3, 10, 30},
		}, nil),
		lastRTT:  prometheus.NewGaugeVec(prometheus.GaugeOpts(name("session_rtt_seconds", "Last round trip measured by ping, by peer.")), []string{"peer"}),
		bytes:    counter("bytes_total", "Bytes carried on streams, by class of traffic and direction.", "class", "direction"),
		wire:     counter("wire_bytes_total", "Bytes on the connections, TLS included, by direction.", "direction"),
		failures: counter("dial_failures_total", "Attempts to get a session that failed, by reason.", "reason"),
		ends:     counter("session_ends_total", "Sessions that ended, by reason.", "reason"),
	}
	if reg != nil {
		reg.MustRegister(m.sessions, m.streams, m.rtt, m.lastRTT, m.bytes, m.wire, m.failures, m.ends)
	}
	return m
}

func (m *Metrics) classOf(r *http.Request) string {
	switch {
	case m != nil && m.Class != nil:
		return m.Class(r)
	case r.Header.Get("Upgrade") != "":
		return classStream
	}
	return classRequest
}

// traffic counts one class in both directions.
type traffic struct{ in, out prometheus.Counter }

func (m *Metrics) traffic(class string) *traffic {
	if m == nil {
		return nil
	}
	return &traffic{m.bytes.WithLabelValues(class, "in"), m.bytes.WithLabelValues(class, "out")}
}

func (t *traffic) read(n int) {
	if t != nil {
		t.in.Add(float64(n))
	}
}

func (t *traffic) wrote(n int) {
	if t != nil {
		t.out.Add(float64(n))
	}
}

func (m *Metrics) opened(delta int) {
	if m != nil {
		m.streams.Add(float64(delta))
	}
}

func (m *Metrics) measured(peer string, rtt time.Duration) {
	if m != nil {
		m.rtt.WithLabelValues().Observe(rtt.Seconds())
		m.lastRTT.WithLabelValues(peer).Set(rtt.Seconds())
	}
}

func (m *Metrics) began() {
	if m != nil {
		m.sessions.Inc()
	}
}

// ended counts the end of a session; last says that its peer has no other.
func (m *Metrics) ended(peer, reason string, last bool) {
	if m == nil {
		return
	}
	m.sessions.Dec()
	m.ends.WithLabelValues(reason).Inc()
	if last {
		m.lastRTT.DeleteLabelValues(peer)
	}
}

func (m *Metrics) failed(reason string) {
	if m != nil {
		m.failures.WithLabelValues(reason).Inc()
	}
}

// count returns conn with its bytes counted.
func (m *Metrics) count(conn net.Conn) net.Conn {
	if m == nil {
		return conn
	}
	return &countedConn{conn, &traffic{m.wire.WithLabelValues("in"), m.wire.WithLabelValues("out")}}
}

type countedConn struct {
	net.Conn
	*traffic
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read(n)
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.wrote(n)
	return n, err
}

func (c *countedConn) CloseWrite() error { return closeWrite(c.Conn) }
