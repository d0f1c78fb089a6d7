package pod

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func TestTerminationMessages(t *testing.T) {
	tests := map[string]struct {
		file, log string
		code      int32
		policy    corev1.TerminationMessagePolicy
		want      string
	}{
		"file":                     {"out of paper", "", 1, "", "out of paper"},
		"file of a success":        {"done", "", 0, "", "done"},
		"long file: its end":       {strings.Repeat("a", 5000) + "end", "", 1, "", strings.Repeat("a", 4093) + "end"},
		"no file, no fallback":     {"", "t stdout F hello\n", 1, "", ""},
		"log instead":              {"", "t stdout F hello\nt stderr P wor\nt stderr F ld\n", 1, corev1.TerminationMessageFallbackToLogsOnError, "hello\nworld\n"},
		"log of a success: not it": {"", "t stdout F hello\n", 0, corev1.TerminationMessageFallbackToLogsOnError, ""},
		"file before log":          {"file", "t stdout F hello\n", 1, corev1.TerminationMessageFallbackToLogsOnError, "file"},
		"long log: 80 lines":       {"", strings.Repeat("t stdout F x\n", 100), 1, corev1.TerminationMessageFallbackToLogsOnError, strings.Repeat("x\n", 80)},
		"long lines: 2048 bytes":   {"", "t stdout F " + strings.Repeat("y", 9000) + "\n", 1, corev1.TerminationMessageFallbackToLogsOnError, strings.Repeat("y", 2047) + "\n"},
		"not text":                 {"\xff\xfe", "", 1, "", "\uFFFD"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.engine(newPod(func(p *corev1.Pod) {
					p.Spec.RestartPolicy = corev1.RestartPolicyNever
					p.Spec.Containers[0].TerminationMessagePolicy = tt.policy
				}))
				w.sleep(time.Second)
				for _, m := range w.rt.configs["c-3"].Mounts {
					if m.ContainerPath == "/dev/termination-log" {
						if err := os.WriteFile(m.HostPath, []byte(tt.file), 0o666); err != nil {
							t.Fatal(err)
						}
					}
				}
				log := filepath.Join(w.rt.boxes["box-2"].LogDirectory, w.rt.configs["c-3"].LogPath)
				if err := os.WriteFile(log, []byte(tt.log), 0o600); err != nil {
					t.Fatal(err)
				}
				w.rt.kill("web", tt.code)
				w.sleep(time.Second)
				if got := w.status("u1").ContainerStatuses[0].State.Terminated.Message; got != tt.want {
					t.Errorf("message = %.60q (%d bytes), want %.60q (%d bytes)", got, len(got), tt.want, len(tt.want))
				}
				w.end()
			})
		})
	}
}

func TestFilesStayInside(t *testing.T) {
	try(t, func(t *testing.T, w *world) {
		canary := filepath.Join(t.TempDir(), "canary")
		os.WriteFile(canary, []byte("secret"), 0o600)
		w.engine(newPod(func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.Containers[0].TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
		}))
		w.sleep(time.Second)
		// Somebody with a hostPath on the log directory puts links there.
		log := filepath.Join(w.rt.boxes["box-2"].LogDirectory, w.rt.configs["c-3"].LogPath)
		if err := os.Symlink(canary, log); err != nil {
			t.Fatal(err)
		}
		w.rt.kill("web", 1)
		w.sleep(time.Second)
		if m := w.status("u1").ContainerStatuses[0].State.Terminated.Message; strings.Contains(m, "secret") {
			t.Errorf("message = %q", m)
		}
		w.end()
	})
	for _, pod := range []*corev1.Pod{
		newPod(func(p *corev1.Pod) { p.UID = "../x" }),
		newPod(func(p *corev1.Pod) { p.Name = "../x" }),
		newPod(func(p *corev1.Pod) { p.Namespace = "a/b" }),
		newPod(func(p *corev1.Pod) { p.Spec.Containers[0].Name = ".." }),
	} {
		m, err := NewManager(newWorld(t).config())
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Set(pod); err == nil {
			t.Errorf("Set(%s/%s %s) = nil, want an error", pod.Namespace, pod.Name, pod.UID)
		}
	}
}

func TestCgroupsAreRemoved(t *testing.T) {
	tests := map[string]struct {
		driver string
		v2     bool
		dirs   []string
	}{
		"v1, cgroupfs": {"cgroupfs", false, []string{"cpu/kubepods/besteffort/podu1/c-3", "memory/kubepods/besteffort/podu1", "pids/kubepods"}},
		"v2, cgroupfs": {"cgroupfs", true, []string{"kubepods/besteffort/podu1/c-3/deep"}},
		"v2, systemd":  {"systemd", true, []string{"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podu1.slice/x.scope"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			try(t, func(t *testing.T, w *world) {
				w.conf = func(c *Config) { c.CgroupDriver = func() string { return tt.driver } }
				for _, dir := range append(tt.dirs, "kubepods/podother") {
					if err := os.MkdirAll(filepath.Join(w.dir, "cgroup", dir), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				if tt.v2 {
					os.WriteFile(filepath.Join(w.dir, "cgroup", "cgroup.controllers"), nil, 0o600)
				}
				pod := newPod()
				w.engine(pod)
				w.sleep(time.Second)
				w.m.Set(deleted(pod, 1))
				w.sleep(5 * time.Second)
				if !w.site.last("u1").Gone {
					t.Errorf("not gone")
				}
				filepath.WalkDir(filepath.Join(w.dir, "cgroup"), func(path string, _ fs.DirEntry, _ error) error {
					if strings.Contains(path, "podu1") {
						t.Errorf("%s is left", path)
					}
					return nil
				})
				if _, err := os.Stat(filepath.Join(w.dir, "cgroup", "kubepods/podother")); err != nil {
					t.Error(err)
				}
				w.end()
			})
		})
	}
}
