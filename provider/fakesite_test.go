package provider

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

// A fakeSite is an edgelet in memory: it keeps what is applied, and says what a
// test has it say. Its sessions are direct calls.
type fakeSite struct {
	name string

	mu      sync.Mutex
	held    map[edge.Key]edge.Object
	applied []edge.Changes
	seq     uint64
	asks    int   // for its inventory
	refuse  error // of Apply, if set
	lose    bool  // the next Apply arrives, but its answer does not
	session *fakeSession
	ran     map[types.UID]int  // how often each pod was started
	runs    bool               // pods run at once, and stop when they are told to
	grace   time.Duration      // that stopping takes
	removed []types.UID        // pods that were removed while they ran
	running map[types.UID]bool // pods that run
	work    sync.WaitGroup
}

func newFakeSite(name string) *fakeSite {
	return &fakeSite{name: name, held: map[edge.Key]edge.Object{}, ran: map[types.UID]int{}, running: map[types.UID]bool{}}
}

func (f *fakeSite) Inventory(context.Context) ([]edge.Held, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asks++
	var held []edge.Held
	for key, o := range f.held {
		held = append(held, edge.Held{Key: key, Version: o.Version})
	}
	slices.SortFunc(held, func(a, b edge.Held) int { return cmp.Compare(a.Key.String(), b.Key.String()) })
	return held, nil
}

// asked counts how often the site was asked for its inventory.
func (f *fakeSite) asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asks
}

// completed counts how often the site was told that it holds all that it should.
func (f *fakeSite) completed() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.applied {
		if c.Complete {
			n++
		}
	}
	return n
}

func (f *fakeSite) Apply(_ context.Context, c edge.Changes) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return f.refuse
	}
	f.applied = append(f.applied, c)
	for _, o := range c.Upserts {
		f.held[o.Key] = o
		if o.Kind == edge.KindPod && f.runs {
			f.drive(o)
		}
	}
	for _, key := range c.Removals {
		delete(f.held, key)
		if f.running[key.UID] {
			f.removed = append(f.removed, key.UID)
			delete(f.running, key.UID)
		}
	}
	if f.lose {
		f.lose = false
		return errors.New("connection lost")
	}
	return nil
}

// drive does what an edgelet would with a pod. f.mu is held.
func (f *fakeSite) drive(o edge.Object) {
	var pod corev1.Pod
	if err := o.Decode(&pod); err != nil {
		return
	}
	f.work.Go(func() {
		if pod.DeletionTimestamp == nil {
			f.mu.Lock()
			started := f.running[pod.UID]
			if !started {
				f.ran[pod.UID]++
			}
			f.running[pod.UID] = true
			f.mu.Unlock()
			if !started {
				f.report(edge.PodStatus{UID: pod.UID, Namespace: pod.Namespace, Name: pod.Name, Status: runningStatus(&pod)})
			}
			return
		}
		time.Sleep(f.grace)
		f.mu.Lock()
		delete(f.running, pod.UID)
		f.mu.Unlock()
		f.report(edge.PodStatus{UID: pod.UID, Namespace: pod.Namespace, Name: pod.Name, Status: endedStatus(&pod), Gone: true})
	})
}

// report reports until it is acknowledged or the session ends.
func (f *fakeSite) report(s edge.PodStatus) {
	f.mu.Lock()
	f.seq++
	s.Seq = f.seq
	f.mu.Unlock()
	for {
		f.mu.Lock()
		session := f.session
		f.mu.Unlock()
		if session == nil {
			return
		}
		ack, err := session.cloud().Report(context.Background(), edge.Report{Pods: []edge.PodStatus{s}})
		if err == nil && ack.Pods[s.UID] >= s.Seq {
			return
		}
		select {
		case <-session.done:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// connect makes a session with p and reports the node.
func (f *fakeSite) connect(t *testing.T, p *Provider) *fakeSession {
	t.Helper()
	if _, err := p.Acquire(t.Context(), f.name); err != nil {
		t.Fatalf("Acquire: %v", err)
	}
	s := f.dial(t, p)
	ack, err := s.cloud().Report(t.Context(), edge.Report{Node: fakeNode()})
	if err != nil || ack.Node != 1 {
		t.Fatalf("Report of node = %+v, %v", ack, err)
	}
	return s
}

// dial makes a session with p, and has it ended when the test ends.
func (f *fakeSite) dial(t *testing.T, p *Provider) *fakeSession {
	mux := http.NewServeMux()
	edge.HandleEdge(mux, f)
	s := &fakeSession{peer: f.name, edge: mux, done: make(chan struct{}), serving: make(chan struct{})}
	f.mu.Lock()
	f.session = s
	f.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.Serve(context.WithoutCancel(t.Context()), s)
	}()
	t.Cleanup(func() {
		s.Close()
		<-ended
		f.work.Wait()
	})
	return s
}

func (f *fakeSite) has(key edge.Key) (edge.Object, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o, ok := f.held[key]
	return o, ok
}

// upserts counts how often an object was sent.
func (f *fakeSite) upserts(key edge.Key) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.applied {
		for _, o := range c.Upserts {
			if o.Key == key {
				n++
			}
		}
	}
	return n
}

func fakeNode() *edge.NodeStatus {
	resources := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi"), corev1.ResourcePods: resource.MustParse("110")}
	return &edge.NodeStatus{
		Seq: 1, Capacity: resources, Allocatable: resources,
		Info:       corev1.NodeSystemInfo{OperatingSystem: "linux", Architecture: "arm64", OSImage: "Debian", ContainerRuntimeVersion: "containerd://2.0"},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "EdgeletReady"}},
		Labels:     map[string]string{"rack": "7", "kubernetes.io/arch": "forged"},
	}
}

// A fakeSession is both ends of a session.
type fakeSession struct {
	peer    string
	edge    http.Handler
	once    sync.Once
	begin   sync.Once
	done    chan struct{}
	serving chan struct{}
	handler http.Handler // set before serving is closed
}

func (s *fakeSession) Peer() string          { return s.peer }
func (s *fakeSession) Done() <-chan struct{} { return s.done }
func (s *fakeSession) Close() error          { s.once.Do(func() { close(s.done) }); return nil }

func (s *fakeSession) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case <-s.done:
		return nil, errors.New("session is down")
	default:
	}
	return direct{s.edge}.RoundTrip(r)
}

func (s *fakeSession) Serve(ctx context.Context, h http.Handler) error {
	s.begin.Do(func() { s.handler = h; close(s.serving) })
	select {
	case <-ctx.Done():
		s.Close()
		return context.Cause(ctx)
	case <-s.done:
		return errors.New("session is down")
	}
}

// cloud is the site's view of the provider.
func (s *fakeSession) cloud() edge.Cloud {
	select {
	case <-s.serving:
		return edge.NewCloudClient(direct{s.handler})
	case <-s.done:
		return edge.NewCloudClient(direct{http.NotFoundHandler()})
	}
}

// direct calls a handler as if it were far away.
type direct struct{ handler http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil {
		r.Body = http.NoBody
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.Body = io.NopCloser(bytes.NewReader(body))
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

func runningStatus(pod *corev1.Pod) corev1.PodStatus {
	now := metav1.Now().Rfc3339Copy()
	s := corev1.PodStatus{
		Phase: corev1.PodRunning, StartTime: &now, HostIP: "192.168.7.7", HostIPs: []corev1.HostIP{{IP: "192.168.7.7"}},
		PodIP: "10.1.2.3", PodIPs: []corev1.PodIP{{IP: "10.1.2.3"}}, ObservedGeneration: pod.Generation,
		Conditions: []corev1.PodCondition{
			{Type: corev1.PodInitialized, Status: corev1.ConditionTrue, LastTransitionTime: now},
			{Type: corev1.ContainersReady, Status: corev1.ConditionTrue, LastTransitionTime: now},
			{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now},
		},
	}
	for _, c := range pod.Spec.Containers {
		s.ContainerStatuses = append(s.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Ready: true, Started: new(true), Image: c.Image, ImageID: "sha256:1", ContainerID: "containerd://1",
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		})
	}
	return s
}

func endedStatus(pod *corev1.Pod) corev1.PodStatus {
	s := runningStatus(pod)
	s.Phase = corev1.PodSucceeded
	for i := range s.Conditions[1:] {
		s.Conditions[i+1].Status, s.Conditions[i+1].Reason = corev1.ConditionFalse, "PodCompleted"
	}
	for i := range s.ContainerStatuses {
		s.ContainerStatuses[i].Ready = false
		s.ContainerStatuses[i].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Completed", StartedAt: *s.StartTime, FinishedAt: metav1.Now()}}
	}
	return s
}

// eventually waits until check is true.
func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !check() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 15 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
