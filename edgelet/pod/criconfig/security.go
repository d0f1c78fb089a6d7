package criconfig

import (
	"fmt"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a container must not see, or not write, of /proc and /sys unless its
// procMount is Unmasked.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
		"/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{
		"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
	}
)

func sandboxLinux(pod *corev1.Pod, cgroupParent string) (*cri.LinuxPodSandboxConfig, error) {
	security := &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: namespaces(pod),
		// The pause process needs nothing that the default profile forbids.
		Seccomp: &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
	}
	for c := range Containers(pod) {
		if c.SecurityContext != nil && deref(c.SecurityContext.Privileged) {
			security.Privileged = true
		}
	}
	sysctls := map[string]string{}
	if sc := pod.Spec.SecurityContext; sc != nil {
		var err error
		security.RunAsUser, security.RunAsGroup = int64Value(sc.RunAsUser), int64Value(sc.RunAsGroup)
		security.SelinuxOptions = selinux(sc.SELinuxOptions)
		security.SupplementalGroups, security.SupplementalGroupsPolicy, err = groups(sc)
		if err != nil {
			return nil, err
		}
		for _, s := range sc.Sysctls {
			sysctls[s.Name] = s.Value
		}
	}
	return &cri.LinuxPodSandboxConfig{
		CgroupParent: cgroupParent, SecurityContext: security, Sysctls: sysctls,
	}, nil
}

func namespaces(pod *corev1.Pod) *cri.NamespaceOption {
	o := &cri.NamespaceOption{
		Network: NetworkMode(pod),
		Ipc:     cri.NamespaceMode_POD,
		Pid:     cri.NamespaceMode_CONTAINER,
	}
	if pod.Spec.HostIPC {
		o.Ipc = cri.NamespaceMode_NODE
	}
	switch {
	case pod.Spec.HostPID:
		o.Pid = cri.NamespaceMode_NODE
	case deref(pod.Spec.ShareProcessNamespace):
		o.Pid = cri.NamespaceMode_POD
	}
	return o
}

// NetworkMode is the network namespace that the pod's sandbox must have.
func NetworkMode(pod *corev1.Pod) cri.NamespaceMode {
	if pod.Spec.HostNetwork {
		return cri.NamespaceMode_NODE
	}
	return cri.NamespaceMode_POD
}

func groups(sc *corev1.PodSecurityContext) ([]int64, cri.SupplementalGroupsPolicy, error) {
	var ids []int64
	if sc.FSGroup != nil {
		ids = append(ids, *sc.FSGroup)
	}
	ids = append(ids, sc.SupplementalGroups...)
	if sc.SupplementalGroupsPolicy == nil {
		return ids, cri.SupplementalGroupsPolicy_Merge, nil
	}
	policy, ok := cri.SupplementalGroupsPolicy_value[string(*sc.SupplementalGroupsPolicy)]
	if !ok {
		return nil, 0, fmt.Errorf("unsupported supplementalGroupsPolicy %q", *sc.SupplementalGroupsPolicy)
	}
	return ids, cri.SupplementalGroupsPolicy(policy), nil
}

func containerSecurity(pod *corev1.Pod, c *corev1.Container, o ContainerOptions) (*cri.LinuxContainerSecurityContext, error) {
	own, shared := c.SecurityContext, pod.Spec.SecurityContext
	if own == nil {
		own = &corev1.SecurityContext{}
	}
	if shared == nil {
		shared = &corev1.PodSecurityContext{}
	}
	user := first(own.RunAsUser, shared.RunAsUser)
	if deref(first(own.RunAsNonRoot, shared.RunAsNonRoot)) {
		if err := checkNonRoot(c.Name, user, o); err != nil {
			return nil, err
		}
	}
	s := &cri.LinuxContainerSecurityContext{
		Capabilities:     capabilities(own.Capabilities),
		Privileged:       deref(own.Privileged),
		NamespaceOptions: namespaces(pod),
		SelinuxOptions:   selinux(first(own.SELinuxOptions, shared.SELinuxOptions)),
		RunAsUser:        int64Value(user),
		RunAsGroup:       int64Value(first(own.RunAsGroup, shared.RunAsGroup)),
		ReadonlyRootfs:   deref(own.ReadOnlyRootFilesystem),
		NoNewPrivs:       own.AllowPrivilegeEscalation != nil && !*own.AllowPrivilegeEscalation,
		MaskedPaths:      maskedPaths,
		ReadonlyPaths:    readonlyPaths,
	}
	if own.ProcMount != nil && *own.ProcMount == corev1.UnmaskedProcMount {
		s.MaskedPaths, s.ReadonlyPaths = nil, nil
	}
	if user == nil {
		s.RunAsUser, s.RunAsUsername = imageUser(o)
	}
	if o.TargetID != "" && s.NamespaceOptions.Pid == cri.NamespaceMode_CONTAINER {
		s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = cri.NamespaceMode_TARGET, o.TargetID
	}
	var err error
	if s.SupplementalGroups, s.SupplementalGroupsPolicy, err = groups(shared); err != nil {
		return nil, err
	}
	if s.Seccomp, err = seccomp(first(own.SeccompProfile, shared.SeccompProfile), o.SeccompDir); err != nil {
		return nil, err
	}
	s.Apparmor, s.ApparmorProfile, err = apparmor(first(own.AppArmorProfile, shared.AppArmorProfile))
	return s, err
}

// imageUser is the user that the image names; an image that names none runs as root.
func imageUser(o ContainerOptions) (*cri.Int64Value, string) {
	switch {
	case o.ImageUID != nil:
		return int64Value(o.ImageUID), ""
	case o.ImageUsername != "":
		return nil, o.ImageUsername
	}
	return &cri.Int64Value{}, ""
}

func checkNonRoot(name string, user *int64, o ContainerOptions) error {
	switch {
	case user != nil && *user == 0:
		return fmt.Errorf("container's runAsUser breaks non-root policy (container: %s)", name)
	case user != nil:
		return nil
	case o.ImageUID == nil && o.ImageUsername != "":
		return fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root (container: %s)",
			o.ImageUsername, name)
	case o.ImageUID == nil || *o.ImageUID == 0:
		return fmt.Errorf("container has runAsNonRoot and image will run as root (container: %s)", name)
	}
	return nil
}

func seccomp(p *corev1.SeccompProfile, dir string) (*cri.SecurityProfile, error) {
	if p == nil {
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, nil
	}
	switch p.Type {
	case corev1.SeccompProfileTypeRuntimeDefault:
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, nil
	case corev1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || !filepath.IsLocal(*p.LocalhostProfile) {
			return nil, fmt.Errorf("localhostProfile must be set to a path below %s if seccompProfile type is Localhost", dir)
		}
		return &cri.SecurityProfile{
			ProfileType:  cri.SecurityProfile_Localhost,
			LocalhostRef: filepath.Join(dir, *p.LocalhostProfile),
		}, nil
	}
	return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, nil
}

// apparmor also returns the profile in the form that runtimes took before CRI
// had a field for it.
func apparmor(p *corev1.AppArmorProfile) (*cri.SecurityProfile, string, error) {
	if p == nil {
		return nil, "", nil
	}
	switch p.Type {
	case corev1.AppArmorProfileTypeRuntimeDefault:
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, "runtime/default", nil
	case corev1.AppArmorProfileTypeUnconfined:
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, "unconfined", nil
	case corev1.AppArmorProfileTypeLocalhost:
		if p.LocalhostProfile == nil || *p.LocalhostProfile == "" {
			return nil, "", fmt.Errorf("localhostProfile must be set if appArmorProfile type is Localhost")
		}
		return &cri.SecurityProfile{
			ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: *p.LocalhostProfile,
		}, "localhost/" + *p.LocalhostProfile, nil
	}
	return nil, "", fmt.Errorf("unknown appArmorProfile type %q", p.Type)
}

func capabilities(c *corev1.Capabilities) *cri.Capability {
	if c == nil {
		return nil
	}
	out := &cri.Capability{}
	for _, name := range c.Add {
		out.AddCapabilities = append(out.AddCapabilities, string(name))
	}
	for _, name := range c.Drop {
		out.DropCapabilities = append(out.DropCapabilities, string(name))
	}
	return out
}

func selinux(o *corev1.SELinuxOptions) *cri.SELinuxOption {
	if o == nil {
		return nil
	}
	return &cri.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

func int64Value(v *int64) *cri.Int64Value {
	if v == nil {
		return nil
	}
	return &cri.Int64Value{Value: *v}
}

func deref(b *bool) bool { return b != nil && *b }

// first returns the first pointer that is not nil.
func first[T any](pointers ...*T) *T {
	for _, p := range pointers {
		if p != nil {
			return p
		}
	}
	return nil
}
