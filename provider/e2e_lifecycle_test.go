//go:build e2e

package provider

import (
	"encoding/json"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

func patchPod(t *testing.T, namespace, name, patch string, sub ...string) {
	t.Helper()
	if _, err := admin.CoreV1().Pods(namespace).Patch(t.Context(), name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, sub...); err != nil {
		t.Fatal(err)
	}
}

func TestTrap01DeletedPodIsGoneAsSoonAsItsContainersAre(t *testing.T) {
	p := startProvider(t, "replica-1")
	f := newFakeSite("trap1")
	f.runs, f.grace = true, 200*time.Millisecond
	f.connect(t, p)
	ns := namespaceFor(t)
	createPod(t, ns, "web", "trap1")
	awaitReady(t, ns, "web")
	begun := time.Now()
	deletePod(t, ns, "web", nil) // 20 s of grace
	eventually(t, "the pod is gone", func() bool { return getPod(t, ns, "web") == nil })
	t.Logf("gone after %v", time.Since(begun))
	if d := time.Since(begun); d > 2*time.Second {
		t.Errorf("gone after %v", d)
	}
}

func TestTrap02PendingPodIsNotDeletedBeforeItsSiteHasConfirmed(t *testing.T) {
	p := startProvider(t, "replica-2")
	f := newFakeSite("trap2")
	s := f.connect(t, p)
	ns := namespaceFor(t)
	pod := createPod(t, ns, "db-0", "trap2")
	eventually(t, "the site holds the pod", func() bool { _, ok := f.has(podKey(pod)); return ok })
	waiting := corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{Name: "main", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}}}}
	f.report(edge.PodStatus{UID: pod.UID, Namespace: ns, Name: "db-0", Status: waiting})
	deletePod(t, ns, "db-0", new(int64(1)))
	eventually(t, "the site is told to stop the pod", func() bool {
		var sent corev1.Pod
		o, _ := f.has(podKey(pod))
		return o.Decode(&sent) == nil && sent.DeletionTimestamp != nil
	})
	time.Sleep(3 * time.Second) // more than its grace period
	if getPod(t, ns, "db-0") == nil {
		t.Fatal("deleted without the site's word")
	}
	if _, err := s.cloud().Report(t.Context(), edge.Report{Pods: []edge.PodStatus{{UID: pod.UID, Namespace: ns, Name: "db-0", Seq: 99, Status: waiting, Gone: true}}}); err != nil {
		t.Fatal(err)
	}
	if getPod(t, ns, "db-0") != nil {
		t.Error("still there after the site's word")
	}
}

func TestTrap03PodOfAnOfflineSiteStaysUntilTheSiteHasConfirmed(t *testing.T) {
	p := startProvider(t, "replica-3")
	f := newFakeSite("trap3")
	f.runs = true
	s := f.connect(t, p)
	ns := namespaceFor(t)
	createPod(t, ns, "db-0", "trap3")
	awaitReady(t, ns, "db-0")
	s.Close()
	eventually(t, "the site is offline", func() bool { _, err := p.Site("trap3"); return err != nil })
	deletePod(t, ns, "db-0", new(int64(1)))
	time.Sleep(4 * time.Second)
	pod := getPod(t, ns, "db-0")
	if pod == nil || pod.DeletionTimestamp == nil {
		t.Fatalf("pod = %v, want it Terminating", pod)
	}
	f.connect(t, p)
	eventually(t, "the pod is gone after the site is back", func() bool { return getPod(t, ns, "db-0") == nil })
}

func TestTrap04PodOfTheSameNameAsAForceDeletedOneReachesItsSite(t *testing.T) {
	p := startProvider(t, "replica-4")
	f := newFakeSite("trap4")
	f.runs = true
	f.connect(t, p)
	ns := namespaceFor(t)
	before := createPod(t, ns, "db-0", "trap4")
	awaitReady(t, ns, "db-0")
	deletePod(t, ns, "db-0", new(int64(0)))
	after := createPod(t, ns, "db-0", "trap4")
	awaitReady(t, ns, "db-0")
	eventually(t, "the site holds the new one only", func() bool {
		_, old := f.has(podKey(before))
		_, young := f.has(podKey(after))
		return !old && young
	})
}

func TestTrap05StatusLeavesLabelsFinalizersAndForeignConditions(t *testing.T) {
	p := startProvider(t, "replica-5")
	f := newFakeSite("trap5")
	f.runs = true
	f.connect(t, p)
	ns := namespaceFor(t)
	pod := createPod(t, ns, "web", "trap5")
	stale := awaitReady(t, ns, "web")
	patchPod(t, ns, "web", `{"metadata":{"labels":{"team":"a"},"annotations":{"note":"b"}}}`)
	patchPod(t, ns, "web", `{"status":{"conditions":[{"type":"example.com/balancer","status":"True"}]}}`, "status")
	status := runningStatus(pod)
	status.Message = "again"
	f.report(edge.PodStatus{UID: pod.UID, Namespace: ns, Name: "web", Status: status})
	check := func() {
		t.Helper()
		got := getPod(t, ns, "web")
		if got.Labels["team"] != "a" || got.Annotations["note"] != "b" {
			t.Errorf("labels = %v, annotations = %v", got.Labels, got.Annotations)
		}
		if podCondition(got.Status.Conditions, "example.com/balancer") == nil || podCondition(got.Status.Conditions, corev1.PodScheduled) == nil {
			t.Errorf("conditions = %v", got.Status.Conditions)
		}
	}
	if got := getPod(t, ns, "web"); got.Status.Message != "again" {
		t.Errorf("message = %q", got.Status.Message)
	}
	check()
	// The same if the controller writes, with a copy from before.
	stale = stale.DeepCopy()
	stale.Status.Message = "stale"
	if _, err := (guardedClient{p}).Pods(ns).UpdateStatus(t.Context(), stale, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	check()
}

func TestTrap07ReadinessGateThatOpensMakesThePodReady(t *testing.T) {
	p := startProvider(t, "replica-7")
	f := newFakeSite("trap7")
	f.runs = true
	f.connect(t, p)
	ns := namespaceFor(t)
	createPod(t, ns, "web", "trap7", func(pod *corev1.Pod) {
		pod.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}
	})
	eventually(t, "the pod runs and is not Ready for its gate", func() bool {
		pod := getPod(t, ns, "web")
		c := podCondition(pod.Status.Conditions, corev1.PodReady)
		return pod.Status.Phase == corev1.PodRunning && c != nil && c.Status == corev1.ConditionFalse && c.Reason == "ReadinessGatesNotReady"
	})
	patchPod(t, ns, "web", `{"status":{"conditions":[{"type":"example.com/gate","status":"True"}]}}`, "status")
	awaitReady(t, ns, "web")
	patchPod(t, ns, "web", `{"status":{"conditions":[{"type":"example.com/gate","status":"False"}]}}`, "status")
	eventually(t, "the pod is not Ready again", func() bool {
		return podCondition(getPod(t, ns, "web").Status.Conditions, corev1.PodReady).Status == corev1.ConditionFalse
	})
}

func TestReadyThatTheControllerManagerTookIsGivenBack(t *testing.T) {
	p := startProvider(t, "replica-ready")
	f := newFakeSite("ready-site")
	f.runs = true
	s := f.connect(t, p)
	ns := namespaceFor(t)
	createPod(t, ns, "web", "ready-site")
	awaitReady(t, ns, "web")
	s.Close()
	eventually(t, "the site is offline", func() bool { _, err := p.Site("ready-site"); return err != nil })
	patchPod(t, ns, "web", `{"status":{"conditions":[{"type":"Ready","status":"False","reason":"NodeNotReady"}]}}`, "status")
	if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "ready-site", types.StrategicMergePatchType,
		[]byte(`{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"NodeStatusUnknown"}]}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	f.connect(t, p)
	eventually(t, "the node is Ready", func() bool {
		node, err := admin.CoreV1().Nodes().Get(t.Context(), "ready-site", metav1.GetOptions{})
		return err == nil && nodeCondition(node.Status.Conditions, corev1.NodeReady).Status == corev1.ConditionTrue
	})
	if d := time.Since(begun); d > 2*time.Second {
		t.Errorf("Ready after %v", d)
	}
	awaitReady(t, ns, "web")
}

func TestTrap14DeletedNode(t *testing.T) {
	deleteNode := func(t *testing.T, name string) types.UID {
		node, err := admin.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if node.Labels[corev1.LabelNodeExcludeBalancers] != "" || node.Spec.ProviderID != "skerry://"+name {
			t.Errorf("labels = %v, providerID = %q: a cloud's controllers may take the node for theirs", node.Labels, node.Spec.ProviderID)
		}
		if err := admin.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		return node.UID
	}
	t.Run("is made again where sites cannot be revoked", func(t *testing.T) {
		p := startProvider(t, "replica-14a")
		f := newFakeSite("trap14a")
		f.connect(t, p)
		uid := deleteNode(t, "trap14a")
		eventually(t, "there is a new node and it is Ready", func() bool {
			node, err := admin.CoreV1().Nodes().Get(t.Context(), "trap14a", metav1.GetOptions{})
			if err != nil || node.UID == uid {
				return false
			}
			c := nodeCondition(node.Status.Conditions, corev1.NodeReady)
			return c != nil && c.Status == corev1.ConditionTrue
		})
	})
	t.Run("cuts the site off where they can", func(t *testing.T) {
		var revoked atomic.Pointer[string]
		p := startProvider(t, "replica-14b", func(c *Config) { c.Revoke = func(site string) { revoked.Store(&site) } })
		f := newFakeSite("trap14b")
		s := f.connect(t, p)
		deleteNode(t, "trap14b")
		select {
		case <-s.Done():
		case <-time.After(5 * time.Second):
			t.Fatal("the session goes on")
		}
		if r := revoked.Load(); r == nil || *r != "trap14b" {
			t.Errorf("revoked = %v", r)
		}
		eventually(t, "the site may join again", func() bool {
			_, err := p.Acquire(t.Context(), "trap14b")
			return err == nil
		})
		if _, err := admin.CoreV1().Nodes().Get(t.Context(), "trap14b", metav1.GetOptions{}); err != nil {
			t.Errorf("after joining again: %v", err)
		}
	})
	t.Run("cuts the site off when it connects, if nobody looked", func(t *testing.T) {
		var revoked atomic.Int32
		with := func(c *Config) { c.Revoke = func(string) { revoked.Add(1) } }
		f := newFakeSite("trap14c")
		t.Run("before", func(t *testing.T) { f.connect(t, startProvider(t, "replica-14c", with)) })
		deleteNode(t, "trap14c")
		p := startProvider(t, "replica-14d", with)
		if _, err := p.Acquire(t.Context(), "trap14c"); err == nil || revoked.Load() != 1 {
			t.Errorf("Acquire = %v, revoked %d times", err, revoked.Load())
		}
		if _, err := admin.CoreV1().Nodes().Get(t.Context(), "trap14c", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("node: %v, want none", err)
		}
	})
	t.Run("a node that only lost its label gets it back", func(t *testing.T) {
		p := startProvider(t, "replica-14e", func(c *Config) { c.Revoke = func(string) { t.Error("revoked") } })
		f := newFakeSite("trap14e")
		s := f.connect(t, p)
		if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "trap14e", types.MergePatchType, []byte(`{"metadata":{"labels":{"skerry.io/site":null}}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the label is back", func() bool {
			node, err := admin.CoreV1().Nodes().Get(t.Context(), "trap14e", metav1.GetOptions{})
			return err == nil && node.Labels[LabelSite] == "trap14e"
		})
		select {
		case <-s.Done():
			t.Error("the session has ended")
		default:
		}
	})
}

func TestTrap15NetworkUnavailableOfOthersIsTakenBack(t *testing.T) {
	p := startProvider(t, "replica-15")
	f := newFakeSite("trap15")
	f.connect(t, p)
	if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "trap15", types.StrategicMergePatchType,
		[]byte(`{"status":{"conditions":[{"type":"NetworkUnavailable","status":"True","reason":"NoRouteCreated"}]}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the condition is false", func() bool {
		node, err := admin.CoreV1().Nodes().Get(t.Context(), "trap15", metav1.GetOptions{})
		return err == nil && nodeCondition(node.Status.Conditions, corev1.NodeNetworkUnavailable).Status == corev1.ConditionFalse
	})
}

func TestPodDeletedBeforeItsSiteEverHeldItIsFinalizedByTheProvider(t *testing.T) {
	p := startProvider(t, "replica-never")
	f := newFakeSite("never")
	f.connect(t, p).Close()
	eventually(t, "the site is offline", func() bool { _, err := p.Site("never"); return err != nil })
	ns := namespaceFor(t)
	createPod(t, ns, "web", "never", func(pod *corev1.Pod) { pod.Spec.NodeName = "never" })
	deletePod(t, ns, "web", new(int64(1)))
	time.Sleep(3 * time.Second)
	if getPod(t, ns, "web") == nil {
		t.Fatal("deleted while nobody can know what the site has")
	}
	f.connect(t, p)
	eventually(t, "the pod is gone", func() bool { return getPod(t, ns, "web") == nil })
	if f.upserts(podKey(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web"}})) > 0 {
		t.Error("it was sent to the site")
	}
}

func TestSiteBelongsToTheReplicaThatAcquiredItLast(t *testing.T) {
	first, second := startProvider(t, "replica-first"), startProvider(t, "replica-second")
	f := newFakeSite("moving")
	f.runs = true
	s := f.connect(t, first)
	ns := namespaceFor(t)
	pod := createPod(t, ns, "web", "moving")
	awaitReady(t, ns, "web")
	before := first.epochs["moving"]
	next := f.connect(t, second)
	select {
	case <-s.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the first replica keeps its session")
	}
	if after := second.epochs["moving"]; after <= before {
		t.Errorf("epoch %d after %d", after, before)
	}
	time.Sleep(3500 * time.Millisecond) // the first one must not speak of a lost site
	node, err := admin.CoreV1().Nodes().Get(t.Context(), "moving", metav1.GetOptions{})
	if err != nil || nodeCondition(node.Status.Conditions, EdgeConnected).Status != corev1.ConditionTrue {
		t.Errorf("node = %v, %v", node.Status.Conditions, err)
	}
	if n := f.upserts(podKey(pod)); n > 2 {
		t.Errorf("the pod was sent %d times", n)
	}
	deletePod(t, ns, "web", nil)
	eventually(t, "the second replica ends the pod", func() bool { return getPod(t, ns, "web") == nil })
	if len(f.removed) > 0 {
		t.Errorf("removed while running: %v", f.removed)
	}
	select {
	case <-next.Done():
		t.Error("the second replica has lost its session")
	default:
	}
}

func TestEventsAreWrittenOnce(t *testing.T) {
	p := startProvider(t, "replica-events")
	f := newFakeSite("events")
	f.runs = true
	s := f.connect(t, p)
	ns := namespaceFor(t)
	pod := createPod(t, ns, "web", "events")
	awaitReady(t, ns, "web")
	at := metav1.NewTime(time.Now().Add(-time.Hour).Truncate(time.Second))
	event := edge.Event{
		Seq: 1, Type: corev1.EventTypeWarning, Reason: "BackOff", Message: "Back-off restarting \x1b[31mfailed", FirstTime: at, LastTime: at, Count: 1,
		Object: corev1.ObjectReference{Kind: "Pod", Namespace: ns, Name: "web", UID: pod.UID, FieldPath: "spec.containers{main}"},
	}
	foreign := event
	foreign.Seq, foreign.Object = 2, corev1.ObjectReference{Kind: "Pod", Namespace: "kube-system", Name: "x", UID: "y"}
	send := func(events ...edge.Event) uint64 {
		ack, err := s.cloud().Report(t.Context(), edge.Report{Events: events})
		if err != nil {
			t.Fatal(err)
		}
		return ack.Events
	}
	if got := send(event, foreign); got != 2 {
		t.Errorf("ack = %d, want 2", got)
	}
	p.link("events").eventSeq = 0 // as after a reconnect before the acknowledgement was stored
	later := event
	later.Seq, later.Count, later.LastTime = 3, 5, metav1.NewTime(at.Add(time.Minute))
	if got := send(event, later); got != 3 {
		t.Errorf("ack = %d, want 3", got)
	}
	list, err := admin.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=web,reason=BackOff"})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	e := list.Items[0]
	if e.Count != 5 || !e.FirstTimestamp.Equal(&at) || !e.LastTimestamp.Equal(&later.LastTime) || e.Source.Component != "edgelet" || e.Source.Host != "events" || e.Message != "Back-off restarting [31mfailed" {
		data, _ := json.Marshal(e)
		t.Errorf("event = %s", data)
	}
	all, err := admin.CoreV1().Events("kube-system").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=x"})
	if err != nil || len(all.Items) != 0 {
		t.Errorf("events of others' pods: %v, %v", all.Items, err)
	}
}

func TestTerminalPhaseIsNeverLeft(t *testing.T) {
	p := startProvider(t, "replica-terminal")
	f := newFakeSite("terminal")
	f.connect(t, p)
	ns := namespaceFor(t)
	pod := createPod(t, ns, "job", "terminal", func(pod *corev1.Pod) { pod.Spec.RestartPolicy = corev1.RestartPolicyNever })
	eventually(t, "the site holds the pod", func() bool { _, ok := f.has(podKey(pod)); return ok })
	f.report(edge.PodStatus{UID: pod.UID, Namespace: ns, Name: "job", Status: runningStatus(pod)})
	f.report(edge.PodStatus{UID: pod.UID, Namespace: ns, Name: "job", Status: endedStatus(pod)})
	f.report(edge.PodStatus{UID: pod.UID, Namespace: ns, Name: "job", Status: runningStatus(pod)})
	if phase := getPod(t, ns, "job").Status.Phase; phase != corev1.PodSucceeded {
		t.Errorf("phase = %s", phase)
	}
	deletePod(t, ns, "job", nil)
	eventually(t, "the site holds it no more", func() bool { _, ok := f.has(podKey(pod)); return !ok })
	if slices.Contains(f.removed, pod.UID) {
		t.Error("removed while running")
	}
}
