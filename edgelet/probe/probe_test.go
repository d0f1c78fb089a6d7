package probe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A world is a runtime whose containers answer as a test says, and a record of
// what the manager has done.
type world struct {
	t      *testing.T
	m      *Manager
	stop   context.CancelFunc
	ended  chan struct{}
	was    map[string][2]bool // by container ID
	answer func(ctx context.Context, id, probe string) (exit int, err error)

	mu      sync.Mutex
	asked   map[string][]time.Duration // since start, by probe
	events  []string
	changed int
	start   time.Time
}

// newWorld starts a manager within a synctest bubble.
func newWorld(t *testing.T, cfg Config) *world {
	w := &world{t: t, asked: map[string][]time.Duration{}, start: time.Now(), ended: make(chan struct{})}
	cfg.Exec = func(ctx context.Context, id string, cmd []string, limit time.Duration) ([]byte, int, error) {
		w.mu.Lock()
		w.asked[cmd[0]] = append(w.asked[cmd[0]], time.Since(w.start))
		w.mu.Unlock()
		if w.answer == nil {
			return nil, 0, nil
		}
		exit, err := w.answer(ctx, id, cmd[0])
		return []byte(cmd[0] + " says no"), exit, err
	}
	cfg.Changed = func(types.UID) { w.mu.Lock(); defer w.mu.Unlock(); w.changed++ }
	cfg.Event = func(_ *corev1.Pod, eventType, reason, message string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.events = append(w.events, eventType+" "+reason+" "+message)
	}
	cfg.Was = func(_ types.UID, _, id string) (bool, bool) { return w.was[id][0], w.was[id][1] }
	cfg.Log = slog.New(slog.DiscardHandler)
	w.m = New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	w.stop = func() { cancel(); <-w.ended }
	go func() { defer close(w.ended); w.m.Run(ctx) }()
	return w
}

func (w *world) sync(pod *corev1.Pod, id string) {
	running := map[string]RunningContainer{}
	if id != "" {
		running["c"] = RunningContainer{ID: id, StartedAt: time.Now()}
	}
	w.m.Sync(pod, "10.0.0.1", running)
	synctest.Wait()
}

// times is when a probe has been asked, in whole seconds since start.
func (w *world) times(probe string) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	var secs []int
	for _, d := range w.asked[probe] {
		secs = append(secs, int(d/time.Second))
	}
	return secs
}

func (w *world) said() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.events)
}

func (w *world) changes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func after(d time.Duration) { time.Sleep(d); synctest.Wait() }

// probes builds the probe of each kind from its command; the command's first
// word is also the name under which it is recorded.
func testPod(edit func(c *corev1.Container)) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1"}}
	pod.Spec.Containers = []corev1.Container{{Name: "c"}}
	edit(&pod.Spec.Containers[0])
	return pod
}

func execProbe(name string, edit func(p *corev1.Probe)) *corev1.Probe {
	p := &corev1.Probe{PeriodSeconds: 10, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 3}
	p.Exec = &corev1.ExecAction{Command: []string{name}}
	if edit != nil {
		edit(p)
	}
	return p
}

func want[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s = %v, want %v", what, got, want)
	}
}

func TestReadinessIsAskedAtOnceAndThenEveryPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.sync(testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) }), "id1")
		want(t, "result", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
		want(t, "changes", w.changes(), 1)
		after(35 * time.Second)
		want(t, "asked at", w.times("ready"), []int{0, 10, 20, 30})
	})
}

func TestContainerThatIsSlowToListenIsReadyLongBeforeAPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.answer = func(context.Context, string, string) (int, error) {
			if time.Since(w.start) < 2*time.Second {
				return 1, nil
			}
			return 0, nil
		}
		w.sync(testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) }), "id1")
		want(t, "ready at once", w.m.Result("u1", "c", "id1").Ready, false)
		after(25 * time.Second)
		want(t, "asked at", w.times("ready"), []int{0, 1, 3, 13, 23})
		want(t, "events", w.said(), []string{"Warning Unhealthy Readiness probe failed: ready says no"})
	})
}

func TestReadinessGoesAfterFailureThreshold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		var broken atomic.Bool
		w.answer = func(context.Context, string, string) (int, error) {
			if broken.Load() {
				return 1, nil
			}
			return 0, nil
		}
		w.sync(testPod(func(c *corev1.Container) {
			c.ReadinessProbe = execProbe("ready", func(p *corev1.Probe) { p.FailureThreshold, p.SuccessThreshold = 3, 2 })
		}), "id1")
		after(15 * time.Second)
		want(t, "ready after two successes", w.m.Result("u1", "c", "id1").Ready, true)
		broken.Store(true)
		after(20 * time.Second)
		want(t, "ready after two failures", w.m.Result("u1", "c", "id1").Ready, true)
		after(10 * time.Second)
		want(t, "ready after three failures", w.m.Result("u1", "c", "id1").Ready, false)
		broken.Store(false)
		after(10 * time.Second)
		want(t, "ready after one success", w.m.Result("u1", "c", "id1").Ready, false)
		after(10 * time.Second)
		want(t, "ready after two more successes", w.m.Result("u1", "c", "id1").Ready, true)
	})
}

func TestLivenessAsksForARestartOnceAndStartsAfresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.answer = func(_ context.Context, id, _ string) (int, error) {
			if id == "id1" {
				return 1, nil
			}
			return 0, nil
		}
		grace := int64(7)
		pod := testPod(func(c *corev1.Container) {
			c.LivenessProbe = execProbe("alive", func(p *corev1.Probe) {
				p.InitialDelaySeconds, p.TerminationGracePeriodSeconds = 5, &grace
			})
		})
		w.sync(pod, "id1")
		want(t, "result at first", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
		after(time.Minute)
		want(t, "result", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true, Unhealthy: "liveness", Message: "alive says no", Grace: &grace})
		asked := w.times("alive")
		if len(asked) != 3 || asked[0] < 5 || asked[0] >= 15 || asked[2]-asked[0] != 20 {
			t.Errorf("asked at %v, want three times, ten seconds apart, first within 5 and 15", asked)
		}
		w.sync(pod, "")
		w.sync(pod, "id2")
		want(t, "result of the next", w.m.Result("u1", "c", "id2"), Result{Started: true, Ready: true})
		want(t, "result of the old", w.m.Result("u1", "c", "id1").Unhealthy, "")
		after(time.Minute)
		want(t, "restart asked for", w.m.Result("u1", "c", "id2").Unhealthy, "")
	})
}

func TestStartupGatesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.answer = func(_ context.Context, _, probe string) (int, error) {
			if probe == "start" && time.Since(w.start) < 25*time.Second {
				return 1, nil
			}
			return 0, nil
		}
		w.sync(testPod(func(c *corev1.Container) {
			c.StartupProbe = execProbe("start", func(p *corev1.Probe) { p.FailureThreshold = 30 })
			c.ReadinessProbe = execProbe("ready", nil)
			c.LivenessProbe = execProbe("alive", nil)
		}), "id1")
		after(29 * time.Second)
		want(t, "before", w.m.Result("u1", "c", "id1"), Result{})
		want(t, "others asked", len(w.times("ready"))+len(w.times("alive")), 0)
		after(time.Second)
		want(t, "after", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
		after(time.Minute)
		want(t, "startup asked at", w.times("start"), []int{0, 10, 20, 30})
		if n := len(w.times("alive")); n < 5 {
			t.Errorf("liveness asked %d times in a minute, want 6 or so", n)
		}
	})
}

func TestStartupThatFailsAsksForARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.answer = func(context.Context, string, string) (int, error) { return 1, nil }
		w.sync(testPod(func(c *corev1.Container) { c.StartupProbe = execProbe("start", nil) }), "id1")
		after(time.Minute)
		want(t, "result", w.m.Result("u1", "c", "id1"), Result{Unhealthy: "startup", Message: "start says no"})
		want(t, "asked at", w.times("start"), []int{0, 10, 20})
	})
}

func TestTerminatingPodKeepsReadinessAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		var dying atomic.Bool
		w.answer = func(context.Context, string, string) (int, error) {
			if dying.Load() {
				return 1, nil
			}
			return 0, nil
		}
		pod := testPod(func(c *corev1.Container) {
			c.ReadinessProbe = execProbe("ready", func(p *corev1.Probe) { p.FailureThreshold = 1 })
			c.LivenessProbe = execProbe("alive", func(p *corev1.Probe) { p.FailureThreshold = 1 })
		})
		w.sync(pod, "id1")
		pod = pod.DeepCopy()
		pod.DeletionTimestamp = &metav1.Time{Time: time.Now()}
		dying.Store(true)
		w.sync(pod, "id1")
		after(time.Minute)
		want(t, "result", w.m.Result("u1", "c", "id1"), Result{Started: true})
		want(t, "liveness asked", len(w.times("alive")), 0)
	})
}

func TestAdoptedContainerDoesNotFlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.was = map[string][2]bool{"id1": {true, true}}
		w.sync(testPod(func(c *corev1.Container) {
			c.StartupProbe = execProbe("start", nil)
			c.ReadinessProbe = execProbe("ready", nil)
		}), "id1")
		want(t, "at once", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
		after(30 * time.Second)
		want(t, "later", w.m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
		want(t, "startup asked", len(w.times("start")), 0)
		want(t, "readiness asked", len(w.times("ready")), 3)
		want(t, "changes", w.changes(), 0)
	})
}

func TestInitialDelayIsNeverLongerThanAskedFor(t *testing.T) {
	for name, started := range map[string]time.Duration{
		"a clock that was behind when the container started": -50 * 365 * 24 * time.Hour,
		"a clock that has been set back since":               50 * 365 * 24 * time.Hour,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				defer w.stop()
				pod := testPod(func(c *corev1.Container) {
					c.ReadinessProbe = execProbe("ready", func(p *corev1.Probe) { p.InitialDelaySeconds = 20 })
				})
				w.m.Sync(pod, "10.0.0.1", map[string]RunningContainer{"c": {ID: "id1", StartedAt: time.Now().Add(started)}})
				after(25 * time.Second)
				if len(w.times("ready")) == 0 {
					t.Error("not asked within 25 s")
				}
			})
		})
	}
}

func TestAnswerThatCannotBeHadCountsForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		var away atomic.Bool
		w.answer = func(context.Context, string, string) (int, error) {
			if away.Load() {
				return 0, errors.New("runtime is away")
			}
			return 0, nil
		}
		w.sync(testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) }), "id1")
		away.Store(true)
		after(15 * time.Second)
		want(t, "asked at", w.times("ready"), []int{0, 10, 10, 10})
		want(t, "events", w.said(), []string{"Warning Unhealthy Readiness probe errored and resulted in unknown state: runtime is away"})
		after(10 * time.Minute)
		want(t, "ready", w.m.Result("u1", "c", "id1").Ready, true)
	})
}

func TestCommandThatHangsFailsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.answer = func(ctx context.Context, _, _ string) (int, error) {
			<-ctx.Done() // a runtime that does not mind the timeout that it was given
			return 0, ctx.Err()
		}
		w.sync(testPod(func(c *corev1.Container) {
			c.LivenessProbe = execProbe("alive", func(p *corev1.Probe) { p.FailureThreshold, p.TimeoutSeconds = 1, 4 })
		}), "id1")
		after(20 * time.Second)
		want(t, "unhealthy", w.m.Result("u1", "c", "id1").Unhealthy, "liveness")
		want(t, "events", w.said(), []string{`Warning Unhealthy Liveness probe failed: command timed out: "alive" timed out after 4s`})
	})
}

func TestForgetEndsAnExecutionUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		var ended atomic.Bool
		w.answer = func(ctx context.Context, _, _ string) (int, error) {
			<-ctx.Done()
			ended.Store(true)
			return 1, nil
		}
		w.sync(testPod(func(c *corev1.Container) {
			c.ReadinessProbe = execProbe("ready", func(p *corev1.Probe) { p.TimeoutSeconds = 3600 })
		}), "id1")
		w.m.Forget("u1")
		synctest.Wait()
		want(t, "ended", ended.Load(), true)
		want(t, "events", w.said(), nil)
		want(t, "queued and busy", [2]int{len(w.m.queue), w.m.busy}, [2]int{})
		want(t, "result", w.m.Result("u1", "c", "id1"), Result{})
	})
}

func TestNoMoreThanConcurrencyWaitAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Concurrency: 3})
		defer w.stop()
		var mu sync.Mutex
		now, most := 0, 0
		w.answer = func(ctx context.Context, _, _ string) (int, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			now--
			return 0, nil
		}
		for i := range 12 {
			pod := testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) })
			pod.UID = types.UID(fmt.Sprint("u", i))
			w.sync(pod, fmt.Sprint("id", i))
		}
		after(4*time.Second + time.Millisecond)
		want(t, "most at once", most, 3)
		want(t, "asked", len(w.times("ready")), 12)
	})
}

func TestResultOfWhatNoSyncHasNamed(t *testing.T) {
	m := New(Config{})
	want(t, "unknown pod", m.Result("u1", "c", "id1"), Result{})
	m.Sync(testPod(func(c *corev1.Container) {
		c.ReadinessProbe = execProbe("ready", nil)
	}), "", nil)
	want(t, "container to come", m.Result("u1", "c", "id1"), Result{Started: true})
	m.Sync(testPod(func(*corev1.Container) {}), "", nil)
	want(t, "no probes", m.Result("u1", "c", "id1"), Result{Started: true, Ready: true})
}

func TestMetricsAreThoseOfAKubelet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		w.sync(testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) }), "id1")
		after(25 * time.Second)
		var b strings.Builder
		if err := w.m.WriteMetrics(&b); err != nil {
			t.Fatal(err)
		}
		const line = `prober_probe_total{container="c",namespace="ns",pod="web",pod_uid="u1",probe_type="Readiness",result="successful"} 3`
		if !strings.Contains(b.String(), line+"\n") {
			t.Errorf("metrics:\n%s\nlack %s", &b, line)
		}
	})
}

// An idle manager costs no goroutine for each probe.
func TestProbesHaveNoGoroutinesOfTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		defer w.stop()
		before := runtime.NumGoroutine()
		for i := range 50 {
			pod := testPod(func(c *corev1.Container) {
				c.ReadinessProbe, c.LivenessProbe = execProbe("ready", nil), execProbe("alive", nil)
			})
			pod.UID = types.UID(fmt.Sprint("u", i))
			w.sync(pod, fmt.Sprint("id", i))
		}
		after(30 * time.Second)
		if n := runtime.NumGoroutine() - before; n > 10 { // others of the process come and go
			t.Errorf("100 idle probes hold %d goroutines, want none", n)
		}
	})
}

func BenchmarkProbeExecution(b *testing.B) {
	done := make(chan struct{}, 1)
	m := New(Config{
		Exec: func(context.Context, string, []string, time.Duration) ([]byte, int, error) { return nil, 0, nil },
		Changed: func(types.UID) {
			select {
			case done <- struct{}{}:
			default:
			}
		},
		Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); m.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	pod := testPod(func(c *corev1.Container) { c.ReadinessProbe = execProbe("ready", nil) })
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m.Sync(pod, "", map[string]RunningContainer{"c": {ID: fmt.Sprint(i)}})
		<-done
	}
}
