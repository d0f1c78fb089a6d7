package server

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are those of all sites together: a class of paths is a label, a site is not.
type metrics struct {
	requests *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	streams  *prometheus.GaugeVec
	refused  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "skerry_kubelet_requests_total",
			Help: "Requests to the kubelet API of sites by class of path and status code."}, []string{"class", "code"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "skerry_kubelet_answer_seconds",
			Help:    "Time until the first byte of the answer to a request to the kubelet API of sites.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 8)}, []string{"class"}), // 1 ms to 16 s
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "skerry_kubelet_open_streams",
			Help: "Open exec, attach and port-forward streams to sites."}, []string{"class"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "skerry_kubelet_refused_connections_total",
			Help: "Connections to the kubelet API of sites that were closed because there were too many."}),
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.requests, m.latency, m.streams, m.refused} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

// A recorder is a ResponseWriter that notes when it was answered, and with what.
type recorder struct {
	http.ResponseWriter
	metrics *metrics
	class   string
	start   time.Time
	code    int
	stream  bool // hijacked
}

// Unwrap lets http.ResponseController find Flush.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) WriteHeader(code int) {
	w.note(code)
	w.ResponseWriter.WriteHeader(code)
}

func (w *recorder) Write(b []byte) (int, error) {
	w.note(http.StatusOK)
	return w.ResponseWriter.Write(b)
}

// Hijack counts a stream, which lasts until done is called.
func (w *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	hijacker, ok := w.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, fmt.Errorf("HTTP/2 cannot be upgraded: %w", http.ErrNotSupported)
	}
	conn, rw, err := hijacker.Hijack()
	if err == nil {
		w.note(http.StatusSwitchingProtocols)
		w.stream = true
		w.metrics.streams.WithLabelValues(w.class).Inc()
	}
	return conn, rw, err
}

func (w *recorder) note(code int) {
	if w.code == 0 {
		w.code = code
		w.metrics.latency.WithLabelValues(w.class).Observe(time.Since(w.start).Seconds())
	}
}

// done counts the request, when all is over.
func (w *recorder) done() {
	if w.stream {
		w.metrics.streams.WithLabelValues(w.class).Dec()
	}
	if w.code == 0 { // who asked has gone
		w.code = http.StatusOK
	}
	w.metrics.requests.WithLabelValues(w.class, strconv.Itoa(w.code)).Inc()
}
