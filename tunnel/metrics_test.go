package tunnel_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skerry-io/skerry/tunnel"
)

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	c := newCloud(t, func(s *tunnel.Server) { s.Metrics = tunnel.NewMetrics(registry) })
	d := c.dialer("site-a")
	dialed := prometheus.NewRegistry()
	d.Metrics = tunnel.NewMetrics(dialed)
	cloud, edge := c.dial(t, d)
	serve(t, edge, contract)
	echo := newEcho(t, cloud)
	echo(1000)
	for range 3 {
		get(t, cloud, "/x")
	}
	want := map[string][2]float64{ // at least, at most
		`sessions`:                         {1, 1},
		`open_streams`:                     {2, 3},
		`rtt_seconds`:                      {1, 10},
		`session_rtt_seconds{peer=site-a}`: {1e-9, 1},
		`bytes_total{class=stream,direction=out}`:  {1000, 1500},
		`bytes_total{class=stream,direction=in}`:   {1000, 1500},
		`bytes_total{class=request,direction=out}`: {100, 1000},
		`wire_bytes_total{direction=in}`:           {2000, 20000},
	}
	values := gather(t, registry)
	for name, bounds := range want {
		if v, ok := values[name]; !ok || v < bounds[0] || v > bounds[1] {
			t.Errorf("%s = %v, want between %v and %v", name, v, bounds[0], bounds[1])
		}
	}
	edge.Close()
	for deadline := time.Now().Add(5 * time.Second); gather(t, registry)[`session_ends_total{reason=peer-closed}`] != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the end of the session is not counted")
		}
	}
	if v := gather(t, registry); v["sessions"] != 0 {
		t.Errorf("after it %v sessions", v["sessions"])
	}

	d.TLS.Certificates = nil
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	d.Transport = tunnel.Direct
	d.Dial(ctx)
	d.Server = "127.0.0.1:1"
	d.Dial(ctx)
	failures := gather(t, dialed)
	if failures[`dial_failures_total{reason=hello}`] != 1 || failures[`dial_failures_total{reason=connect}`] != 1 {
		t.Errorf("failed dials are counted as %v", failures)
	}
}

// gather returns all values, by names as name{label=value}.
func gather(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			name := strings.TrimPrefix(family.GetName(), "skerry_tunnel_")
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			if labels != nil {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			values[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

func TestBytesOfEachRequestAreOfItsClass(t *testing.T) {
	registry := prometheus.NewRegistry()
	metrics := tunnel.NewMetrics(registry)
	metrics.Class = func(r *http.Request) string { return strings.Trim(r.URL.Path, "/") }
	c := newCloud(t, func(s *tunnel.Server) { s.Metrics = metrics })
	cloud, edge := c.dial(t, c.dialer("site-a"))
	serve(t, edge, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, strings.Repeat("x", 10_000)) })
	get(t, cloud, "/logs") // the second request takes the same stream
	get(t, cloud, "/stats")
	values := gather(t, registry)
	for _, class := range []string{"logs", "stats"} {
		if n := values["bytes_total{class="+class+",direction=in}"]; n < 10_000 || n > 11_000 {
			t.Errorf("%v bytes of %s in", n, class)
		}
	}
}
