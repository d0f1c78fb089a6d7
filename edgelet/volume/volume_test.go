package volume

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"golang.org/x/sys/unix"
)

func TestEmptyDir(t *testing.T) {
	old := syscall.Umask(0o077) // must not matter
	defer syscall.Umask(old)
	m, pod := manager(t, &objects{}), podOf(emptyDirVolume(""))
	setup(t, m, pod)
	dir := dirOf(m, "empty-dir")
	if info, err := os.Stat(dir); err != nil || info.Mode() != os.ModeDir|0o777 {
		t.Fatalf("mode %v, %v, want 0777", info.Mode(), err)
	}
	write(t, dir+"/file", "data")
	if err := os.Chmod(dir, 0o700); err != nil { // it belongs to the pod now
		t.Fatal(err)
	}
	setup(t, m, pod)
	if info, err := os.Stat(dir); err != nil || info.Mode() != os.ModeDir|0o700 || read(t, dir+"/file") != "data" {
		t.Errorf("mode %v, %v after another setup: the pod's own change is lost", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Join(m.dir, "u-1")); err != nil || info.Mode().Perm()&0o027 != 0 {
		t.Errorf("the pod's directory has mode %v, %v", info.Mode(), err)
	}
}

func TestEmptyDirInMemory(t *testing.T) {
	needMounts(t)
	memory := func(limit string) corev1.ResourceRequirements {
		return corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(limit)}}
	}
	tests := map[string]struct {
		limit      string
		containers []corev1.Container
		pod        *corev1.ResourceRequirements
		want       int64 // 0: the kernel's default
	}{
		"its own limit":                           {limit: "8Mi", want: 8 << 20},
		"the pod's memory":                        {containers: []corev1.Container{{Resources: memory("4Mi")}, {Resources: memory("2Mi")}}, want: 6 << 20},
		"the lesser of both":                      {limit: "8Mi", containers: []corev1.Container{{Resources: memory("4Mi")}}, want: 4 << 20},
		"the lesser is its own":                   {limit: "1Mi", containers: []corev1.Container{{Resources: memory("4Mi")}}, want: 1 << 20},
		"one container without limit: no limit":   {containers: []corev1.Container{{Resources: memory("4Mi")}, {}}},
		"limited by the pod":                      {containers: []corev1.Container{{}}, pod: new(memory("3Mi")), want: 3 << 20},
		"a limit of nothing counts for nothing":   {limit: "0", want: 0},
		"a limit of less than a page is at least": {limit: "1", want: 4096},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			v := emptyDirVolume(corev1.StorageMediumMemory)
			if tt.limit != "" {
				v.EmptyDir.SizeLimit = new(resource.MustParse(tt.limit))
			}
			m, pod := manager(t, &objects{}), podOf(v)
			if tt.containers != nil {
				pod.Spec.Containers = tt.containers
			}
			pod.Spec.Resources = tt.pod
			setup(t, m, pod)
			write(t, dirOf(m, "empty-dir")+"/file", "data")
			setup(t, m, pod) // keeps what is there
			var s unix.Statfs_t
			if err := unix.Statfs(dirOf(m, "empty-dir"), &s); err != nil || s.Type != unix.TMPFS_MAGIC {
				t.Fatalf("file system %x, %v", s.Type, err)
			}
			if got := int64(s.Blocks) * int64(s.Bsize); tt.want != 0 && got != tt.want || tt.want == 0 && got < 64<<20 {
				t.Errorf("size %d, want %d", got, tt.want)
			}
			if info, err := os.Stat(dirOf(m, "empty-dir")); err != nil || info.Mode() != os.ModeDir|os.ModeSticky|0o777 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			if read(t, dirOf(m, "empty-dir")+"/file") != "data" {
				t.Error("a second setup lost what was there")
			}
		})
	}
}

func TestEmptyDirs(t *testing.T) {
	v := emptyDirVolume(corev1.StorageMediumMemory)
	v.EmptyDir.SizeLimit = new(resource.MustParse("1Ki"))
	m := manager(t, &objects{})
	got := m.EmptyDirs(podOf(v, configMapVolume("x")))
	if want := (EmptyDir{"v", dirOf(m, "empty-dir"), 1024, true}); len(got) != 1 || got[0] != want {
		t.Errorf("EmptyDirs = %v, want %v", got, want)
	}
}

func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	file := write(t, dir+"/file", "")
	socket := dir + "/socket"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		path string
		kind corev1.HostPathType
		want string // "" for success
	}{
		"unset is not looked at":      {dir + "/none", "", ""},
		"a directory":                 {dir, corev1.HostPathDirectory, ""},
		"a directory behind a link":   {dir + "/link", corev1.HostPathDirectory, ""},
		"a file is no directory":      {file, corev1.HostPathDirectory, "hostPath type check failed: " + file + " is not a directory, it is a file"},
		"a missing directory":         {dir + "/none", corev1.HostPathDirectory, "hostPath type check failed: " + dir + "/none is not a directory, it does not exist"},
		"a directory is made":         {dir + "/new/er", corev1.HostPathDirectoryOrCreate, ""},
		"a file is not made over":     {file, corev1.HostPathDirectoryOrCreate, "hostPath type check failed: " + file + " is not a directory, it is a file"},
		"a file":                      {file, corev1.HostPathFile, ""},
		"a file is made":              {dir + "/newfile", corev1.HostPathFileOrCreate, ""},
		"but not its directory":       {dir + "/no/newfile", corev1.HostPathFileOrCreate, "open " + dir + "/no/newfile: no such file or directory"},
		"a socket":                    {socket, corev1.HostPathSocket, ""},
		"a directory is no socket":    {dir, corev1.HostPathSocket, "hostPath type check failed: " + dir + " is not a socket file, it is a directory"},
		"a character device":          {"/dev/null", corev1.HostPathCharDev, ""},
		"a character is no block":     {"/dev/null", corev1.HostPathBlockDev, "hostPath type check failed: /dev/null is not a block device, it is a character device"},
		"a type that there is not":    {dir, "Cloud", "Cloud is an invalid volume type"},
		"a path that leads upwards":   {dir + "/../x", "", "invalid HostPath `" + dir + "/../x`: must not contain '..'"},
		"a path that is not absolute": {"x", "", `invalid HostPath "x": must be an absolute path`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m, pod := manager(t, &objects{}), podOf(hostPathVolume(tt.path, tt.kind))
			err := m.Setup(t.Context(), pod)
			if tt.want != "" {
				if want := `MountVolume.SetUp failed for volume "v" : ` + tt.want; err == nil || err.Error() != want {
					t.Errorf("Setup = %v\nwant %s", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			mount, err := mountsOf(t, m, pod, corev1.VolumeMount{})
			if err != nil || mount.HostPath != tt.path || mount.Readonly {
				t.Errorf("Mounts = %v, %v", mount, err)
			}
		})
	}
	for path, mode := range map[string]os.FileMode{dir + "/new/er": os.ModeDir | 0o755, dir + "/newfile": 0o644} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, mode)
		}
	}
}

func TestUnsupportedKinds(t *testing.T) {
	for want, source := range map[string]corev1.VolumeSource{
		"persistentVolumeClaim": {PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "c"}},
		"csi":                   {CSI: &corev1.CSIVolumeSource{Driver: "d"}},
		"nfs":                   {NFS: &corev1.NFSVolumeSource{}},
		"image":                 {Image: &corev1.ImageVolumeSource{}},
		"unknown":               {},
	} {
		m, pod := manager(t, &objects{}), podOf(corev1.Volume{Name: "v", VolumeSource: source}, corev1.Volume{Name: "e", VolumeSource: emptyDirVolume("").VolumeSource})
		err := m.Setup(t.Context(), pod)
		if err == nil || !strings.HasPrefix(err.Error(), `MountVolume.SetUp failed for volume "v" : volumes of kind `+want+" are not supported on this site, only ") {
			t.Errorf("Setup = %v", err)
		}
		if _, err := os.Stat(filepath.Join(dirOf(m, "empty-dir"), "../e")); err != nil {
			t.Errorf("another volume of the pod is not ready: %v", err)
		}
	}
	for _, medium := range []corev1.StorageMedium{"HugePages", "Tape"} {
		if err := manager(t, &objects{}).Setup(t.Context(), podOf(emptyDirVolume(medium))); err == nil || !strings.HasSuffix(err.Error(), `unknown storage medium "`+string(medium)+`"`) {
			t.Errorf("Setup = %v", err)
		}
	}
}

func TestNamesAreNotTrusted(t *testing.T) {
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1"}}}
	for _, name := range []string{"", ".", "..", "../../x", "a/b", "a\x00b", ".new-v", strings.Repeat("a", 300)} {
		m, pod := manager(t, o), podOf(configMapVolume("conf"))
		pod.Spec.Volumes[0].Name = name
		if err := m.Setup(t.Context(), pod); err == nil {
			t.Errorf("a volume named %q was made", name)
		}
		pod = podOf(emptyDirVolume(""))
		setup(t, m, pod)
		c := &corev1.Container{Name: name, VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/x", SubPath: "s"}}}
		if mounts, err := m.Mounts(t.Context(), pod, c, nil); err == nil {
			t.Errorf("a container named %q got %v", name, mounts)
		}
		pod.UID = "u/../.." + "/x"
		if err := m.Setup(t.Context(), pod); err == nil {
			t.Errorf("a pod of UID %q was made", pod.UID)
		}
	}
}
