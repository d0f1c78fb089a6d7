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

// report adds the median and the 99th percentile of durations to the result.
func report(b *testing.B, durations []time.Duration) {
	slices.Sort(durations)
	b.ReportMetric(float64(durations[len(durations)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(durations[len(durations)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkPod measures a pod from create to Ready, as a watcher sees it, and from
// delete until it has left the API, beside the bare CRI calls for the same.
func BenchmarkPod(b *testing.B) {
	client := setUp(b)
	b.Run("start/floor=cri", func(b *testing.B) { benchmarkCRI(b, true) })
	b.Run("start/skerry", func(b *testing.B) { benchmarkPod(b, client, true) })
	b.Run("delete/floor=cri", func(b *testing.B) { benchmarkCRI(b, false) })
	b.Run("delete/skerry", func(b *testing.B) { benchmarkPod(b, client, false) })
}

func benchmarkCRI(b *testing.B, start bool) {
	client, err := cri.Dial(cri.Config{Endpoint: site.Containerd.Endpoint})
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	logs := b.TempDir()
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		name := "cri-" + strconv.Itoa(i)
		sandbox := &runtime.PodSandboxConfig{
			Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
			LogDirectory: logs,
			Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/besteffort/pod" + name},
		}
		container := &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "main"},
			Image:    &runtime.ImageSpec{Image: lab.Busybox},
			Command:  []string{"sh", "-c", "trap exit TERM; sleep 3600 & wait"},
			LogPath:  name + ".log",
			Linux:    &runtime.LinuxContainerConfig{},
		}
		began := time.Now()
		id, err := client.RunPodSandbox(b.Context(), sandbox, "")
		if err != nil {
			b.Fatal(err)
		}
		cid, err := client.CreateContainer(b.Context(), id, container, sandbox)
		if err == nil {
			err = client.StartContainer(b.Context(), cid)
		}
		if err != nil {
			b.Fatal(err)
		}
		if start {
			took = append(took, time.Since(began))
		}
		began = time.Now()
		if err := client.StopContainer(b.Context(), cid, 30*time.Second); err != nil {
			b.Fatal(err)
		}
		if err := client.StopPodSandbox(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		if err := client.RemovePodSandbox(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		if !start {
			took = append(took, time.Since(began))
		}
	}
	report(b, took)
}

func benchmarkPod(b *testing.B, client kubernetes.Interface, start bool) {
	pods := client.CoreV1().Pods("default")
	watching, err := pods.Watch(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer watching.Stop()
	await := func(name string, done func(watch.Event, *corev1.Pod) bool) {
		limit := time.After(time.Minute)
		for {
			select {
			case e, ok := <-watching.ResultChan():
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
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("bench-%v-%d", start, i)},
			Spec: corev1.PodSpec{
				NodeSelector: map[string]string{"skerry.io/site": siteName},
				Containers: []corev1.Container{{
					Name: "main", Image: lab.Busybox, Command: []string{"sh", "-c", "trap exit TERM; sleep 3600 & wait"},
				}},
			},
		}
		began := time.Now()
		if _, err := pods.Create(b.Context(), p, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
		await(p.Name, func(_ watch.Event, p *corev1.Pod) bool {
			return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			})
		})
		if start {
			took = append(took, time.Since(began))
		}
		began = time.Now()
		if err := pods.Delete(b.Context(), p.Name, metav1.DeleteOptions{}); err != nil {
			b.Fatal(err)
		}
		await(p.Name, func(e watch.Event, _ *corev1.Pod) bool { return e.Type == watch.Deleted })
		if !start {
			took = append(took, time.Since(began))
		}
	}
	report(b, took)
}
