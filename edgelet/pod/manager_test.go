package pod

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// try runs f in a bubble, on a world of its own.
func try(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newWorld(t)) })
}

func (w *world) waiting(container string) string {
	s := w.status("u1")
	for _, c := range slices.Concat(s.ContainerStatuses, s.InitContainerStatuses) {
		if c.Name == container && c.State.Waiting != nil {
			return c.State.Waiting.Reason
		}
	}
	return ""
}

func (w *world) events(substring string) (n int) {
	w.site.mu.Lock()
	defer w.site.mu.Unlock()
	for _, e := range w.site.events {
		if strings.Contains(e, substring) {
			n++
		}
	}
	return n
}

func TestPodLives(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.engine()
		pod := newPod()
		if err := w.m.Set(pod); err != nil {
			t.Fatal(err)
		}
		w.sleep(time.Second)
		s := w.status("u1")
		if s.Phase != corev1.PodRunning || s.PodIP != "10.0.0.7" || s.HostIP != "192.0.2.1" || s.ObservedGeneration != 3 {
			t.Errorf("status = %+v, want Running with addresses", s)
		}
		if c := s.ContainerStatuses[0]; !c.Ready || c.Started == nil || !*c.Started || c.State.Running == nil || c.ContainerID != "containerd://c-3" {
			t.Errorf("container = %+v, want ready", c)
		}
		if err := w.m.Set(deleted(pod, 30)); err != nil {
			t.Fatal(err)
		}
		w.sleep(time.Second)
		last := w.site.last("u1")
		if !last.Gone || last.Status.Phase != corev1.PodFailed || last.Status.ContainerStatuses[0].State.Terminated.ExitCode != 143 {
			t.Errorf("status = %+v, want gone, failed with 143", last)
		}
		w.m.Remove("u1")
		w.sleep(time.Second)
		if !w.site.forgot("u1") || len(w.site.records) > 0 || len(w.rt.sandboxes) > 0 || len(w.m.Pods()) > 0 {
			t.Errorf("forgotten %v, records %v, sandboxes %v, pods %v", w.site.forgotten, w.site.records, w.rt.sandboxes, w.m.Pods())
		}
		for _, dir := range []string{"/logs", "/pods"} {
			if left, _ := os.ReadDir(w.dir + dir); len(left) > 0 {
				t.Errorf("%s: %v is left", dir, left)
			}
		}
		w.end()
	})
}

func TestPodStartsWithFewCalls(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.site.slowPut = 100 * time.Millisecond // a slow disk must not be waited for
		w.engine()
		w.sleep(time.Second)
		began := time.Now()
		w.m.Set(newPod())
		for w.rt.called("ContainerStatus") == 0 {
			time.Sleep(time.Millisecond)
		}
		// Two listings, sandbox and its status, create, start and status.
		if d := time.Since(began); d > 9*time.Millisecond {
			t.Errorf("started after %v at 1 ms a call, want 7", d)
		}
		w.sleep(time.Minute)
		if n := len(w.rt.calls); n > 6 {
			t.Errorf("%d calls besides listings: %q", n, w.rt.calls)
		}
		w.end()
	})
}

func TestEngineAdoptsWhatRuns(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		pods := []*corev1.Pod{newPod(), newPod(func(p *corev1.Pod) { p.UID, p.Name = "u2", "q" })}
		w.engine(pods...)
		w.sleep(time.Second)
		w.end()
		calls, before := len(w.rt.calls), w.site.last("u1")
		w.engine(pods...)
		w.sleep(time.Minute)
		for _, c := range w.rt.calls[calls:] {
			if !strings.Contains(c, "Status") {
				t.Errorf("restarting the engine made it call %s", c)
			}
		}
		after := w.site.last("u1")
		after.Seq = before.Seq
		if fmt.Sprintf("%+v", after) != fmt.Sprintf("%+v", before) {
			t.Errorf("status changed from\n%+v to\n%+v", before, after)
		}
		w.end()
	})
}

func TestOrphansAreEndedAndForeignPodsLeftAlone(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		pod := newPod(func(p *corev1.Pod) {
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 1}}}
		})
		w.engine(pod)
		w.sleep(time.Second)
		w.end()
		clear(w.site.records) // not even a record
		foreign := &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "f", Uid: "foreign"},
			Labels: map[string]string{"io.kubernetes.pod.uid": "foreign"}}
		if _, err := w.rt.RunPodSandbox(t.Context(), foreign, ""); err != nil {
			t.Fatal(err)
		}
		w.engine()
		w.sleep(time.Minute)
		if len(w.rt.sandboxes) != 1 || len(w.rt.containers) != 0 || !w.site.forgot("u1") || len(w.site.mounted) > 0 {
			t.Errorf("sandboxes %v, containers %v, forgotten %v", w.rt.sandboxes, w.rt.containers, w.site.forgotten)
		}
		if len(w.site.hooks) != 1 {
			t.Errorf("hooks = %v, want the preStop of the orphan", w.site.hooks)
		}
		if len(w.m.Pods()) > 0 {
			t.Errorf("an orphan is shown as a pod")
		}
		w.end()
	})
}

func TestCrashLoop(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.behaves = func(string, uint32) behaviour { return behaviour{after: time.Millisecond, code: 1} }
		pod := newPod()
		w.engine(pod)
		w.sleep(5 * time.Second)
		s := w.status("u1")
		if got := w.waiting("web"); got != "CrashLoopBackOff" || s.Phase != corev1.PodRunning {
			t.Errorf("waiting for %q in phase %s, want CrashLoopBackOff, Running", got, s.Phase)
		}
		c := s.ContainerStatuses[0]
		if want := "back-off 10s restarting failed container=web pod=p_default(u1)"; c.State.Waiting.Message != want {
			t.Errorf("message = %q, want %q", c.State.Waiting.Message, want)
		}
		if c.RestartCount != 1 || c.LastTerminationState.Terminated == nil || c.LastTerminationState.Terminated.ExitCode != 1 {
			t.Errorf("container = %+v, want one restart and its last state", c)
		}
		if n := w.rt.called("StartContainer"); n != 2 {
			t.Errorf("%d starts in the first 5 s, want 2", n)
		}
		w.sleep(6 * time.Second) // 10 s
		if n := w.rt.called("StartContainer"); n != 3 {
			t.Errorf("%d starts in the first 11 s, want 3", n)
		}
		w.sleep(2 * time.Hour)
		// A restart of the engine neither forgets the count nor the back-off.
		before := w.status("u1").ContainerStatuses[0].RestartCount
		w.end()
		starts := w.rt.called("StartContainer")
		w.engine(pod)
		w.sleep(time.Second)
		if n := w.rt.called("StartContainer"); n > starts+1 || before < 25 || w.status("u1").ContainerStatuses[0].RestartCount < before {
			t.Errorf("%d starts more, %d restarts before, %d after", n-starts, before, w.status("u1").ContainerStatuses[0].RestartCount)
		}
		w.sleep(time.Hour)
		if n := w.rt.called("StartContainer") - starts; n < 11 || n > 13 {
			t.Errorf("%d restarts in an hour, want about 12", n)
		}
		if n := w.events("BackOff"); n == 0 {
			t.Errorf("no BackOff event")
		}
		w.end()
	})
}

func TestContainerRestartsAtOnceWhenItEnds(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.engine(newPod())
		w.sleep(time.Hour)
		w.rt.kill("web", 9)
		w.sleep(20 * time.Millisecond)
		if c := w.status("u1").ContainerStatuses[0]; c.State.Running == nil || c.RestartCount != 1 || c.LastTerminationState.Terminated.ExitCode != 9 {
			t.Errorf("container = %+v, want running again", c)
		}
		w.end()
	})
}

func TestStartFailures(t *testing.T) {
	tests := map[string]struct {
		method string
		err    error
		want   string
		event  string
	}{
		"image cannot be pulled": {"Ensure", reasoned{errFake, "ErrImagePull"}, "ErrImagePull", "Failed web Error: ErrImagePull"},
		"config map is missing":  {"Env", errFake, "CreateContainerConfigError", "Failed web Error: injected"},
		"mount is refused":       {"Mounts", errFake, "CreateContainerConfigError", "Failed web Error: injected"},
		"volume is missing":      {"Setup", errFake, "ContainerCreating", "FailedMount  injected"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.site.fails[tt.method] = tt.err
				w.engine(newPod())
				w.sleep(3 * time.Second)
				if got := w.waiting("web"); got != tt.want || w.status("u1").Phase != corev1.PodPending {
					t.Errorf("waiting for %q in phase %s, want %q", got, w.status("u1").Phase, tt.want)
				}
				if w.events(tt.event) == 0 {
					t.Errorf("events = %q, want %q", w.site.events, tt.event)
				}
				w.site.mu.Lock()
				delete(w.site.fails, tt.method)
				w.site.mu.Unlock()
				if tt.want == reasonConfig || tt.method == "Setup" {
					w.m.Changed("u1")
					w.sleep(50 * time.Millisecond)
				} else {
					w.sleep(30 * time.Second)
				}
				if s := w.status("u1"); s.Phase != corev1.PodRunning {
					t.Errorf("phase = %s after the fault was mended", s.Phase)
				}
				w.end()
			})
		})
	}
}

func TestRuntimeRefuses(t *testing.T) {
	for _, op := range []string{"CreateContainer", "StartContainer", "RunPodSandbox"} {
		t.Run(op, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.rt.refuse(op)
				w.engine(newPod())
				w.sleep(10 * time.Second)
				want := map[string]string{"CreateContainer": reasonCreate, "StartContainer": reasonRun, "RunPodSandbox": reasonCreating}[op]
				if got := w.waiting("web"); got != want {
					t.Errorf("waiting for %q, want %q", got, want)
				}
				if n := w.rt.called(op); n < 2 || n > 12 {
					t.Errorf("%d tries in 10 s", n)
				}
				w.rt.refuse("")
				w.sleep(40 * time.Second)
				if s := w.status("u1"); s.Phase != corev1.PodRunning || s.ContainerStatuses[0].RestartCount != 0 {
					t.Errorf("phase = %s with %d restarts, want Running with 0", s.Phase, s.ContainerStatuses[0].RestartCount)
				}
				w.end()
			})
		})
	}
}

// The record of a container that must run once is durable before it is started.
func TestMustRunOnce(t *testing.T) {
	never := newPod(func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever })
	t.Run("not started while the store refuses", func(t *testing.T) {
		try(t, func(t *testing.T, w *world) {
			w.site.fails["Put"] = errFake
			w.engine(never)
			w.sleep(time.Minute)
			if n := w.rt.called("StartContainer"); n > 0 {
				t.Errorf("started %d times without a record", n)
			}
			w.site.mu.Lock()
			delete(w.site.fails, "Put")
			w.site.mu.Unlock()
			w.sleep(time.Minute)
			if n := w.rt.called("StartContainer"); n != 1 {
				t.Errorf("started %d times, want once: %q", n, w.rt.calls)
			}
			w.end()
		})
	})
	t.Run("not again when the runtime forgets it as soon as it has started", func(t *testing.T) {
		try(t, func(t *testing.T, w *world) {
			s := &schedule{world: w}
			s.pod = never
			w.site.slowPut = 50 * time.Millisecond
			s.rt.onStart = func(uid, name string) { s.dead.Store(true) }
			s.r = newRand(1)
			s.boot(never)
			w.sleep(time.Second)
			s.crash()
			w.rt.wipe()
			s.rt.onStart = nil
			s.boot(never)
			w.sleep(time.Minute)
			if n := w.rt.starts["u1/web"]; n != 1 {
				t.Errorf("started %d times, want once", n)
			}
			st := w.status("u1")
			if end := st.ContainerStatuses[0].State.Terminated; st.Phase != corev1.PodFailed || end == nil || end.Reason != "ContainerStatusUnknown" {
				t.Errorf("status = %+v, want Failed, unknown", st)
			}
			w.end()
		})
	})
	t.Run("not again when the site has lost its store", func(t *testing.T) {
		try(t, func(t *testing.T, w *world) {
			w.engine(never)
			w.sleep(time.Second)
			w.end()
			seq := w.site.last("u1").Seq
			pod := never.DeepCopy()
			pod.Status = w.status("u1")
			clear(w.site.records)
			w.rt.wipe()
			w.engine(pod)
			w.sleep(time.Minute)
			if last := w.site.last("u1"); w.rt.starts["u1/web"] != 1 || last.Status.Phase != corev1.PodFailed || last.Seq <= seq {
				t.Errorf("started %d times, phase %s, seq %d after %d", w.rt.starts["u1/web"], last.Status.Phase, last.Seq, seq)
			}
			w.end()
		})
	})
}

func TestJobCompletes(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.behaves = func(name string, _ uint32) behaviour {
			if name == "side" {
				return behaviour{}
			}
			return behaviour{after: time.Second}
		}
		pod := newPod(func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
			p.Spec.InitContainers = []corev1.Container{ctr("prepare"), sidecar("side")}
		})
		w.engine(pod)
		w.sleep(500 * time.Millisecond)
		s := w.status("u1")
		if s.Phase != corev1.PodPending || s.ContainerStatuses[0].State.Waiting.Reason != "PodInitializing" ||
			condition(s, corev1.PodInitialized).Message != "containers with incomplete status: [prepare side]" {
			t.Errorf("status = %+v, want initializing", s)
		}
		w.sleep(10 * time.Second)
		s = w.status("u1")
		if s.Phase != corev1.PodSucceeded || condition(s, corev1.PodReady).Reason != "PodCompleted" || condition(s, corev1.PodInitialized).Status != "True" {
			t.Errorf("status = %+v, want Succeeded", s)
		}
		if len(w.site.mounted) > 0 || w.rt.called("RemovePodSandbox") > 0 {
			t.Errorf("volumes %v, want none; the sandbox stays for its logs", w.site.mounted)
		}
		w.sleep(time.Hour)
		if s := w.status("u1"); s.Phase != corev1.PodSucceeded {
			t.Errorf("phase = %s an hour later", s.Phase)
		}
		w.end()
	})
}

func condition(s corev1.PodStatus, t corev1.PodConditionType) corev1.PodCondition {
	for _, c := range s.Conditions {
		if c.Type == t {
			return c
		}
	}
	return corev1.PodCondition{}
}

func TestDeletionInterruptsStart(t *testing.T) {
	for _, what := range []string{"pull", "postStart"} {
		t.Run(what, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				pod := newPod()
				if what == "pull" {
					w.site.pulls = time.Hour
				} else {
					w.site.hookTime = time.Hour
					pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{}}}
				}
				w.engine(pod)
				w.sleep(time.Minute)
				if what == "pull" && w.waiting("web") != "ContainerCreating" {
					t.Errorf("waiting for %q", w.waiting("web"))
				}
				w.m.Set(deleted(pod, 30))
				w.sleep(time.Second)
				if !w.site.last("u1").Gone {
					t.Errorf("not gone a second after deletion: %q", w.rt.calls)
				}
				w.end()
			})
		})
	}
}

func TestSlowPodDoesNotHoldUpAnother(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.site.pulls = time.Hour
		w.engine(newPod())
		w.sleep(time.Second)
		w.site.pulls = 0
		w.m.Set(newPod(func(p *corev1.Pod) { p.UID, p.Name = "u2", "q" }))
		w.sleep(time.Second)
		if s := w.status("u2"); s.Phase != corev1.PodRunning {
			t.Errorf("phase = %s while another pod pulls", s.Phase)
		}
		w.end()
	})
}

func TestPostStartFailureKillsContainer(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.site.fails["Hook"] = errors.New("secret text")
		w.engine(newPod(func(p *corev1.Pod) {
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{}}}
		}))
		w.sleep(5 * time.Second)
		if w.events("FailedPostStartHook web PostStartHook failed") == 0 || w.events("secret") > 0 {
			t.Errorf("events = %q", w.site.events)
		}
		if got := w.waiting("web"); got != "PostStartHookError" && got != "CrashLoopBackOff" {
			t.Errorf("waiting for %q", got)
		}
		w.end()
	})
}

func TestProbes(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.site.probes["web"] = ProbeResult{}
		w.engine(newPod())
		w.sleep(time.Second)
		s := w.status("u1")
		if c := s.ContainerStatuses[0]; c.Ready || *c.Started || s.Phase != corev1.PodRunning || condition(s, corev1.PodReady).Reason != "ContainersNotReady" {
			t.Errorf("status = %+v, want running, not ready", s)
		}
		w.site.mu.Lock()
		w.site.probes["web"] = ProbeResult{Started: true, Ready: true}
		w.site.mu.Unlock()
		w.m.Changed("u1")
		w.sleep(10 * time.Millisecond)
		s = w.status("u1")
		if c := condition(s, corev1.PodReady); c.Status != corev1.ConditionTrue || !s.ContainerStatuses[0].Ready {
			t.Errorf("status = %+v, want ready", s)
		}
		w.site.mu.Lock()
		w.site.probes = map[string]ProbeResult{"c-3": {Started: true, Ready: true, Unhealthy: "liveness"}}
		w.site.mu.Unlock()
		w.m.Changed("u1")
		w.sleep(time.Second)
		if c := w.status("u1").ContainerStatuses[0]; c.RestartCount != 1 || !c.Ready || w.events("Killing web Container web failed liveness probe, will be restarted") != 1 {
			t.Errorf("container = %+v, want restarted; events %q", c, w.site.events)
		}
		w.end()
	})
}

func TestReboot(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		pod := newPod(func(p *corev1.Pod) { p.Spec.InitContainers = []corev1.Container{ctr("prepare")} })
		w.rt.behaves = func(name string, _ uint32) behaviour {
			if name == "prepare" {
				return behaviour{after: time.Second}
			}
			return behaviour{}
		}
		w.engine(pod)
		w.sleep(5 * time.Second)
		w.end()
		w.rt.reboot()
		w.engine(pod)
		w.sleep(5 * time.Second)
		s := w.status("u1")
		if s.Phase != corev1.PodRunning || s.ContainerStatuses[0].RestartCount != 1 || s.InitContainerStatuses[0].RestartCount != 1 || w.events("SandboxChanged") != 1 {
			t.Errorf("status = %+v, want running again, restarted once", s)
		}
		w.end()
	})
}

func TestActiveDeadline(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		pod := newPod(func(p *corev1.Pod) { p.Spec.ActiveDeadlineSeconds = new(int64(60)) })
		w.engine(pod)
		w.sleep(30 * time.Second)
		w.end()
		w.engine(pod)
		w.sleep(29 * time.Second)
		if s := w.status("u1"); s.Phase != corev1.PodRunning {
			t.Errorf("phase = %s before the deadline", s.Phase)
		}
		w.sleep(2 * time.Second)
		s := w.status("u1")
		if s.Phase != corev1.PodFailed || s.Reason != "DeadlineExceeded" || s.ContainerStatuses[0].State.Terminated == nil || w.events("DeadlineExceeded") != 1 {
			t.Errorf("status = %+v, want Failed, DeadlineExceeded", s)
		}
		w.end()
	})
}

func TestEphemeralContainer(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.behaves = func(name string, _ uint32) behaviour {
			if name == "debug" {
				return behaviour{after: time.Minute, code: 3}
			}
			return behaviour{}
		}
		w.engine(newPod())
		w.sleep(time.Second)
		pod := newPod(func(p *corev1.Pod) {
			p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{
				EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "busybox"}, TargetContainerName: "web"}}
		})
		w.m.Set(pod)
		w.sleep(time.Second)
		if s := w.status("u1").EphemeralContainerStatuses; len(s) != 1 || s[0].State.Running == nil {
			t.Errorf("statuses = %+v, want running", s)
		}
		for _, config := range w.rt.configs {
			if o := config.Linux.SecurityContext.NamespaceOptions; config.Metadata.Name == "debug" && (o.Pid != cri.NamespaceMode_TARGET || o.TargetId != "c-3") {
				t.Errorf("namespaces = %v, want those of c-3", o)
			}
		}
		w.sleep(time.Hour)
		if n := w.rt.starts["u1/debug"]; n != 1 || w.status("u1").EphemeralContainerStatuses[0].State.Terminated.ExitCode != 3 {
			t.Errorf("started %d times", n)
		}
		w.end()
	})
}

func TestOneBurstIsFewListings(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		var pods []*corev1.Pod
		for i := range 20 {
			pods = append(pods, newPod(func(p *corev1.Pod) { p.UID, p.Name = types.UID(fmt.Sprintf("u%d", i)), fmt.Sprintf("p%d", i) }))
		}
		w.engine(pods...)
		w.sleep(5 * time.Second)
		if n := w.rt.listed(); n > 30 {
			t.Errorf("%d listings for 20 pods", n)
		}
		before := w.rt.listed()
		w.sleep(time.Hour)
		if n := w.rt.listed() - before; n > 370 {
			t.Errorf("%d listings in an idle hour, want about 360", n)
		}
		if n := len(w.rt.calls); n != 20*5 {
			t.Errorf("%d other calls, want 5 a pod", n)
		}
		w.end()
	})
}

func TestChangesAreNoticedWithoutEvents(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.mute = true
		w.engine(newPod())
		w.sleep(time.Minute)
		w.rt.kill("web", 1)
		w.sleep(11 * time.Second)
		if c := w.status("u1").ContainerStatuses[0]; c.RestartCount != 1 || c.State.Running == nil {
			t.Errorf("container = %+v, want restarted", c)
		}
		w.end()
	})
}
