package pod

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// The runtime forgets a pod, the engine was killed, and what it had recorded of
// the container's last run is newer than what it had recorded as its status, or
// older. The phase must be that by which it acts, or the pod waits for ever.
func TestPodConvergesWhenTheRuntimeHasForgottenIt(t *testing.T) {
	const never, failure, always = corev1.RestartPolicyNever, corev1.RestartPolicyOnFailure, corev1.RestartPolicyAlways
	up := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: second(t0)}}
	end := func(code int32) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Reason: reasonError, ContainerID: "fake://c-1"}}
	}
	waits := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reasonCrashLoop}}
	again := func(c *corev1.Container) {
		c.RestartPolicy = new(corev1.ContainerRestartPolicy(never))
		c.RestartPolicyRules = []corev1.ContainerRestartRule{{
			Action:    corev1.ContainerRestartRuleActionRestart,
			ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
		}}
	}
	code := func(n int32) *int32 { return &n }
	tests := map[string]struct {
		policy corev1.RestartPolicy
		change func(*corev1.Container)
		told   corev1.ContainerState
		exited *int32
		phase  corev1.PodPhase
		starts int
		code   int32 // as shown of a container that does not run
	}{
		"succeeded, told running: succeeded":                    {failure, nil, up, code(0), corev1.PodSucceeded, 0, 0},
		"succeeded, told failed before: succeeded":              {failure, nil, end(1), code(0), corev1.PodSucceeded, 0, 0},
		"succeeded, told waiting for a restart: succeeded":      {failure, nil, waits, code(0), corev1.PodSucceeded, 0, 0},
		"succeeded, told nothing: succeeded":                    {failure, nil, corev1.ContainerState{}, code(0), corev1.PodSucceeded, 0, 0},
		"failed, told running: again":                           {failure, nil, up, code(1), corev1.PodSucceeded, 1, 0},
		"begun, told failed before: again":                      {failure, nil, end(1), nil, corev1.PodSucceeded, 1, 0},
		"begun, told running: again":                            {failure, nil, up, nil, corev1.PodSucceeded, 1, 0},
		"once, succeeded, told running: succeeded":              {never, nil, up, code(0), corev1.PodSucceeded, 0, 0},
		"once, failed, told running: failed":                    {never, nil, up, code(3), corev1.PodFailed, 0, 3},
		"once, begun, told running: failed":                     {never, nil, up, nil, corev1.PodFailed, 0, 137},
		"once, begun, told nothing: failed":                     {never, nil, corev1.ContainerState{}, nil, corev1.PodFailed, 0, 137},
		"once, out of memory, told running: failed":             {never, nil, up, code(137), corev1.PodFailed, 0, 137},
		"once or by rule, ended by rule, told running: again":   {never, again, up, code(42), corev1.PodSucceeded, 1, 0},
		"once or by rule, begun again, told ended by rule: not": {never, again, end(42), nil, corev1.PodFailed, 0, 137},
		"always, succeeded, told running: again":                {always, nil, up, code(0), corev1.PodRunning, 1, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				pod := newPod(func(p *corev1.Pod) {
					p.Spec.RestartPolicy = tt.policy
					if tt.change != nil {
						tt.change(&p.Spec.Containers[0])
					}
				})
				if tt.policy != always {
					w.rt.behaves = func(string, uint32) behaviour { return behaviour{after: time.Second} }
				}
				w.site.records["u1"] = Record{
					Namespace: pod.Namespace, Name: pod.Name, Seq: 7,
					Status: &corev1.PodStatus{
						Phase: corev1.PodRunning, StartTime: new(second(t0)),
						ContainerStatuses: []corev1.ContainerStatus{{Name: "web", State: tt.told, ContainerID: "fake://c-1", RestartCount: 1}},
					},
					Containers: map[string]ContainerRecord{"web": {Begun: true, Next: 2, Exited: tt.exited}},
				}
				w.engine(pod)
				w.sleep(time.Hour)
				s := w.status("u1")
				if n := w.rt.starts["u1/web"]; s.Phase != tt.phase || n != tt.starts {
					t.Errorf("phase %s after %d starts, want %s after %d", s.Phase, n, tt.phase, tt.starts)
				}
				c := s.ContainerStatuses[0]
				if ended(tt.phase) && (c.State.Terminated == nil || c.State.Terminated.ExitCode != tt.code) {
					t.Errorf("state = %+v, want exit code %d", c.State, tt.code)
				}
				if want := int32(1 + tt.starts); c.RestartCount != want && !(tt.starts == 0 && tt.exited == nil) {
					t.Errorf("restart count = %d, want %d", c.RestartCount, want)
				}
				w.end()
			})
		})
	}
}

// A slowProbes gives what saves records the time to do so while a status is
// being computed.
type slowProbes struct{ *fakeSite }

func (s slowProbes) Sync(pod *corev1.Pod, ip string, running map[string]RunningContainer) {
	time.Sleep(time.Second)
	s.fakeSite.Sync(pod, ip, running)
}

// A recorder checks every record that is saved.
type recorder struct {
	*fakeSite
	t *testing.T
	n int
}

func (r *recorder) Put(uid string, record Record) error {
	if record.Status != nil && len(record.Status.ContainerStatuses) == 1 {
		exited, end := record.Containers["web"].Exited, record.Status.ContainerStatuses[0].State.Terminated
		if (exited == nil) != (end == nil) {
			r.t.Errorf("recorded exit code %v beside status %+v", exited, record.Status.ContainerStatuses[0].State)
		}
		if end != nil {
			r.n++
		}
	}
	return r.fakeSite.Put(uid, record)
}

func TestExitIsRecordedTogetherWithItsStatus(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		records := &recorder{fakeSite: w.site, t: t}
		w.conf = func(c *Config) { c.Probes, c.Records = slowProbes{w.site}, records }
		w.rt.behaves = func(string, uint32) behaviour { return behaviour{after: 5 * time.Second} }
		w.engine(newPod(func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }))
		w.sleep(time.Minute)
		if s := w.status("u1"); s.Phase != corev1.PodSucceeded || records.n == 0 {
			t.Errorf("phase %s with %d records of it, want Succeeded", s.Phase, records.n)
		}
		w.end()
	})
}

// A sinkAfter checks that a final phase is in the store when it is told.
type sinkAfter struct {
	*fakeSite
	fail func(error)
}

func (s sinkAfter) PodStatus(st edge.PodStatus) error {
	s.mu.Lock()
	r := s.records[string(st.UID)]
	s.mu.Unlock()
	if ended(st.Status.Phase) && (r.Status == nil || !ended(r.Status.Phase)) {
		s.fail(fmt.Errorf("phase %s is told before it is recorded", st.Status.Phase))
	}
	return s.fakeSite.PodStatus(st)
}

func TestFinalPhaseIsRecordedBeforeItIsTold(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.conf = func(c *Config) { c.Sink = sinkAfter{w.site, func(err error) { t.Error(err) }} }
		w.rt.behaves = func(string, uint32) behaviour { return behaviour{after: time.Second} }
		w.engine(newPod(func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }))
		w.sleep(time.Minute)
		if s := w.status("u1"); s.Phase != corev1.PodSucceeded {
			t.Errorf("phase = %s, want Succeeded", s.Phase)
		}
		w.end()
	})
}

func TestExitCodeIsRememberedWhenItsContainerIsRemoved(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.behaves = func(string, uint32) behaviour { return behaviour{after: time.Second, code: 3} }
		pod := newPod(func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever })
		w.engine(pod)
		w.sleep(time.Minute)
		w.m.Set(deleted(pod, 1))
		w.sleep(time.Minute)
		exited := w.site.records["u1"].Containers["web"].Exited
		end := w.status("u1").ContainerStatuses[0].State.Terminated
		if exited == nil || *exited != 3 || end == nil || end.ExitCode != 3 || end.Reason != "Error" || end.FinishedAt.IsZero() {
			t.Errorf("remembered %v, state %+v, want exit code 3 in both", exited, end)
		}
		w.end()
	})
}
