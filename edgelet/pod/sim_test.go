package pod

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

var (
	schedules = flag.Int("schedules", 400, "how many random schedules TestSchedules plays")
	firstSeed = flag.Uint64("seed", 1, "seed of the first schedule")
)

// A mortal is what one engine sees of the site. Once it is dead, as after
// kill -9, nothing that the engine does has any effect.
type mortal struct {
	*fakeSite
	dead *atomic.Bool
}

var errDead = status.Error(codes.Canceled, "the engine is dead")

func (m mortal) Put(uid string, r Record) error {
	if m.dead.Load() {
		return errDead
	}
	return m.fakeSite.Put(uid, r)
}

func (m mortal) Delete(uid string) error {
	if m.dead.Load() {
		return errDead
	}
	return m.fakeSite.Delete(uid)
}

func (m mortal) PodStatus(s edge.PodStatus) error {
	if m.dead.Load() {
		return errDead
	}
	return m.fakeSite.PodStatus(s)
}

func (m mortal) PodForgotten(uid types.UID) {
	if !m.dead.Load() {
		m.fakeSite.PodForgotten(uid)
	}
}

func (m mortal) Setup(ctx context.Context, pod *corev1.Pod) error {
	if m.dead.Load() {
		return errDead
	}
	return m.fakeSite.Setup(ctx, pod)
}

// A schedule is one random course of events.
type schedule struct {
	*world
	seed  uint64
	r     *rand.Rand
	pod   *corev1.Pod
	dead  *atomic.Bool
	chaos atomic.Bool
	downs int // reboots and losses of the runtime
	log   []string
}

func (s *schedule) note(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// randomPod makes a pod of up to four init and three main containers, and a
// behaviour for each that ends well after its third run.
func (s *schedule) randomPod(n int) *corev1.Pod {
	r := s.r
	policies := []corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever}
	pod := newPod()
	pod.UID, pod.Name = types.UID(fmt.Sprintf("u%d", n)), fmt.Sprintf("p%d", n)
	pod.Spec.RestartPolicy = policies[r.IntN(3)]
	pod.Spec.Containers = nil
	for i := range r.IntN(4) {
		c := corev1.Container{Name: fmt.Sprintf("init%d", i), Image: "i"}
		if r.IntN(2) == 0 {
			c.Name = fmt.Sprintf("side%d", i)
			c.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
		}
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, c)
	}
	for i := range 1 + r.IntN(2) {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: fmt.Sprintf("main%d", i), Image: "m"})
	}
	return pod
}

func (s *schedule) behave(name string, attempt uint32) behaviour {
	if name == "other" {
		return behaviour{}
	}
	h := uint64(attempt)
	for _, c := range name {
		h = h*31 + uint64(c)
	}
	r := rand.New(rand.NewPCG(h, s.seed))
	b := behaviour{term: time.Duration(r.IntN(3000)) * time.Millisecond, deaf: r.IntN(8) == 0}
	isInit, isSide := strings.HasPrefix(name, "init"), strings.HasPrefix(name, "side")
	if isSide || s.pod.Spec.RestartPolicy == corev1.RestartPolicyAlways && !isInit {
		if attempt < 3 && r.IntN(2) == 0 {
			b.after, b.code = time.Duration(1+r.IntN(20000))*time.Millisecond, int32(r.IntN(2))
		}
		return b
	}
	b.after = time.Duration(1+r.IntN(5000)) * time.Millisecond
	if attempt < 3 && r.IntN(3) == 0 {
		b.code = 1
	}
	return b
}

// boot starts a new engine, which dies at a random call of its runtime.
func (s *schedule) boot(pods ...*corev1.Pod) {
	dead := &atomic.Bool{}
	s.dead = dead
	left := atomic.Int64{}
	left.Store(int64(1 + s.r.IntN(60)))
	die := s.chaos.Load() && s.r.IntN(3) > 0
	s.conf = func(c *Config) {
		site := mortal{s.site, dead}
		c.Images, c.Volumes, c.Environments, c.Probes, c.Hooks = site, site, site, site, site
		c.Objects, c.Records, c.Sink = site, site, site
		c.Runtime = mortalRuntime{s.rt, dead}
	}
	seed := s.r.Uint64()
	faults := rand.New(rand.NewPCG(seed, 1))
	s.rt.mu.Lock()
	s.rt.fault = func(op string) (before, after error) {
		s.rt.mu.Lock()
		defer s.rt.mu.Unlock()
		if dead.Load() {
			return errDead, nil
		}
		if !s.chaos.Load() {
			return nil, nil
		}
		if die && left.Add(-1) == 0 {
			if faults.IntN(2) == 0 {
				dead.Store(true)
				return errDead, nil
			}
			return nil, deadly{errDead}
		}
		switch faults.IntN(60) {
		case 0:
			return status.Error(codes.Unavailable, "fault before "+op), nil
		case 1:
			return nil, status.Error(codes.Unavailable, "fault after "+op)
		}
		return nil, nil
	}
	s.rt.mu.Unlock()
	s.engine(pods...)
}

// deadly is returned by the call at which the engine dies.
type deadly struct{ error }

// A mortalRuntime is what one engine sees of the runtime.
type mortalRuntime struct {
	*fakeRuntime
	dead *atomic.Bool
}

func (m mortalRuntime) died(err error) error {
	if _, ok := err.(deadly); ok {
		m.dead.Store(true)
	}
	return err
}

func (m mortalRuntime) StartContainer(ctx context.Context, id string) error {
	return m.died(m.fakeRuntime.StartContainer(ctx, id))
}

func (m mortalRuntime) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	return m.died(m.fakeRuntime.StopContainer(ctx, id, grace))
}

func (m mortalRuntime) RemoveContainer(ctx context.Context, id string) error {
	return m.died(m.fakeRuntime.RemoveContainer(ctx, id))
}

func (m mortalRuntime) StopPodSandbox(ctx context.Context, id string) error {
	return m.died(m.fakeRuntime.StopPodSandbox(ctx, id))
}

func (m mortalRuntime) RemovePodSandbox(ctx context.Context, id string) error {
	return m.died(m.fakeRuntime.RemovePodSandbox(ctx, id))
}

func (m mortalRuntime) CreateContainer(ctx context.Context, sandboxID string, c *cri.ContainerConfig, b *cri.PodSandboxConfig) (string, error) {
	id, err := m.fakeRuntime.CreateContainer(ctx, sandboxID, c, b)
	return id, m.died(err)
}

func (m mortalRuntime) RunPodSandbox(ctx context.Context, c *cri.PodSandboxConfig, h string) (string, error) {
	id, err := m.fakeRuntime.RunPodSandbox(ctx, c, h)
	return id, m.died(err)
}

// play plays one schedule and checks what must hold in each.
func (s *schedule) play() {
	s.pod = s.randomPod(1)
	s.rt.behaves = s.behave
	s.rt.onStart = s.checkStart
	s.site.slowPut = time.Duration(s.r.IntN(20)) * time.Millisecond
	s.chaos.Store(true)
	// Another pod runs beside it, and must not notice.
	other := newPod(with(nil, ctr("other")), func(p *corev1.Pod) { p.UID, p.Name = "u2", "p2" })
	desired := []*corev1.Pod{s.pod, other}
	s.boot(desired...)
	current := s.pod
	gone := false
	for range 3 + s.r.IntN(12) {
		s.sleep(time.Duration(s.r.IntN(8000)) * time.Millisecond)
		if s.dead.Load() {
			s.note("died")
			switch s.r.IntN(8) {
			case 0:
				s.rt.wipe()
				s.downs++
			case 1:
				s.rt.reboot()
				s.downs++
			}
			s.crash()
			s.boot(desired...)
			continue
		}
		switch n := s.r.IntN(14); {
		case n < 4:
			s.note("crash")
			s.dead.Store(true)
			s.crash()
			s.boot(desired...)
		case n == 4:
			s.note("reboot")
			s.dead.Store(true)
			s.rt.reboot()
			s.downs++
			s.crash()
			s.boot(desired...)
		case n == 5:
			s.note("wipe")
			s.dead.Store(true)
			s.rt.wipe()
			s.downs++
			s.crash()
			s.boot(desired...)
		case n == 6:
			s.note("kill")
			s.rt.kill(current.Spec.Containers[0].Name, 9)
		case n == 7 && !gone:
			s.note("delete")
			current = deleted(s.pod, int64(s.r.IntN(30)))
			desired = []*corev1.Pod{current, other}
			s.m.Set(current)
		case n == 8 && !gone && s.r.IntN(2) == 0:
			s.note("remove")
			gone, desired = true, []*corev1.Pod{other}
			s.m.Remove(s.pod.UID)
		}
	}
	s.chaos.Store(false)
	s.sleep(time.Minute) // calls under way may still be deadly
	if s.dead.Load() {
		s.crash()
		s.boot(desired...)
	}
	s.sleep(30 * time.Minute)
	s.checkEnd(current, gone)
	if st := s.status("u2"); st.Phase != corev1.PodRunning || !st.ContainerStatuses[0].Ready || s.rt.starts["u2/other"] > 1+s.downs {
		s.t.Errorf("the other pod is %s, started %d times with %d reboots", st.Phase, s.rt.starts["u2/other"], s.downs)
	}
	s.end()
	s.checkStatuses()
}

// crash ends the engine as kill -9 does: what it still does has no effect. The
// next one does not come up within the millisecond that tells Seqs apart.
func (s *schedule) crash() {
	s.stop()
	<-s.done
	time.Sleep(50 * time.Millisecond)
}

func (s *schedule) checkStart(uid, name string) {
	if uid != string(s.pod.UID) {
		return
	}
	c := specOf(s.pod, name)
	n := s.rt.starts[uid+"/"+name]
	if policy(s.pod, c) == corev1.RestartPolicyNever && n > 1 {
		s.rt.problem("container %s that must run once was started %d times", name, n)
	}
	if !strings.HasPrefix(name, "main") {
		return
	}
	for i := range s.pod.Spec.InitContainers {
		init := &s.pod.Spec.InitContainers[i]
		if s.rt.starts[uid+"/"+init.Name] == 0 {
			s.rt.problem("%s started before %s", name, init.Name)
		}
		if !criconfig.IsSidecar(init) && !s.rt.succeeded[uid+"/"+init.Name] {
			s.rt.problem("%s started before %s had succeeded", name, init.Name)
		}
	}
}

// checkEnd checks that the pod has become what it was asked to be.
func (s *schedule) checkEnd(pod *corev1.Pod, removed bool) {
	s.rt.mu.Lock()
	boxes, ready := 0, 0
	for _, b := range s.rt.sandboxes {
		if b.Metadata.Uid != string(pod.UID) {
			continue
		}
		boxes++
		if b.State == cri.PodSandboxState_SANDBOX_READY {
			ready++
		}
	}
	s.rt.mu.Unlock()
	delete(s.site.mounted, "u2")
	last := s.site.last(pod.UID)
	switch {
	case removed || pod.DeletionTimestamp != nil:
		if boxes > 0 || len(s.site.mounted) > 0 || !removed && !last.Gone || removed && !s.site.forgot(pod.UID) || !ended(last.Status.Phase) && !removed {
			s.t.Errorf("not gone: %d sandboxes, volumes %v, gone %t, forgotten %v, phase %s",
				boxes, s.site.mounted, last.Gone, s.site.forgotten, last.Status.Phase)
		}
	case pod.Spec.RestartPolicy == corev1.RestartPolicyAlways:
		if last.Status.Phase != corev1.PodRunning || ready != 1 {
			s.t.Errorf("phase = %s with %d sandboxes, want Running", last.Status.Phase, ready)
		}
		for _, c := range append(last.Status.ContainerStatuses, last.Status.InitContainerStatuses...) {
			if !c.Ready {
				s.t.Errorf("container %s = %+v, want ready", c.Name, c.State)
			}
		}
	default:
		lost := s.rt.wiped // a container that must run once was begun and did not succeed
		for c := range criconfig.Containers(pod) {
			key := string(pod.UID) + "/" + c.Name
			lost = lost || s.rt.starts[key] > 0 && !s.rt.succeeded[key] || policy(pod, c) == corev1.RestartPolicyOnFailure
		}
		if last.Status.Phase == corev1.PodFailed && !lost {
			s.t.Errorf("pod failed, although no container of it had")
		}
		if !ended(last.Status.Phase) || ready > 0 || len(s.site.mounted) > 0 {
			s.t.Errorf("phase = %s with %d sandboxes, volumes %v, want an end", last.Status.Phase, ready, s.site.mounted)
		}
	}
}

// checkStatuses checks that no status ever went backwards. One with a lower Seq
// than its forerunner does not count: an engine that was killed after it had told
// a status and before it had recorded it tells the recorded one again when it is
// back, and the outbox and the cloud pass over that.
func (s *schedule) checkStatuses() {
	for _, all := range s.site.statuses {
		var before edge.PodStatus
		counts := map[string]int32{}
		for _, st := range all {
			if st.Seq < before.Seq {
				continue
			}
			if ended(before.Status.Phase) && st.Status.Phase != before.Status.Phase {
				s.t.Errorf("phase %s after %s", st.Status.Phase, before.Status.Phase)
			}
			for _, c := range append(st.Status.ContainerStatuses, st.Status.InitContainerStatuses...) {
				if c.RestartCount < counts[c.Name] {
					s.t.Errorf("restart count of %s went from %d to %d", c.Name, counts[c.Name], c.RestartCount)
				}
				counts[c.Name] = c.RestartCount
			}
			before = st
		}
		if last := all[len(all)-1]; last.Seq < before.Seq {
			s.t.Errorf("status %d came after %d, and none after it", last.Seq, before.Seq)
		}
	}
}

// TestSchedules plays random courses of events, in which the engine dies between
// any two calls, calls fail before or after their work, and the runtime reboots
// or forgets.
//
// A seed fixes the events, not the order of goroutines that are ready at the same
// instant, which the race detector shuffles, nor the jitter of back-offs. So a
// schedule that fails may need to be played some tens of times, best with -race,
// to fail again.
func TestSchedules(t *testing.T) {
	// Not more than one processor: the order depends on the machine less, and the
	// race detector crashes (Go 1.26) when two goroutines of one bubble run timers
	// at once, because the bubble has one race context for both.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	n := *schedules
	if testing.Short() {
		n = 100
	}
	for i := range n {
		seed := *firstSeed + uint64(i)
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &schedule{world: newWorld(t), seed: seed, r: newRand(seed)}
				s.play()
				if t.Failed() {
					t.Logf("%s init %d\n%s\n%s", s.pod.Spec.RestartPolicy, len(s.pod.Spec.InitContainers),
						strings.Join(s.log, "\n"), strings.Join(s.rt.calls, "\n"))
				}
			})
		})
		if !ok && !testing.Verbose() {
			return
		}
	}
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }
