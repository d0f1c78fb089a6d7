package probe

import (
	"cmp"
	"context"
	"iter"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A RunningContainer is a container that probes may look at.
type RunningContainer = struct {
	ID        string
	StartedAt time.Time
}

// A Result is the verdict of a container's three probes. Unhealthy names the
// probe, "liveness" or "startup", that asks for a restart, Message is what it
// said, and Grace is its own terminationGracePeriodSeconds if it has one.
type Result = struct {
	Started, Ready bool
	Unhealthy      string
	Message        string
	Grace          *int64
}

// Config configures a [Manager]. Only Exec is required. Its functions are called
// without any lock held, and from several goroutines at once.
type Config struct {
	// Exec runs cmd in a container until it ends, ctx is done or timeout is over
	// (zero: no timeout), and returns what it wrote. Running out of time is an
	// error that is context.DeadlineExceeded or has gRPC code DeadlineExceeded.
	Exec func(ctx context.Context, containerID string, cmd []string, timeout time.Duration) (output []byte, exit int, err error)

	// Changed is called as soon as the verdict on a container of a pod is another.
	Changed func(uid types.UID)

	// Event reports on a pod what a kubelet would: Unhealthy, ProbeWarning,
	// LifecycleHTTPFallback.
	Event func(pod *corev1.Pod, eventType, reason, message string)

	// Was is what is known of a container from before the edgelet started, false
	// and false for a new one. Its probes go on from there: a container that was
	// ready stays so until a probe says otherwise. Called from within Sync, it
	// must not take a lock that Sync's caller holds.
	Was func(uid types.UID, container, containerID string) (started, ready bool)

	Version     string       // Kubernetes version of the user agent, default "1.37"
	Concurrency int          // probes that may wait for an answer at once, default 64
	Log         *slog.Logger // default slog.Default()
}

// A Manager probes containers and runs their hooks. Its methods may be called
// from any goroutine. Probes run while Run does.
type Manager struct {
	cfg   Config
	check checker
	wake  chan struct{} // holds one token when the schedule has changed

	mu    sync.Mutex // guards the following fields and all that they lead to
	pods  map[types.UID]*pod
	queue queue // probes that wait until they are due
	busy  int   // probes that wait for their answer
}

// A pod holds the probed containers of one pod, by name.
type pod struct {
	spec       *corev1.Pod
	ip         string
	containers map[string]*container
}

// New returns a manager that has no pods yet.
func New(cfg Config) *Manager {
	cfg = cfg.withDefaults()
	return &Manager{
		cfg:   cfg,
		check: newChecker(cfg),
		wake:  make(chan struct{}, 1),
		pods:  map[types.UID]*pod{},
	}
}

func (c Config) withDefaults() Config {
	c.Version = cmp.Or(c.Version, "1.37")
	c.Concurrency = max(cmp.Or(c.Concurrency, 64), 1)
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.Changed == nil {
		c.Changed = func(types.UID) {}
	}
	if c.Event == nil {
		c.Event = func(*corev1.Pod, string, string, string) {}
	}
	if c.Was == nil {
		c.Was = func(types.UID, string, string) (bool, bool) { return false, false }
	}
	return c
}

// Sync makes the running probes those of the containers that running names, by
// container name. A pod that terminates keeps readiness alone. It does not wait
// for probes, and keeps spec, which must not be changed afterwards.
func (m *Manager) Sync(spec *corev1.Pod, ip string, running map[string]RunningContainer) {
	fresh := m.unseen(spec, running)
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pods[spec.UID]
	if p == nil {
		p = &pod{containers: map[string]*container{}}
		m.pods[spec.UID] = p
	}
	p.spec, p.ip = spec, ip
	for name, c := range p.containers {
		if running[name].ID != c.id {
			m.drop(c)
			delete(p.containers, name)
		} else if declared := find(spec, name); declared != nil {
			c.spec = declared
		}
	}
	for _, c := range fresh {
		if p.containers[c.spec.Name] != nil {
			continue // another Sync was quicker
		}
		c.pod = p
		p.containers[c.spec.Name] = c
		m.begin(c, now)
	}
	if spec.DeletionTimestamp != nil {
		for _, c := range p.containers {
			m.quiet(c)
		}
	}
}

// unseen makes the containers of running that have probes and are not known yet.
func (m *Manager) unseen(spec *corev1.Pod, running map[string]RunningContainer) []*container {
	m.mu.Lock()
	known := make(map[string]bool, len(running))
	if p := m.pods[spec.UID]; p != nil {
		for name, c := range p.containers {
			known[name] = c.id == running[name].ID
		}
	}
	m.mu.Unlock()
	var fresh []*container
	for declared := range containers(spec) {
		is, ok := running[declared.Name]
		if !ok || known[declared.Name] || !probed(declared) {
			continue
		}
		started, ready := m.cfg.Was(spec.UID, declared.Name, is.ID)
		fresh = append(fresh, newContainer(declared, is, started, ready))
	}
	return fresh
}

// Result is the latest verdict on a container. A container without probes is
// started and ready as soon as it runs. Of a container that no Sync has named
// yet nothing is known, so it is neither unless it has no probes.
func (m *Manager) Result(uid types.UID, name, containerID string) Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pods[uid]
	if p == nil {
		return Result{}
	}
	if c := p.containers[name]; c != nil && c.id == containerID {
		return c.result
	}
	declared := find(p.spec, name)
	if declared == nil {
		return Result{Started: true, Ready: true} // an ephemeral container has no probes
	}
	started := declared.StartupProbe == nil
	return Result{Started: started, Ready: started && declared.ReadinessProbe == nil}
}

// Forget ends all probes of a pod.
func (m *Manager) Forget(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pods[uid]; p != nil {
		for _, c := range p.containers {
			m.drop(c)
		}
		delete(m.pods, uid)
	}
}

// containers yields what may have probes: containers, and init containers for
// the sake of sidecars. Others of the init containers declare no probes.
func containers(spec *corev1.Pod) iter.Seq[*corev1.Container] {
	return func(yield func(*corev1.Container) bool) {
		for i := range spec.Spec.InitContainers {
			if !yield(&spec.Spec.InitContainers[i]) {
				return
			}
		}
		for i := range spec.Spec.Containers {
			if !yield(&spec.Spec.Containers[i]) {
				return
			}
		}
	}
}

// find returns the declaration of a container, or nil.
func find(spec *corev1.Pod, name string) *corev1.Container {
	for c := range containers(spec) {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func probed(c *corev1.Container) bool {
	return c.StartupProbe != nil || c.ReadinessProbe != nil || c.LivenessProbe != nil
}
