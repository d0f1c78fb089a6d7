package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"golang.org/x/sys/unix"
)

// tree makes a volume with all that a subPath can meet.
func tree(t *testing.T) (volume, outside string) {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	volume, outside = base+"/volume", base+"/outside"
	write(t, volume+"/dir/file", "in dir")
	write(t, volume+"/file", "in volume")
	write(t, outside+"/file", "outside")
	if err := os.Chmod(volume, 0o2775); err != nil { // MkdirAll leaves out setgid
		t.Fatal(err)
	}
	if err := os.Chmod(volume, os.ModeSetgid|0o775); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{
		"inside": "dir", "up-and-down": "dir/../dir", "absolute": volume + "/dir", "dangling": "none",
		"out": "../outside", "absolute-out": outside, "root": "/", "proc": "/proc/self/root", "loop": "loop",
	} {
		if err := os.Symlink(target, volume+"/"+link); err != nil {
			t.Fatal(err)
		}
	}
	return volume, outside
}

func TestSubPath(t *testing.T) {
	needMounts(t)
	const failed = `failed to prepare subPath for volumeMount "v" of container "main"`
	tests := map[string]struct {
		sub, expr string
		file      string // what the mount shows there
		want      string
		wantErr   string
	}{
		"a directory":                         {sub: "dir", file: "/file", want: "in dir"},
		"a file":                              {sub: "dir/file", want: "in dir"},
		"the whole volume":                    {sub: ".", file: "/file", want: "in volume"},
		"a link that stays":                   {sub: "inside", file: "/file", want: "in dir"},
		"a link on the way":                   {sub: "inside/file", want: "in dir"},
		"a link up and down again":            {sub: "up-and-down/file", want: "in dir"},
		"an absolute link that stays":         {sub: "absolute/file", want: "in dir"},
		"from the environment":                {expr: "$(D)/file", want: "in dir"},
		"a variable that is not set":          {expr: "$(NONE)/$(EMPTY)", wantErr: "missing value for EMPTY, NONE"},
		"a variable that leads upwards":       {expr: "$(UP)/x", wantErr: "unable to provision SubPath `../x`: must not contain '..'"},
		"upwards":                             {sub: "dir/../../outside", wantErr: "unable to provision SubPath `dir/../../outside`: must not contain '..'"},
		"absolute":                            {sub: "/etc", wantErr: "error SubPath `/etc` must not be an absolute path"},
		"a link that leads out":               {sub: "out", wantErr: failed},
		"below a link that leads out":         {sub: "out/file", wantErr: failed},
		"an absolute link that leads out":     {sub: "absolute-out/file", wantErr: failed},
		"a link to the root":                  {sub: "root/etc", wantErr: failed},
		"a link to the process":               {sub: "proc/etc", wantErr: failed},
		"a link to nowhere":                   {sub: "dangling", wantErr: failed},
		"a link to itself":                    {sub: "loop", wantErr: failed},
		"below a file":                        {sub: "file/x", wantErr: failed},
		"new directories not below a way out": {sub: "out/new/dir", wantErr: failed},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			volume, outside := tree(t)
			m, pod := manager(t, &objects{}), podOf(hostPathVolume(volume, corev1.HostPathDirectory))
			setup(t, m, pod)
			env := []*cri.KeyValue{{Key: "D", Value: []byte("dir")}, {Key: "UP", Value: []byte("..")}, {Key: "EMPTY"}}
			mount, err := mountsOf(t, m, pod, corev1.VolumeMount{SubPath: tt.sub, SubPathExpr: tt.expr}, env...)
			if tt.wantErr != "" {
				if err == nil || err.Error() != tt.wantErr {
					t.Errorf("Mounts = %v, %v, want %s", mount, err, tt.wantErr)
				}
			} else if err != nil {
				t.Errorf("Mounts: %v, because %v", err, errors.Unwrap(err))
			} else if got := read(t, mount.HostPath+tt.file); got != tt.want || mount.HostPath != m.dir+"/u-1/volume-subpaths/v/main/0" {
				t.Errorf("%s shows %q, want %q", mount.HostPath, got, tt.want)
			}
			if left, _ := os.ReadDir(outside); len(left) != 1 {
				t.Errorf("outside the volume there are now %v", left)
			}
		})
	}
}

func TestSubPathIsMade(t *testing.T) {
	needMounts(t)
	for _, sub := range []string{"new", "new/er/dirs", "inside/new", "absolute/new/er"} {
		t.Run(sub, func(t *testing.T) {
			volume, _ := tree(t)
			m, pod := manager(t, &objects{}), podOf(hostPathVolume(volume, ""))
			setup(t, m, pod)
			mount, err := mountsOf(t, m, pod, corev1.VolumeMount{SubPath: sub})
			if err != nil {
				t.Fatalf("Mounts: %v, because %v", err, errors.Unwrap(err))
			}
			info, err := os.Stat(volume + "/" + sub)
			if err != nil || info.Mode() != os.ModeDir|os.ModeSetgid|0o775 {
				t.Errorf("%v, %v, want the mode of the volume", info.Mode(), err)
			}
			write(t, mount.HostPath+"/x", "data")
			if got := read(t, volume+"/"+sub+"/x"); got != "data" {
				t.Errorf("the volume has %q", got)
			}
		})
	}
}

func TestSubPathIsMountedAnew(t *testing.T) {
	needMounts(t)
	o := &objects{configMaps: map[string]map[string]string{"conf": {"a": "1", "b": "x"}}}
	m, pod := manager(t, o), podOf(configMapVolume("conf"))
	setup(t, m, pod)
	for range 3 { // a container that restarts
		mount, err := mountsOf(t, m, pod, corev1.VolumeMount{SubPath: "a"})
		if err != nil || read(t, mount.HostPath) != "1" || !mount.Readonly {
			t.Fatalf("Mounts = %v, %v", mount, err)
		}
	}
	o.configMaps["conf"] = map[string]string{"a": "2"}
	setup(t, m, pod)
	mount, err := mountsOf(t, m, pod, corev1.VolumeMount{SubPath: "a"})
	if err != nil || read(t, mount.HostPath) != "2" {
		t.Errorf("after an update Mounts = %v, %v, %q", mount, err, read(t, mount.HostPath))
	}
	o.configMaps["conf"] = map[string]string{"d/e": "3"} // no file any more
	pod.Spec.Volumes[0].ConfigMap.Items = []corev1.KeyToPath{{Key: "d/e", Path: "a/b"}}
	setup(t, m, pod)
	if mount, err = mountsOf(t, m, pod, corev1.VolumeMount{SubPath: "a"}); err != nil || read(t, mount.HostPath+"/b") != "3" {
		t.Errorf("after it became a directory Mounts = %v, %v", mount, err)
	}
	if below, err := mountsBelow(m.dir); err != nil || len(below) != 1 {
		t.Errorf("mounted are %q, %v, want one", below, err)
	}
}

// TestSubPathRace exchanges directories for links to the outside as fast as it
// can while subPaths are mounted.
func TestSubPathRace(t *testing.T) {
	needMounts(t)
	volume, outside := tree(t)
	rounds := 4000
	if testing.Short() {
		rounds = 200
	}
	write(t, volume+"/swap/deep/file", "in volume")
	write(t, outside+"/deep/file", "outside")
	if err := os.Symlink(outside, volume+"/swap-link"); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, volume+"/swap", unix.AT_FDCWD, volume+"/swap-link", unix.RENAME_EXCHANGE)
			}
		}
	})
	m, pod := manager(t, &objects{}), podOf(hostPathVolume(volume, ""))
	setup(t, m, pod)
	mounted, refused, escaped := 0, 0, 0
	for i := range rounds {
		sub := []string{"swap", "swap/deep", "swap/deep/file", "swap/new/" + string(rune('a'+i%26))}[i%4]
		mount, err := mountsOf(t, m, pod, corev1.VolumeMount{SubPath: sub})
		if err != nil {
			refused++
			continue
		}
		mounted++
		content, err := os.ReadFile(strings.TrimSuffix(mount.HostPath+map[int]string{0: "/deep/file", 1: "/file"}[i%4], "/"))
		if err == nil && string(content) != "in volume" {
			escaped++
		}
	}
	close(stop)
	swapper.Wait()
	t.Logf("%d rounds: %d mounted, %d refused, %d outside the volume", rounds, mounted, refused, escaped)
	if escaped > 0 {
		t.Errorf("%d mounts of %d lead outside the volume", escaped, mounted)
	}
	if mounted < rounds/20 || refused < rounds/20 {
		t.Errorf("%d mounted and %d refused: there was no race", mounted, refused)
	}
	if made, err := filepath.Glob(outside + "/*"); err != nil || len(made) != 2 {
		t.Errorf("outside the volume there are now %q", made)
	}
}

func TestMounts(t *testing.T) {
	enabled, possible, disabled := corev1.RecursiveReadOnlyEnabled, corev1.RecursiveReadOnlyIfPossible, corev1.RecursiveReadOnlyDisabled
	both, toContainer, none, bad := corev1.MountPropagationBidirectional, corev1.MountPropagationHostToContainer, corev1.MountPropagationNone, corev1.MountPropagationMode("x")
	tests := map[string]struct {
		mount   corev1.VolumeMount
		able    bool
		want    *cri.Mount
		wantErr string
	}{
		"plain":                         {mount: corev1.VolumeMount{}, want: &cri.Mount{}},
		"read-only":                     {mount: corev1.VolumeMount{ReadOnly: true, MountPropagation: &none, RecursiveReadOnly: &disabled}, want: &cri.Mount{Readonly: true}},
		"from the host":                 {mount: corev1.VolumeMount{MountPropagation: &toContainer}, want: &cri.Mount{Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}},
		"both ways":                     {mount: corev1.VolumeMount{MountPropagation: &both}, want: &cri.Mount{Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL}},
		"no propagation that there is":  {mount: corev1.VolumeMount{MountPropagation: &bad}, wantErr: `invalid MountPropagation mode: "x"`},
		"recursively, if possible: yes": {mount: corev1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &possible}, able: true, want: &cri.Mount{Readonly: true, RecursiveReadOnly: true}},
		"recursively, if possible: no":  {mount: corev1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &possible}, want: &cri.Mount{Readonly: true}},
		"recursively":                   {mount: corev1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &enabled}, able: true, want: &cri.Mount{Readonly: true, RecursiveReadOnly: true}},
		"recursively, by a runtime that cannot": {mount: corev1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &enabled},
			wantErr: `volume "v" requested recursive read-only mode, but it is not supported by the runtime`},
		"recursively but not read-only": {mount: corev1.VolumeMount{RecursiveReadOnly: &enabled}, able: true,
			wantErr: `volume "v" requested recursive read-only mode, but it is not read-only`},
		"recursively and propagated": {mount: corev1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &enabled, MountPropagation: &both}, able: true,
			wantErr: `volume "v" requested recursive read-only mode, but it is not compatible with propagation "Bidirectional"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m, pod := manager(t, &objects{}), podOf(emptyDirVolume(""))
			m.config.RecursiveReadOnly = func(*corev1.Pod) bool { return tt.able }
			setup(t, m, pod)
			got, err := mountsOf(t, m, pod, tt.mount)
			if tt.wantErr != "" {
				if err == nil || err.Error() != tt.wantErr {
					t.Errorf("Mounts = %v, want %s", err, tt.wantErr)
				}
				return
			}
			if err != nil || got.ContainerPath != "/data" || got.HostPath != dirOf(m, "empty-dir") || got.Readonly != tt.want.Readonly ||
				got.Propagation != tt.want.Propagation || got.RecursiveReadOnly != tt.want.RecursiveReadOnly {
				t.Errorf("Mounts = %v, %v, want %v", got, err, tt.want)
			}
		})
	}
	m, pod := manager(t, &objects{}), podOf(emptyDirVolume(""))
	if _, err := mountsOf(t, m, pod, corev1.VolumeMount{}); err == nil || !strings.HasPrefix(err.Error(), `cannot find volume "v" to mount into container "main"`) {
		t.Errorf("Mounts before Setup = %v", err)
	}
	pod.Spec.Volumes = nil
	if _, err := mountsOf(t, m, pod, corev1.VolumeMount{}); err == nil || err.Error() != `cannot find volume "v" to mount into container "main"` {
		t.Errorf("Mounts of no volume = %v", err)
	}
}

func TestOpen(t *testing.T) {
	volume, _ := tree(t)
	if err := unix.Mkfifo(volume+"/pipe", 0o644); err != nil {
		t.Fatal(err)
	}
	m, pod := manager(t, &objects{}), podOf(hostPathVolume(volume, ""))
	setup(t, m, pod)
	f, err := m.Open(pod, "v", "inside/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buffer := make([]byte, 16)
	if n, _ := f.Read(buffer); string(buffer[:n]) != "in dir" {
		t.Errorf("Open shows %q", buffer[:n])
	}
	if _, err := m.Open(pod, "v", "none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of a missing file = %v", err)
	}
	for _, name := range []string{"out/file", "absolute-out/file", "../outside/file", "/etc/passwd", "proc/etc/passwd", "pipe", "dir", "loop"} {
		if f, err := m.Open(pod, "v", name); err == nil {
			f.Close()
			t.Errorf("%s was opened", name)
		}
	}
}
