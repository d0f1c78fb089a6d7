package pod

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestTermination(t *testing.T) {
	hook := func(p *corev1.Pod) {
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{}}}
	}
	tests := map[string]struct {
		pod      *corev1.Pod
		deaf     bool
		hookTime time.Duration
		hookErr  error
		delete   func(w *world, pod *corev1.Pod)
		min, max time.Duration
		calls    string
		event    string
	}{
		"ends as soon as the container does":     {pod: newPod(), max: 100 * time.Millisecond, calls: "30s"},
		"deaf: killed after the grace period":    {pod: newPod(), deaf: true, min: 30 * time.Second, max: 31 * time.Second, calls: "30s"},
		"preStop counts":                         {pod: newPod(hook), deaf: true, hookTime: 20 * time.Second, min: 30 * time.Second, max: 31 * time.Second, calls: "10s"},
		"preStop uses all: two seconds are left": {pod: newPod(hook), deaf: true, hookTime: time.Hour, min: 32 * time.Second, max: 33 * time.Second, calls: "2s"},
		"preStop fails: it is said":              {pod: newPod(hook), hookErr: errFake, max: time.Second, event: "FailedPreStopHook"},
		"deleted again with less time": {pod: newPod(), deaf: true, min: 7 * time.Second, max: 8 * time.Second, calls: "2s",
			delete: func(w *world, pod *corev1.Pod) {
				w.m.Set(deleted(pod, 30))
				w.sleep(5 * time.Second)
				w.m.Set(deleted(pod, 2))
			}},
		"deleted again with more time changes nothing": {pod: newPod(), deaf: true, min: 10 * time.Second, max: 11 * time.Second, calls: "10s",
			delete: func(w *world, pod *corev1.Pod) {
				w.m.Set(deleted(pod, 10))
				w.sleep(5 * time.Second)
				w.m.Set(deleted(pod, 30))
			}},
		"forced": {pod: newPod(), deaf: true, min: 2 * time.Second, max: 3 * time.Second, calls: "2s",
			delete: func(w *world, pod *corev1.Pod) { w.m.Set(deleted(pod, 0)) }},
		"removed without having been deleted: by force": {pod: newPod(), deaf: true, min: 2 * time.Second, max: 3 * time.Second, calls: "2s",
			delete: func(w *world, pod *corev1.Pod) { w.m.Remove(pod.UID) }},
		"the engine restarts meanwhile": {pod: newPod(), deaf: true, min: 30 * time.Second, max: 31 * time.Second, calls: "20s",
			delete: func(w *world, pod *corev1.Pod) {
				d := deleted(pod, 30)
				w.m.Set(d)
				w.sleep(10 * time.Second)
				w.end()
				w.engine(d)
			}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.rt.behaves = func(string, uint32) behaviour { return behaviour{deaf: tt.deaf} }
				w.site.hookTime = tt.hookTime
				if tt.hookErr != nil {
					w.site.fails["Hook"] = tt.hookErr
				}
				w.engine(tt.pod)
				w.sleep(time.Second)
				began := time.Now()
				if tt.delete == nil {
					w.m.Set(deleted(tt.pod, 30))
				} else {
					tt.delete(w, tt.pod)
				}
				for w.sleep(0); !w.site.last("u1").Gone && !w.site.forgot("u1") && time.Since(began) < time.Hour; {
					w.sleep(10 * time.Millisecond)
				}
				if d := time.Since(began); d < tt.min || d > tt.max {
					t.Errorf("gone after %v, want %v to %v: %q", d, tt.min, tt.max, w.rt.calls)
				}
				if tt.calls != "" && !slices.ContainsFunc(w.rt.calls, func(c string) bool {
					return strings.Contains(c, "StopContainer") && strings.HasSuffix(c, " "+tt.calls)
				}) {
					t.Errorf("calls = %q, want StopContainer with %s", w.rt.calls, tt.calls)
				}
				if tt.event != "" && w.events(tt.event) == 0 {
					t.Errorf("no event %s", tt.event)
				}
				if n := w.events("Killing"); n == 0 {
					t.Errorf("no Killing event")
				}
				w.end()
			})
		})
	}
}

func TestSidecarsEndInReverseOrder(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.rt.behaves = func(string, uint32) behaviour { return behaviour{term: time.Second} }
		pod := newPod(func(p *corev1.Pod) { p.Spec.InitContainers = []corev1.Container{sidecar("s1"), sidecar("s2")} })
		w.engine(pod)
		w.sleep(time.Second)
		w.m.Set(deleted(pod, 30))
		w.sleep(10 * time.Second)
		ends := map[string]time.Time{}
		for _, c := range slices.Concat(w.status("u1").ContainerStatuses, w.status("u1").InitContainerStatuses) {
			ends[c.Name] = c.State.Terminated.FinishedAt.Time
		}
		if !ends["web"].Before(ends["s2"]) || !ends["s2"].Before(ends["s1"]) {
			t.Errorf("ends = %v, want web, s2, s1", ends)
		}
		w.end()
	})
}

func TestEviction(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		pod := newPod()
		w.engine(pod)
		w.sleep(time.Second)
		w.m.Evict("u1", "Evicted", "The node was low on resource: memory.")
		w.sleep(time.Second)
		check := func() {
			s := w.status("u1")
			if s.Phase != corev1.PodFailed || s.Reason != "Evicted" || s.ContainerStatuses[0].State.Terminated == nil ||
				condition(s, corev1.DisruptionTarget).Reason != "TerminationByKubelet" {
				t.Errorf("status = %+v, want Failed, Evicted", s)
			}
		}
		check()
		w.end()
		w.engine(pod)
		w.sleep(time.Minute)
		check()
		if n := w.rt.called("StartContainer"); n != 1 {
			t.Errorf("started %d times", n)
		}
		w.end()
	})
}

// A runtime may say that a container was killed before it says why.
func TestOutOfMemoryIsFoundOutLate(t *testing.T) {
	for _, policy := range []corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyNever} {
		try(t, func(t *testing.T, w *world) {
			w.engine(newPod(func(p *corev1.Pod) { p.Spec.RestartPolicy = policy }))
			w.sleep(time.Minute)
			w.rt.kill("web", 137)
			w.sleep(100 * time.Millisecond)
			w.rt.mu.Lock()
			w.rt.containers["c-3"].Reason = "OOMKilled"
			w.rt.mu.Unlock()
			w.sleep(time.Second)
			c := w.status("u1").ContainerStatuses[0]
			end := c.State.Terminated
			if policy == corev1.RestartPolicyAlways {
				end = c.LastTerminationState.Terminated
			}
			if end == nil || end.Reason != "OOMKilled" {
				t.Errorf("container = %+v, want OOMKilled", c)
			}
			w.end()
		})
	}
}
