package tunnel_test

import (
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

// BenchmarkRoundTrip measures a small request and its answer, over loopback.
func BenchmarkRoundTrip(b *testing.B) {
	for name, setup := range ways() {
		b.Run(name, func(b *testing.B) {
			c := newCloud(b)
			cloud, edge := c.dial(b, setup(b, c))
			serve(b, edge, hello)
			b.ReportAllocs()
			for b.Loop() {
				get(b, cloud, "/x")
			}
		})
	}
}

// BenchmarkBulk measures one large download from the site, over loopback.
func BenchmarkBulk(b *testing.B) {
	const size = 200 << 20
	data := make([]byte, 1<<20)
	for name, setup := range ways() {
		b.Run(name, func(b *testing.B) {
			c := newCloud(b)
			cloud, edge := c.dial(b, setup(b, c))
			serve(b, edge, func(w http.ResponseWriter, r *http.Request) {
				for range size / len(data) {
					w.Write(data)
				}
			})
			b.SetBytes(size)
			for b.Loop() {
				req, _ := http.NewRequest(http.MethodGet, "http://peer/", nil)
				resp, err := cloud.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
					b.Fatalf("%d bytes, %v", n, err)
				}
				resp.Body.Close()
			}
		})
	}
}

// BenchmarkEchoBesideBulk measures in real time what TestEchoBesideBulk checks
// under fake time: 64 bytes there and back beside a bulk stream at 1 Mbit/s and 100 ms.
func BenchmarkEchoBesideBulk(b *testing.B) {
	cloud, edge, _ := tunneltest.PairOver(b, tunneltest.Link{Delay: 50 * time.Millisecond, Rate: 1_000_000 / 8})
	serve(b, edge, contract)
	_, stop := startBulk(b, cloud)
	defer stop()
	echo := newEcho(b, cloud)
	time.Sleep(2 * time.Second)
	var took []time.Duration
	for b.Loop() {
		took = append(took, echo(64))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Milliseconds()), "p99-ms")
}

// BenchmarkDial measures how fast sites come in: TCP, TLS with both
// certificates, hellos, and the end, both sides in one process.
func BenchmarkDial(b *testing.B) {
	c := newCloud(b)
	d := c.dialer("site-a")
	for b.Loop() {
		edge, err := d.Dial(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		<-c.sessions
		edge.Close()
	}
}
