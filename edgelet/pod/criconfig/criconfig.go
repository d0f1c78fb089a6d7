// Package criconfig translates pods into what CRI is asked for: the configuration
// of sandboxes and containers. It is pure: it reads no file, no clock and no
// network, and every name that becomes part of a path has been checked.
//
// Labels and annotations are a kubelet's, so that crictl and monitoring see what
// they know, and [LabelManaged] besides, which tells our sandboxes from others.
package criconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"path/filepath"
	"regexp"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels of sandboxes and containers.
const (
	LabelManaged   = "skerry.io/managed" // "true" on all that is ours; nothing else is ever touched
	LabelPodName   = "io.kubernetes.pod.name"
	LabelNamespace = "io.kubernetes.pod.namespace"
	LabelUID       = "io.kubernetes.pod.uid"
	LabelContainer = "io.kubernetes.container.name"
)

// Annotations of containers.
const (
	AnnotationHash          = "io.kubernetes.container.hash"
	AnnotationRestartCount  = "io.kubernetes.container.restartCount"
	AnnotationMessagePath   = "io.kubernetes.container.terminationMessagePath"
	AnnotationMessagePolicy = "io.kubernetes.container.terminationMessagePolicy"
	AnnotationPreStop       = "io.kubernetes.container.preStopHandler"
	AnnotationPorts         = "io.kubernetes.container.ports"
	AnnotationGrace         = "io.kubernetes.pod.terminationGracePeriod" // seconds
)

var (
	uidPattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,127}$`)
	namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	namespace   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

// Check returns an error if the name of the pod or of one of its containers
// could lead out of the directories that are named after them, or if two of the
// containers share a name.
func Check(pod *corev1.Pod) error {
	if !uidPattern.MatchString(string(pod.UID)) {
		return fmt.Errorf("pod UID %q is not one", pod.UID)
	}
	if !namePattern.MatchString(pod.Name) || !namespace.MatchString(pod.Namespace) {
		return fmt.Errorf("pod name %q in namespace %q is not valid", pod.Name, pod.Namespace)
	}
	seen := map[string]bool{}
	for c := range Containers(pod) {
		if !namespace.MatchString(c.Name) {
			return fmt.Errorf("container name %q is not valid", c.Name)
		}
		if seen[c.Name] {
			return fmt.Errorf("two containers are named %q", c.Name)
		}
		seen[c.Name] = true
	}
	return nil
}

// CheckUID returns an error if uid could not be the name of a directory.
func CheckUID(uid types.UID) error {
	if !uidPattern.MatchString(string(uid)) {
		return fmt.Errorf("pod UID %q is not one", uid)
	}
	return nil
}

// Containers yields all containers of a pod: init, main, ephemeral.
func Containers(pod *corev1.Pod) func(yield func(*corev1.Container) bool) {
	return func(yield func(*corev1.Container) bool) {
		for i := range pod.Spec.InitContainers {
			if !yield(&pod.Spec.InitContainers[i]) {
				return
			}
		}
		for i := range pod.Spec.Containers {
			if !yield(&pod.Spec.Containers[i]) {
				return
			}
		}
		for i := range pod.Spec.EphemeralContainers {
			if !yield((*corev1.Container)(&pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)) {
				return
			}
		}
	}
}

// LogDirectory is where the logs of a pod are, below base.
func LogDirectory(base, namespace, name string, uid types.UID) string {
	return filepath.Join(base, namespace+"_"+name+"_"+string(uid))
}

// LogPath is the log of one run of a container, below the pod's log directory.
func LogPath(container string, attempt uint32) string {
	return filepath.Join(container, strconv.FormatUint(uint64(attempt), 10)+".log")
}

// Hash identifies what of a container cannot change while it runs: its image. It
// must stay the same in all versions of the edgelet, because containers whose
// hash differs from their spec's are restarted.
func Hash(c *corev1.Container) string {
	h := fnv.New64a()
	h.Write([]byte(c.Name + "\x00" + c.Image))
	return strconv.FormatUint(h.Sum64(), 16)
}

// SandboxOptions is what a sandbox's configuration needs besides the pod.
type SandboxOptions struct {
	Attempt      uint32
	LogDir       string         // directory of all logs
	Hostname     string         // ignored on the host's network
	DNS          *cri.DNSConfig // nil: the runtime's default
	CgroupParent string         // see [CgroupParent]
}

// Sandbox configures the sandbox of pod.
func Sandbox(pod *corev1.Pod, o SandboxOptions) (*cri.PodSandboxConfig, error) {
	if pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers {
		// To run it without what it relies on would be worse than not to.
		return nil, errors.New("hostUsers: false is not supported at this site")
	}
	linux, err := sandboxLinux(pod, o.CgroupParent)
	if err != nil {
		return nil, err
	}
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{
			Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: o.Attempt,
		},
		LogDirectory: LogDirectory(o.LogDir, pod.Namespace, pod.Name, pod.UID),
		DnsConfig:    o.DNS,
		Labels:       map[string]string{},
		Annotations:  map[string]string{},
		PortMappings: portMappings(pod),
		Linux:        linux,
	}
	for k, v := range pod.Labels {
		config.Labels[k] = v
	}
	for k, v := range pod.Annotations {
		config.Annotations[k] = v
	}
	for k, v := range podLabels(pod) {
		config.Labels[k] = v
	}
	if pod.Spec.TerminationGracePeriodSeconds != nil {
		config.Annotations[AnnotationGrace] = strconv.FormatInt(*pod.Spec.TerminationGracePeriodSeconds, 10)
	}
	if !pod.Spec.HostNetwork {
		config.Hostname = o.Hostname
	}
	return config, nil
}

func podLabels(pod *corev1.Pod) map[string]string {
	return map[string]string{
		LabelManaged:   "true",
		LabelPodName:   pod.Name,
		LabelNamespace: pod.Namespace,
		LabelUID:       string(pod.UID),
	}
}

func portMappings(pod *corev1.Pod) []*cri.PortMapping {
	if pod.Spec.HostNetwork {
		return nil
	}
	var mappings []*cri.PortMapping
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if p.HostPort == 0 {
				continue
			}
			protocol := cri.Protocol_TCP
			switch p.Protocol {
			case corev1.ProtocolUDP:
				protocol = cri.Protocol_UDP
			case corev1.ProtocolSCTP:
				protocol = cri.Protocol_SCTP
			}
			mappings = append(mappings, &cri.PortMapping{
				Protocol: protocol, ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIp: p.HostIP,
			})
		}
	}
	for i := range pod.Spec.InitContainers {
		if IsSidecar(&pod.Spec.InitContainers[i]) {
			add(&pod.Spec.InitContainers[i])
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	return mappings
}

// IsSidecar reports whether an init container is one that keeps running.
func IsSidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// ContainerOptions is what a container's configuration needs besides the pod.
type ContainerOptions struct {
	Attempt       uint32
	Image         string // what CreateContainer takes
	ImageUID      *int64 // user of the image, if it names a numeric one
	ImageUsername string // user of the image, if it names one by name
	Command, Args []string
	Env           []*cri.KeyValue
	Mounts        []*cri.Mount
	TargetID      string // container whose processes an ephemeral container sees
	SeccompDir    string // directory of Localhost profiles
	Memory        int64  // bytes of the machine, for the OOM score
	PageSizes     []string
	Unified       map[string]string // cgroup v2 settings for every container
}

// Container configures one container of pod.
func Container(pod *corev1.Pod, c *corev1.Container, o ContainerOptions) (*cri.ContainerConfig, error) {
	security, err := containerSecurity(pod, c, o)
	if err != nil {
		return nil, err
	}
	annotations, err := containerAnnotations(pod, c, o.Attempt)
	if err != nil {
		return nil, err
	}
	labels := podLabels(pod)
	labels[LabelContainer] = c.Name
	config := &cri.ContainerConfig{
		Metadata:    &cri.ContainerMetadata{Name: c.Name, Attempt: o.Attempt},
		Image:       &cri.ImageSpec{Image: o.Image, UserSpecifiedImage: c.Image},
		Command:     o.Command,
		Args:        o.Args,
		WorkingDir:  c.WorkingDir,
		Envs:        o.Env,
		Mounts:      o.Mounts,
		Labels:      labels,
		Annotations: annotations,
		LogPath:     LogPath(c.Name, o.Attempt),
		Stdin:       c.Stdin,
		StdinOnce:   c.StdinOnce,
		Tty:         c.TTY,
		Linux: &cri.LinuxContainerConfig{
			Resources:       Resources(pod, c, o.Memory, o.PageSizes),
			SecurityContext: security,
		},
	}
	config.Linux.Resources.Unified = o.Unified
	if c.Lifecycle != nil && c.Lifecycle.StopSignal != nil {
		signal, ok := cri.Signal_value["SIGNAL_"+string(*c.Lifecycle.StopSignal)]
		if !ok {
			return nil, fmt.Errorf("container %s: unknown stop signal %q", c.Name, *c.Lifecycle.StopSignal)
		}
		config.StopSignal = cri.Signal(signal)
	}
	return config, nil
}

func containerAnnotations(pod *corev1.Pod, c *corev1.Container, attempt uint32) (map[string]string, error) {
	a := map[string]string{
		AnnotationHash:          Hash(c),
		AnnotationRestartCount:  strconv.FormatUint(uint64(attempt), 10),
		AnnotationMessagePath:   c.TerminationMessagePath,
		AnnotationMessagePolicy: string(c.TerminationMessagePolicy),
	}
	if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
		a[AnnotationGrace] = strconv.FormatInt(*g, 10)
	}
	if c.Lifecycle != nil && c.Lifecycle.PreStop != nil {
		data, err := json.Marshal(c.Lifecycle.PreStop)
		if err != nil {
			return nil, fmt.Errorf("container %s: preStop: %w", c.Name, err)
		}
		a[AnnotationPreStop] = string(data)
	}
	if len(c.Ports) > 0 {
		data, err := json.Marshal(c.Ports)
		if err != nil {
			return nil, fmt.Errorf("container %s: ports: %w", c.Name, err)
		}
		a[AnnotationPorts] = string(data)
	}
	return a, nil
}
