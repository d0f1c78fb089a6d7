package pod

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestAdmission(t *testing.T) {
	request := func(cpu, memory string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{"cpu": resource.MustParse(cpu), "memory": resource.MustParse(memory)}
		}
	}
	port := func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{HostPort: 80, ContainerPort: 80}}
	}
	sysctl := func(name string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: name, Value: "1"}}}
		}
	}
	tests := map[string]struct {
		change func(*corev1.Pod)
		want   string // reason; empty: admitted
		text   string
	}{
		"fits":                         {request("500m", "1Gi"), "", ""},
		"too much cpu":                 {request("1501m", "1Gi"), "OutOfcpu", "Pod was rejected: Node didn't have enough resource: cpu, requested: 1501, used: 500, capacity: 2000"},
		"too much memory":              {request("1m", "4Gi"), "OutOfmemory", ""},
		"host port is taken":           {port, "NodePorts", ""},
		"host port, other protocol":    {func(p *corev1.Pod) { port(p); p.Spec.Containers[0].Ports[0].Protocol = "UDP" }, "", ""},
		"other node selected":          {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"site": "b"} }, "NodeAffinity", ""},
		"this node selected":           {func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"site": "a"} }, "", ""},
		"safe sysctl":                  {sysctl("net.ipv4.tcp_syncookies"), "", ""},
		"safe sysctl, kernel style":    {sysctl("net/ipv4/tcp_syncookies"), "", ""},
		"unsafe sysctl":                {sysctl("kernel.msgmax"), "SysctlForbidden", `Pod was rejected: forbidden sysctl: "kernel.msgmax" not allowlisted`},
		"sysctl that the site allows":  {sysctl("net.core.somaxconn"), "", ""},
		"sysctl of the host's network": {func(p *corev1.Pod) { sysctl("net.ipv4.tcp_syncookies")(p); p.Spec.HostNetwork = true }, "SysctlForbidden", ""},
		"other operating system":       {func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: "windows"} }, "PodOSNotSupported", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.conf = func(c *Config) {
					c.Allocatable = func() corev1.ResourceList {
						return corev1.ResourceList{"cpu": resource.MustParse("2"), "memory": resource.MustParse("4Gi"), "pods": resource.MustParse("2")}
					}
					c.Sysctls = []string{"net.core.*"}
				}
				w.site.node = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"site": "a"}}}
				w.engine(newPod(func(p *corev1.Pod) { p.UID, p.Name = "u0", "first" }, request("500m", "1Gi"), port))
				w.sleep(time.Second)
				pod := newPod(tt.change)
				w.m.Set(pod)
				w.sleep(time.Second)
				s := w.status("u1")
				if s.Reason != tt.want || tt.text != "" && s.Message != tt.text {
					t.Errorf("reason %q, message %q, want %q %q", s.Reason, s.Message, tt.want, tt.text)
				}
				if want := map[bool]corev1.PodPhase{true: corev1.PodRunning, false: corev1.PodFailed}[tt.want == ""]; s.Phase != want {
					t.Errorf("phase = %s, want %s", s.Phase, want)
				}
				// What was admitted is never refused later, even if it fits no more.
				w.end()
				w.conf = func(c *Config) {
					c.Allocatable = func() corev1.ResourceList { return corev1.ResourceList{"pods": resource.MustParse("0")} }
				}
				w.engine(newPod(func(p *corev1.Pod) { p.UID, p.Name = "u0", "first" }), pod)
				w.sleep(time.Minute)
				if again := w.status("u1"); again.Phase != s.Phase || again.Reason != s.Reason {
					t.Errorf("phase %s, reason %s after a restart", again.Phase, again.Reason)
				}
				w.m.Set(deleted(pod, 1))
				w.sleep(5 * time.Second)
				if !w.site.last("u1").Gone {
					t.Errorf("not gone after it was deleted")
				}
				w.end()
			})
		})
	}
}

func TestResize(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		w.conf = func(c *Config) {
			c.Allocatable = func() corev1.ResourceList { return corev1.ResourceList{"cpu": resource.MustParse("2")} }
		}
		sized := func(cpu string) *corev1.Pod {
			return newPod(func(p *corev1.Pod) {
				p.Spec.Containers[0].Resources = corev1.ResourceRequirements{
					Requests: corev1.ResourceList{"cpu": resource.MustParse(cpu)}, Limits: corev1.ResourceList{"cpu": resource.MustParse(cpu)}}
			})
		}
		w.engine(sized("1"))
		w.sleep(time.Second)
		w.m.Set(sized("1500m"))
		w.sleep(time.Second)
		quota := func() int64 { return w.rt.containers["c-3"].Resources.Linux.CpuQuota }
		c := w.status("u1").ContainerStatuses[0]
		if quota() != 150_000 || c.Resources.Limits.Cpu().String() != "1500m" || c.AllocatedResources.Cpu().String() != "1500m" || c.RestartCount != 0 {
			t.Errorf("quota %d, container %+v", quota(), c)
		}
		w.m.Set(sized("3"))
		w.sleep(time.Second)
		s := w.status("u1")
		if p := condition(s, corev1.PodResizePending); p.Reason != "Infeasible" || quota() != 150_000 || s.ContainerStatuses[0].AllocatedResources.Cpu().String() != "1500m" {
			t.Errorf("status %+v, quota %d, want pending", s, quota())
		}
		w.end()
		w.engine(sized("3")) // it remembers what was allocated
		w.sleep(time.Second)
		if p := condition(w.status("u1"), corev1.PodResizePending); p.Reason != "Infeasible" || quota() != 150_000 {
			t.Errorf("condition %+v, quota %d after a restart", p, quota())
		}
		w.rt.refuse("UpdateContainerResources")
		w.m.Set(sized("2"))
		w.sleep(time.Second)
		if p := condition(w.status("u1"), corev1.PodResizeInProgress); p.Status != "True" || p.Reason != "Error" {
			t.Errorf("condition %+v, want in progress, with an error", p)
		}
		w.rt.refuse("")
		w.sleep(time.Minute)
		if p := condition(w.status("u1"), corev1.PodResizeInProgress); p.Status != "" || quota() != 200_000 {
			t.Errorf("condition %+v, quota %d, want done", p, quota())
		}
		w.end()
	})
}
