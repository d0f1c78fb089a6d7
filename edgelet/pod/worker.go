package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/internal/backoff"
)

// How long a worker waits after a pass that failed: full jitter, growing.
const (
	retryBase  = time.Second
	retryLimit = 30 * time.Second
	retryLeast = 100 * time.Millisecond
)

// maxRounds bounds how often one pass plans.
const maxRounds = 50

// errInterrupted is the cause of a pass that ended because the pod is to end, or
// to end sooner.
var errInterrupted = errors.New("the pod is to end sooner")

// A worker brings one pod to what is desired, one pass after the other.
type worker struct {
	m       *Manager
	uid     types.UID
	wake    chan struct{} // holds a token when there is something to do
	started bool          // guarded by Manager.mu

	mu      sync.Mutex // guards what follows
	pod     *corev1.Pod
	removed bool
	forced  bool                    // the API object vanished before the pod had ended: a person forced that
	stale   bool                    // the runtime must be listed
	kicked  bool                    // something that the pod depends on has changed
	cancel  context.CancelCauseFunc // of the pass under way
	evicted *Ending                 // the machine wants to be rid of the pod
	failing bool                    // the last pass failed
	digest  string                  // of what was last observed
	record  Record                  // as it is to be saved; never written through
	dirty   bool                    // record is not saved yet
	saving  bool                    // a goroutine saves it
	holds   bool                    // the pod has been admitted: its requests count

	write chan struct{} // holds a token while something is written to the store
	sent  uint64        // Seq of the last status sent; owned by who holds write

	// Owned by the worker's goroutine.
	obs      Observed
	admitted bool
	failures int       // passes in a row
	next     time.Time // when to plan again
	refresh  time.Time // when the volumes are to be refreshed
	killing  map[string]bool
	doubts   map[string]time.Time // containers to be looked at again, and when
	stopped  map[string]bool      // containers whose preStop hook has run
	mountErr string
	resize   Resize
	finished bool // nothing is left of the pod
	unsure   bool // a call has failed that may have done its work: obs may be wrong
	current  *corev1.Pod
	gone     bool // w.removed as of this pass
	force    bool // w.forced as of this pass
}

// adopt takes what is remembered. It is called before the worker runs.
func (w *worker) adopt(r Record) {
	w.record, w.admitted, w.holds = r, true, r.Ended == nil
	for name, c := range r.Containers {
		w.obs.Memory[name] = c.memory()
	}
	w.finished = r.Gone
	w.dirty = r.Status != nil // it may not have been sent
}

func (w *worker) set(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.pod
	w.pod, w.removed = pod, false
	if pod.DeletionTimestamp != nil && (old == nil || old.DeletionTimestamp == nil || stopGrace(pod) < stopGrace(old)) {
		w.interrupt()
	}
	poke(w.wake)
}

// interrupt ends the pass under way. The caller holds w.mu.
func (w *worker) interrupt() {
	if w.cancel != nil {
		w.cancel(errInterrupted)
	}
}

// snapshot is the pod with its status, nil if it is not desired.
func (w *worker) snapshot() *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pod == nil || w.removed {
		return nil
	}
	pod := *w.pod
	if w.record.Status != nil {
		pod.Status = *w.record.Status
	}
	return &pod
}

// run works until ctx is done or nothing is left of the pod.
func (w *worker) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	w.mu.Lock()
	if w.dirty {
		w.saveSoon()
	}
	w.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-w.wake:
		}
		if w.turn(ctx) {
			return
		}
		if w.next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(max(time.Until(w.next), 0))
		}
	}
}

// turn does one pass and says when the next is due. It reports whether nothing
// is left to do, ever.
func (w *worker) turn(ctx context.Context) (over bool) {
	pass, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w.mu.Lock()
	stale, kicked := w.stale, w.kicked
	w.stale, w.kicked = false, false
	w.current, w.gone, w.force, w.cancel = w.pod, w.removed, w.forced, cancel
	evicted := w.evicted
	w.mu.Unlock()
	if r := &w.record; evicted != nil && r.Ended == nil && (r.Status == nil || !ended(r.Status.Phase)) {
		w.event("", corev1.EventTypeWarning, evicted.Reason, evicted.Message)
		w.end(*evicted)
	}

	w.next = time.Time{}
	err := w.pass(pass, stale || w.failures > 0, kicked)
	w.mu.Lock()
	w.cancel = nil
	w.digest = w.obs.digest()
	interrupted := context.Cause(pass) == errInterrupted
	w.failing = err != nil && !interrupted
	if interrupted {
		w.stale = true
		poke(w.wake)
	}
	w.mu.Unlock()
	switch {
	case ctx.Err() != nil, interrupted:
		return false
	case err != nil:
		w.log().Warn("pod cannot be brought up to date", "err", err)
		w.due(time.Now().Add(retryLeast + backoff.Delay(w.failures, retryBase, retryLimit)))
		w.failures++
		return false
	}
	w.failures = 0
	return w.finished && w.gone && w.leave()
}

func (w *worker) log() *slog.Logger {
	return w.m.Log.With("pod", w.current.Namespace+"/"+w.current.Name, "uid", w.uid)
}

// due makes sure that the worker plans again at t.
func (w *worker) due(t time.Time) {
	if w.next.IsZero() || t.Before(w.next) {
		w.next = t
	}
}

// pass observes, plans and acts until nothing is due.
func (w *worker) pass(ctx context.Context, stale, kicked bool) error {
	if w.finished {
		w.saveGone()
		return nil
	}
	if kicked {
		for name, m := range w.obs.Memory {
			if m.Failure.Reason == reasonConfig {
				m.Failure.Retry = time.Time{}
				w.obs.Memory[name] = m
			}
		}
		w.obs.Volumes = false
	}
	w.unsure = w.unsure || stale
	if err := w.ascertain(ctx); err != nil {
		return err
	}
	if err := w.reconsider(ctx); err != nil {
		return err
	}
	w.admitOnce()
	w.allocate()
	if !time.Now().Before(w.refresh) {
		w.obs.Volumes = false
	}
	var failed error
	for range maxRounds {
		if err := w.ascertain(ctx); err != nil {
			return err
		}
		now := time.Now()
		w.report(now)
		spec := w.spec(now)
		acted, err := w.act(ctx, spec, Plan(spec, w.obs, now))
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			failed = err
		}
		if !acted || err != nil || w.finished {
			if !w.unsure {
				w.report(time.Now())
			}
			w.timers(spec)
			for _, at := range w.doubts {
				w.due(at)
			}
			if w.finished {
				w.saveGone()
			}
			return failed
		}
	}
	w.due(time.Now().Add(retryBase))
	return nil
}

// ascertain observes the pod anew if what is known of it may be wrong. Nothing
// must be concluded from it before: what is missing might be taken for lost.
func (w *worker) ascertain(ctx context.Context) error {
	if !w.unsure {
		return nil
	}
	pods, err := w.m.lister.fresh(ctx, w.m.ctx, &w.m.wg)
	if err != nil {
		return err
	}
	if w.current.Name == "" || w.gone && len(w.current.Spec.Containers) == 0 {
		w.learn(pods[w.uid])
	}
	if err := w.observe(ctx, pods[w.uid]); err != nil {
		return err
	}
	w.unsure = false
	return nil
}

// learn makes up what it can of a pod whose spec is not known any more.
func (w *worker) learn(s *seen) {
	if s == nil {
		return
	}
	w.current = skeleton(w.uid, s)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.removed {
		w.pod = w.current
	}
}

// timers sees to it that the worker wakes for what comes with time alone.
func (w *worker) timers(spec Spec) {
	if spec.Stop != nil {
		return
	}
	if d := spec.Pod.Spec.ActiveDeadlineSeconds; d != nil && w.record.Status != nil && w.record.Status.StartTime != nil {
		w.due(w.record.Status.StartTime.Add(time.Duration(*d) * time.Second))
	}
	if w.obs.Volumes {
		w.due(w.refresh)
	}
}

// spec is what is asked of the pod now. It decides when the pod is to end, and
// remembers since when.
func (w *worker) spec(now time.Time) Spec {
	pod := w.current
	r := &w.record // only this goroutine writes to it, and under w.mu
	spec := Spec{Pod: pod}
	if d := pod.Spec.ActiveDeadlineSeconds; d != nil && r.Ended == nil && r.Status != nil && !ended(r.Status.Phase) &&
		r.Status.StartTime != nil && !now.Before(r.Status.StartTime.Add(time.Duration(*d)*time.Second)) {
		w.end(Ending{Reason: "DeadlineExceeded", Message: "Pod was active on the node longer than the specified deadline"})
		w.event("", corev1.EventTypeNormal, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline")
		w.report(now)
	}
	remove := w.gone || pod.DeletionTimestamp != nil || !r.StopSince.IsZero()
	switch {
	case remove:
		grace := stopGrace(pod)
		if w.force { // the name is free, and whatever takes its place may run already
			grace = leastGrace
		}
		if r.StopSince.IsZero() || grace < r.StopGrace {
			w.change(func(r *Record) {
				r.StopSince, r.StopGrace = now, grace
				if w.gone {
					r.Removed = withoutStatus(pod)
				}
			})
		}
		spec.Stop = &Stop{Since: r.StopSince, Grace: r.StopGrace, Remove: true}
	case r.Ended != nil || r.Status != nil && ended(r.Status.Phase):
		spec.Stop = &Stop{Since: now, Grace: podGrace(pod)}
	}
	return spec
}

func withoutStatus(pod *corev1.Pod) *corev1.Pod {
	p := *pod
	p.Status, p.ManagedFields = corev1.PodStatus{}, nil
	return &p
}

// stopGrace is how long a pod has for its end once it has been asked to.
func stopGrace(pod *corev1.Pod) time.Duration {
	if g := pod.DeletionGracePeriodSeconds; g != nil {
		return time.Duration(max(*g, 1)) * time.Second
	}
	return podGrace(pod)
}

// end makes the pod fail as a whole.
func (w *worker) end(e Ending) {
	w.change(func(r *Record) { r.Ended = &e })
}

// report hears the probes, computes the pod's status, and sends it if it has
// changed.
func (w *worker) report(now time.Time) {
	records, learned := w.remember()
	w.probe()
	spec := Spec{Pod: w.current}
	w.resized()
	r := &w.record
	if w.gone || w.current.DeletionTimestamp != nil || !r.StopSince.IsZero() {
		spec.Stop = &Stop{Remove: true}
	} else if r.Ended != nil || r.Status != nil && ended(r.Status.Phase) {
		spec.Stop = &Stop{}
	}
	status := podStatus(situation{
		spec: spec, obs: w.obs, old: r.Status, ended: r.Ended,
		resize: w.resize, hostIPs: w.m.HostIPs(), runtime: w.m.RuntimeName(), now: now,
	})
	told := r.Status != nil && equality.Semantic.DeepEqual(*r.Status, status)
	if told && !learned {
		return
	}
	if !told {
		w.sayBackedOff(r.Status, &status)
	}
	w.change(func(r *Record) { // both or none: one explains the other after a crash
		r.Containers = records
		if !told {
			r.Seq = nextSeq(r.Seq, now)
			r.Status = &status
		}
	})
}

// sayBackedOff reports the containers that have just begun to wait for a restart.
func (w *worker) sayBackedOff(old, status *corev1.PodStatus) {
	waits := func(c corev1.ContainerStatus) bool {
		return c.State.Waiting != nil && c.State.Waiting.Reason == reasonCrashLoop
	}
	if old == nil {
		old = &corev1.PodStatus{}
	}
	before := slices.Concat(old.InitContainerStatuses, old.ContainerStatuses)
	for _, c := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses) {
		if waits(c) && !slices.ContainsFunc(before, func(o corev1.ContainerStatus) bool {
			return o.Name == c.Name && o.RestartCount == c.RestartCount && waits(o)
		}) {
			w.event(c.Name, corev1.EventTypeWarning, "BackOff",
				fmt.Sprintf("Back-off restarting failed container %s in pod %s", c.Name, fullName(w.current)))
		}
	}
}

// nextSeq is higher than last and, as far as the clock can be trusted, than all
// that were ever used, so that a site that has lost its store is still heard.
func nextSeq(last uint64, now time.Time) uint64 {
	return max(last+1, uint64(max(now.UnixMilli(), 0)))
}

// remember keeps what the runtime may forget. It returns it as it is to be
// recorded, and whether it differs from what is.
func (w *worker) remember() (records map[string]ContainerRecord, learned bool) {
	for i := len(w.obs.Containers) - 1; i >= 0; i-- { // the latest of a name last
		c := &w.obs.Containers[i]
		m := w.obs.Memory[c.Name]
		m.Next = max(m.Next, c.Attempt+1)
		if c.State != cri.ContainerState_CONTAINER_CREATED {
			m.Begun, m.Exited = true, nil
			if c.Attempt >= m.Failure.Attempt {
				m.Failure = Failure{} // it has been started after all
			}
		}
		if c.State == cri.ContainerState_CONTAINER_EXITED {
			m.Exited = exitCode(c, m)
		}
		w.obs.Memory[c.Name] = m
	}
	records = map[string]ContainerRecord{}
	for name, m := range w.obs.Memory {
		records[name] = recordOf(m)
	}
	return records, !equality.Semantic.DeepEqual(records, w.record.Containers)
}

// probe tells the probes what runs and hears what they say of it.
func (w *worker) probe() {
	running := map[string]RunningContainer{}
	for i := range w.obs.Containers {
		c := &w.obs.Containers[i]
		if c.State == cri.ContainerState_CONTAINER_RUNNING && slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.Name == c.Name }) == i {
			running[c.Name] = RunningContainer{ID: c.ID, StartedAt: c.Started}
		}
	}
	pod := w.current
	if !w.record.StopSince.IsZero() && pod.DeletionTimestamp == nil {
		p := *pod
		p.DeletionTimestamp = new(second(w.record.StopSince))
		pod = &p
	}
	ip := ""
	if ips := w.ips(); len(ips) > 0 {
		ip = ips[0]
	}
	w.m.Probes.Sync(pod, ip, running)
	for i := range w.obs.Containers {
		c := &w.obs.Containers[i]
		c.Probe = ProbeResult{}
		if running[c.Name].ID == c.ID {
			c.Probe = w.m.Probes.Result(w.uid, c.Name, c.ID)
		}
	}
}

func (w *worker) ips() []string {
	return podIPs(w.current, w.obs, onePerFamily(w.m.HostIPs()))
}

// admitOnce refuses a new pod that the site cannot run. What has begun is never
// refused.
func (w *worker) admitOnce() {
	if w.admitted {
		return
	}
	w.m.admit.Lock()
	defer w.m.admit.Unlock()
	w.admitted = true
	w.recall()
	reason, message := "", ""
	if len(w.obs.Sandboxes) == 0 && !w.gone && w.current.DeletionTimestamp == nil && !ended(w.current.Status.Phase) {
		reason, message = w.m.refuses(w.current)
	}
	if reason != "" {
		w.event("", corev1.EventTypeWarning, reason, message)
		w.end(Ending{Reason: reason, Message: "Pod was rejected: " + message})
		return
	}
	w.change(func(*Record) {}) // having a record is having been admitted
	w.mu.Lock()
	w.holds = true
	w.mu.Unlock()
}

// recall takes from the API what a site that has lost its records had reported, so
// that what has ended or begun does not begin again.
func (w *worker) recall() {
	status := &w.current.Status
	if status.StartTime == nil {
		return
	}
	for _, c := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses, status.EphemeralContainerStatuses) {
		m := w.obs.Memory[c.Name]
		m.Begun = m.Begun || c.ContainerID != ""
		if m.Begun {
			m.Next = max(m.Next, uint32(max(c.RestartCount, 0))+1)
		}
		if t := c.State.Terminated; t != nil && m.Exited == nil && t.Reason != reasonUnknown {
			m.Exited = &t.ExitCode
		}
		w.obs.Memory[c.Name] = m
	}
	w.change(func(r *Record) { r.Status = status })
}

// event reports an event of the pod, or of one of its containers.
func (w *worker) event(container, eventType, reason, message string) {
	w.m.Sink.PodEvent(w.current, container, eventType, reason, message)
}

// digest sums up what a comparison with a listing needs.
func (o Observed) digest() string {
	var ids []string
	for _, s := range o.Sandboxes {
		ids = append(ids, fmt.Sprintf("%s:%t", s.ID, s.Ready))
	}
	for _, c := range o.Containers {
		ids = append(ids, fmt.Sprintf("%s:%d", c.ID, c.State))
	}
	slices.Sort(ids)
	return fmt.Sprint(ids)
}

// digest is what [Observed.digest] is for what was listed.
func (s *seen) digest() string {
	var ids []string
	if s != nil {
		for _, sandbox := range s.sandboxes {
			ids = append(ids, fmt.Sprintf("%s:%t", sandbox.Id, sandbox.State == cri.PodSandboxState_SANDBOX_READY))
		}
		for _, c := range s.containers {
			ids = append(ids, fmt.Sprintf("%s:%d", c.Id, c.State))
		}
	}
	slices.Sort(ids)
	return fmt.Sprint(ids)
}
