package volume

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// everything is a pod with a volume of each kind that changes something, and a
// container with subPaths of them.
func everything(mounts bool) (*corev1.Pod, *corev1.Container) {
	disk, conf, secret, memory := emptyDirVolume(""), configMapVolume("conf"), secretVolume("keys"), emptyDirVolume(corev1.StorageMediumMemory)
	disk.Name, conf.Name, secret.Name, memory.Name = "d", "c", "s", "m"
	pod := podOf(disk, conf)
	c := &corev1.Container{Name: "main"}
	if mounts {
		pod.Spec.Volumes = append(pod.Spec.Volumes, secret, memory)
		c.VolumeMounts = []corev1.VolumeMount{{Name: "c", MountPath: "/c", SubPath: "a"}, {Name: "m", MountPath: "/m", SubPath: "new/dir"}, {Name: "d", MountPath: "/d", SubPath: "new"}}
	}
	return pod, c
}

func content1() *objects {
	return &objects{configMaps: map[string]map[string]string{"conf": {"a": "1", "gone": "x"}}, secrets: map[string]map[string]string{"keys": {"k": "1"}}}
}

func content2() *objects {
	return &objects{configMaps: map[string]map[string]string{"conf": {"a": "2", "new": "y"}}, secrets: map[string]map[string]string{"keys": {"k": "2"}}}
}

// prepare does what the edgelet does before it starts a container.
func prepare(m *Manager, pod *corev1.Pod, c *corev1.Container) error {
	if err := m.Setup(context.Background(), pod); err != nil {
		return err
	}
	_, err := m.Mounts(context.Background(), pod, c, nil)
	return err
}

// until runs f with m interrupted at its step n and reports whether it came to
// that. It leaves what a kill at that point leaves: nothing that f defers
// changes a file or a mount.
func until(m *Manager, n int, f func() error) (stopped bool, err error) {
	type interruption struct{}
	m.step = func(string) {
		if n--; n < 0 {
			panic(interruption{})
		}
	}
	defer func() {
		m.step = func(string) {}
		if r := recover(); r != nil {
			if _, ok := r.(interruption); !ok {
				panic(r)
			}
			stopped = true
		}
	}()
	return false, f()
}

// again returns a manager as of a new process on the same directory.
func again(t *testing.T, m *Manager, o *objects) *Manager {
	t.Helper()
	config := m.config
	config.Objects = o
	next, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// checkWhole checks that everything is as if nothing had happened.
func checkWhole(t *testing.T, m *Manager, mounts bool) {
	t.Helper()
	base := filepath.Join(m.dir, "u-1")
	if got := visible(t, base+"/volumes/kubernetes.io~configmap/c"); got != "a -rw-r--r-- 2\nnew -rw-r--r-- y" {
		t.Errorf("configMap has %q", got)
	}
	if left, _ := filepath.Glob(base + "/volumes/kubernetes.io~configmap/c/..*"); len(left) != 2 {
		t.Errorf("configMap has also %q", left)
	}
	if left, _ := filepath.Glob(base + "/volumes/*/.new-*"); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
	if info, err := os.Stat(base + "/volumes/kubernetes.io~empty-dir/d"); err != nil || info.Mode() != os.ModeDir|0o777 {
		t.Errorf("emptyDir: %v, %v", info.Mode(), err)
	}
	if !mounts {
		return
	}
	if got := visible(t, base+"/volumes/kubernetes.io~secret/s"); got != "k -rw-r--r-- 2" {
		t.Errorf("secret has %q", got)
	}
	if got := read(t, base+"/volume-subpaths/c/main/0"); got != "2" {
		t.Errorf("subPath of the configMap shows %q", got)
	}
	if below, err := mountsBelow(m.dir); err != nil || len(below) != 5 {
		t.Errorf("mounted are %q, %v, want two tmpfs and three subPaths", below, err)
	}
}

func TestInterruptedAtEachStep(t *testing.T) {
	mounts := os.Getenv(inside) != ""
	if !mounts {
		t.Log("without mounts: this user may not mount")
	}
	pod, c := everything(mounts)
	for name, first := range map[string]bool{"making": false, "updating": true} {
		t.Run(name, func(t *testing.T) {
			n := 0
			for stopped := true; stopped; n++ {
				m := manager(t, content1())
				if first {
					if err := prepare(m, pod, c); err != nil {
						t.Fatal(err)
					}
				}
				m = again(t, m, content2())
				var err error
				if stopped, err = until(m, n, func() error { return prepare(m, pod, c) }); err != nil {
					t.Fatalf("step %d: %v", n, err)
				}
				m = again(t, m, content2())
				if n%2 == 0 { // every other time it is healed before it is removed
					if err := prepare(m, pod, c); err != nil {
						t.Fatalf("after an end at step %d: %v", n, err)
					}
					checkWhole(t, m, mounts)
				}
				removeInterrupted(t, m, n)
			}
			if n < 10 {
				t.Errorf("only %d steps", n)
			}
		})
	}
}

// removeInterrupted tears down with an interruption at step n, then whole.
func removeInterrupted(t *testing.T, m *Manager, n int) {
	t.Helper()
	if _, err := until(m, n, func() error { return m.Teardown(t.Context(), "u-1") }); err != nil {
		t.Fatalf("teardown until step %d: %v", n, err)
	}
	if err := again(t, m, content2()).Teardown(t.Context(), "u-1"); err != nil {
		t.Fatalf("teardown after one that ended at step %d: %v", n, err)
	}
	below, err := mountsBelow(m.dir)
	entries, err2 := os.ReadDir(m.dir)
	if err != nil || err2 != nil || len(below)+len(entries) > 0 {
		t.Fatalf("step %d: left are mounts %q and files %v (%v, %v)", n, below, entries, err, err2)
	}
}

// victimDir makes the test binary a process that makes, updates and removes the
// volumes of one pod in that directory until it is killed.
const victimDir = "SKERRY_VOLUME_TEST_VICTIM"

func beKilled() {
	pod, c := everything(true)
	fmt.Println("ready")
	for i := 0; ; i++ {
		o := content1()
		if i%2 == 0 {
			o = content2()
		}
		m, err := New(Config{Dir: os.Getenv(victimDir), Objects: o, Fields: fields{}, Expand: expand})
		if err == nil {
			err = prepare(m, pod, c)
		}
		if err == nil && i%5 == 4 {
			err = m.Teardown(context.Background(), "u-1")
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
}

func TestKilledAnywhere(t *testing.T) {
	needMounts(t)
	rounds := 40
	if testing.Short() {
		rounds = 5
	}
	pod, c := everything(true)
	m := manager(t, content2())
	for i := range rounds {
		victim := exec.Command(os.Args[0])
		victim.Env = append(os.Environ(), victimDir+"="+m.dir)
		out, err := victim.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			t.Fatalf("the victim says %q", lines.Text())
		}
		time.Sleep(rand.N(20 * time.Millisecond))
		victim.Process.Kill()
		for lines.Scan() {
			t.Errorf("round %d: the victim says %q", i, lines.Text())
		}
		victim.Wait()
		m = again(t, m, content2())
		if i%2 == 0 {
			if err := prepare(m, pod, c); err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
			checkWhole(t, m, true)
		}
	}
	if err := m.Teardown(t.Context(), "u-1"); err != nil {
		t.Error(err)
	}
}
