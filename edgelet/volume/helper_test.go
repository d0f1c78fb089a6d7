package volume

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// objects is what a site holds, by name; nil is known not to exist, and what is
// not there is unknown.
type objects struct {
	mu         sync.Mutex
	configMaps map[string]map[string]string
	secrets    map[string]map[string]string
	token      string
}

func (o *objects) ConfigMap(_, name string) (*corev1.ConfigMap, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data, ok := o.configMaps[name]
	if !ok {
		return nil, fmt.Errorf("ConfigMap: %w", edge.ErrUnknown)
	}
	if data == nil {
		return nil, fmt.Errorf("ConfigMap: %w", edge.ErrAbsent)
	}
	c := &corev1.ConfigMap{Data: data}
	if b, ok := data["binary"]; ok {
		c.BinaryData = map[string][]byte{"binary": []byte(b)}
	}
	return c, nil
}

func (o *objects) Secret(_, name string) (*corev1.Secret, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data, ok := o.secrets[name]
	if !ok {
		return nil, fmt.Errorf("Secret: %w", edge.ErrUnknown)
	}
	if data == nil {
		return nil, fmt.Errorf("Secret: %w", edge.ErrAbsent)
	}
	s := &corev1.Secret{Data: map[string][]byte{}}
	for k, v := range data {
		s.Data[k] = []byte(v)
	}
	return s, nil
}

func (o *objects) Token(pod *corev1.Pod, audience string, expirationSeconds int64) (string, error) {
	if o.token == "" {
		return "", edge.ErrUnknown
	}
	return fmt.Sprintf("%s for %s %q %d", o.token, pod.Spec.ServiceAccountName, audience, expirationSeconds), nil
}

// fields is what downwardAPI shows.
type fields struct{}

func (fields) Field(pod *corev1.Pod, path string) (string, error) {
	if path == "metadata.labels" {
		return fmt.Sprint(pod.Labels), nil
	}
	return "", fmt.Errorf("unsupported fieldPath: %s", path)
}

func (fields) Resource(_ *corev1.Pod, container string, s *corev1.ResourceFieldSelector) (string, error) {
	return container + ":" + s.Resource, nil
}

// expand knows $(NAME) alone.
func expand(s string, lookup func(string) (string, bool)) string {
	return os.Expand(strings.NewReplacer("$(", "${", ")", "}").Replace(s), func(name string) string { v, _ := lookup(name); return v })
}

func manager(t testing.TB, o *objects) *Manager {
	t.Helper()
	m, err := New(Config{Dir: filepath.Join(t.TempDir(), "pods"), Objects: o, Fields: fields{}, Expand: expand, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func podOf(volumes ...corev1.Volume) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "u-1", Labels: map[string]string{"app": "web"}}}
	pod.Spec.ServiceAccountName = "robot"
	pod.Spec.Volumes = volumes
	pod.Spec.Containers = []corev1.Container{{Name: "main"}}
	return pod
}

func configMapVolume(name string, items ...corev1.KeyToPath) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: corev1.LocalObjectReference{Name: name}, Items: items}}}
}

func secretVolume(name string) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: name}}}
}

func emptyDirVolume(medium corev1.StorageMedium) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}}}
}

func hostPathVolume(path string, kind corev1.HostPathType) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path, Type: &kind}}}
}

// dirOf is where the volume v of podOf is.
func dirOf(m *Manager, kind string) string {
	return filepath.Join(m.dir, "u-1/volumes/kubernetes.io~"+kind+"/v")
}

func setup(t testing.TB, m *Manager, pod *corev1.Pod) {
	t.Helper()
	if err := m.Setup(t.Context(), pod); err != nil {
		t.Fatalf("Setup: %v", err)
	}
	t.Cleanup(func() { // leaves nothing mounted that would keep TempDir from going
		if below, err := mountsBelow(m.dir); err == nil && len(below) > 0 {
			p, err := m.openPod(pod.UID, false)
			if err == nil {
				m.unmountAll(context.Background(), p) // that of the test is over
				p.close()
			}
		}
	})
}

// visible lists what a pod sees in a volume: path, mode and content.
func visible(t testing.TB, dir string) string {
	t.Helper()
	var lines []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && target != "..data/"+e.Name() {
			t.Errorf("%s leads to %s", e.Name(), target)
		}
		real, err := filepath.EvalSymlinks(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		filepath.WalkDir(real, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			content, err := os.ReadFile(path)
			info, _ := d.Info()
			rel, _ := filepath.Rel(real, path)
			lines = append(lines, fmt.Sprintf("%s %v %s", filepath.Join(e.Name(), rel), info.Mode(), content))
			return err
		})
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func mountsOf(t testing.TB, m *Manager, pod *corev1.Pod, mount corev1.VolumeMount, env ...*cri.KeyValue) (*cri.Mount, error) {
	t.Helper()
	mount.Name = "v"
	if mount.MountPath == "" {
		mount.MountPath = "/data"
	}
	mounts, err := m.Mounts(t.Context(), pod, &corev1.Container{Name: "main", VolumeMounts: []corev1.VolumeMount{mount}}, env)
	if err != nil {
		return nil, err
	}
	return mounts[0], nil
}

func write(t testing.TB, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
