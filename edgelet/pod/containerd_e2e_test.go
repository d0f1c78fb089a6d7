//go:build e2e

package pod

import (
	"context"
	"os"
	"path/filepath"
	"sort"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/test/containerd"
	"github.com/skerry-io/skerry/test/images"
)

const testImage = "skerry.test/busybox:1"

// onContainerd makes a world whose runtime is a real containerd.
func onContainerd(t *testing.T) (*world, *cri.Client) {
	t.Helper()
	busybox, err := images.Busybox(t.Context(), testImage, "/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "busybox.tar")
	if err := images.Write(archive, busybox); err != nil {
		t.Fatal(err)
	}
	i, err := containerd.Start(t.Context(), containerd.Options{Archives: []string{archive}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	client, err := cri.Dial(cri.Config{Endpoint: i.Endpoint})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	w := newWorld(t)
	w.conf = func(c *Config) { c.Runtime, c.CgroupRoot, c.CgroupDir = client, "skerry-pod-test", "/sys/fs/cgroup" }
	t.Cleanup(func() { noCgroupsLeft(t) })
	return w, client
}

// noCgroupsLeft checks that no cgroup of a pod is left, and removes the rest.
func noCgroupsLeft(t *testing.T) {
	for _, pattern := range []string{"/sys/fs/cgroup/skerry-pod-test", "/sys/fs/cgroup/*/skerry-pod-test"} {
		dirs, _ := filepath.Glob(pattern)
		for _, dir := range dirs {
			for _, class := range []string{"burstable", "besteffort", "bare", ""} {
				if err := os.Remove(filepath.Join(dir, class)); err != nil && !os.IsNotExist(err) {
					t.Error(err)
				}
			}
		}
	}
}

func shell(script string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Image, p.Spec.Containers[0].Command = testImage, []string{"/bin/sh", "-c", script}
	}
}

// until waits for ok, and fails the test if that takes too long.
func (w *world) until(what string, limit time.Duration, ok func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > limit {
			w.t.Fatalf("%s: not after %v; status %+v, events %q", what, limit, w.status(types.UID(what)), w.site.events)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(began)
}

func ready(s corev1.PodStatus) bool {
	return condition(s, corev1.PodReady).Status == corev1.ConditionTrue
}

func TestContainerdRunsAPod(t *testing.T) {
	w, client := onContainerd(t)
	w.engine()
	pod := newPod(shell(`echo hello; trap 'echo bye > /dev/termination-log; exit 3' TERM; while true; do sleep 0.01; done`))
	pod.Spec.Containers[0].Resources.Limits = corev1.ResourceList{"memory": resource.MustParse("64Mi"), "cpu": resource.MustParse("500m")}
	w.m.Set(pod)
	t.Logf("ready after %v", w.until("ready", 20*time.Second, func() bool { return ready(w.status("u1")) }))
	s := w.status("u1")
	t.Logf("status %+v", s)

	log := filepath.Join(criconfig.LogDirectory(w.dir+"/logs", "default", "p", "u1"), criconfig.LogPath("web", 0))
	w.until("log", 5*time.Second, func() bool { data, _ := os.ReadFile(log); return len(data) > 0 })

	// A container that is killed comes back at once.
	id := s.ContainerStatuses[0].ContainerID[len("containerd://"):]
	if err := client.StopContainer(t.Context(), id, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	t.Logf("running again after %v", w.until("restart", 5*time.Second, func() bool {
		c := w.status("u1").ContainerStatuses[0]
		return c.RestartCount == 1 && c.State.Running != nil
	}))
	if last := w.status("u1").ContainerStatuses[0].LastTerminationState.Terminated; last.ExitCode != 3 || last.Message != "bye\n" {
		t.Errorf("last state = %+v, want 3 and a message", last)
	}

	// Another engine adopts it.
	w.end()
	w.engine(pod)
	time.Sleep(time.Second)
	if c := w.status("u1").ContainerStatuses[0]; c.RestartCount != 1 || c.State.Running == nil {
		t.Errorf("container = %+v after the engine restarted", c)
	}

	bigger := pod.DeepCopy()
	bigger.Spec.Containers[0].Resources.Limits["memory"] = resource.MustParse("128Mi")
	w.m.Set(bigger)
	w.until("resize", 5*time.Second, func() bool {
		r := w.status("u1").ContainerStatuses[0].Resources
		return r != nil && r.Limits.Memory().String() == "128Mi"
	})

	w.m.Set(deleted(bigger, 30))
	t.Logf("gone after %v", w.until("gone", 10*time.Second, func() bool { return w.site.last("u1").Gone }))
	if end := w.status("u1").ContainerStatuses[0].State.Terminated; end == nil || end.ExitCode != 3 {
		t.Errorf("end = %+v", end)
	}
	w.end()
	boxes, err := client.ListPodSandbox(t.Context())
	if err != nil || len(boxes) > 0 {
		t.Errorf("sandboxes %v, %v are left", boxes, err)
	}
}

func TestContainerdPodsFail(t *testing.T) {
	w, _ := onContainerd(t)
	never := func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }
	tests := map[string]struct {
		change func(*corev1.Pod)
		check  func(s corev1.PodStatus) bool
	}{
		"exit": {func(p *corev1.Pod) { never(p); shell("exit 7")(p) }, func(s corev1.PodStatus) bool {
			return s.Phase == corev1.PodFailed && s.ContainerStatuses[0].State.Terminated.ExitCode == 7
		}},
		"done": {func(p *corev1.Pod) { never(p); shell("exit 0")(p) }, func(s corev1.PodStatus) bool { return s.Phase == corev1.PodSucceeded }},
		"loop": {shell("exit 1"), func(s corev1.PodStatus) bool {
			c := s.ContainerStatuses[0]
			return c.State.Waiting != nil && c.State.Waiting.Reason == "CrashLoopBackOff"
		}},
		"nothere": {func(p *corev1.Pod) { shell("")(p); p.Spec.Containers[0].Command = []string{"/not/there"} }, func(s corev1.PodStatus) bool {
			c := s.ContainerStatuses[0]
			return c.State.Waiting != nil && (c.State.Waiting.Reason == "RunContainerError" || c.State.Waiting.Reason == "CrashLoopBackOff")
		}},
		"oom": {func(p *corev1.Pod) {
			never(p)
			shell("tail /dev/zero")(p)
			p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{"memory": resource.MustParse("32Mi")}
		}, func(s corev1.PodStatus) bool {
			end := s.ContainerStatuses[0].State.Terminated
			return s.Phase == corev1.PodFailed && end.Reason == "OOMKilled"
		}},
		"init": {func(p *corev1.Pod) {
			shell("sleep 1000")(p)
			p.Spec.InitContainers = []corev1.Container{
				{Name: "i", Image: testImage, Command: []string{"/bin/true"}},
				{Name: "s", Image: testImage, Command: []string{"/bin/sleep", "1000"}, RestartPolicy: new(corev1.ContainerRestartPolicyAlways)},
			}
		}, ready},
	}
	var pods []*corev1.Pod
	for name, tt := range tests {
		pods = append(pods, newPod(tt.change, func(p *corev1.Pod) {
			p.UID, p.Name, p.Spec.TerminationGracePeriodSeconds = types.UID(name), name, new(int64(1))
		}))
	}
	w.engine(pods...)
	for name, tt := range tests {
		w.until(name, 20*time.Second, func() bool { s := w.status(types.UID(name)); return s.Phase != "" && tt.check(s) })
		t.Logf("%s: %+v", name, w.status(types.UID(name)).ContainerStatuses[0].State)
	}
	for _, p := range pods {
		w.m.Remove(p.UID)
	}
	w.until("forgotten", 60*time.Second, func() bool { return len(w.m.all()) == 0 })
	w.end()
}

// TestContainerdStartTimes compares the engine with the calls that no engine can
// do without.
func TestContainerdStartTimes(t *testing.T) {
	w, client := onContainerd(t)
	w.engine()
	var bare, ours []time.Duration
	for i := range 10 {
		name := string(rune('a' + i))
		bare = append(bare, bareStart(t, client, name))
		pod := newPod(shell("sleep 1000"), func(p *corev1.Pod) {
			p.UID, p.Name, p.Spec.TerminationGracePeriodSeconds = types.UID("u"+name), name, new(int64(1))
		})
		w.m.Set(pod)
		ours = append(ours, w.until("ready", 20*time.Second, func() bool { return ready(w.status(pod.UID)) }))
		w.m.Remove(pod.UID)
		w.until("forgotten", 20*time.Second, func() bool { return w.site.forgot(pod.UID) })
	}
	median := func(d []time.Duration) time.Duration {
		sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
		return d[len(d)/2]
	}
	t.Logf("bare %v, engine %v", median(bare), median(ours))
	if median(ours) > median(bare)*3/2 {
		t.Errorf("engine %v, want at most 1.5 times %v", median(ours), median(bare))
	}
	w.end()
}

func bareStart(t *testing.T, client *cri.Client, name string) time.Duration {
	t.Helper()
	pod := newPod(shell("sleep 1000"), func(p *corev1.Pod) { p.UID, p.Name = types.UID("bare-"+name), "bare-"+name })
	box, err := criconfig.Sandbox(pod, criconfig.SandboxOptions{LogDir: t.TempDir(), CgroupParent: "/skerry-pod-test/bare"})
	if err != nil {
		t.Fatal(err)
	}
	delete(box.Labels, criconfig.LabelManaged)
	c := &pod.Spec.Containers[0]
	config, err := criconfig.Container(pod, c, criconfig.ContainerOptions{Image: testImage, Command: c.Command})
	if err != nil {
		t.Fatal(err)
	}
	delete(config.Labels, criconfig.LabelManaged)
	os.MkdirAll(filepath.Join(box.LogDirectory, c.Name), 0o755)
	began := time.Now()
	id, err := client.RunPodSandbox(t.Context(), box, "")
	if err != nil {
		t.Fatal(err)
	}
	cid, err := client.CreateContainer(t.Context(), id, config, box)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.StartContainer(t.Context(), cid); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if s, err := client.ContainerStatus(t.Context(), cid); err != nil || s.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("status %v, %v", s, err)
	}
	client.StopPodSandbox(t.Context(), id)
	client.RemovePodSandbox(t.Context(), id)
	return took
}
