//go:build e2e

package containerd

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/test/images"
)

// runPod starts a pod with a host port and one container that sleeps.
func runPod(t *testing.T, i *Instance, image string) {
	t.Helper()
	client := cri.NewRuntimeServiceClient(i.conn)
	logs := filepath.Join(i.Dir, "logs")
	os.MkdirAll(logs, 0o700)
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "p", Namespace: "default", Uid: "uid"},
		LogDirectory: logs,
		PortMappings: []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: 18080}},
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: "/" + filepath.Base(i.Dir)},
	}
	sandbox, err := client.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	container, err := client.CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId: sandbox.PodSandboxId, SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: image},
			Command: []string{"sleep", "1000"}, LogPath: "c.log", Linux: &cri.LinuxContainerConfig{},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		t.Fatal(err)
	}
}

func start(t *testing.T) (*Instance, string) {
	t.Helper()
	const image = "skerry.test/busybox:1"
	busybox, err := images.Busybox(t.Context(), image, "/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "busybox.tar")
	if err := images.Write(archive, busybox); err != nil {
		t.Fatal(err)
	}
	i, err := Start(t.Context(), Options{Archives: []string{archive}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return i, image
}

// leftovers lists what of an instance can be found on the machine.
func leftovers(t *testing.T, i *Instance) (found []string) {
	t.Helper()
	pids, err := processesOf(i.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(pids) > 0 {
		found = append(found, "processes")
	}
	if mounts, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(mounts), i.Dir) {
		found = append(found, "mounts")
	}
	if _, err := os.Stat("/sys/class/net/" + i.Network.Bridge); err == nil {
		found = append(found, "bridge")
	}
	if rules, _ := exec.Command("iptables-save").Output(); strings.Contains(string(rules), i.Network.Name+`\"`) {
		found = append(found, "iptables rules")
	}
	if results, _ := filepath.Glob("/var/lib/cni/results/" + i.Network.Name + "-*"); len(results) > 0 {
		found = append(found, "cni results")
	}
	filepath.WalkDir("/sys/fs/cgroup", func(path string, _ os.DirEntry, _ error) error {
		// The parent cgroup is whoever's named it; the containers' are ours.
		if strings.Contains(path, "/"+filepath.Base(i.Dir)+"/") && len(filepath.Base(path)) == 64 {
			found = append(found, "cgroup "+path)
		}
		return nil
	})
	return found
}

func TestStopLeavesNothing(t *testing.T) {
	i, image := start(t)
	runPod(t, i, image)
	if got := leftovers(t, i); len(got) < 5 {
		t.Errorf("while a pod runs, found only %v: the test looks in the wrong places", got)
	}
	began := time.Now()
	if err := i.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Logf("stopped in %v", time.Since(began))
	if got := leftovers(t, i); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
	if _, err := os.Stat(i.Dir); err == nil {
		t.Errorf("%s is still there", i.Dir)
	}
}

func TestCleanupAfterKill(t *testing.T) {
	i, image := start(t)
	runPod(t, i, image)
	if err := i.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(i.Dir); err != nil {
		t.Fatal(err)
	}
	if got := leftovers(t, i); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
	if err := Cleanup(i.Dir); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestContainersOutliveTheDaemon(t *testing.T) {
	i, image := start(t)
	runPod(t, i, image)
	if err := i.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := i.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := cri.NewRuntimeServiceClient(i.conn).ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 1 || list.Containers[0].State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("containers after a restart = %v, %v", list, err)
	}
}

func TestImportOfSeveralArchitectures(t *testing.T) {
	i, _ := start(t)
	const name = "skerry.test/pause:multi"
	image, err := images.Pause(t.Context(), name, "amd64", "arm64")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "pause.tar")
	if err := images.Write(archive, image); err != nil {
		t.Fatal(err)
	}
	if err := i.Import(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	runPod(t, i, "skerry.test/busybox:1")
}
