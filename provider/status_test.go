package provider

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var t0 = metav1.NewTime(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC))

func condition(kind corev1.PodConditionType, status corev1.ConditionStatus) corev1.PodCondition {
	return corev1.PodCondition{Type: kind, Status: status, LastTransitionTime: t0}
}

func TestMergeStatus(t *testing.T) {
	pod := func(change ...func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main"}}}}
		p.Status.Phase, p.Status.QOSClass = corev1.PodRunning, corev1.PodQOSBurstable
		for _, c := range change {
			c(p)
		}
		return p
	}
	container := func(restarts int32) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: "main", RestartCount: restarts, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: t0}}}
	}
	ended := corev1.ContainerStatus{Name: "main", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
	tests := map[string]struct {
		pod      *corev1.Pod
		reported corev1.PodStatus
		check    func(s corev1.PodStatus) bool
	}{
		"a terminal phase is not left": {
			pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), corev1.PodStatus{Phase: corev1.PodRunning},
			func(s corev1.PodStatus) bool { return s.Phase == corev1.PodFailed },
		},
		"failed does not become succeeded": {
			pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), corev1.PodStatus{Phase: corev1.PodSucceeded},
			func(s corev1.PodStatus) bool { return s.Phase == corev1.PodFailed },
		},
		"running does not become pending": {
			pod(), corev1.PodStatus{Phase: corev1.PodPending},
			func(s corev1.PodStatus) bool { return s.Phase == corev1.PodRunning },
		},
		"a phase that does not exist is ignored": {
			pod(), corev1.PodStatus{Phase: "Flying"},
			func(s corev1.PodStatus) bool { return s.Phase == corev1.PodRunning },
		},
		"a restart count does not decrease": {
			pod(func(p *corev1.Pod) { p.Status.ContainerStatuses = []corev1.ContainerStatus{container(5)} }),
			corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{container(2)}},
			func(s corev1.PodStatus) bool { return s.ContainerStatuses[0].RestartCount == 5 },
		},
		"a container that has ended for good does not run again": {
			pod(func(p *corev1.Pod) {
				p.Spec.RestartPolicy, p.Status.ContainerStatuses = corev1.RestartPolicyNever, []corev1.ContainerStatus{ended}
			}), corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{container(0)}},
			func(s corev1.PodStatus) bool { return s.ContainerStatuses[0].State.Terminated != nil },
		},
		"one that may restart does": {
			pod(func(p *corev1.Pod) { p.Status.ContainerStatuses = []corev1.ContainerStatus{ended} }),
			corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{container(1)}},
			func(s corev1.PodStatus) bool { return s.ContainerStatuses[0].State.Running != nil },
		},
		"containers that the spec does not name are dropped": {
			pod(), corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "miner"}, container(0), container(1)}},
			func(s corev1.PodStatus) bool {
				return len(s.ContainerStatuses) == 1 && s.ContainerStatuses[0].Name == "main"
			},
		},
		"conditions of others stay and cannot be set": {
			pod(func(p *corev1.Pod) {
				p.Status.Conditions = []corev1.PodCondition{condition("example.com/a", corev1.ConditionTrue), condition(corev1.PodScheduled, corev1.ConditionTrue), condition(corev1.PodReady, corev1.ConditionFalse)}
			}),
			corev1.PodStatus{Conditions: []corev1.PodCondition{condition("example.com/a", corev1.ConditionFalse), condition("example.com/b", corev1.ConditionTrue), condition(corev1.PodScheduled, corev1.ConditionFalse), condition(corev1.ContainersReady, corev1.ConditionTrue)}},
			func(s corev1.PodStatus) bool {
				return len(s.Conditions) == 4 && podCondition(s.Conditions, "example.com/a").Status == corev1.ConditionTrue &&
					podCondition(s.Conditions, corev1.PodScheduled).Status == corev1.ConditionTrue && podCondition(s.Conditions, corev1.PodReady).Status == corev1.ConditionTrue
			},
		},
		"an eviction by the site is told": {
			pod(), corev1.PodStatus{Conditions: []corev1.PodCondition{condition(corev1.DisruptionTarget, corev1.ConditionTrue)}},
			func(s corev1.PodStatus) bool { return podCondition(s.Conditions, corev1.DisruptionTarget) != nil },
		},
		"a closed readiness gate keeps Ready false": {
			pod(func(p *corev1.Pod) {
				p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}
			}),
			corev1.PodStatus{Conditions: []corev1.PodCondition{condition(corev1.ContainersReady, corev1.ConditionTrue), condition(corev1.PodReady, corev1.ConditionTrue)}},
			func(s corev1.PodStatus) bool {
				c := podCondition(s.Conditions, corev1.PodReady)
				return c.Status == corev1.ConditionFalse && strings.Contains(c.Message, "example.com/gate")
			},
		},
		"what is not a site's to write stays": {
			pod(func(p *corev1.Pod) { p.Status.NominatedNodeName, p.Status.StartTime = "n", &t0 }),
			corev1.PodStatus{QOSClass: corev1.PodQOSGuaranteed, NominatedNodeName: "other", StartTime: &metav1.Time{}, ResourceClaimStatuses: []corev1.PodResourceClaimStatus{{Name: "x"}}},
			func(s corev1.PodStatus) bool {
				return s.QOSClass == corev1.PodQOSBurstable && s.NominatedNodeName == "n" && s.StartTime.Equal(&t0) && s.ResourceClaimStatuses == nil
			},
		},
		"text is cleaned and cut": {
			pod(), corev1.PodStatus{Message: "a\x1b[2J\u202eb\u009bc" + strings.Repeat("ä", maxText), ContainerStatuses: []corev1.ContainerStatus{{Name: "main", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Message: "x\x07y"}}}}},
			func(s corev1.PodStatus) bool {
				return strings.HasPrefix(s.Message, "a[2Jbcä") && len(s.Message) <= maxText && utf8.ValidString(s.Message) && s.ContainerStatuses[0].State.Waiting.Message == "xy"
			},
		},
		"what is no address is dropped": {
			pod(), corev1.PodStatus{PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "evil"}, {IP: "fd00::1"}}, HostIP: "x"},
			func(s corev1.PodStatus) bool { return s.PodIP == "10.0.0.1" && len(s.PodIPs) == 2 && s.HostIP == "" },
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := mergeStatus(tt.pod, tt.reported); !tt.check(got) {
				data, _ := json.MarshalIndent(got, "", " ")
				t.Errorf("status = %s", data)
			}
		})
	}
}

// Whatever a site reports, what it may not change does not, and reporting it
// twice is as good as once.
func FuzzMergeStatus(f *testing.F) {
	status, _ := json.Marshal(runningStatus(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main"}}}}))
	f.Add(status, true)
	f.Add([]byte(`{"phase":"Pending","conditions":[{"type":"Ready","status":"True"},{"type":"x/y","status":"True"}],"containerStatuses":[{"name":"main","restartCount":-1}]}`), false)
	f.Fuzz(func(t *testing.T, data []byte, over bool) {
		var reported corev1.PodStatus
		if json.Unmarshal(data, &reported) != nil {
			return
		}
		pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main"}}}}
		pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{condition("x/y", corev1.ConditionFalse)}, ContainerStatuses: []corev1.ContainerStatus{{Name: "main", RestartCount: 3}}}
		if over {
			pod.Status.Phase = corev1.PodSucceeded
		}
		next := mergeStatus(pod, reported)
		if over && next.Phase != corev1.PodSucceeded || next.Phase == corev1.PodPending {
			t.Errorf("phase = %s", next.Phase)
		}
		if c := podCondition(next.Conditions, "x/y"); c == nil || c.Status != corev1.ConditionFalse {
			t.Errorf("foreign condition = %v", c)
		}
		if len(next.ContainerStatuses) != 1 || next.ContainerStatuses[0].RestartCount < 3 {
			t.Errorf("containers = %v", next.ContainerStatuses)
		}
		if strings.ContainsFunc(next.Message+next.Reason, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
			t.Errorf("message = %q", next.Message)
		}
		pod.Status = next
		patch, err := statusPatch(pod, mergeStatus(pod, reported))
		if err != nil || patch != nil {
			t.Errorf("reported again: %s, %v", patch, err)
		}
	})
}

func FuzzClean(f *testing.F) {
	f.Add("plain", 3)
	f.Add("\x1b]0;title\x07\u202e\xff", 4)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit = max(0, limit%1000)
		got := clean(s, limit)
		if len(got) > limit || !utf8.ValidString(got) || clean(got, limit) != got || strings.ContainsAny(got, "\x1b\x07\u202e\u009b") {
			t.Errorf("clean(%q, %d) = %q", s, limit, got)
		}
	})
}

func TestStatusPatchIsForOnePodAtOneVersionOnly(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u1", ResourceVersion: "7"}}
	patch, err := statusPatch(pod, corev1.PodStatus{Phase: corev1.PodRunning})
	if want := `{"metadata":{"uid":"u1","resourceVersion":"7"},"status":{"phase":"Running"}}`; err != nil || string(patch) != want {
		t.Errorf("patch = %s, %v, want %s", patch, err, want)
	}
}
