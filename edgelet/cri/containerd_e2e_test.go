//go:build e2e

package cri_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/edgelet/cri/critest"
	"github.com/skerry-io/skerry/test/containerd"
	"github.com/skerry-io/skerry/test/images"
)

// start starts a private containerd that has the suite's image.
func start(t *testing.T) (*containerd.Instance, *cri.Client) {
	t.Helper()
	busybox, err := images.Busybox(t.Context(), critest.Image, "/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "busybox.tar")
	if err := images.Write(archive, busybox); err != nil {
		t.Fatal(err)
	}
	// Another containerd than the installed one can be tested, too.
	i, err := containerd.Start(t.Context(), containerd.Options{
		Archives: []string{archive},
		Binary:   os.Getenv("CONTAINERD"), Shim: os.Getenv("CONTAINERD_SHIM_DIR"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		// The pods' parent cgroup, of v2 or of each controller of v1.
		for _, pattern := range []string{"/sys/fs/cgroup/skerry-suite", "/sys/fs/cgroup/*/skerry-suite"} {
			for _, dir := range glob(t, pattern) {
				if err := os.Remove(dir); err != nil {
					t.Error(err)
				}
			}
		}
	})
	client, err := cri.Dial(cri.Config{Endpoint: i.Endpoint, QueryTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return i, client
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestContainerdFulfilsTheContract(t *testing.T) {
	_, client := start(t)
	critest.RunSuite(t, func(*testing.T) critest.Runtime { return client })
}

func TestContainerdAnswersTheRest(t *testing.T) {
	_, client := start(t)
	version, err := client.Version(t.Context())
	if err != nil || version.RuntimeName != "containerd" {
		t.Errorf("version: %v, %v", version, err)
	}
	if driver, err := client.CgroupDriver(t.Context()); err != nil || driver != cri.Cgroupfs {
		t.Errorf("cgroup driver: %v, %v", driver, err)
	}
	if image, err := client.SandboxImage(t.Context()); err != nil || image != containerd.PauseImage {
		t.Errorf("sandbox image: %q, %v", image, err)
	}
	list, err := client.ListImages(t.Context())
	if err != nil || len(list) != 2 {
		t.Errorf("images: %v, %v", list, err)
	}
	absent := &runtime.ImageSpec{Image: "skerry.test/absent:1"}
	if image, err := client.ImageStatus(t.Context(), absent); err != nil || image != nil {
		t.Errorf("an absent image: %v, %v", image, err)
	}
	if err := client.RemoveImage(t.Context(), absent); err != nil {
		t.Errorf("remove an absent image: %v", err)
	}
	if info, err := client.ImageFsInfo(t.Context()); err != nil || len(info.ImageFilesystems) != 1 || info.ImageFilesystems[0].FsId.GetMountpoint() == "" {
		t.Errorf("image file systems: %v, %v", info, err)
	}
}

// sleeper starts a pod with a network and a container, and returns their ids.
func sleeper(t *testing.T, client *cri.Client, cgroup string) (sandbox, container string) {
	t.Helper()
	pod := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"},
		LogDirectory: t.TempDir(),
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: cgroup},
	}
	sandbox, err := client.RunPodSandbox(t.Context(), pod, "")
	if err != nil {
		t.Fatal(err)
	}
	container, err = client.CreateContainer(t.Context(), sandbox, &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "c"}, Image: &runtime.ImageSpec{Image: critest.Image},
		Command: critest.Command(critest.Behaviour{}), LogPath: "c.log", Linux: &runtime.LinuxContainerConfig{},
		Labels: map[string]string{"io.kubernetes.pod.uid": "u"},
	}, pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.StartContainer(t.Context(), container); err != nil {
		t.Fatal(err)
	}
	return sandbox, container
}

func TestExecAndStats(t *testing.T) {
	_, client := start(t)
	sandbox, container := sleeper(t, client, "/skerry-suite")
	stdout, stderr, exit, err := client.ExecSync(t.Context(), container, []string{"sh", "-c", "echo out; echo err >&2; exit 4"}, 5*time.Second)
	if string(stdout) != "out\n" || string(stderr) != "err\n" || exit != 4 || err != nil {
		t.Errorf("exec = %q, %q, %d, %v", stdout, stderr, exit, err)
	}
	_, _, _, err = client.ExecSync(t.Context(), container, []string{"sleep", "100"}, time.Second)
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("exec that takes too long: %v", err)
	}
	stdout, _, _, err = client.ExecSync(t.Context(), container, []string{"head", "-c", "1000000", "/dev/zero"}, 5*time.Second)
	if !bytes.Equal(stdout, make([]byte, 64<<10)) || err != nil {
		t.Errorf("exec with much output: %d bytes, %v", len(stdout), err)
	}
	if url, err := client.Exec(t.Context(), &runtime.ExecRequest{ContainerId: container, Cmd: []string{"true"}, Stdout: true}); err != nil || url == "" {
		t.Errorf("exec URL: %q, %v", url, err)
	}
	if url, err := client.Attach(t.Context(), &runtime.AttachRequest{ContainerId: container, Stdout: true}); err != nil || url == "" {
		t.Errorf("attach URL: %q, %v", url, err)
	}
	if url, err := client.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: sandbox, Port: []int32{80}}); err != nil || url == "" {
		t.Errorf("port-forward URL: %q, %v", url, err)
	}
	if err := client.ReopenContainerLog(t.Context(), container); err != nil {
		t.Errorf("reopen log: %v", err)
	}
	checkStats(t, client, true)
}

func TestStatsOfAPodWithoutACgroup(t *testing.T) {
	_, client := start(t)
	sleeper(t, client, "")
	checkStats(t, client, false)
}

func checkStats(t *testing.T, client *cri.Client, network bool) {
	t.Helper()
	stats, err := client.ListPodSandboxStats(t.Context())
	if err != nil || len(stats) != 1 || len(stats[0].Linux.Containers) != 1 {
		t.Fatalf("stats: %v, %v", stats, err)
	}
	if c := stats[0].Linux.Containers[0]; c.Memory.GetWorkingSetBytes().GetValue() == 0 || c.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("container stats: %v", c)
	}
	if got := stats[0].Linux.Network != nil; got != network {
		t.Errorf("network stats: %v, want %v", got, network)
	}
}

func TestDaemonRestartAndHang(t *testing.T) {
	i, client := start(t)
	_, container := sleeper(t, client, "")
	events := make(chan types.UID, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- client.Watch(ctx, func(uid types.UID) { events <- uid }) }()
	defer func() { cancel(); <-done }()
	next := func(want types.UID) {
		t.Helper()
		for {
			select {
			case got := <-events:
				if got == want {
					return
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("no event of %q", want)
			}
		}
	}
	next("")

	if err := i.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.ListContainers(t.Context()); status.Code(err) != codes.Unavailable {
		t.Errorf("list while the daemon is dead: %v", err)
	}
	for len(events) > 0 {
		<-events
	}
	if err := i.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	next("")
	t.Logf("watching again %v after the daemon was ready", time.Since(began))
	time.Sleep(300 * time.Millisecond) // until it has subscribed

	if err := i.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	if _, err := client.ListContainers(t.Context()); status.Code(err) != codes.DeadlineExceeded || time.Since(began) > 3*time.Second {
		t.Errorf("list while the daemon hangs: %v after %v", err, time.Since(began))
	}
	if err := i.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for len(events) > 0 {
		<-events
	}
	if err := client.StopContainer(t.Context(), container, 0); err != nil {
		t.Fatal(err)
	}
	next("u")
}
