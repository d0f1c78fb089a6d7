package provider

import (
	"context"
	"errors"
	"go/parser"
	gotoken "go/token"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/virtual-kubelet/virtual-kubelet/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kuberuntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	"github.com/skerry-io/skerry/api/edge"
)

type onePort struct{}

func (onePort) Port(string) (int32, error) { return 20001, nil }

// fakeProvider runs a provider on a fake API server until the test ends.
func fakeProvider(t testing.TB, client *fake.Clientset) *Provider {
	t.Helper()
	config, err := Config{Namespace: "skerry-system", Replica: "r1", Address: "10.0.0.1", Ports: onePort{}, Log: slog.New(slog.DiscardHandler)}.withDefaults()
	if err == nil {
		t.Fatal("a configuration without a cluster was taken")
	}
	p, err := newProvider(config, client)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	<-p.synced
	return p
}

func boundPod(name, site string, uid types.UID) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: uid},
		Spec:       corev1.PodSpec{NodeName: site, Containers: []corev1.Container{{Name: "main"}}},
	}
}

func TestTrap06DeletionThatWasMissedIsADeletion(t *testing.T) {
	pod := boundPod("web", "a", "u1")
	indexer := cache.NewSharedIndexInformer(&cache.ListWatch{}, &corev1.Pod{}, 0, cache.Indexers{})
	v := newPodView(indexer, func(string) bool { return true })
	var deleted []any
	if _, err := v.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(obj any) { deleted = append(deleted, obj) }}); err != nil {
		t.Fatal(err)
	}
	h := handler[*corev1.Pod]{add: v.add, update: v.update, delete: v.delete}
	h.OnAdd(pod, true)
	h.OnDelete(cache.DeletedFinalStateUnknown{Key: "default/web", Obj: pod})
	if len(deleted) != 1 {
		t.Fatalf("deletions = %v", deleted)
	}
	if _, ok := deleted[0].(*corev1.Pod); !ok {
		t.Errorf("the controller hears of a %T, which it ignores", deleted[0])
	}
}

func TestTrap04ViewTellsAnotherUIDAsDeletionAndAddition(t *testing.T) {
	indexer := cache.NewSharedIndexInformer(&cache.ListWatch{}, &corev1.Pod{}, 0, cache.Indexers{})
	v := newPodView(indexer, func(node string) bool { return node == "a" })
	var heard []string
	name := func(obj any) string { return string(obj.(*corev1.Pod).UID) }
	if _, err := v.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { heard = append(heard, "add "+name(obj)) },
		UpdateFunc: func(_, obj any) { heard = append(heard, "update "+name(obj)) },
		DeleteFunc: func(obj any) { heard = append(heard, "delete "+name(obj)) },
	}); err != nil {
		t.Fatal(err)
	}
	v.update(nil, boundPod("web", "a", "u1")) // an update first: the controller would panic
	v.update(nil, boundPod("web", "a", "u1"))
	v.update(nil, boundPod("web", "a", "u2"))
	v.add(boundPod("other", "a-real-kubelet", "u3"))
	v.delete(boundPod("web", "a", "u2"))
	if got, want := strings.Join(heard, ", "), "add u1, update u1, delete u1, add u2, delete u2"; got != want {
		t.Errorf("heard %s, want %s", got, want)
	}
}

func TestTrap08QueuesNeverGiveUpAndAreNotThrottledTogether(t *testing.T) {
	p := fakeProvider(t, fake.NewClientset())
	config := p.podControllerConfig()
	for name, retry := range map[string]func(context.Context, string, int, time.Time, error) (*time.Duration, error){
		"create": config.SyncPodsFromKubernetesShouldRetryFunc, "delete": config.DeletePodsFromKubernetesShouldRetryFunc, "status": config.SyncPodStatusFromProviderShouldRetryFunc,
	} {
		if _, err := retry(t.Context(), "default/web", 100000, time.Time{}, errors.New("refused")); err != nil {
			t.Errorf("%s is forgotten after many tries: %v", name, err)
		}
	}
	limiter := config.SyncPodsFromKubernetesRateLimiter
	for i := range 10000 { // with a bucket of ten a second the last would wait a quarter of an hour
		if d := limiter.When(i); d > 10*time.Millisecond {
			t.Fatalf("pod %d of 10,000 waits %v", i, d)
		}
	}
	for range 100 {
		limiter.When("failing")
	}
	if d := limiter.When("failing"); d > lastRetry {
		t.Errorf("a failing pod waits %v", d)
	}
}

func TestTrap09ColdCacheRemovesNothing(t *testing.T) {
	client := fake.NewClientset()
	pod := boundPod("web", "a", "u1")
	pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
	var exists atomic.Bool
	exists.Store(true)
	// The API server has the pod, the cache does not yet.
	client.PrependReactor("get", "pods", func(clienttesting.Action) (bool, kuberuntime.Object, error) {
		if !exists.Load() {
			return true, nil, apierrors.NewNotFound(corev1.Resource("pods"), "web")
		}
		return true, pod, nil
	})
	p := fakeProvider(t, client)
	if pods, err := (&dispatcher{p: p}).GetPods(t.Context()); pods != nil || err != nil {
		t.Errorf("GetPods = %v, %v: the controller would delete them", pods, err)
	}
	f := newFakeSite("a")
	secret := edge.Key{Kind: edge.KindSecret, Namespace: "default", Name: "pull"}
	for _, key := range []edge.Key{podKey(pod), secret} {
		f.held[key] = edge.Object{Key: key, Version: "1"}
	}
	f.connect(t, p)
	eventually(t, "the site has what it lacked", func() bool { _, ok := f.has(edge.Key{Kind: edge.KindCluster}); return ok })
	p.mark("a")
	time.Sleep(50 * time.Millisecond)
	if _, ok := f.has(podKey(pod)); !ok {
		t.Error("a pod was removed that the cache did not have yet")
	}
	if _, ok := f.has(secret); !ok {
		t.Error("and its Secret")
	}
	if n := f.completed(); n != 0 {
		t.Errorf("the site was told %d times that it has everything, though the cache is behind", n)
	}
	exists.Store(false)
	p.mark("a")
	eventually(t, "what is really gone is removed", func() bool {
		_, ok := f.has(podKey(pod))
		_, ok2 := f.has(secret)
		return !ok && !ok2
	})
	p.mark("a")
	eventually(t, "the site is told once that it has everything", func() bool { return f.completed() == 1 })
}

func TestTrap10StatusIsAcknowledgedOnlyWhenItIsWritten(t *testing.T) {
	pod := boundPod("job", "a", "u1")
	client := fake.NewClientset(pod)
	var down atomic.Bool
	down.Store(true)
	client.PrependReactor("patch", "pods", func(action clienttesting.Action) (bool, kuberuntime.Object, error) {
		if down.Load() && action.GetSubresource() == "status" {
			return true, nil, apierrors.NewInternalError(errors.New("etcd is away"))
		}
		return false, nil, nil
	})
	p := fakeProvider(t, client)
	f := newFakeSite("a")
	s := f.connect(t, p)
	report := edge.Report{Pods: []edge.PodStatus{
		{UID: "u1", Namespace: "default", Name: "job", Seq: 7, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}},
		{UID: "u9", Namespace: "default", Name: "long-gone", Seq: 3},
	}}
	ack, err := s.cloud().Report(t.Context(), report)
	if err != nil || ack.Pods["u1"] != 0 || ack.RetryAfter == 0 {
		t.Errorf("ack = %+v, %v: a status that is lost makes the pod run again", ack, err)
	}
	if ack.Pods["u9"] != 3 {
		t.Errorf("ack = %+v: what can no longer matter is not waited for", ack)
	}
	down.Store(false)
	ack, err = s.cloud().Report(t.Context(), report)
	if err != nil || ack.Pods["u1"] != 7 {
		t.Errorf("ack = %+v, %v", ack, err)
	}
	got, err := client.CoreV1().Pods("default").Get(t.Context(), "job", metav1.GetOptions{})
	if err != nil || got.Status.Phase != corev1.PodSucceeded {
		t.Errorf("phase = %v, %v", got.Status.Phase, err)
	}
}

func TestTrap11UnknownPodIsAPlainNotFound(t *testing.T) {
	p := fakeProvider(t, fake.NewClientset())
	d := &dispatcher{p: p, handed: map[string]*corev1.Pod{}}
	pod, err := d.GetPod(t.Context(), "default", "none")
	if pod != nil || !errdefs.IsNotFound(err) {
		t.Errorf("GetPod = %v, %v: the controller does not see that it is not found", pod, err)
	}
	d.hand(boundPod("web", "a", "u1")) // by now the API has none of that name
	if pod, err := d.GetPod(t.Context(), "default", "web"); pod != nil || !errdefs.IsNotFound(err) {
		t.Errorf("GetPod of a predecessor = %v, %v", pod, err)
	}
}

// The kubelet API is the site's own, behind a proxy with its own authorizer:
// virtual-kubelet's server and its webhook authorizer are not linked.
func TestTrap12And13VirtualKubeletsServerIsNotUsed(t *testing.T) {
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !strings.HasSuffix(file.Name(), ".go") {
			continue
		}
		parsed, err := parser.ParseFile(gotoken.NewFileSet(), file.Name(), nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range parsed.Imports {
			if path := strings.Trim(i.Path.Value, `"`); strings.HasSuffix(path, "/node/api") || strings.HasSuffix(path, "/node/nodeutil") {
				t.Errorf("%s imports %s", file.Name(), path)
			}
		}
	}
}

func TestReportOfAnothersPodIsIgnored(t *testing.T) {
	client := fake.NewClientset(boundPod("web", "b", "u1"))
	p := fakeProvider(t, client)
	f := newFakeSite("a")
	s := f.connect(t, p)
	ack, err := s.cloud().Report(t.Context(), edge.Report{Pods: []edge.PodStatus{{UID: "u1", Namespace: "default", Name: "web", Seq: 1, Gone: true, Status: corev1.PodStatus{Phase: corev1.PodFailed}}}})
	if err != nil || ack.Pods["u1"] != 1 {
		t.Errorf("ack = %+v, %v", ack, err)
	}
	got, err := client.CoreV1().Pods("default").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil || got.Status.Phase == corev1.PodFailed {
		t.Errorf("pod = %v, %v", got.Status, err)
	}
}

// A site may say of any pod that it holds it, and of any event that it is about one
// of its own pods: neither lets it write into others' namespaces.
func TestEventsOfOthersAreDropped(t *testing.T) {
	client := fake.NewClientset(boundPod("mine", "a", "u1"), boundPod("web", "b", "u2"))
	p := fakeProvider(t, client)
	f := newFakeSite("a")
	claimed := edge.Key{Kind: edge.KindPod, Namespace: "kube-system", Name: "claimed", UID: "u3"}
	f.held[claimed] = edge.Object{Key: claimed, Version: "1"}
	f.refuse = errors.New("no") // so that it goes on holding the pod
	s := f.connect(t, p)
	mine := corev1.ObjectReference{Kind: "Pod", Namespace: "default", Name: "mine", UID: "u1"}
	eventually(t, "the claim has been heard", func() bool { return f.asked() > 1 })
	var report edge.Report
	for _, object := range []corev1.ObjectReference{
		{Kind: "Pod", Namespace: "default", Name: "web", UID: "u2"},
		{Kind: "Pod", Namespace: "default", Name: "web", UID: "u1"},         // its own pod under another's name
		{Kind: "Pod", Namespace: "kube-system", Name: "mine", UID: "u1"},    // in another namespace
		{Kind: "Pod", Namespace: "kube-system", Name: "claimed", UID: "u3"}, // only it knows of it
		{Kind: "Node", Name: "b"},
		{Kind: "Secret", Namespace: "default", Name: "web"},
		mine,
	} {
		seq := uint64(len(report.Events) + 1)
		report.Events = append(report.Events, edge.Event{Seq: seq, Object: object, Reason: "Said", Count: 1})
	}
	ack, err := s.cloud().Report(t.Context(), report)
	if err != nil || ack.Events != 7 {
		t.Errorf("ack = %+v, %v", ack, err)
	}
	events, err := client.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(events.Items) != 1 || events.Items[0].InvolvedObject.Name != "mine" || events.Items[0].Namespace != "default" {
		t.Errorf("events = %+v, want that of its own pod", events.Items)
	}
}

func TestLostAnswerOfApplyIsFoundOutByInventory(t *testing.T) {
	client := fake.NewClientset()
	p := fakeProvider(t, client)
	f := newFakeSite("a")
	f.connect(t, p)
	eventually(t, "the site is in step", func() bool { _, ok := f.has(edge.Key{Kind: edge.KindNode, Name: "a"}); return ok })
	f.mu.Lock()
	f.lose = true
	f.mu.Unlock()
	pod := boundPod("web", "a", "u1")
	if _, err := client.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is there", func() bool { _, ok := f.has(podKey(pod)); return ok })
	time.Sleep(300 * time.Millisecond)
	if n := f.upserts(podKey(pod)); n != 1 {
		t.Errorf("sent %d times", n)
	}
}

func TestSiteSaysSinceWhenItIsOffline(t *testing.T) {
	p := fakeProvider(t, fake.NewClientset())
	f := newFakeSite("a")
	s := f.connect(t, p)
	if rt, err := p.Site("a"); rt != http.RoundTripper(s) || err != nil {
		t.Errorf("Site = %v, %v", rt, err)
	}
	s.Close()
	eventually(t, "it is offline", func() bool { _, err := p.Site("a"); return err != nil })
	_, err := p.Site("a")
	if e, ok := errors.AsType[*OfflineError](err); !ok || e.Site != "a" || time.Since(e.Since) > time.Minute || e.Since.IsZero() {
		t.Errorf("Site = %v", err)
	}
	if _, err := p.Site("b"); err == nil || err.Error() != "site b is not connected" {
		t.Errorf("Site = %v", err)
	}
}

func TestAcquireRefusesWhatIsNoSiteName(t *testing.T) {
	real := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker-1"}}
	p := fakeProvider(t, fake.NewClientset(real))
	for _, site := range []string{"", "a/b", "A", "..", strings.Repeat("a", 64), "worker-1"} {
		if _, err := p.Acquire(t.Context(), site); !errors.Is(err, edge.ErrInvalid) {
			t.Errorf("Acquire(%q) = %v, want ErrInvalid", site, err)
		}
	}
	for want := range uint64(3) {
		if got, err := p.Acquire(t.Context(), "a"); got != want+1 || err != nil {
			t.Errorf("epoch = %d, %v, want %d", got, err, want+1)
		}
	}
}

// A session costs two goroutines here: the caller of Serve and the loop.
func TestIdleSiteCostsTwoGoroutines(t *testing.T) {
	p := fakeProvider(t, fake.NewClientset())
	connect := func(n int, prefix string) {
		for i := range n {
			newFakeSite(prefix+string(rune('a'+i/26))+string(rune('a'+i%26))).connect(t, p)
		}
	}
	connect(5, "warm-")
	time.Sleep(50 * time.Millisecond)
	before := runtime.NumGoroutine()
	const n = 100
	connect(n, "site-")
	eventually(t, "at most two goroutines for each site", func() bool { return runtime.NumGoroutine()-before <= 2*n })
}

func TestImpersonation(t *testing.T) {
	var user string
	rt := impersonate(direct{http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { user = r.Header.Get("Impersonate-User") })})
	for name, tt := range map[string]struct {
		ctx  context.Context
		want string
	}{
		"by itself": {t.Context(), ""},
		"as a site": {as(t.Context(), "a"), "system:node:a"},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(tt.ctx, http.MethodGet, "http://api/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := rt.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if user != tt.want || req.Header.Get("Impersonate-User") != "" {
				t.Errorf("user = %q, want %q; the caller's request is unchanged: %v", user, tt.want, req.Header)
			}
		})
	}
}
