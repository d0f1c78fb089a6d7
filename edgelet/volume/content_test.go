package volume

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/api/edge"
)

func TestConfigMap(t *testing.T) {
	held := func() *objects {
		return &objects{configMaps: map[string]map[string]string{"conf": {"a": "1", "b": "2"}, "gone": nil}}
	}
	tests := map[string]struct {
		volume  corev1.Volume
		change  func(*corev1.ConfigMapVolumeSource)
		want    string
		wantErr string
		is      error
	}{
		"all keys":            {volume: configMapVolume("conf"), want: "a -rw-r--r-- 1\nb -rw-r--r-- 2"},
		"with a default mode": {volume: configMapVolume("conf"), change: func(s *corev1.ConfigMapVolumeSource) { s.DefaultMode = new(int32(0o400)) }, want: "a -r-------- 1\nb -r-------- 2"},
		"items, in directories, with modes": {
			volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "d/e//f", Mode: new(int32(0o755))}, corev1.KeyToPath{Key: "b", Path: "./d/g"}),
			want:   "d/e/f -rwxr-xr-x 1\nd/g -rw-r--r-- 2"},
		"an optional object that is absent":     {volume: configMapVolume("gone"), change: func(s *corev1.ConfigMapVolumeSource) { s.Optional = new(true) }},
		"an optional key that is absent":        {volume: configMapVolume("conf", corev1.KeyToPath{Key: "z", Path: "z"}, corev1.KeyToPath{Key: "a", Path: "a"}), change: func(s *corev1.ConfigMapVolumeSource) { s.Optional = new(true) }, want: "a -rw-r--r-- 1"},
		"an absent object":                      {volume: configMapVolume("gone"), wantErr: `configmap "gone" not found`, is: edge.ErrAbsent},
		"an unknown object, even if optional":   {volume: configMapVolume("new"), change: func(s *corev1.ConfigMapVolumeSource) { s.Optional = new(true) }, wantErr: `configmap "new" has not been received yet`, is: edge.ErrUnknown},
		"an absent key":                         {volume: configMapVolume("conf", corev1.KeyToPath{Key: "z", Path: "z"}), wantErr: "configmap references non-existent config key: z"},
		"a path that leads upwards":             {volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "d/../../x"}), wantErr: "invalid path: must not contain '..': d/../../x"},
		"an absolute path":                      {volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "/etc/passwd"}), wantErr: "invalid path: must be relative path: /etc/passwd"},
		"a path like our own":                   {volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "..data"}), wantErr: "invalid path: must not start with '..': ..data"},
		"the same, hidden":                      {volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "./..data"}), wantErr: "invalid path: must not start with '..': ./..data"},
		"a path that is a file and a directory": {volume: configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "a"}, corev1.KeyToPath{Key: "b", Path: "a/b/c"}), wantErr: "invalid path: a is a file and cannot contain a/b/c"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := manager(t, held())
			if tt.change != nil {
				tt.change(tt.volume.ConfigMap)
			}
			err := m.Setup(t.Context(), podOf(tt.volume))
			if tt.wantErr != "" {
				want := `MountVolume.SetUp failed for volume "v" : ` + tt.wantErr
				if err == nil || err.Error() != want || tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("Setup = %v\nwant %s", err, want)
				}
				return
			}
			if got := visible(t, dirOf(m, "configmap")); err != nil || got != tt.want {
				t.Errorf("Setup = %v, %q, want %q", err, got, tt.want)
			}
		})
	}
}

func TestUpdateInPlace(t *testing.T) {
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1", "b": "2"}}}
	m, pod := manager(t, o), podOf(configMapVolume("conf"))
	dir := dirOf(m, "configmap")
	steps := []struct {
		does    string
		held    map[string]string
		unknown bool
		want    string
		rewrite bool
	}{
		{"first content", map[string]string{"a": "1", "b": "2"}, false, "a -rw-r--r-- 1\nb -rw-r--r-- 2", true},
		{"the same again", map[string]string{"a": "1", "b": "2"}, false, "a -rw-r--r-- 1\nb -rw-r--r-- 2", false},
		{"a value changes", map[string]string{"a": "1", "b": "3"}, false, "a -rw-r--r-- 1\nb -rw-r--r-- 3", true},
		{"a key goes", map[string]string{"a": "1"}, false, "a -rw-r--r-- 1", true},
		{"a key comes", map[string]string{"a": "1", "c": ""}, false, "a -rw-r--r-- 1\nc -rw-r--r-- ", true},
		{"the object is unknown", nil, true, "a -rw-r--r-- 1\nc -rw-r--r-- ", false},
		{"the object is deleted", nil, false, "a -rw-r--r-- 1\nc -rw-r--r-- ", false},
		{"it is back", map[string]string{"a": "9"}, false, "a -rw-r--r-- 9", true},
	}
	var last string
	for _, s := range steps {
		o.configMaps["conf"] = s.held
		if s.unknown {
			delete(o.configMaps, "conf")
		}
		setup(t, m, pod)
		if got := visible(t, dir); got != s.want {
			t.Fatalf("%s: volume has %q, want %q", s.does, got, s.want)
		}
		now, err := os.Readlink(filepath.Join(dir, "..data"))
		if err != nil || (now != last) != s.rewrite {
			t.Errorf("%s: ..data leads to %s, before to %s, error %v", s.does, now, last, err)
		}
		last = now
		if old, _ := filepath.Glob(filepath.Join(dir, "..2*")); len(old) != 1 {
			t.Errorf("%s: %d directories of content are left, want one", s.does, len(old))
		}
	}
	if len(m.stale) != 0 {
		t.Errorf("volume is current but noted as %v", m.stale)
	}
}

func TestReaderSeesOneGeneration(t *testing.T) {
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "0", "b": "0"}}}
	m, pod := manager(t, o), podOf(configMapVolume("conf"))
	setup(t, m, pod)
	stop, reads := make(chan struct{}), 0
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			generation, err := os.OpenRoot(filepath.Join(dirOf(m, "configmap"), "..data"))
			if errors.Is(err, fs.ErrNotExist) {
				continue // the link was read before, and the old directory removed after the exchange
			}
			if err != nil {
				t.Errorf("open ..data: %v", err)
				return
			}
			a, errA := generation.ReadFile("a")
			b, errB := generation.ReadFile("b")
			if errA == nil && errB == nil {
				if reads++; string(a) != string(b) {
					t.Errorf("one generation has a = %s and b = %s", a, b)
				}
			}
			generation.Close()
		}
	})
	for i := range 200 {
		v := strings.Repeat("x", i)
		o.mu.Lock()
		o.configMaps["conf"] = map[string]string{"a": v, "b": v}
		o.mu.Unlock()
		if err := m.Setup(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	reader.Wait()
	if reads == 0 {
		t.Error("nothing was read")
	}
}

func TestSecretsAreInMemoryOnly(t *testing.T) {
	needMounts(t)
	o := &objects{secrets: map[string]map[string]string{"keys": {"token": "s3cret"}}}
	m, pod := manager(t, o), podOf(secretVolume("keys"))
	setup(t, m, pod)
	dir := dirOf(m, "secret")
	if got := visible(t, dir); got != "token -rw-r--r-- s3cret" {
		t.Fatalf("volume has %q", got)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil || s.Type != unix.TMPFS_MAGIC {
		t.Errorf("file system is %x, %v, want a tmpfs", s.Type, err)
	}
	o.secrets["keys"] = map[string]string{"token": "rotated"}
	setup(t, m, pod)
	if below, err := mountsBelow(m.dir); err != nil || len(below) != 1 {
		t.Errorf("mounted are %q, %v, want one tmpfs after two setups", below, err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("below the tmpfs, on disk, are %v, %v", entries, err)
	}
	// As after a reboot: content is gone, and not taken for published.
	delete(o.secrets, "keys")
	if err := m.Setup(t.Context(), pod); !errors.Is(err, edge.ErrUnknown) {
		t.Errorf("Setup = %v, want an error that the secret is unknown", err)
	}
	o.secrets["keys"] = map[string]string{"token": "again"}
	setup(t, m, pod)
	if got := visible(t, dir); got != "token -rw-r--r-- again" {
		t.Errorf("volume has %q", got)
	}
}

func TestProjected(t *testing.T) {
	needMounts(t)
	o := &objects{
		token:      "t1",
		configMaps: map[string]map[string]string{"ca": {"ca.crt": "CA"}},
		secrets:    map[string]map[string]string{"keys": {"k": "s"}},
	}
	v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", Audience: "vault", ExpirationSeconds: new(int64(3607))}},
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "ca"}}},
		{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "keys"}, Items: []corev1.KeyToPath{{Key: "k", Path: "d/k", Mode: new(int32(0o400))}}}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "d/labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
			{Path: "d/cpu", ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: "main", Resource: "limits.cpu"}},
		}}},
		{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{Path: "roots.pem", Optional: new(true)}},
	}}}}
	want := "ca.crt -rw-r--r-- CA\nd/cpu -rw-r--r-- main:limits.cpu\nd/k -r-------- s\nd/labels -rw-r--r-- map[app:web]\nroots.pem -rw-r--r-- \n" +
		"token TOKENMODE t1 for robot \"vault\" 3607"
	gid := group(t)
	tests := map[string]struct {
		context *corev1.PodSecurityContext
		mode    string
		change  func(string) string
	}{
		"a token that all may read":              {mode: "-rw-r--r--"},
		"a token for the user of all containers": {context: &corev1.PodSecurityContext{RunAsUser: new(int64(os.Geteuid()))}, mode: "-rw-------"},
		"a token for the group": {context: &corev1.PodSecurityContext{FSGroup: &gid}, mode: "-rw-r-----",
			change: func(s string) string { return strings.ReplaceAll(s, "d/k -r--------", "d/k -r--r-----") }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m, pod := manager(t, o), podOf(v)
			pod.Spec.SecurityContext = tt.context
			setup(t, m, pod)
			want := strings.Replace(want, "TOKENMODE", tt.mode, 1)
			if tt.change != nil {
				want = tt.change(want)
			}
			if got := visible(t, dirOf(m, "projected")); got != want {
				t.Errorf("volume has\n%s\nwant\n%s", got, want)
			}
			o.token = "t2"
			defer func() { o.token = "t1" }()
			setup(t, m, pod)
			if got := read(t, dirOf(m, "projected")+"/token"); !strings.HasPrefix(got, "t2 ") {
				t.Errorf("after rotation the token is %q", got)
			}
		})
	}
	for name, source := range map[string]corev1.VolumeProjection{
		"clusterTrustBundle sources are not supported on this site": {ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{Path: "x"}},
		"podCertificate sources are not supported on this site":     {PodCertificate: &corev1.PodCertificateProjection{}},
		"unsupported fieldPath: x":                                  {DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "x", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "x"}}}}},
	} {
		pod := podOf(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{source}}}})
		if err := manager(t, o).Setup(t.Context(), pod); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("Setup = %v, want %q", err, name)
		}
	}
}

func TestContentIsBounded(t *testing.T) {
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": strings.Repeat("x", 1<<20)}}}
	v := configMapVolume("conf")
	for i := range 100 {
		v.ConfigMap.Items = append(v.ConfigMap.Items, corev1.KeyToPath{Key: "a", Path: strings.Repeat("y", i+1)})
	}
	if err := manager(t, o).Setup(t.Context(), podOf(v)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("Setup = %v, want an error that content is too large", err)
	}
}

func TestFSGroup(t *testing.T) {
	gid := group(t)
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1"}}}
	m := manager(t, o)
	pod := podOf(configMapVolume("conf", corev1.KeyToPath{Key: "a", Path: "d/a", Mode: new(int32(0o400))}))
	empty := emptyDirVolume("")
	empty.Name = "e"
	pod.Spec.Volumes = append(pod.Spec.Volumes, empty)
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	setup(t, m, pod)
	for path, mode := range map[string]os.FileMode{
		dirOf(m, "configmap"):                           os.ModeDir | os.ModeSetgid | 0o777,
		dirOf(m, "configmap") + "/..data/d":             os.ModeDir | os.ModeSetgid | 0o755,
		dirOf(m, "configmap") + "/..data/d/a":           0o440,
		filepath.Join(dirOf(m, "empty-dir"), "..", "e"): os.ModeDir | os.ModeSetgid | 0o777,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode() != mode || int64(info.Sys().(*syscall.Stat_t).Gid) != gid {
			t.Errorf("%s: %v, %v, want mode %v and group %d", path, info.Mode(), err, mode, gid)
		}
	}
	before, _ := os.Readlink(dirOf(m, "configmap") + "/..data")
	setup(t, m, pod)
	if after, _ := os.Readlink(dirOf(m, "configmap") + "/..data"); after != before {
		t.Error("content of a group was written again without need")
	}
}

func TestContentHealsTampering(t *testing.T) {
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1"}}}
	outside := write(t, filepath.Join(t.TempDir(), "outside"), "keep")
	for name, tamper := range map[string]func(dir string) error{
		"another content": func(dir string) error { return os.WriteFile(dir+"/..data/a", []byte("2"), 0o644) },
		"another mode":    func(dir string) error { return os.Chmod(dir+"/..data/a", 0o600) },
		"one file more":   func(dir string) error { return os.WriteFile(dir+"/..data/b", nil, 0o644) },
		"one file less":   func(dir string) error { return os.Remove(dir + "/..data/a") },
		"a pipe": func(dir string) error {
			return errors.Join(os.Remove(dir+"/..data/a"), unix.Mkfifo(dir+"/..data/a", 0o644))
		},
		"a link outside": func(dir string) error {
			return errors.Join(os.Remove(dir+"/..data/a"), os.Symlink(outside, dir+"/..data/a"))
		},
		"..data is gone":    func(dir string) error { return os.Remove(dir + "/..data") },
		"..data leads away": func(dir string) error { return errors.Join(os.Remove(dir+"/..data"), os.Symlink("/", dir+"/..data")) },
		"..data leads up":   func(dir string) error { return errors.Join(os.Remove(dir+"/..data"), os.Symlink("..", dir+"/..data")) },
		"..data is a file": func(dir string) error {
			return errors.Join(os.Remove(dir+"/..data"), os.WriteFile(dir+"/..data", nil, 0o644))
		},
		"remains": func(dir string) error {
			return errors.Join(os.MkdirAll(dir+"/..2020_x/d", 0o755), os.Symlink("x", dir+"/..data_tmp"))
		},
		"the link is gone": func(dir string) error { return os.Remove(dir + "/a") },
	} {
		t.Run(name, func(t *testing.T) {
			m, pod := manager(t, o), podOf(configMapVolume("conf"))
			setup(t, m, pod)
			if err := tamper(dirOf(m, "configmap")); err != nil {
				t.Fatal(err)
			}
			setup(t, m, pod)
			if got := visible(t, dirOf(m, "configmap")); got != "a -rw-r--r-- 1" {
				t.Errorf("volume has %q", got)
			}
			if old, _ := filepath.Glob(dirOf(m, "configmap") + "/..*"); len(old) != 2 {
				t.Errorf("%q are left, want ..data and one directory", old)
			}
			if read(t, outside) != "keep" {
				t.Error("a file outside was changed")
			}
		})
	}
}

func TestNestedMountPoints(t *testing.T) {
	mount := func(name, path string) corev1.VolumeMount { return corev1.VolumeMount{Name: name, MountPath: path} }
	tests := map[string]struct {
		mounts []corev1.VolumeMount
		want   []string
	}{
		"none":                         {[]corev1.VolumeMount{mount("v", "/etc/v"), mount("w", "/etc/vw")}, nil},
		"one":                          {[]corev1.VolumeMount{mount("v", "/etc/v"), mount("w", "/etc/v/a/b")}, []string{"a/b"}},
		"not those within another":     {[]corev1.VolumeMount{mount("v", "/etc/v"), mount("w", "/etc/v/a"), mount("x", "/etc/v/a/b"), mount("y", "/etc/v/a-c")}, []string{"a", "a-c"}},
		"dots do not lead out":         {[]corev1.VolumeMount{mount("v", "/etc/v/"), mount("w", "/etc/v/../../x"), mount("x", "etc/v//y")}, []string{"y"}},
		"a volume mounted at the root": {[]corev1.VolumeMount{mount("v", "/"), mount("w", "/a")}, []string{"a"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			pod := podOf()
			pod.Spec.Containers[0].VolumeMounts = tt.mounts
			if got := nestedMountPoints(pod, "v"); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("nestedMountPoints = %q, want %q", got, tt.want)
			}
		})
	}
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1"}}}
	m, pod := manager(t, o), podOf(configMapVolume("conf"))
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{mount("v", "/c"), mount("w", "/c/nested/x"), mount("w", "/c/..data/y")}
	for range 2 {
		setup(t, m, pod)
		if info, err := os.Lstat(dirOf(m, "configmap") + "/nested/x"); err != nil || !info.IsDir() {
			t.Errorf("mount point: %v", err)
		}
	}
	if _, err := os.Lstat(dirOf(m, "configmap") + "/..data/y"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("mount point in our own directory: %v", err)
	}
}
