package critest

import (
	"context"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func sandboxLifecycle(t *testing.T, p *pod) {
	p.run(t)
	if got := p.sandboxState(t); got != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("after run: %v", got)
	}
	if err := p.rt.StopPodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	if got := p.sandboxState(t); got != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("after stop: %v", got)
	}
	if err := p.rt.RemovePodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	_, err := p.rt.PodSandboxStatus(t.Context(), p.sandbox)
	wantCode(t, "status after remove", err, codes.NotFound)
}

func sandboxName(t *testing.T, p *pod) {
	p.run(t)
	if id, err := p.rt.RunPodSandbox(t.Context(), p.config, ""); err == nil {
		t.Errorf("a second sandbox of the same attempt: %s", id)
		p.rt.RemovePodSandbox(t.Context(), id)
	}
	if err := p.rt.RemovePodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	p.run(t)
}

func idempotence(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{})
	for range 2 {
		if err := p.rt.StopContainer(t.Context(), id, time.Second); err != nil {
			t.Errorf("stop container: %v", err)
		}
	}
	for range 2 {
		if err := p.rt.RemoveContainer(t.Context(), id); err != nil {
			t.Errorf("remove container: %v", err)
		}
	}
	if err := p.rt.StopContainer(t.Context(), id, time.Second); err != nil {
		t.Errorf("stop a removed container: %v", err)
	}
	for range 2 {
		if err := p.rt.StopPodSandbox(t.Context(), p.sandbox); err != nil {
			t.Errorf("stop sandbox: %v", err)
		}
	}
	for range 2 {
		if err := p.rt.RemovePodSandbox(t.Context(), p.sandbox); err != nil {
			t.Errorf("remove sandbox: %v", err)
		}
	}
	if err := p.rt.StopPodSandbox(t.Context(), p.sandbox); err != nil {
		t.Errorf("stop a removed sandbox: %v", err)
	}
}

func missing(t *testing.T, p *pod) {
	const id = "0123456789abcdef"
	_, err := p.rt.PodSandboxStatus(t.Context(), id)
	wantCode(t, "sandbox status", err, codes.NotFound)
	_, err = p.rt.ContainerStatus(t.Context(), id)
	wantCode(t, "container status", err, codes.NotFound)
	wantCode(t, "start", p.rt.StartContainer(t.Context(), id), codes.NotFound)
	wantCode(t, "update", p.rt.UpdateContainerResources(t.Context(), id, &cri.LinuxContainerResources{}), codes.NotFound)
	_, err = p.rt.CreateContainer(t.Context(), id, p.container("c", 0, Behaviour{}), p.config)
	wantCode(t, "create", err, codes.NotFound)
	p.run(t)
	config := p.container("c", 0, Behaviour{})
	config.Image.Image = "skerry.test/no-such-image:1"
	_, err = p.rt.CreateContainer(t.Context(), p.sandbox, config, p.config)
	wantCode(t, "create without image", err, codes.NotFound)
}

func containerLifecycle(t *testing.T, p *pod) {
	id := p.create(t, Behaviour{Exits: true, ExitAfter: 300 * time.Millisecond})
	s := p.status(t, id)
	if s.State != cri.ContainerState_CONTAINER_CREATED || s.CreatedAt == 0 || s.StartedAt != 0 {
		t.Errorf("created: %v", s)
	}
	if err := p.rt.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if s = p.status(t, id); s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt < s.CreatedAt || s.FinishedAt != 0 {
		t.Errorf("running: %v", s)
	}
	s = p.ended(t, id)
	if s.ExitCode != 0 || s.Reason != "Completed" || s.FinishedAt < s.StartedAt {
		t.Errorf("ended: %v", s)
	}
	if s.Metadata.Name != "c" || s.Image.GetImage() == "" || s.ImageRef == "" {
		t.Errorf("identity: %v", s)
	}
	if list := p.containers(t); len(list) != 1 || list[0].Id != id || list[0].State != s.State || list[0].Metadata.Name != "c" {
		t.Errorf("list: %v", list)
	}
}

func exitCode(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{Exits: true, ExitCode: 7})
	if s := p.ended(t, id); s.ExitCode != 7 || s.Reason != "Error" {
		t.Errorf("exit code %d, reason %q; want 7, Error", s.ExitCode, s.Reason)
	}
}

func startOnce(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{})
	if err := p.rt.StartContainer(t.Context(), id); err == nil {
		t.Error("a running container was started")
	}
	p.stop(t, id, 5*time.Second, 0, 4*time.Second, 0)
	if err := p.rt.StartContainer(t.Context(), id); err == nil {
		t.Error("a container that has ended was started")
	}
}

func stopHeeded(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{TermCode: 5})
	p.stop(t, id, 20*time.Second, 0, 5*time.Second, 5)
}

func stopIgnored(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{IgnoreTerm: true})
	p.stop(t, id, 2*time.Second, 1900*time.Millisecond, 5*time.Second, exitKilled)
}

func stopNow(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{TermCode: 5})
	p.stop(t, id, 0, 0, 5*time.Second, exitKilled)
}

func stopShortened(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{IgnoreTerm: true})
	var first sync.WaitGroup
	first.Go(func() {
		if err := p.rt.StopContainer(t.Context(), id, 60*time.Second); err != nil {
			t.Errorf("first stop: %v", err)
		}
	})
	p.stop(t, id, time.Second, 500*time.Millisecond, 10*time.Second, exitKilled)
	first.Wait()
}

func stopSandboxWithContainers(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{IgnoreTerm: true})
	if err := p.rt.StopPodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	if s := p.ended(t, id); s.ExitCode != exitKilled {
		t.Errorf("exit code %d, want %d", s.ExitCode, exitKilled)
	}
}

func removeSandboxWithContainers(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{})
	if err := p.rt.RemovePodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	_, err := p.rt.ContainerStatus(t.Context(), id)
	wantCode(t, "status", err, codes.NotFound)
	if list := p.containers(t); len(list) != 0 {
		t.Errorf("list: %v", list)
	}
}

func removeRunning(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{IgnoreTerm: true})
	if err := p.rt.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if list := p.containers(t); len(list) != 0 {
		t.Errorf("list: %v", list)
	}
}

// contains reports whether all of want is in got; runtimes add labels of their own.
func contains(got, want map[string]string) bool {
	for k, v := range want {
		if got[k] != v {
			return false
		}
	}
	return true
}

func labels(t *testing.T, p *pod) {
	id := p.create(t, Behaviour{})
	config := p.container("c", 0, Behaviour{})
	if s := p.status(t, id); !contains(s.Labels, config.Labels) || !maps.Equal(s.Annotations, config.Annotations) {
		t.Errorf("container status: %v %v", s.Labels, s.Annotations)
	}
	if c := p.containers(t)[0]; !contains(c.Labels, config.Labels) || !maps.Equal(c.Annotations, config.Annotations) {
		t.Errorf("container list: %v %v", c.Labels, c.Annotations)
	}
	s, err := p.rt.PodSandboxStatus(t.Context(), p.sandbox)
	if err != nil || !contains(s.Labels, p.config.Labels) || !maps.Equal(s.Annotations, p.config.Annotations) || s.Metadata.Uid != p.config.Metadata.Uid {
		t.Errorf("sandbox status: %v, %v", s, err)
	}
	list, err := p.rt.ListPodSandbox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.Id == p.sandbox {
			if !contains(s.Labels, p.config.Labels) || !maps.Equal(s.Annotations, p.config.Annotations) || s.Metadata.Uid != p.config.Metadata.Uid {
				t.Errorf("sandbox list: %v", s)
			}
			return
		}
	}
	t.Error("the sandbox is not in the list")
}

func attempts(t *testing.T, p *pod) {
	first := p.start(t, Behaviour{Exits: true})
	p.ended(t, first)
	if _, err := p.rt.CreateContainer(t.Context(), p.sandbox, p.container("c", 0, Behaviour{}), p.config); err == nil {
		t.Error("a second container of the same attempt")
	}
	second, err := p.rt.CreateContainer(t.Context(), p.sandbox, p.container("c", 1, Behaviour{}), p.config)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[uint32]string{}
	for _, c := range p.containers(t) {
		seen[c.Metadata.Attempt] = c.Id
	}
	if seen[0] != first || seen[1] != second {
		t.Errorf("attempts: %v, want %s and %s", seen, first, second)
	}
	if err := p.rt.RemoveContainer(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if _, err := p.rt.CreateContainer(t.Context(), p.sandbox, p.container("c", 0, Behaviour{}), p.config); err != nil {
		t.Errorf("after removal: %v", err)
	}
}

func createWithoutSandbox(t *testing.T, p *pod) {
	id := p.create(t, Behaviour{})
	if err := p.rt.StopPodSandbox(t.Context(), p.sandbox); err != nil {
		t.Fatal(err)
	}
	if err := p.rt.StartContainer(t.Context(), id); err == nil {
		t.Error("a container was started in a stopped sandbox")
	}
}

func logs(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{Output: []string{"it's here"}, Exits: true})
	p.ended(t, id)
	const want = " stdout F it's here\n"
	await(t, func() bool { return len(p.log(t, id)) > len(want) })
	line := p.log(t, id)
	stamp, _, _ := strings.Cut(line, " ")
	if _, err := time.Parse(time.RFC3339Nano, stamp); err != nil || line[len(stamp):len(stamp)+len(want)] != want {
		t.Errorf("log: %q", line)
	}
}

func updateResources(t *testing.T, p *pod) {
	id := p.start(t, Behaviour{})
	err := p.rt.UpdateContainerResources(t.Context(), id, &cri.LinuxContainerResources{MemoryLimitInBytes: 96 << 20})
	if err != nil {
		t.Fatal(err)
	}
	// Runtimes before CRI 1.27 do not report resources at all.
	if r := p.status(t, id).GetResources().GetLinux(); r != nil && (r.MemoryLimitInBytes != 96<<20 || r.CpuShares != 102) {
		t.Errorf("resources: %v, want the memory changed and the rest kept", r)
	}
}

func watch(t *testing.T, p *pod) {
	ctx, cancel := context.WithCancel(t.Context())
	events := make(chan types.UID, 1000)
	var watching sync.WaitGroup
	watching.Go(func() {
		p.rt.Watch(ctx, func(uid types.UID) { events <- uid })
	})
	defer watching.Wait()
	defer cancel()
	next := func(want types.UID) {
		t.Helper()
		deadline := time.NewTimer(10 * time.Second)
		defer deadline.Stop()
		for {
			select {
			case got := <-events:
				if got == want {
					return
				}
			case <-deadline.C:
				t.Fatalf("no event of %q", want)
			}
		}
	}
	next("")
	uid := types.UID(p.config.Metadata.Uid)
	id := p.create(t, Behaviour{Exits: true, ExitAfter: 500 * time.Millisecond})
	// Whatever the sandbox has told is over when the container starts.
	time.Sleep(300 * time.Millisecond)
	for len(events) > 0 {
		<-events
	}
	if err := p.rt.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	next(uid)
	if s := p.status(t, id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("told of %v, want the start", s.State)
	}
	next(uid)
	if s := p.ended(t, id); s.ExitCode != 0 {
		t.Errorf("exit code %d", s.ExitCode)
	}
}
