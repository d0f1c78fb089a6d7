package benchmarks

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/test/lab"
)

const siteName = "bench"

// The lab that all benchmarks share; nil when none was asked for.
var (
	shared *lab.Lab
	site   *lab.Site
)

// setUp starts the lab with the first benchmark that needs it.
func setUp(b *testing.B) *kubernetes.Clientset {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("needs root: run make bench")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	if shared == nil {
		var err error
		if shared, err = lab.Start(ctx, lab.Options{Net: 6, Out: os.Stderr}); err != nil {
			b.Fatal(err)
		}
		if err := shared.StartProvider(ctx); err != nil {
			b.Fatal(err)
		}
		if site, err = shared.AddSite(ctx, siteName); err != nil {
			b.Fatal(err)
		}
		for _, args := range [][]string{
			{"wait", "--for=create", "--timeout=60s", "node/" + siteName},
			{"wait", "--for=condition=Ready", "--timeout=60s", "node/" + siteName},
			{"wait", "--for=create", "--timeout=60s", "serviceaccount/default"},
		} {
			if _, err := shared.Kubectl(ctx, args...); err != nil {
				b.Fatal(err)
			}
		}
	}
	config, err := shared.Cluster.Config()
	if err != nil {
		b.Fatal(err)
	}
	return kubernetes.NewForConfigOrDie(config)
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared != nil {
		if err := shared.Close(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// A series is durations of one kind.
type series []time.Duration

func (s series) quantile(q int) float64 {
	sorted := slices.Sorted(slices.Values(s))
	return float64(sorted[len(sorted)*q/100].Microseconds()) / 1000
}

// BenchmarkPod measures a pod from create to Ready, as a watcher sees it, and from
// delete until it has left the API. Each is paired with the bare CRI calls for the
// same, one after the other, so that both see the same machine.
func BenchmarkPod(b *testing.B) {
	client := setUp(b)
	floor := newBare(b)
	pods := newWatched(b, client)
	var start, startFloor, stop, stopFloor series
	for i := 0; b.Loop(); i++ {
		begun, ended := floor.pod(b, i)
		startFloor, stopFloor = append(startFloor, begun), append(stopFloor, ended)
		begun, ended = pods.pod(b, i)
		start, stop = append(start, begun), append(stop, ended)
	}
	b.ReportMetric(0, "ns/op") // of both together: says nothing
	for _, m := range []struct {
		name        string
		ours, floor series
	}{{"start", start, startFloor}, {"delete", stop, stopFloor}} {
		b.ReportMetric(m.ours.quantile(50), m.name+"-p50-ms")
		b.ReportMetric(m.ours.quantile(90), m.name+"-p90-ms")
		b.ReportMetric(m.floor.quantile(50), m.name+"-cri-p50-ms")
		b.ReportMetric(m.ours.quantile(50)/m.floor.quantile(50), m.name+"-x-cri")
	}
}

// command ends as soon as it is told to.
var command = []string{"sh", "-c", "trap exit TERM; sleep 3600 & wait"}

// A bare is the floor: CRI calls and nothing else.
type bare struct {
	client *cri.Client
	logs   string
}

func newBare(b *testing.B) *bare {
	client, err := cri.Dial(cri.Config{Endpoint: site.Containerd.Endpoint})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { client.Close() })
	return &bare{client, b.TempDir()}
}

// pod starts a pod and ends it, and returns how long each took.
func (f *bare) pod(b *testing.B, i int) (start, stop time.Duration) {
	ctx, name := b.Context(), "cri-"+strconv.Itoa(i)
	sandbox := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		LogDirectory: f.logs,
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/besteffort/pod" + name},
	}
	container := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "main"},
		Image:    &runtime.ImageSpec{Image: lab.Busybox},
		Command:  command,
		LogPath:  name + ".log",
		Linux:    &runtime.LinuxContainerConfig{},
	}
	began := time.Now()
	id, err := f.client.RunPodSandbox(ctx, sandbox, "")
	if err != nil {
		b.Fatal(err)
	}
	cid, err := f.client.CreateContainer(ctx, id, container, sandbox)
	if err == nil {
		err = f.client.StartContainer(ctx, cid)
	}
	if err != nil {
		b.Fatal(err)
	}
	start = time.Since(began)
	began = time.Now()
	err = f.client.StopContainer(ctx, cid, 2*time.Second)
	if err == nil {
		err = f.client.StopPodSandbox(ctx, id)
	}
	if err == nil {
		err = f.client.RemovePodSandbox(ctx, id)
	}
	if err != nil {
		b.Fatal(err)
	}
	return start, time.Since(began)
}

// A watched makes pods through the API server and sees in a watch what becomes of
// them.
type watched struct {
	client kubernetes.Interface
	events watch.Interface
}

func newWatched(b *testing.B, client kubernetes.Interface) *watched {
	events, err := client.CoreV1().Pods("default").Watch(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(events.Stop)
	return &watched{client, events}
}

func (w *watched) await(b *testing.B, name string, done func(watch.Event, *corev1.Pod) bool) {
	limit := time.After(time.Minute)
	for {
		select {
		case e, ok := <-w.events.ResultChan():
			if !ok {
				b.Fatal("the watch has ended")
			}
			if p, ok := e.Object.(*corev1.Pod); ok && p.Name == name && done(e, p) {
				return
			}
		case <-limit:
			b.Fatalf("pod %s: not within a minute", name)
		}
	}
}

// pod starts a pod and deletes it, and returns how long each took.
func (w *watched) pod(b *testing.B, i int) (start, stop time.Duration) {
	pods := w.client.CoreV1().Pods("default")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "bench-" + strconv.Itoa(i)},
		Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{"skerry.io/site": siteName},
			TerminationGracePeriodSeconds: new(int64(2)),
			Containers:                    []corev1.Container{{Name: "main", Image: lab.Busybox, Command: command}},
		},
	}
	began := time.Now()
	if _, err := pods.Create(b.Context(), p, metav1.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	w.await(b, p.Name, func(_ watch.Event, p *corev1.Pod) bool {
		return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
	})
	start = time.Since(began)
	began = time.Now()
	if err := pods.Delete(b.Context(), p.Name, metav1.DeleteOptions{}); err != nil {
		b.Fatal(err)
	}
	w.await(b, p.Name, func(e watch.Event, _ *corev1.Pod) bool { return e.Type == watch.Deleted })
	return start, time.Since(began)
}
