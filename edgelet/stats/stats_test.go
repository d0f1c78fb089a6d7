package stats

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

const meminfo = `MemTotal:        1048576 kB
MemFree:          524288 kB
Inactive(file):   262144 kB
AnonPages:        131072 kB
SwapTotal:          2048 kB
SwapFree:           1024 kB
`

// tree makes a file system root that looks like a machine.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range map[string]string{
		"proc/meminfo":                   meminfo,
		"proc/stat":                      "cpu  100 20 30 9999 5 6 7 8 50 0\ncpu0 1 2 3\nbtime 1700000000\n",
		"proc/vmstat":                    "pgfault 11\npgmajfault 2\n",
		"proc/loadavg":                   "0.1 0.2 0.3 2/345 678\n",
		"proc/net/dev":                   "Inter-|\n face |\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 1 2 0 0 0 0 0 30 1 4 0 0 0 0 0\nveth1: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n",
		"proc/net/route":                 "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\neth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\n",
		"proc/sys/kernel/pid_max":        "1000\n",
		"proc/sys/kernel/threads-max":    "4000\n",
		"proc/sys/kernel/osrelease":      "6.1.0-test\n",
		"proc/sys/kernel/random/boot_id": "boot\n",
		"sys/devices/system/cpu/online":  "0-2,5\n",
		"etc/machine-id":                 "machine\n",
		"etc/os-release":                 "NAME=x\nPRETTY_NAME=\"Debian \x1b[31mGNU/Linux 12\"\n",
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "16\n",
	} {
		file := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// fakeRuntime is one with one pod, whose CPU counter follows the clock.
type fakeRuntime struct {
	err    error
	downAt time.Time // when Status begins to fail, if ever
	calls  int
	full   bool // tells of pods and not only of containers
	start  time.Time
}

func (r *fakeRuntime) Version(context.Context) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "fake", RuntimeVersion: "1"}, r.err
}
func (r *fakeRuntime) Status(context.Context) (*cri.StatusResponse, error) {
	if !r.downAt.IsZero() && time.Now().After(r.downAt) {
		return nil, errors.New("down")
	}
	if r.err != nil {
		return nil, r.err
	}
	return &cri.StatusResponse{
		Status:          &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{{Type: cri.RuntimeReady, Status: true}, {Type: cri.NetworkReady, Status: true}}},
		RuntimeHandlers: []*cri.RuntimeHandler{{Name: "runc", Features: &cri.RuntimeHandlerFeatures{UserNamespaces: true}}},
	}, nil
}
func (r *fakeRuntime) ListPodSandbox(context.Context) ([]*cri.PodSandbox, error) {
	return []*cri.PodSandbox{{Id: "s", CreatedAt: 1e9}}, r.err
}
func (r *fakeRuntime) ListContainers(context.Context) ([]*cri.Container, error) {
	return []*cri.Container{{Id: "c1", CreatedAt: 2e9}, {Id: "c0", CreatedAt: 1e9}}, r.err
}
func (r *fakeRuntime) ListImages(context.Context) ([]*cri.Image, error) {
	return []*cri.Image{{Id: "a", RepoTags: []string{"a:1"}, Size: 5}, {Id: "b", RepoTags: []string{"b:1", "b:2", "b:3", "b:4", "b:5", "b:6"}, Size: 9}, {Id: "untagged"}}, r.err
}
func (r *fakeRuntime) ImageFsInfo(context.Context) (*cri.ImageFsInfoResponse, error) {
	return &cri.ImageFsInfoResponse{ImageFilesystems: []*cri.FilesystemUsage{{FsId: &cri.FilesystemIdentifier{Mountpoint: "/images"}, UsedBytes: &cri.UInt64Value{Value: 77}}}}, r.err
}
func (r *fakeRuntime) ListPodSandboxStats(context.Context) ([]*cri.PodSandboxStats, error) {
	r.calls++
	now := time.Now()
	one := func(id string, attempt uint32) *cri.ContainerStats {
		return &cri.ContainerStats{
			Attributes:    &cri.ContainerAttributes{Id: id, Metadata: &cri.ContainerMetadata{Name: "c", Attempt: attempt}},
			Cpu:           &cri.CpuUsage{Timestamp: now.UnixNano(), UsageCoreNanoSeconds: &cri.UInt64Value{Value: uint64(now.Sub(r.start)) / 4}},
			Memory:        &cri.MemoryUsage{Timestamp: now.UnixNano(), WorkingSetBytes: &cri.UInt64Value{Value: 4096}},
			WritableLayer: &cri.FilesystemUsage{UsedBytes: &cri.UInt64Value{Value: 50}, InodesUsed: &cri.UInt64Value{Value: 3}},
		}
	}
	pod := &cri.PodSandboxStats{
		Attributes: &cri.PodSandboxAttributes{Id: "s", Metadata: &cri.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}},
		Linux:      &cri.LinuxPodSandboxStats{Containers: []*cri.ContainerStats{one("c1", 1), one("c0", 0)}},
	}
	if r.full {
		pod.Linux.Memory = &cri.MemoryUsage{Timestamp: now.UnixNano(), WorkingSetBytes: &cri.UInt64Value{Value: 5000}}
		pod.Linux.Network = &cri.NetworkUsage{DefaultInterface: &cri.NetworkInterfaceUsage{Name: "eth0", RxBytes: &cri.UInt64Value{Value: 9}}}
	}
	return []*cri.PodSandboxStats{pod}, r.err
}

func newNode(t *testing.T, r *fakeRuntime) *Node {
	return New(Config{
		Runtime: r, NodeName: "site", DataDir: "/data", Root: tree(t), Addresses: []string{"192.0.2.7"},
		Reserved: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
		Statfs:   func(string) (Filesystem, error) { return Filesystem{1000, 400, 100, 60}, nil },
	})
}

func TestSummary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRuntime{full: true, start: time.Now()}
		n := newNode(t, r)
		time.Sleep(time.Minute)
		first, err := n.Summary(t.Context())
		if err != nil || first.Pods[0].Containers[0].CPU.UsageNanoCores != nil {
			t.Fatalf("first: %v, %v", first, err)
		}
		time.Sleep(10 * time.Second)
		s, err := n.Summary(t.Context())
		if err != nil || len(s.Pods) != 1 || len(s.Pods[0].Containers) != 1 {
			t.Fatalf("summary: %+v, %v", s, err)
		}
		pod := s.Pods[0]
		c := pod.Containers[0]
		for what, pair := range map[string][2]uint64{
			"container CPU rate":        {*c.CPU.UsageNanoCores, 250_000_000},
			"pod CPU rate":              {*pod.CPU.UsageNanoCores, 250_000_000},
			"pod memory":                {*pod.Memory.WorkingSetBytes, 5000},
			"pod network":               {*pod.Network.RxBytes, 9},
			"container start":           {uint64(c.StartTime.Unix()), 2},
			"root file system use":      {*c.Rootfs.UsedBytes, 50},
			"root file system capacity": {*c.Rootfs.CapacityBytes, 1000},
			"pod storage":               {*pod.EphemeralStorage.UsedBytes, 50},
			"node CPU":                  {*s.Node.CPU.UsageCoreNanoSeconds, 171 * tick},
			"node working set":          {*s.Node.Memory.WorkingSetBytes, 256 << 20},
			"node memory available":     {*s.Node.Memory.AvailableBytes, 768 << 20},
			"node network":              {*s.Node.Network.TxErrors, 4},
			"node file system":          {*s.Node.Fs.UsedBytes, 600},
			"images":                    {*s.Node.Runtime.ImageFs.UsedBytes, 77},
			"layers":                    {*s.Node.Runtime.ContainerFs.UsedBytes, 600},
			"boot":                      {uint64(s.Node.StartTime.Unix()), 1700000000},
			"processes":                 {uint64(*s.Node.Rlimit.NumOfRunningProcesses), 345},
		} {
			if pair[0] != pair[1] {
				t.Errorf("%s is %d, want %d", what, pair[0], pair[1])
			}
		}
		calls := r.calls
		time.Sleep(freshness / 2)
		if again, _ := n.Summary(t.Context()); again != s || r.calls != calls {
			t.Error("a fresh summary is made anew")
		}
		time.Sleep(freshness)
		if again, _ := n.Summary(t.Context()); again == s {
			t.Error("an old summary is kept")
		}
	})
}

func TestSummaryWithoutRuntime(t *testing.T) {
	r := &fakeRuntime{err: errors.New("down")}
	s, err := newNode(t, r).Summary(t.Context())
	if err == nil || s == nil || s.Node.Memory == nil || len(s.Pods) != 0 {
		t.Errorf("summary: %+v, %v", s, err)
	}
	var out bytes.Buffer
	WriteResourceMetrics(&out, s, err)
	if !strings.Contains(out.String(), "\nscrape_error 1\n") || !strings.Contains(out.String(), "node_memory_working_set_bytes 2.68435456e+08 ") {
		t.Errorf("metrics: %s", out.String())
	}
}

func TestResourceMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, &fakeRuntime{start: time.Now().Add(-40 * time.Second)})
		s, err := n.Summary(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.Pods[0].PodRef.Name = "p\"\\\n"
		var out bytes.Buffer
		if err := WriteResourceMetrics(&out, s, nil); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"# TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total 1.71 946684800000\n",
			`container_cpu_usage_seconds_total{container="c",namespace="n",pod="p\"\\\n"} 10 946684800000` + "\n",
			`container_memory_working_set_bytes{container="c",namespace="n",pod="p\"\\\n"} 4096 946684800000` + "\n",
			`container_start_time_seconds{container="c",namespace="n",pod="p\"\\\n"} 2` + "\n",
			`pod_cpu_usage_seconds_total{namespace="n",pod="p\"\\\n"} 10 946684800000` + "\n",
			`pod_memory_working_set_bytes{namespace="n",pod="p\"\\\n"} 4096 946684800000` + "\n",
			"\nscrape_error 0\n", "\nresource_scrape_error 0\n",
		} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("no %q in:\n%s", want, out.String())
			}
		}
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRuntime{}
		n := newNode(t, r)
		s, err := n.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[corev1.ResourceName][2]string{
			"cpu":               {"4", "3500m"},
			"memory":            {"1Gi", "868Mi"}, // less reserved, eviction threshold and huge pages
			"ephemeral-storage": {"1k", "900"},
			"pods":              {"110", "110"},
			"hugepages-2Mi":     {"32Mi", "32Mi"},
		} {
			has, may := s.Capacity[name], s.Allocatable[name]
			if has.String() != want[0] || may.String() != want[1] {
				t.Errorf("%s: %s of %s, want %s of %s", name, may.String(), has.String(), want[1], want[0])
			}
		}
		i := s.Info
		if i.MachineID != "machine" || i.SystemUUID != "machine" || i.BootID != "boot" || i.KernelVersion != "6.1.0-test" || i.OSImage != "Debian [31mGNU/Linux 12" || i.ContainerRuntimeVersion != "fake://1" {
			t.Errorf("info: %+v", i)
		}
		if len(s.Images) != 2 || s.Images[0].SizeBytes != 9 || len(s.Images[0].Names) != maxImageNames {
			t.Errorf("images: %v", s.Images)
		}
		if len(s.RuntimeHandlers) != 1 || !*s.RuntimeHandlers[0].Features.UserNamespaces {
			t.Errorf("handlers: %v", s.RuntimeHandlers)
		}
		if ready := condition(s, corev1.NodeReady); ready.Status != corev1.ConditionTrue || ready.LastTransitionTime.IsZero() {
			t.Errorf("ready: %v", ready)
		}
		time.Sleep(time.Hour)
		r.err = errors.New("connection refused")
		s, err = n.Status(t.Context())
		if ready := condition(s, corev1.NodeReady); err != nil || ready.Status != corev1.ConditionFalse || ready.Message != "container runtime is down: connection refused" || time.Since(ready.LastTransitionTime.Time) > time.Second {
			t.Errorf("ready: %v, %v", ready, err)
		}
		if len(s.Images) != 2 {
			t.Error("the images are forgotten while the runtime is down")
		}
	})
}

func condition(s edge.NodeStatus, kind corev1.NodeConditionType) corev1.NodeCondition {
	i := slices.IndexFunc(s.Conditions, func(c corev1.NodeCondition) bool { return c.Type == kind })
	if i < 0 {
		return corev1.NodeCondition{}
	}
	return s.Conditions[i]
}

func TestRunTellsOfChangesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRuntime{}
		n := newNode(t, r)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		var told []corev1.ConditionStatus
		r.downAt = time.Now().Add(2 * time.Minute)
		err := n.Run(ctx, func(s edge.NodeStatus) { told = append(told, condition(s, corev1.NodeReady).Status) })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run = %v", err)
		}
		if want := []corev1.ConditionStatus{"True", "False"}; !slices.Equal(told, want) {
			t.Errorf("told %v, want %v", told, want)
		}
	})
}

func TestPressures(t *testing.T) {
	thresholds := Thresholds{}.withDefaults()
	mem := func(free uint64) Observation { return Observation{Memory: &Memory{Total: 1 << 30, Free: free}} }
	disk := func(fs Filesystem) Observation { return Observation{Node: &fs} }
	images := func(fs Filesystem) Observation { return Observation{Image: &fs} }
	tests := map[string]struct {
		o    Observation
		kind corev1.NodeConditionType
		want bool
	}{
		"memory at the threshold":              {mem(100 << 20), corev1.NodeMemoryPressure, false},
		"memory below the threshold":           {mem(100<<20 - 1), corev1.NodeMemoryPressure, true},
		"a tenth of the disk left":             {disk(Filesystem{100, 10, 100, 100}), corev1.NodeDiskPressure, false},
		"less than a tenth of the disk left":   {disk(Filesystem{100, 9, 100, 100}), corev1.NodeDiskPressure, true},
		"few inodes left":                      {disk(Filesystem{100, 50, 100, 4}), corev1.NodeDiskPressure, true},
		"a file system without inodes":         {disk(Filesystem{100, 50, 0, 0}), corev1.NodeDiskPressure, false},
		"images have a threshold of their own": {images(Filesystem{100, 14, 100, 100}), corev1.NodeDiskPressure, true},
		"few process ids left":                 {Observation{Processes: &Processes{950, 1000}}, corev1.NodePIDPressure, true},
		"enough process ids left":              {Observation{Processes: &Processes{800, 1000}}, corev1.NodePIDPressure, false},
		"nothing could be read":                {Observation{}, corev1.NodeMemoryPressure, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := Pressures(thresholds, PressureState{}, test.o, time.Unix(1e9, 0))
			if s.On[test.kind] != test.want {
				t.Errorf("%s = %v, want %v", test.kind, s.On[test.kind], test.want)
			}
			for kind, on := range s.On {
				if on && kind != test.kind {
					t.Errorf("%s too", kind)
				}
			}
		})
	}
	off := Thresholds{Memory: -1}.withDefaults()
	if Pressures(off, PressureState{}, mem(0), time.Now()).On[corev1.NodeMemoryPressure] {
		t.Error("a threshold that is off applies")
	}
}

func TestPressureDoesNotFlicker(t *testing.T) {
	thresholds := Thresholds{}.withDefaults()
	start := time.Unix(1e9, 0)
	var s PressureState
	at := func(minute int, free uint64) bool {
		s = Pressures(thresholds, s, Observation{Memory: &Memory{Total: 1 << 30, Free: free}}, start.Add(time.Duration(minute)*time.Minute))
		return s.On[corev1.NodeMemoryPressure]
	}
	const low, high = 1 << 20, 1 << 29
	for i, step := range []struct {
		minute int
		free   uint64
		want   bool
	}{{0, high, false}, {1, low, true}, {2, high, true}, {5, low, true}, {9, high, true}, {10, high, false}, {11, high, false}} {
		if got := at(step.minute, step.free); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
	if got := s.Conditions()[0]; got.Reason != "KubeletHasSufficientMemory" || !got.LastTransitionTime.Time.Equal(start.Add(10*time.Minute)) {
		t.Errorf("condition %v", got)
	}
}

func TestOrderOfAddresses(t *testing.T) {
	ips := func(list ...string) (out []netip.Addr) {
		for _, s := range list {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	tests := map[string]struct {
		primary, others []netip.Addr
		want            []string
	}{
		"the primary comes first":              {ips("10.0.0.2"), ips("10.0.0.1", "10.0.0.2"), []string{"10.0.0.2", "10.0.0.1"}},
		"one of each family":                   {ips("fd00::2"), ips("10.0.0.1", "10.0.0.3", "fd00::1", "fd00::2"), []string{"10.0.0.1", "fd00::2", "10.0.0.3", "fd00::1"}},
		"what only the link knows is no use":   {nil, ips("fe80::1", "169.254.1.1", "127.0.0.1", "192.168.1.1"), []string{"192.168.1.1"}},
		"a machine without addresses has none": {nil, nil, []string{}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := order(test.primary, test.others); !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestThisMachine(t *testing.T) {
	n := New(Config{Runtime: &fakeRuntime{}, DataDir: t.TempDir()})
	s, err := n.Status(t.Context())
	if err != nil || s.Capacity.Memory().Value() < 1<<20 || s.Capacity.Cpu().Value() < 1 || s.Info.KernelVersion == "" {
		t.Errorf("status %+v, %v", s, err)
	}
	t.Logf("%+v %v", s.Info, s.Addresses)
}

func FuzzParsers(f *testing.F) {
	f.Add(meminfo)
	f.Add("cpu  100 20 30 9999 5 6 7 8\nbtime 17\n")
	f.Add("0-3,8")
	f.Add("0.1 0.2 0.3 2/345 678")
	f.Add("eth0: 10 1 2 0 0 0 0 0 30 1 4 0 0 0 0 0\n")
	f.Add("PRETTY_NAME=\"x\\n\"")
	f.Add("eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\n")
	f.Fuzz(func(t *testing.T, text string) {
		if m, err := parseMeminfo(text); err == nil && (m.Available() > m.Total || m.WorkingSet() > m.Total) {
			t.Errorf("more memory than there is: %+v", m)
		}
		parseCPU(text)
		if n := parseCPUList(text); n < 0 {
			t.Errorf("%d processors", n)
		}
		parseLoadavg(text)
		parseVmstat(text)
		bootTime(text)
		parseRoute(text)
		if list := parseNetDev(text); len(list) > maxInterfaces {
			t.Errorf("%d interfaces", len(list))
		}
		if name := parseOSRelease(text); len(name) > maxText {
			t.Errorf("a name of %d bytes", len(name))
		}
	})
}

func BenchmarkSummary(b *testing.B) {
	n := New(Config{Runtime: &fakeRuntime{full: true}, DataDir: b.TempDir()})
	b.ReportAllocs()
	for b.Loop() {
		n.made = time.Time{}
		if _, err := n.Summary(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
