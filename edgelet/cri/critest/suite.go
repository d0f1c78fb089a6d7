package critest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Image is the image that the suite's containers run: busybox, present already.
const Image = "skerry.test/busybox:1"

// Runtime is what the suite checks: what the pod engine drives.
type Runtime interface {
	ListPodSandbox(ctx context.Context) ([]*cri.PodSandbox, error)
	ListContainers(ctx context.Context) ([]*cri.Container, error)
	PodSandboxStatus(ctx context.Context, id string) (*cri.PodSandboxStatus, error)
	ContainerStatus(ctx context.Context, id string) (*cri.ContainerStatus, error)
	RunPodSandbox(ctx context.Context, config *cri.PodSandboxConfig, handler string) (id string, err error)
	StopPodSandbox(ctx context.Context, id string) error
	RemovePodSandbox(ctx context.Context, id string) error
	CreateContainer(ctx context.Context, sandboxID string, config *cri.ContainerConfig, sandbox *cri.PodSandboxConfig) (id string, err error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string, grace time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	UpdateContainerResources(ctx context.Context, id string, resources *cri.LinuxContainerResources) error
	Watch(ctx context.Context, changed func(uid types.UID)) error
}

// RunSuite checks what every Runtime must do. Each check gets a runtime from open,
// which may be the same one, and makes pods of its own.
func RunSuite(t *testing.T, open func(*testing.T) Runtime) {
	checks := map[string]func(*testing.T, *pod){
		"a sandbox is ready until it is stopped":                        sandboxLifecycle,
		"a sandbox's name is taken until it is removed":                 sandboxName,
		"stopping and removing may be repeated and need nothing":        idempotence,
		"what is not there is NotFound":                                 missing,
		"a container is created, runs and ends":                         containerLifecycle,
		"the exit code is that of the process":                          exitCode,
		"a container can be started once":                               startOnce,
		"a process that heeds TERM ends within its grace":               stopHeeded,
		"a process that ignores TERM is killed after its grace":         stopIgnored,
		"no grace kills at once":                                        stopNow,
		"a second stop with less grace cuts the first short":            stopShortened,
		"stopping a sandbox ends its containers":                        stopSandboxWithContainers,
		"removing a sandbox removes its containers":                     removeSandboxWithContainers,
		"a running container can be removed":                            removeRunning,
		"labels and annotations come back":                              labels,
		"a container's name and attempt are taken until it is removed":  attempts,
		"a container needs a sandbox that is ready":                     createWithoutSandbox,
		"output is in the log file":                                     logs,
		"resources can be changed while a container runs":               updateResources,
		"a watcher hears of starts and ends, and first that it watches": watch,
	}
	for name, check := range checks {
		t.Run(name, func(t *testing.T) { check(t, newPod(t, open(t))) })
	}
}

// A pod is one pod of a check, removed when the check ends.
type pod struct {
	rt      Runtime
	config  *cri.PodSandboxConfig
	sandbox string
}

func newPod(t *testing.T, rt Runtime) *pod {
	uid := fmt.Sprintf("uid-%x", rand.Uint64())
	p := &pod{rt: rt, config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "p", Namespace: "suite", Uid: uid},
		LogDirectory: t.TempDir(),
		Labels:       map[string]string{"io.kubernetes.pod.uid": uid, "a/b": "c"},
		Annotations:  map[string]string{"x/y": "{\"z\": 1}"},
		// Without a network of its own, a sandbox is made much faster.
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    "/skerry-suite",
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}},
		},
	}}
	t.Cleanup(func() {
		if p.sandbox != "" {
			if err := rt.RemovePodSandbox(context.Background(), p.sandbox); err != nil {
				t.Error(err)
			}
		}
	})
	return p
}

// run starts the sandbox.
func (p *pod) run(t *testing.T) {
	t.Helper()
	id, err := p.rt.RunPodSandbox(t.Context(), p.config, "")
	if err != nil {
		t.Fatal(err)
	}
	p.sandbox = id
}

// container is the config of a container that behaves so.
func (p *pod) container(name string, attempt uint32, b Behaviour) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata:    &cri.ContainerMetadata{Name: name, Attempt: attempt},
		Image:       &cri.ImageSpec{Image: Image},
		Command:     Command(b),
		Labels:      map[string]string{"io.kubernetes.pod.uid": p.config.Metadata.Uid, "n": name},
		Annotations: map[string]string{"restart": "x=1,y"},
		LogPath:     filepath.Join(name, fmt.Sprintf("%d.log", attempt)),
		Linux: &cri.LinuxContainerConfig{
			Resources:       &cri.LinuxContainerResources{CpuPeriod: 100000, CpuShares: 102, MemoryLimitInBytes: 64 << 20},
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions},
		},
	}
}

// create makes a container, in a sandbox that it starts if there is none.
func (p *pod) create(t *testing.T, b Behaviour) string {
	t.Helper()
	if p.sandbox == "" {
		p.run(t)
	}
	id, err := p.rt.CreateContainer(t.Context(), p.sandbox, p.container("c", 0, b), p.config)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// start makes a container run.
func (p *pod) start(t *testing.T, b Behaviour) string {
	t.Helper()
	b.Output = append(b.Output, "ready")
	id := p.create(t, b)
	if err := p.rt.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	// A shell heeds signals only when it has got to its trap.
	await(t, func() bool { return strings.Contains(p.log(t, id), "ready") })
	return id
}

func (p *pod) log(t *testing.T, id string) string {
	t.Helper()
	data, err := os.ReadFile(p.status(t, id).LogPath)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func (p *pod) status(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	s, err := p.rt.ContainerStatus(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ended waits until a container has ended.
func (p *pod) ended(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	await(t, func() bool { return p.status(t, id).State == cri.ContainerState_CONTAINER_EXITED })
	return p.status(t, id)
}

func (p *pod) sandboxState(t *testing.T) cri.PodSandboxState {
	t.Helper()
	s, err := p.rt.PodSandboxStatus(t.Context(), p.sandbox)
	if err != nil {
		t.Fatal(err)
	}
	return s.State
}

// stop stops a container and checks how long that took and how it ended.
func (p *pod) stop(t *testing.T, id string, grace, least, most time.Duration, code int32) {
	t.Helper()
	began := time.Now()
	if err := p.rt.StopContainer(t.Context(), id, grace); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < least || took > most {
		t.Errorf("stopping took %v, want %v to %v", took, least, most)
	}
	s := p.status(t, id)
	if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != code {
		t.Errorf("after stop: %v with exit code %d, want exited with %d", s.State, s.ExitCode, code)
	}
}

func (p *pod) containers(t *testing.T) (mine []*cri.Container) {
	t.Helper()
	list, err := p.rt.ListContainers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		if c.PodSandboxId == p.sandbox {
			mine = append(mine, c)
		}
	}
	return mine
}

// await polls until ok, ten seconds at most.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func wantCode(t *testing.T, what string, err error, want ...codes.Code) {
	t.Helper()
	if !slices.Contains(want, status.Code(err)) {
		t.Errorf("%s: %v of code %v, want code %v", what, err, status.Code(err), want)
	}
}
