// Package pod provides the pod engine: it brings pods to life on a container
// runtime, keeps them as their specs say, ends them, and reports their status as
// a kubelet does.
//
// [Plan] decides. It is pure: from the spec, what was observed and the time, it
// computes the actions that are due. A worker for each pod carries them out,
// observes again and plans again until nothing is due; then it sleeps until the
// runtime, a probe, the desired set or the clock gives it a reason. Workers share
// listings of the runtime and nothing else, so that no pod waits for another.
//
// The runtime is the memory of what runs: containers are found by their labels,
// so that an edgelet that was killed between any two calls adopts what it finds.
// What the runtime does not keep is in a [Record]. A container that must run at
// most once is recorded as begun before StartContainer is called, so that it is
// not started again even if the runtime has lost it.
//
// Only sandboxes and containers with the label skerry.io/managed are touched.
package pod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/internal/backoff"
)

// Config is what a [Manager] needs. The interfaces must be set; of the rest, each
// zero value stands for a default.
type Config struct {
	Runtime      Runtime
	Images       Images
	Volumes      Volumes
	Environments Environments
	Probes       Probes
	Hooks        Hooks
	Objects      Objects
	Records      Records
	Sink         Sink

	HostIPs      func() []string            // the machine's addresses, the primary first; default none
	RuntimeName  func() string              // prefix of container IDs in statuses; default containerd
	CgroupDriver func() string              // systemd or cgroupfs; default cgroupfs
	Allocatable  func() corev1.ResourceList // what pods may request in all; default no limit
	Memory       int64                      // bytes of the machine; default: OOM scores ignore requests

	LogDir     string // default /var/log/pods
	Dir        string // the pods' own files; default /var/lib/edgelet/pods
	SeccompDir string // profiles that pods may name; default /var/lib/kubelet/seccomp
	CgroupRoot string // default kubepods
	CgroupDir  string // where cgroups are mounted; default /sys/fs/cgroup

	Sysctls []string // allowed besides the safe ones; a trailing * matches any rest

	Relist  time.Duration // how often the runtime is listed without a reason; default 10s
	Refresh time.Duration // how often the volumes of a pod are refreshed; default 60s

	Log *slog.Logger // default slog.Default()
}

func (c Config) withDefaults() (Config, error) {
	var errs []error
	for name, missing := range map[string]bool{
		"Runtime": c.Runtime == nil, "Images": c.Images == nil, "Volumes": c.Volumes == nil,
		"Environments": c.Environments == nil, "Probes": c.Probes == nil, "Hooks": c.Hooks == nil,
		"Objects": c.Objects == nil, "Records": c.Records == nil, "Sink": c.Sink == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("%s: missing", name))
		}
	}
	if c.HostIPs == nil {
		c.HostIPs = func() []string { return nil }
	}
	if c.RuntimeName == nil {
		c.RuntimeName = func() string { return "containerd" }
	}
	if c.CgroupDriver == nil {
		c.CgroupDriver = func() string { return criconfig.DriverCgroupfs }
	}
	if c.Allocatable == nil {
		c.Allocatable = func() corev1.ResourceList { return nil }
	}
	c.LogDir = cmp.Or(c.LogDir, "/var/log/pods")
	c.Dir = cmp.Or(c.Dir, "/var/lib/edgelet/pods")
	c.SeccompDir = cmp.Or(c.SeccompDir, "/var/lib/kubelet/seccomp")
	c.CgroupRoot = cmp.Or(c.CgroupRoot, "kubepods")
	c.CgroupDir = cmp.Or(c.CgroupDir, "/sys/fs/cgroup")
	c.Relist = cmp.Or(c.Relist, 10*time.Second)
	c.Refresh = cmp.Or(c.Refresh, time.Minute)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c, errors.Join(errs...)
}

// A Manager runs all pods of a site. Its methods may be called from any
// goroutine.
type Manager struct {
	Config
	lister    lister
	pageSizes []string

	wg      sync.WaitGroup // workers and what they have started
	admit   sync.Mutex     // one admission at a time
	mu      sync.Mutex
	ctx     context.Context // Run's; nil: not running
	workers map[types.UID]*worker
}

// NewManager returns a manager that does nothing until it is run.
func NewManager(c Config) (*Manager, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("pod manager: %w", err)
	}
	m := &Manager{Config: c, lister: lister{runtime: c.Runtime}, workers: map[types.UID]*worker{}}
	entries, _ := os.ReadDir("/sys/kernel/mm/hugepages") // none: no huge pages
	for _, e := range entries {
		if size := criconfig.PageSize(e.Name()); size != "" {
			m.pageSizes = append(m.pageSizes, size)
		}
	}
	return m, nil
}

// Run runs the pods until ctx is done; it then stops working, not the pods. All
// pods that are desired must have been Set before: what else it finds of ours in
// the runtime, or in the records, is ended.
func (m *Manager) Run(ctx context.Context) error {
	records, err := m.Records.All()
	if err != nil {
		return fmt.Errorf("pod manager: read records: %w", err)
	}
	m.mu.Lock()
	if m.ctx != nil {
		m.mu.Unlock()
		return errors.New("pod manager: already running")
	}
	m.ctx = ctx
	for uid, record := range records {
		w := m.workers[types.UID(uid)]
		if w == nil {
			w = m.newWorker(types.UID(uid))
			w.pod, w.removed = cmp.Or(record.Removed, skeleton(types.UID(uid), &seen{})), true
			w.pod.Namespace, w.pod.Name = record.Namespace, record.Name
		}
		w.adopt(record)
	}
	for _, w := range m.workers {
		m.start(w)
	}
	m.mu.Unlock()
	m.sweep()

	relist := make(chan struct{}, 1)
	lost := make(chan bool, 1)
	m.wg.Go(func() { m.watch(ctx, relist, lost) })
	m.relist(ctx, relist, lost)
	m.mu.Lock() // no worker is started from here on
	m.mu.Unlock()
	m.wg.Wait()
	return nil
}

// sweep removes the volumes of pods that nobody knows any more.
func (m *Manager) sweep() {
	uids, err := m.Volumes.Present()
	if err != nil {
		m.Log.Warn("volumes on disk cannot be listed", "err", err)
	}
	for _, uid := range uids {
		m.mu.Lock()
		known := m.workers[uid] != nil
		m.mu.Unlock()
		if !known && criconfig.CheckUID(uid) == nil {
			m.orphan(uid, &seen{})
		}
	}
}

// watch passes on what the runtime reports. While it has no source, it says so
// in lost, and the runtime is listed more often.
func (m *Manager) watch(ctx context.Context, relist chan<- struct{}, lost chan<- bool) {
	for n := 0; ctx.Err() == nil; n++ {
		began := time.Now()
		err := m.Runtime.Watch(ctx, func(uid types.UID) {
			if uid == "" {
				poke(relist)
				return
			}
			m.wake(uid, func(w *worker) { w.stale = true })
		})
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			n = 0
		}
		m.Log.Warn("runtime events are lost", "err", err)
		tell(lost, true)
		if backoff.Sleep(ctx, time.Second+backoff.Delay(n, time.Second, 30*time.Second)) != nil {
			return
		}
		tell(lost, false)
		poke(relist)
	}
}

// poke puts a token into c unless there is one.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// tell puts v into c, which has room for one, or leaves the value that waits
// there: the next is never far.
func tell(c chan<- bool, v bool) {
	select {
	case c <- v:
	default:
	}
}

// relist lists the runtime now and then, and wakes the workers whose pods are
// not as they know them.
func (m *Manager) relist(ctx context.Context, asked <-chan struct{}, lost <-chan bool) {
	failing := false
	period := m.Relist
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case l := <-lost:
			if period = m.Relist; l {
				period = min(period, time.Second)
			}
		case <-asked:
		case <-timer.C:
		}
		pods, err := m.lister.fresh(ctx, ctx, &m.wg)
		if err != nil && ctx.Err() == nil && !failing {
			m.Log.Error("runtime cannot be listed", "err", err)
		}
		if err == nil {
			m.compare(pods, failing)
		}
		failing = err != nil
		timer.Reset(period)
	}
}

// compare wakes the workers whose pods have changed, and those that could not
// work while the runtime was down; it ends what nobody knows. Pods is shared with
// workers.
func (m *Manager) compare(pods map[types.UID]*seen, recovered bool) {
	known := map[types.UID]bool{}
	for _, w := range m.all() {
		known[w.uid] = true
		digest := pods[w.uid].digest()
		w.mu.Lock()
		if w.digest != digest || recovered && w.failing {
			w.stale = true
			poke(w.wake)
		}
		w.mu.Unlock()
	}
	for uid, s := range pods {
		if !known[uid] {
			m.orphan(uid, s)
		}
	}
}

// orphan ends a pod of which only traces are known.
func (m *Manager) orphan(uid types.UID, s *seen) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.workers[uid] != nil || m.ctx == nil {
		return
	}
	m.Log.Info("pod that is not desired is ended", "uid", uid)
	w := m.newWorker(uid)
	w.pod, w.removed = skeleton(uid, s), true
	m.start(w)
}

// newWorker registers a worker. The caller holds m.mu.
func (m *Manager) newWorker(uid types.UID) *worker {
	w := &worker{m: m, uid: uid, wake: make(chan struct{}, 1), write: make(chan struct{}, 1), stale: true}
	w.obs.Memory, w.doubts = map[string]Memory{}, map[string]time.Time{}
	m.workers[uid] = w
	return w
}

// start runs a worker, if the manager runs. The caller holds m.mu.
func (m *Manager) start(w *worker) {
	if m.ctx == nil || m.ctx.Err() != nil || w.started {
		return
	}
	w.started = true
	ctx := m.ctx
	m.wg.Go(func() { w.run(ctx) })
}

// Set makes pod desired, or changes it. It may carry a deletionTimestamp, and
// then it is ended within its deletionGracePeriodSeconds. Pod must not be
// changed afterwards.
func (m *Manager) Set(pod *corev1.Pod) error {
	if err := criconfig.Check(pod); err != nil {
		return fmt.Errorf("set pod: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.workers[pod.UID]
	if w == nil {
		w = m.newWorker(pod.UID)
	}
	w.set(pod)
	m.start(w)
	return nil
}

// Remove makes a pod no longer desired and forgets it once it has ended. If it has
// not yet, its object was deleted by force, and it is ended at once.
func (m *Manager) Remove(uid types.UID) {
	m.wake(uid, func(w *worker) {
		if !w.removed {
			w.removed, w.forced = true, true
			w.interrupt()
		}
	})
}

// Changed says that something which a pod depends on has changed: an object that
// it refers to, or the verdict of a probe.
func (m *Manager) Changed(uid types.UID) {
	m.wake(uid, func(w *worker) { w.kicked = true })
}

// Evict makes a pod fail for a reason that lies in the machine, as "Evicted", and
// ends it within its grace period. A pod that has ended stays as it is.
func (m *Manager) Evict(uid types.UID, reason, message string) {
	m.wake(uid, func(w *worker) {
		if w.evicted == nil {
			w.evicted = &Ending{Reason: reason, Message: message, Disruption: true}
			w.interrupt()
		}
	})
}

func (m *Manager) wake(uid types.UID, change func(*worker)) {
	m.mu.Lock()
	w := m.workers[uid]
	m.mu.Unlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	change(w)
	poke(w.wake)
	w.mu.Unlock()
}

func (m *Manager) all() []*worker {
	m.mu.Lock()
	defer m.mu.Unlock()
	workers := make([]*worker, 0, len(m.workers))
	for _, w := range m.workers {
		workers = append(workers, w)
	}
	return workers
}

// Pods returns all desired pods with their status, by namespace and name. They
// must not be changed.
func (m *Manager) Pods() []*corev1.Pod {
	var pods []*corev1.Pod
	for _, w := range m.all() {
		if pod := w.snapshot(); pod != nil {
			pods = append(pods, pod)
		}
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return pods
}

// Pod returns the desired pod of that name with its status. Of several, it is the
// one that is not being deleted, if any.
func (m *Manager) Pod(namespace, name string) (*corev1.Pod, bool) {
	var found *corev1.Pod
	for _, pod := range m.Pods() {
		if pod.Namespace == namespace && pod.Name == name && (found == nil || pod.DeletionTimestamp == nil) {
			found = pod
		}
	}
	return found, found != nil
}

// ByUID returns one pod with its status.
func (m *Manager) ByUID(uid types.UID) (*corev1.Pod, bool) {
	m.mu.Lock()
	w := m.workers[uid]
	m.mu.Unlock()
	if w == nil {
		return nil, false
	}
	pod := w.snapshot()
	return pod, pod != nil
}

// skeleton is as much of a pod as the runtime's labels and annotations tell, for
// ending one whose spec is not known any more.
func skeleton(uid types.UID, s *seen) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}}
	for _, sandbox := range s.sandboxes {
		pod.Namespace, pod.Name = sandbox.GetMetadata().GetNamespace(), sandbox.GetMetadata().GetName()
		pod.Spec.TerminationGracePeriodSeconds = graceFrom(sandbox.Annotations)
	}
	for _, c := range s.containers {
		name := c.Labels[criconfig.LabelContainer]
		pod.Namespace = cmp.Or(pod.Namespace, c.Labels[criconfig.LabelNamespace])
		pod.Name = cmp.Or(pod.Name, c.Labels[criconfig.LabelPodName])
		if !slices.ContainsFunc(pod.Spec.Containers, func(k corev1.Container) bool { return k.Name == name }) {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: name, Lifecycle: preStopFrom(c.Annotations)})
		}
	}
	return pod
}
