package pod

import (
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// Crash back-off: 10 s after the second exit, doubled with each up to 300 s,
// forgotten when a run has lasted 10 min longer than the back-off was set.
const (
	backoffBase   = 10 * time.Second
	backoffLimit  = 300 * time.Second
	backoffForget = 10 * time.Minute
)

// A Record is what is kept of a pod across restarts of the edgelet and of the
// machine. Having one means that the pod was admitted, or refused for ever.
type Record struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`

	Seq    uint64            `json:"seq,omitempty"`    // of the last status
	Status *corev1.PodStatus `json:"status,omitempty"` // the last status
	Gone   bool              `json:"gone,omitempty"`   // nothing is left of the pod, and that was said

	// Ended is how the pod has ended, or been told to, before its containers
	// did: its phase is Failed then, for ever.
	Ended *Ending `json:"ended,omitempty"`

	Containers map[string]ContainerRecord `json:"containers,omitempty"`

	StopSince time.Time     `json:"stopSince,omitzero"` // when termination began
	StopGrace time.Duration `json:"stopGrace,omitempty"`

	// Removed is the pod when it was no longer desired. It is kept here because
	// by then the desired set has forgotten it.
	Removed *corev1.Pod `json:"removed,omitempty"`
}

// An Ending is why a pod has failed as a whole.
type Ending struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`

	Disruption bool `json:"disruption,omitempty"` // the machine's doing, not the pod's
}

// A ContainerRecord is what is kept of one container.
type ContainerRecord struct {
	Begun   bool          `json:"begun,omitempty"`  // StartContainer may have been called
	Next    uint32        `json:"next,omitempty"`   // number of the next run
	Exited  *int32        `json:"exited,omitempty"` // exit code of the last run
	Backoff time.Duration `json:"backoff,omitempty"`
	Backed  metav1.Time   `json:"backed,omitzero"`
	Key     string        `json:"key,omitempty"`

	Allocated *corev1.ResourceRequirements `json:"allocated,omitempty"`
	Applied   *corev1.ResourceRequirements `json:"applied,omitempty"`
}

// recordOf is what is kept of m.
func recordOf(m Memory) ContainerRecord {
	return ContainerRecord{
		Begun: m.Begun, Next: m.Next, Exited: m.Exited, Backoff: m.Backoff, Backed: metav1.NewTime(m.Backed), Key: m.Key,
		Allocated: m.Allocated, Applied: m.Applied,
	}
}

// memory is what r remembers.
func (r ContainerRecord) memory() Memory {
	return Memory{
		Begun: r.Begun, Next: r.Next, Exited: r.Exited, Backoff: r.Backoff, Backed: r.Backed.Time, Key: r.Key,
		Allocated: r.Allocated, Applied: r.Applied,
	}
}

// restarts reports whether c is to run again after it ended with code; nil is an
// end that nobody saw.
func restarts(pod *corev1.Pod, c *corev1.Container, code *int32) bool {
	if code != nil {
		for _, rule := range c.RestartPolicyRules {
			if rule.Action == corev1.ContainerRestartRuleActionRestart && ruleMatches(rule, *code) {
				return true
			}
		}
	}
	switch policy(pod, c) {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return code == nil || *code != 0
	}
	return true
}

func ruleMatches(rule corev1.ContainerRestartRule, code int32) bool {
	if rule.ExitCodes == nil {
		return false
	}
	in := false
	for _, v := range rule.ExitCodes.Values {
		in = in || v == code
	}
	switch rule.ExitCodes.Operator {
	case corev1.ContainerRestartRuleOnExitCodesOpIn:
		return in
	case corev1.ContainerRestartRuleOnExitCodesOpNotIn:
		return !in
	}
	return false
}

// policy is the restart policy of one container. An init container that must
// end runs again only if it failed.
func policy(pod *corev1.Pod, c *corev1.Container) corev1.RestartPolicy {
	if c.RestartPolicy != nil {
		return corev1.RestartPolicy(*c.RestartPolicy)
	}
	if pod.Spec.RestartPolicy == "" {
		return corev1.RestartPolicyAlways
	}
	return pod.Spec.RestartPolicy
}

// restartsAtAll reports whether c is to run again after it was killed for a
// failed probe. Rules speak of exit codes, which that is not.
func restartsAtAll(pod *corev1.Pod, c *corev1.Container) bool {
	return policy(pod, c) != corev1.RestartPolicyNever
}

// atMostOnce reports whether c must not run again unless it was seen to end with
// an exit code that says so.
func atMostOnce(pod *corev1.Pod, c *corev1.Container) bool {
	return policy(pod, c) == corev1.RestartPolicyNever
}

// exitCode is the exit code of a container's last run, nil if nobody knows.
func exitCode(last *Container, memory Memory) *int32 {
	switch {
	case last == nil:
		return memory.Exited
	case last.Finished.IsZero():
		return nil
	case last.ExitCode == 0 && last.Reason == reasonOOMKilled:
		return new(int32(137))
	}
	return new(last.ExitCode) // a copy: it is remembered when last has been overwritten
}

// backoffKey changes when the back-off of a container must start afresh.
func backoffKey(c *corev1.Container) string { return c.Image }

// crashBackoff is how long c must wait after its last run finished.
func crashBackoff(m Memory, c *corev1.Container, finished time.Time) time.Duration {
	if m.Key != backoffKey(c) || finished.Sub(m.Backed) > backoffForget {
		return 0
	}
	return m.Backoff
}

// backedOff returns m with the back-off that the run after next must wait.
func backedOff(m Memory, c *corev1.Container, finished, now time.Time) Memory {
	next := min(2*crashBackoff(m, c, finished), backoffLimit)
	m.Backoff, m.Backed, m.Key = max(next, backoffBase), now, backoffKey(c)
	return m
}

func podGrace(pod *corev1.Pod) time.Duration {
	if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
		return time.Duration(max(*g, 1)) * time.Second
	}
	return 30 * time.Second
}

// change edits the record and sees to it that it is saved soon.
func (w *worker) change(edit func(*Record)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.record.Namespace, w.record.Name = w.current.Namespace, w.current.Name
	edit(&w.record)
	w.dirty = true
	w.saveSoon()
}

// saveSoon starts what saves the record, unless it runs. The caller holds w.mu.
func (w *worker) saveSoon() {
	if w.saving {
		return
	}
	w.saving = true
	ctx := w.m.ctx
	w.m.wg.Go(func() {
		for n := 0; ; n++ {
			if err := w.save(); err != nil {
				w.m.Log.Error("pod record cannot be saved", "uid", w.uid, "err", err)
				if backoff.Sleep(ctx, retryLeast+backoff.Delay(n, retryBase, retryLimit)) == nil {
					continue
				}
			}
			w.mu.Lock()
			if !w.dirty || ctx.Err() != nil {
				w.saving = false
				w.mu.Unlock()
				return
			}
			w.mu.Unlock()
		}
	})
}

// save writes the record if it has changed, and sends the status if that has.
// When it returns nil, what was changed before the call is durable.
func (w *worker) save() error {
	w.write <- struct{}{}
	defer func() { <-w.write }()
	w.mu.Lock()
	record, dirty := w.record, w.dirty
	w.dirty = false
	w.mu.Unlock()
	if !dirty {
		return nil
	}
	put := func() error {
		if err := w.m.Records.Put(string(w.uid), record); err != nil {
			return fmt.Errorf("save record: %w", err)
		}
		return nil
	}
	// What could not be found out again must be in the store before it is told;
	// all else is told first, because somebody waits for it.
	steps := []func() error{func() error { return w.send(record) }, put}
	if record.Ended != nil || record.Gone || record.Status != nil && ended(record.Status.Phase) {
		slices.Reverse(steps)
	}
	err := errors.Join(steps[0](), steps[1]())
	if err != nil {
		w.mu.Lock()
		w.dirty = true
		w.mu.Unlock()
	}
	return err
}

// send reports the status of record unless that has been done.
func (w *worker) send(record Record) error {
	if record.Status == nil || record.Seq <= w.sent {
		return nil
	}
	err := w.m.Sink.PodStatus(edge.PodStatus{
		UID: w.uid, Namespace: record.Namespace, Name: record.Name,
		Seq: record.Seq, Status: *record.Status, Gone: record.Gone,
	})
	if err != nil {
		return fmt.Errorf("report status: %w", err)
	}
	w.sent = record.Seq
	return nil
}

// saveGone says that nothing is left of the pod, once.
func (w *worker) saveGone() {
	if w.record.Gone {
		w.mu.Lock()
		if w.dirty {
			w.saveSoon()
		}
		w.mu.Unlock()
		return
	}
	w.change(func(r *Record) {
		r.Gone = true
		r.Seq = nextSeq(r.Seq, time.Now())
	})
}

// leave forgets a pod that is gone and not desired. It reports whether it has.
func (w *worker) leave() bool {
	w.write <- struct{}{} // nothing is saved from here on
	defer func() { <-w.write }()
	w.m.mu.Lock()
	w.mu.Lock()
	left := w.removed
	if left {
		w.dirty = false
		delete(w.m.workers, w.uid)
	}
	w.mu.Unlock()
	w.m.mu.Unlock()
	if !left {
		return false
	}
	if err := w.m.Records.Delete(string(w.uid)); err != nil {
		// The next start of the edgelet finds it and ends here again.
		w.log().Error("pod record cannot be deleted", "err", err)
	}
	w.m.Sink.PodForgotten(w.uid)
	return true
}
