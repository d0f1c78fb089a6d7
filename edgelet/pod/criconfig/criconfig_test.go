package criconfig

import (
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newPod(change ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default", UID: "a1-b2"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "web", Image: "nginx"}}},
	}
	for _, f := range change {
		f(pod)
	}
	return pod
}

func list(cpu, memory string) corev1.ResourceList {
	l := corev1.ResourceList{}
	if cpu != "" {
		l["cpu"] = resource.MustParse(cpu)
	}
	if memory != "" {
		l["memory"] = resource.MustParse(memory)
	}
	return l
}

func resources(requests, limits corev1.ResourceList) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: requests, Limits: limits}
	}
}

func TestQOSAndCgroupParent(t *testing.T) {
	second := func(p *corev1.Pod) { p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "b"}) }
	tests := map[string]struct {
		pod                *corev1.Pod
		qos                corev1.PodQOSClass
		cgroupfs, inSlices string
	}{
		"nothing asked for": {newPod(), corev1.PodQOSBestEffort, "/kubepods/besteffort/poda1-b2",
			"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda1_b2.slice"},
		"a request": {newPod(resources(list("1", ""), nil)), corev1.PodQOSBurstable, "/kubepods/burstable/poda1-b2",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda1_b2.slice"},
		"limits alone are requests too": {newPod(resources(nil, list("1", "1Gi"))), corev1.PodQOSGuaranteed, "/kubepods/poda1-b2",
			"/kubepods.slice/kubepods-poda1_b2.slice"},
		"one limit is missing":        {newPod(resources(list("1", "1Gi"), list("1", ""))), corev1.PodQOSBurstable, "/kubepods/burstable/poda1-b2", ""},
		"request below limit":         {newPod(resources(list("1", "1Gi"), list("2", "1Gi"))), corev1.PodQOSBurstable, "/kubepods/burstable/poda1-b2", ""},
		"one of two asks for nothing": {newPod(resources(nil, list("1", "1Gi")), second), corev1.PodQOSBurstable, "/kubepods/burstable/poda1-b2", ""},
		"limits of the pod": {newPod(func(p *corev1.Pod) {
			p.Spec.Resources = &corev1.ResourceRequirements{Limits: list("1", "1Gi")}
		}), corev1.PodQOSGuaranteed, "/kubepods/poda1-b2", ""},
		"the API server has said so": {newPod(func(p *corev1.Pod) { p.Status.QOSClass = corev1.PodQOSBurstable }), corev1.PodQOSBurstable, "/kubepods/burstable/poda1-b2", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := QOS(tt.pod); got != tt.qos {
				t.Errorf("QOS = %s, want %s", got, tt.qos)
			}
			if got := CgroupParent("kubepods", DriverCgroupfs, tt.pod); got != tt.cgroupfs {
				t.Errorf("cgroup = %s, want %s", got, tt.cgroupfs)
			}
			if got := CgroupParent("kubepods", DriverSystemd, tt.pod); tt.inSlices != "" && got != tt.inSlices {
				t.Errorf("slice = %s, want %s", got, tt.inSlices)
			}
		})
	}
}

func TestResources(t *testing.T) {
	const gi = 1 << 30
	tests := map[string]struct {
		pod  *corev1.Pod
		want *cri.LinuxContainerResources
	}{
		"nothing": {newPod(), &cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 2, OomScoreAdj: 1000}},
		"guaranteed": {newPod(resources(nil, list("500m", "1Gi"))),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 512, CpuQuota: 50_000, MemoryLimitInBytes: gi, OomScoreAdj: -997}},
		"burstable: a tenth of the memory": {newPod(resources(list("1", "1Gi"), list("2", "2Gi"))),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 1024, CpuQuota: 200_000, MemoryLimitInBytes: 2 * gi, OomScoreAdj: 900}},
		"burstable without memory": {newPod(resources(list("1", ""), nil)),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 1024, OomScoreAdj: 999}},
		"all of the memory": {newPod(resources(list("", "10Gi"), nil)),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 2, OomScoreAdj: 3}},
		"a tiny limit": {newPod(resources(list("1m", ""), list("1m", ""))),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 2, CpuQuota: 1000, OomScoreAdj: 999}},
		"limit of the pod": {newPod(func(p *corev1.Pod) { p.Spec.Resources = &corev1.ResourceRequirements{Limits: list("", "1Gi")} }),
			&cri.LinuxContainerResources{CpuPeriod: 100_000, CpuShares: 2, MemoryLimitInBytes: gi, OomScoreAdj: 999}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := Resources(tt.pod, &tt.pod.Spec.Containers[0], 10*gi, nil); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("Resources = %v, want %v", got, tt.want)
			}
		})
	}
	pod := newPod(resources(nil, corev1.ResourceList{"hugepages-2Mi": resource.MustParse("4Mi")}))
	got := Resources(pod, &pod.Spec.Containers[0], gi, []string{"2MB", "1GB"}).HugepageLimits
	if len(got) != 2 || got[0].Limit != 4<<20 || got[1].Limit != 0 {
		t.Errorf("huge pages = %v, want 4 MiB of 2MB, none of 1GB", got)
	}
}

func TestSecurity(t *testing.T) {
	own := func(sc corev1.SecurityContext) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.Containers[0].SecurityContext = &sc }
	}
	shared := func(sc corev1.PodSecurityContext) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.SecurityContext = &sc }
	}
	localhost := func(path string) *corev1.SeccompProfile {
		return &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost, LocalhostProfile: &path}
	}
	type s = *cri.LinuxContainerSecurityContext
	tests := map[string]struct {
		pod   *corev1.Pod
		o     ContainerOptions
		check func(s) bool
		err   string
	}{
		"nothing: root, masked, unconfined": {pod: newPod(), check: func(s s) bool {
			return s.RunAsUser.GetValue() == 0 && s.RunAsUser != nil && slices.Contains(s.MaskedPaths, "/proc/kcore") && slices.Contains(s.ReadonlyPaths, "/proc/sys") &&
				s.Seccomp.ProfileType == cri.SecurityProfile_Unconfined && !s.NoNewPrivs && !s.Privileged
		}},
		"user of the image":       {pod: newPod(), o: ContainerOptions{ImageUID: new(int64(7))}, check: func(s s) bool { return s.RunAsUser.GetValue() == 7 }},
		"named user of the image": {pod: newPod(), o: ContainerOptions{ImageUsername: "www"}, check: func(s s) bool { return s.RunAsUser == nil && s.RunAsUsername == "www" }},
		"user of the pod":         {pod: newPod(shared(corev1.PodSecurityContext{RunAsUser: new(int64(8))})), check: func(s s) bool { return s.RunAsUser.GetValue() == 8 }},
		"the container's own counts": {pod: newPod(shared(corev1.PodSecurityContext{RunAsUser: new(int64(8)), RunAsGroup: new(int64(9))}), own(corev1.SecurityContext{RunAsUser: new(int64(10))})),
			check: func(s s) bool { return s.RunAsUser.GetValue() == 10 && s.RunAsGroup.GetValue() == 9 }},
		"non-root, image is root":           {pod: newPod(own(corev1.SecurityContext{RunAsNonRoot: new(true)})), err: "image will run as root"},
		"non-root, image names a user":      {pod: newPod(own(corev1.SecurityContext{RunAsNonRoot: new(true)})), o: ContainerOptions{ImageUsername: "www"}, err: "non-numeric user (www)"},
		"non-root, image has a number":      {pod: newPod(own(corev1.SecurityContext{RunAsNonRoot: new(true)})), o: ContainerOptions{ImageUID: new(int64(5))}, check: func(s s) bool { return true }},
		"non-root, root asked for":          {pod: newPod(shared(corev1.PodSecurityContext{RunAsNonRoot: new(true)}), own(corev1.SecurityContext{RunAsUser: new(int64(0))})), err: "breaks non-root policy"},
		"non-root of the pod is overridden": {pod: newPod(shared(corev1.PodSecurityContext{RunAsNonRoot: new(true)}), own(corev1.SecurityContext{RunAsNonRoot: new(false)})), check: func(s s) bool { return true }},
		"no privilege escalation":           {pod: newPod(own(corev1.SecurityContext{AllowPrivilegeEscalation: new(false)})), check: func(s s) bool { return s.NoNewPrivs }},
		"privileged":                        {pod: newPod(own(corev1.SecurityContext{Privileged: new(true), AllowPrivilegeEscalation: new(true)})), check: func(s s) bool { return s.Privileged && !s.NoNewPrivs }},
		"read-only root":                    {pod: newPod(own(corev1.SecurityContext{ReadOnlyRootFilesystem: new(true)})), check: func(s s) bool { return s.ReadonlyRootfs }},
		"unmasked /proc":                    {pod: newPod(own(corev1.SecurityContext{ProcMount: new(corev1.UnmaskedProcMount)})), check: func(s s) bool { return len(s.MaskedPaths)+len(s.ReadonlyPaths) == 0 }},
		"capabilities": {pod: newPod(own(corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}, Drop: []corev1.Capability{"ALL"}}})),
			check: func(s s) bool {
				return s.Capabilities.AddCapabilities[0] == "NET_ADMIN" && s.Capabilities.DropCapabilities[0] == "ALL"
			}},
		"groups": {pod: newPod(shared(corev1.PodSecurityContext{FSGroup: new(int64(1)), SupplementalGroups: []int64{2, 3}, SupplementalGroupsPolicy: new(corev1.SupplementalGroupsPolicyStrict)})),
			check: func(s s) bool {
				return slices.Equal(s.SupplementalGroups, []int64{1, 2, 3}) && s.SupplementalGroupsPolicy == cri.SupplementalGroupsPolicy_Strict
			}},
		"unknown policy of groups": {pod: newPod(shared(corev1.PodSecurityContext{SupplementalGroupsPolicy: new(corev1.SupplementalGroupsPolicy("Odd"))})), err: "unsupported"},
		"seccomp of the pod": {pod: newPod(shared(corev1.PodSecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}})),
			check: func(s s) bool { return s.Seccomp.ProfileType == cri.SecurityProfile_RuntimeDefault }},
		"seccomp of the site":    {pod: newPod(own(corev1.SecurityContext{SeccompProfile: localhost("a/b.json")})), check: func(s s) bool { return s.Seccomp.LocalhostRef == "/seccomp/a/b.json" }},
		"seccomp from elsewhere": {pod: newPod(own(corev1.SecurityContext{SeccompProfile: localhost("../../etc/shadow")})), err: "below /seccomp"},
		"seccomp from the root":  {pod: newPod(own(corev1.SecurityContext{SeccompProfile: localhost("/etc/shadow")})), err: "below /seccomp"},
		"apparmor": {pod: newPod(own(corev1.SecurityContext{AppArmorProfile: &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeLocalhost, LocalhostProfile: new("mine")}})),
			check: func(s s) bool { return s.Apparmor.LocalhostRef == "mine" && s.ApparmorProfile == "localhost/mine" }},
		"selinux": {pod: newPod(shared(corev1.PodSecurityContext{SELinuxOptions: &corev1.SELinuxOptions{Level: "s0"}})), check: func(s s) bool { return s.SelinuxOptions.Level == "s0" }},
		"host's processes": {pod: newPod(func(p *corev1.Pod) { p.Spec.HostPID, p.Spec.HostIPC, p.Spec.HostNetwork = true, true, true }), check: func(s s) bool {
			o := s.NamespaceOptions
			return o.Pid == cri.NamespaceMode_NODE && o.Ipc == cri.NamespaceMode_NODE && o.Network == cri.NamespaceMode_NODE
		}},
		"shared processes": {pod: newPod(func(p *corev1.Pod) { p.Spec.ShareProcessNamespace = new(true) }), o: ContainerOptions{TargetID: "x"},
			check: func(s s) bool {
				return s.NamespaceOptions.Pid == cri.NamespaceMode_POD && s.NamespaceOptions.TargetId == ""
			}},
		"processes of a target": {pod: newPod(), o: ContainerOptions{TargetID: "x"},
			check: func(s s) bool {
				return s.NamespaceOptions.Pid == cri.NamespaceMode_TARGET && s.NamespaceOptions.TargetId == "x"
			}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.o.SeccompDir = "/seccomp"
			config, err := Container(tt.pod, &tt.pod.Spec.Containers[0], tt.o)
			switch {
			case tt.err != "":
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error = %v, want %q", err, tt.err)
				}
			case err != nil:
				t.Error(err)
			case !tt.check(config.Linux.SecurityContext):
				t.Errorf("security context = %v", config.Linux.SecurityContext)
			}
		})
	}
}

func TestSandbox(t *testing.T) {
	pod := newPod(func(p *corev1.Pod) {
		p.Labels = map[string]string{"app": "x", LabelUID: "forged", LabelManaged: "false"}
		p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "net.core.somaxconn", Value: "9"}}}
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 8080, Protocol: "UDP", HostIP: "127.0.0.1"}, {ContainerPort: 81}}
		p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: new(true)}
	})
	box, err := Sandbox(pod, SandboxOptions{Attempt: 2, LogDir: "/logs", Hostname: "h", CgroupParent: "/c"})
	if err != nil {
		t.Fatal(err)
	}
	if box.Labels[LabelUID] != "a1-b2" || box.Labels[LabelManaged] != "true" || box.Labels["app"] != "x" {
		t.Errorf("labels = %v, want the pod's, but ours for what is ours", box.Labels)
	}
	want := []*cri.PortMapping{{Protocol: cri.Protocol_UDP, ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}}
	if box.LogDirectory != "/logs/default_p_a1-b2" || box.Hostname != "h" || box.Linux.Sysctls["net.core.somaxconn"] != "9" ||
		!box.Linux.SecurityContext.Privileged || !reflect.DeepEqual(box.PortMappings, want) || box.Metadata.Attempt != 2 {
		t.Errorf("sandbox = %v", box)
	}
	pod.Spec.HostNetwork = true
	if box, err := Sandbox(pod, SandboxOptions{Hostname: "h"}); err != nil || box.Hostname != "" || box.PortMappings != nil {
		t.Errorf("on the host's network: %v, %v, want neither host name nor ports", box, err)
	}
}

func TestStopSignal(t *testing.T) {
	pod := newPod(func(p *corev1.Pod) {
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{StopSignal: new(corev1.SIGUSR1)}
	})
	config, err := Container(pod, &pod.Spec.Containers[0], ContainerOptions{})
	if err != nil || config.StopSignal != cri.Signal_SIGNAL_SIGUSR1 {
		t.Errorf("signal = %v, %v, want SIGUSR1", config.GetStopSignal(), err)
	}
}

// The hash is kept in the runtime by edgelets of all versions: it never changes.
func TestHashIsStable(t *testing.T) {
	if got := Hash(&corev1.Container{Name: "web", Image: "nginx:1", Args: []string{"x"}}); got != "1b02ace9941cfe44" {
		t.Errorf("Hash = %s", got)
	}
}

func FuzzCheck(f *testing.F) {
	for _, s := range []string{"web", "..", "a/b", "", "a_b", "A", "x\x00y", "-", strings.Repeat("a", 300)} {
		f.Add(s, s, s, s)
	}
	f.Fuzz(func(t *testing.T, namespace, name, uid, container string) {
		pod := newPod(func(p *corev1.Pod) {
			p.Namespace, p.Name, p.UID, p.Spec.Containers[0].Name = namespace, name, types.UID(uid), container
		})
		if Check(pod) != nil {
			return
		}
		dir := LogDirectory("/logs", namespace, name, pod.UID)
		if filepath.Dir(dir) != "/logs" || strings.Count(filepath.Base(dir), "_") != 2 {
			t.Errorf("log directory %q", dir)
		}
		if log := filepath.Join(dir, LogPath(container, 1)); filepath.Dir(filepath.Dir(log)) != dir {
			t.Errorf("log %q", log)
		}
		if filepath.Dir(CgroupParent("kubepods", DriverCgroupfs, pod)) != "/kubepods/besteffort" {
			t.Errorf("cgroup %q", CgroupParent("kubepods", DriverCgroupfs, pod))
		}
	})
}

func FuzzPageSize(f *testing.F) {
	for entry, want := range map[string]string{"hugepages-2048kB": "2MB", "hugepages-1048576kB": "1GB", "hugepages-64kB": "64KB", "hugepages-0kB": "", "x": ""} {
		if got := PageSize(entry); got != want {
			f.Errorf("PageSize(%q) = %q, want %q", entry, got, want)
		}
		f.Add(entry)
	}
	f.Fuzz(func(t *testing.T, entry string) {
		if got := PageSize(entry); got != "" && !strings.HasSuffix(got, "B") {
			t.Errorf("PageSize(%q) = %q", entry, got)
		}
	})
}
