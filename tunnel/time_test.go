package tunnel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/mux"
	"github.com/skerry-io/skerry/tunnel/tunneltest"
)

// TestMain fails the run if a test leaves goroutines of ours behind.
func TestMain(m *testing.M) {
	if order := os.Getenv(floodVariable); order != "" {
		if err := flood(order); err != nil {
			fmt.Println(err)
		}
		return
	}
	code := m.Run()
	left := ""
	for range 100 {
		buf := make([]byte, 1<<20)
		left = ""
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(stack, "skerry/tunnel") && !strings.Contains(stack, "TestMain") {
				left += stack + "\n\n"
			}
		}
		if left == "" {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if code == 0 && left != "" {
		print("goroutines are left:\n\n" + left)
		code = 1
	}
	os.Exit(code)
}

func TestHalfOpenLinkIsNoticedByBothSides(t *testing.T) {
	cuts := map[string]func(*tunneltest.Conn){
		"both ways":         (*tunneltest.Conn).Stall,
		"towards the cloud": (*tunneltest.Conn).StallWrites,
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			tunneltest.Bubble(t, func(t *testing.T) {
				cloud, edge, link := tunneltest.PairOver(t, tunneltest.Link{Delay: 50 * time.Millisecond})
				serve(t, edge, hello)
				for _, idle := range []time.Duration{time.Hour, 7 * time.Second, 8 * time.Second} {
					time.Sleep(idle)
					get(t, cloud, "/")
				}
				cut(link)
				began := time.Now()
				<-cloud.Done()
				<-edge.Done()
				if d := time.Since(began); d > 30*time.Second {
					t.Errorf("noticed after %v", d)
				}
				if !errors.Is(cloud.Err(), mux.ErrTimeout) || !errors.Is(cloud.Err(), tunnel.ErrDown) {
					t.Errorf("cloud: %v", cloud.Err())
				}
			})
		})
	}
	t.Run("a link that is away for 20 s is not given up", func(t *testing.T) {
		tunneltest.Bubble(t, func(t *testing.T) {
			cloud, edge, link := tunneltest.PairOver(t, tunneltest.Link{Delay: 50 * time.Millisecond})
			serve(t, edge, hello)
			time.Sleep(time.Minute + time.Second)
			link.Stall()
			time.Sleep(11 * time.Second)
			link.Resume()
			get(t, cloud, "/")
			time.Sleep(time.Minute)
			if cloud.Err() != nil || edge.Err() != nil {
				t.Errorf("%v, %v", cloud.Err(), edge.Err())
			}
		})
	})
}

func TestThirtyDaysIdle(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		cloud, edge, link := tunneltest.PairOver(t, tunneltest.Link{Delay: 50 * time.Millisecond})
		serve(t, cloud, hello)
		serve(t, edge, hello)
		const day = 24 * time.Hour
		time.Sleep(day)
		first := link.Cost()
		time.Sleep(day)
		perDay := link.Cost() - first
		t.Logf("an idle session costs %d kB a day, with TCP's and IP's headers", perDay/1000)
		if perDay > 1_500_000 {
			t.Errorf("an idle day costs %d bytes, want at most 1.5 MB, so that 0.5 MB are left for a site's pods", perDay)
		}
		time.Sleep(28 * day)
		if got := get(t, cloud, "/x"); got != "hello /x" {
			t.Errorf("after 30 days the edge answers %q", got)
		}
		if rtt := cloud.RTT(); rtt < 100*time.Millisecond || rtt > 110*time.Millisecond {
			t.Errorf("RTT %v on a link of 100ms", rtt)
		}
	})
}

func TestIdleSiteCostsFewGoroutinesAndLittleMemory(t *testing.T) {
	const sites = 100
	c := newCloud(t, func(s *tunnel.Server) {
		s.Use = func(ctx context.Context, s *tunnel.Session) { s.Serve(ctx, http.HandlerFunc(hello)) }
	})
	measure := func() (goroutines int, heap uint64) {
		var m runtime.MemStats
		for range 3 {
			time.Sleep(50 * time.Millisecond)
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), m.HeapAlloc + m.StackInuse
	}
	goroutines, memory := measure()
	for i := range sites {
		d := c.dialer("site-" + string(rune('a'+i/26)) + string(rune('a'+i%26)))
		edge, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer edge.Close()
	}
	g, m := measure()
	// The edge's two goroutines and its memory are in it too.
	perSite := float64(g-goroutines)/sites - 2
	t.Logf("%.1f goroutines in the cloud and %d KiB on both sides for each idle site", perSite, (m-memory)/sites>>10)
	if perSite > 5 {
		t.Errorf("an idle site costs the cloud %.1f goroutines, want at most 5", perSite)
	}
	if m-memory > sites*200<<10 {
		t.Errorf("an idle site costs %d KiB on both sides together, want at most 200", (m-memory)/sites>>10)
	}
}

// A world is a server and a dialer over a network in memory.
type world struct {
	network *tunneltest.Network
	server  *tunnel.Server
	dialer  *tunnel.Dialer
	ca      *tunneltest.CA
}

// newWorld runs a server until the test ends; the dialer is up to the test.
func newWorld(t *testing.T, change func(*world)) *world {
	ca := tunneltest.NewCA(t)
	w := &world{network: tunneltest.NewNetwork(tunneltest.Link{}), ca: ca}
	w.server = &tunnel.Server{
		TLS: ca.Server(), Authenticate: tunneltest.Site, Log: quiet,
		Use: func(ctx context.Context, s *tunnel.Session) { <-ctx.Done() },
	}
	w.dialer = &tunnel.Dialer{Server: tunneltest.ServerName, TLS: ca.Client("site-a"), Net: w.network.Dial, Proxy: noProxy, Log: quiet}
	change(w)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error)
	go func() { done <- w.server.Serve(ctx, w.network) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// run runs the dialer until the test ends.
func (w *world) run(t *testing.T, use func(context.Context, *tunnel.Session) error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error)
	go func() { done <- w.dialer.Run(ctx, use) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestReconnect(t *testing.T) {
	t.Run("within a second after a session was lost", func(t *testing.T) {
		var gaps []time.Duration
		for range 20 {
			tunneltest.Bubble(t, func(t *testing.T) {
				ups := make(chan time.Time, 10)
				w := newWorld(t, func(*world) {})
				w.run(t, func(ctx context.Context, s *tunnel.Session) error {
					ups <- time.Now()
					<-ctx.Done()
					return nil
				})
				<-ups
				time.Sleep(2 * time.Minute)
				lost := time.Now()
				w.network.Conns()[0].Cut()
				gaps = append(gaps, (<-ups).Sub(lost))
			})
		}
		slices.Sort(gaps)
		if gaps[len(gaps)-1] > time.Second+50*time.Millisecond {
			t.Errorf("the slowest of 20 was back after %v", gaps[len(gaps)-1])
		}
		if gaps[len(gaps)-1]-gaps[0] < 300*time.Millisecond {
			t.Errorf("20 sites all come back between %v and %v", gaps[0], gaps[len(gaps)-1])
		}
	})
	t.Run("within two seconds after an hour without a link", func(t *testing.T) {
		tunneltest.Bubble(t, func(t *testing.T) {
			ups := make(chan time.Time, 10)
			w := newWorld(t, func(*world) {})
			w.run(t, func(ctx context.Context, s *tunnel.Session) error {
				ups <- time.Now()
				<-ctx.Done()
				return nil
			})
			<-ups
			w.network.Down()
			time.Sleep(time.Hour)
			w.network.Up()
			began := time.Now()
			if gap := (<-ups).Sub(began); gap > 2050*time.Millisecond {
				t.Errorf("back after %v", gap)
			}
		})
	})
	t.Run("ever later when the server refuses", func(t *testing.T) {
		tunneltest.Bubble(t, func(t *testing.T) {
			var asked atomic.Int32
			w := newWorld(t, func(w *world) {
				w.server.Accept = func(context.Context, string, tunnel.Hello) (uint64, error) {
					asked.Add(1)
					return 0, errors.New("in quarantine")
				}
			})
			w.run(t, func(context.Context, *tunnel.Session) error { return errors.New("used") })
			time.Sleep(time.Hour)
			synctest.Wait()
			// With full jitter up to a minute about two a minute are expected.
			if n := asked.Load(); n > 240 || n < 60 {
				t.Errorf("a site that is refused asks %d times an hour", n)
			}
		})
	})
}

func TestNewestSessionOfASiteWins(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		var using, most, switches atomic.Int32
		w := newWorld(t, func(w *world) {
			var epoch atomic.Uint64
			w.server.Accept = func(context.Context, string, tunnel.Hello) (uint64, error) { return epoch.Add(1), nil }
			w.server.Use = func(ctx context.Context, s *tunnel.Session) {
				most.Store(max(most.Load(), using.Add(1)))
				switches.Add(1)
				<-ctx.Done()
				using.Add(-1)
			}
		})
		first, err := w.dialer.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second, err := w.dialer.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		<-first.Done()
		if second.Hello().Epoch <= first.Hello().Epoch || second.Err() != nil {
			t.Errorf("epochs %d, then %d, which ended with %v", first.Hello().Epoch, second.Hello().Epoch, second.Err())
		}
		w.server.Disconnect("site-a")
		<-second.Done()
		// Two machines with one key take turns, ever more slowly.
		w.run(t, func(ctx context.Context, s *tunnel.Session) error { <-ctx.Done(); return nil })
		clone := &tunnel.Dialer{Server: tunneltest.ServerName, TLS: w.ca.Client("site-a"), Net: w.network.Dial, Proxy: noProxy, Log: quiet}
		(&world{dialer: clone}).run(t, func(ctx context.Context, s *tunnel.Session) error { <-ctx.Done(); return nil })
		time.Sleep(time.Hour)
		if n := switches.Load(); n > 360 {
			t.Errorf("%d switches in an hour between two machines with the same key", n)
		}
		if n := most.Load(); n > 1 {
			t.Errorf("%d sessions of one site in use at once", n)
		}
	})
}

// TestEchoBesideBulk is what a person feels who types while logs are copied.
func TestEchoBesideBulk(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		const rate = 1_000_000 / 8
		cloud, edge, link := tunneltest.PairOver(t, tunneltest.Link{Delay: 50 * time.Millisecond, Rate: rate})
		serve(t, edge, contract)
		bulk, stop := startBulk(t, cloud)
		echo := newEcho(t, cloud)
		time.Sleep(3 * time.Second) // until the rate is known
		from, began := bulk.Load(), time.Now()
		var took []time.Duration
		for range 100 {
			took = append(took, echo(64))
			time.Sleep(50 * time.Millisecond)
		}
		carried := float64(bulk.Load()-from) / time.Since(began).Seconds()
		stop()
		slices.Sort(took)
		p50, p99 := took[50], took[99]
		t.Logf("echo beside bulk at 1 Mbit/s and 100 ms: p50 %v, worst %v; bulk %.0f kB/s of 125", p50.Round(time.Millisecond), p99.Round(time.Millisecond), carried/1000)
		if p50 > 200*time.Millisecond {
			t.Errorf("p50 %v, want at most RTT + 100ms", p50)
		}
		if carried < rate*0.85 {
			t.Errorf("bulk at %.0f B/s of %d", carried, rate)
		}
		link.Cut()
	})
}

// TestSlowLinkKeepsItsSession moves more than the link carries within any timeout.
func TestSlowLinkKeepsItsSession(t *testing.T) {
	tunneltest.Bubble(t, func(t *testing.T) {
		cloud, edge, _ := tunneltest.PairOver(t, tunneltest.Link{Delay: 300 * time.Millisecond, Rate: 1200})
		serve(t, edge, contract)
		for i := range 5 {
			req, _ := http.NewRequest("PUT", "http://peer/sum", strings.NewReader(strings.Repeat("x", 200_000)))
			resp, err := cloud.RoundTrip(req)
			if err != nil {
				t.Fatalf("upload %d at 9600 bit/s: %v", i, err)
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	})
}
