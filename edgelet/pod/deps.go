package pod

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// Runtime is the part of CRI v1 that the engine drives. Package cri implements it
// on a real runtime and critest in memory. Errors carry gRPC status codes. Every
// call ends by itself in bounded time, StopContainer in little more than its grace.
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

	// Watch calls changed with the UID of each pod of which a container or the
	// sandbox has started or ended, "" when it may have missed something, until
	// ctx is done. It reconnects by itself, and calls changed with "" about once a
	// second while it has no source, and when it has one again. If it returns
	// sooner, the engine lists the runtime once a second and calls it again.
	Watch(ctx context.Context, changed func(uid types.UID)) error
}

// Images makes images present. Package image implements it. An error with a
// method Reason() string (ErrImagePull, ImagePullBackOff, ErrImageNeverPull,
// InvalidImageName…) gives a waiting container its reason. One with a method
// RetryAt() time.Time says when trying again makes sense; else it is in 10 s.
type Images interface {
	// Ensure returns what CRI's CreateContainer takes as image, pulling it first
	// when policy asks for that. Secrets are the pod's pull secrets. event, called
	// before it returns, reports Pulling, Pulled, Failed and BackOff.
	Ensure(ctx context.Context, image string, policy corev1.PullPolicy, secrets []*corev1.Secret, sandbox *cri.PodSandboxConfig, event func(kind, reason, message string)) (Image, error)
}

// An Image is a present image, and the user that it runs as unless told otherwise.
type Image = struct {
	Ref      string // what CreateContainer takes
	ID       string // digest reference for status.imageID
	UID      *int64 // numeric user of the image, if it names one
	Username string // user name of the image, if it names one instead
}

// Volumes prepares the volumes of pods. Package volume implements it.
type Volumes interface {
	// Setup makes all of pod's volumes present and their content current. It is
	// called before containers are created and again at every resync.
	Setup(ctx context.Context, pod *corev1.Pod) error
	// Mounts returns the mounts of one container, subPaths resolved and safe
	// against exchange; env is the container's environment, for subPathExpr.
	Mounts(ctx context.Context, pod *corev1.Pod, container *corev1.Container, env []*cri.KeyValue) ([]*cri.Mount, error)
	// Teardown unmounts and removes all that Setup has made for a pod.
	Teardown(ctx context.Context, uid types.UID) error
	// Present lists the pods of which something is left on disk.
	Present() ([]types.UID, error)
}

// Environments resolves what a container sees of its pod and cluster. Package
// podenv implements it. An error means CreateContainerConfigError.
type Environments interface {
	Env(pod *corev1.Pod, container *corev1.Container, ips []string) ([]*cri.KeyValue, error)
	Command(container *corev1.Container, env []*cri.KeyValue) (command, args []string)
	Hostname(pod *corev1.Pod) (string, error)
	DNS(pod *corev1.Pod) (*cri.DNSConfig, error)
	Hosts(pod *corev1.Pod, ips []string) []byte // content of /etc/hosts
}

// Probes runs the probes of containers. Package probe implements it.
type Probes interface {
	// Sync makes the running probes those of the containers that running names,
	// by container name. A pod that terminates keeps readiness alone.
	Sync(pod *corev1.Pod, ip string, running map[string]RunningContainer)
	// Result is the latest verdict on a container; containers without probes are
	// started, ready and alive as soon as they run.
	Result(uid types.UID, container, containerID string) ProbeResult
	// Forget ends all probes of a pod.
	Forget(uid types.UID)
}

// A RunningContainer is a container that probes may look at.
type RunningContainer = struct {
	ID        string
	StartedAt time.Time
}

// A ProbeResult is the verdict of a container's three probes. Unhealthy names
// the probe, "liveness" or "startup", that asks for a restart, and Grace is the
// probe's own terminationGracePeriodSeconds if it has one.
type ProbeResult = struct {
	Started, Ready bool
	Unhealthy      string
	Message        string
	Grace          *int64
}

// Hooks runs postStart and preStop. Package probe implements it.
type Hooks interface {
	Run(ctx context.Context, pod *corev1.Pod, container *corev1.Container, containerID, podIP string, hook *corev1.LifecycleHandler) error
}

// Objects reads what pods refer to, from what the cloud has sent. The error is
// edge.ErrAbsent when there is no such object, edge.ErrUnknown when it is not
// known yet.
type Objects interface {
	Secret(namespace, name string) (*corev1.Secret, error)
	RuntimeClass(name string) (edge.RuntimeClass, error)
	Node() (*corev1.Node, error)
}

// Records keeps what must outlive the edgelet, one record a pod. Package store
// implements it. Put is durable when it returns.
type Records interface {
	All() (map[string]Record, error)
	Put(uid string, record Record) error
	Delete(uid string) error
}

// Sink takes what the engine has to say to the cloud, never blocking for it.
type Sink interface {
	PodStatus(status edge.PodStatus) error // durable when it returns
	// PodEvent reports an event of a pod, or of its container of that name if
	// container is not empty; see [Reference].
	PodEvent(pod *corev1.Pod, container, eventType, reason, message string)
	PodForgotten(uid types.UID) // nothing is left of the pod here and none will be reported
}
