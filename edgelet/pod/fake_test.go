package pod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// A behaviour says how the runs of a container go.
type behaviour struct {
	after time.Duration // it exits by itself; zero: never
	code  int32
	term  time.Duration // how long it takes to end when asked to
	deaf  bool          // it must be killed
}

// A fakeRuntime is a runtime in memory. It outlives the engines that use it.
type fakeRuntime struct {
	mu         sync.Mutex
	n          int
	sandboxes  map[string]*cri.PodSandbox
	containers map[string]*fakeContainer
	stopped    map[string]bool // sandboxes
	watchers   map[int]func(types.UID)
	behaves    func(name string, attempt uint32) behaviour
	fault      func(op string) (before, after error) // nil: none
	calls      []string
	starts     map[string]int // successes by pod UID and container name, over all time
	problems   []string       // broken invariants
	configs    map[string]*cri.ContainerConfig
	boxes      map[string]*cri.PodSandboxConfig
	delay      time.Duration // of every call
	listings   int
	mute       bool // watchers are told nothing
	wiped      bool // the runtime has forgotten everything, once
	succeeded  map[string]bool
	onStart    func(uid, name string) // with mu held
}

type fakeContainer struct {
	*cri.ContainerStatus
	sandbox string
	ended   chan struct{} // closed when it has exited
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{
		sandboxes: map[string]*cri.PodSandbox{}, containers: map[string]*fakeContainer{}, stopped: map[string]bool{},
		watchers: map[int]func(types.UID){}, starts: map[string]int{},
		configs: map[string]*cri.ContainerConfig{}, boxes: map[string]*cri.PodSandboxConfig{},
		behaves: func(string, uint32) behaviour { return behaviour{} },
		delay:   time.Millisecond, succeeded: map[string]bool{},
	}
}

func (f *fakeRuntime) problem(format string, args ...any) {
	f.problems = append(f.problems, fmt.Sprintf(format, args...))
}

// enter begins a call: it takes time, may be interrupted, and may fail before or
// after it has done its work.
func (f *fakeRuntime) enter(ctx context.Context, op, id string) (after error, err error) {
	select {
	case <-time.After(f.delay):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	f.mu.Lock()
	if op == "ListPodSandbox" {
		f.listings++
	}
	if op != "ListPodSandbox" && op != "ListContainers" {
		f.calls = append(f.calls, time.Now().Format("04:05.000 ")+op+" "+id)
	}
	fault := f.fault
	f.mu.Unlock()
	if fault != nil {
		before, after := fault(op)
		return after, before
	}
	return nil, nil
}

func (f *fakeRuntime) listed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.listings
}

// refuse makes all calls of op fail before they have done anything; "" ends it.
func (f *fakeRuntime) refuse(op string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = func(o string) (before, after error) {
		if o == op {
			return errFake, nil
		}
		return nil, nil
	}
}

func (f *fakeRuntime) called(prefix string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if strings.HasPrefix(c[len("04:05.000 "):], prefix) {
			n++
		}
	}
	return n
}

// tell tells the watchers that a pod has changed. The caller holds f.mu.
func (f *fakeRuntime) tell(uid string) {
	if f.mute {
		return
	}
	for _, w := range f.watchers {
		go w(types.UID(uid))
	}
}

func (f *fakeRuntime) ListPodSandbox(ctx context.Context) ([]*cri.PodSandbox, error) {
	if _, err := f.enter(ctx, "ListPodSandbox", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*cri.PodSandbox
	for _, s := range f.sandboxes {
		all = append(all, &cri.PodSandbox{Id: s.Id, Metadata: s.Metadata, State: s.State, CreatedAt: s.CreatedAt,
			Labels: s.Labels, Annotations: s.Annotations})
	}
	return all, nil
}

func (f *fakeRuntime) ListContainers(ctx context.Context) ([]*cri.Container, error) {
	if _, err := f.enter(ctx, "ListContainers", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*cri.Container
	for _, c := range f.containers {
		all = append(all, &cri.Container{Id: c.Id, PodSandboxId: c.sandbox, Metadata: c.Metadata, State: c.State,
			CreatedAt: c.CreatedAt, Labels: c.Labels, Annotations: c.Annotations})
	}
	return all, nil
}

func (f *fakeRuntime) PodSandboxStatus(ctx context.Context, id string) (*cri.PodSandboxStatus, error) {
	after, err := f.enter(ctx, "PodSandboxStatus", id)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[id]
	if s == nil {
		return nil, status.Error(codes.NotFound, "no such sandbox")
	}
	network := f.boxes[id].GetLinux().GetSecurityContext().GetNamespaceOptions()
	return &cri.PodSandboxStatus{
		Id: id, Metadata: s.Metadata, State: s.State, CreatedAt: s.CreatedAt,
		Network: &cri.PodSandboxNetworkStatus{Ip: "10.0.0.7"},
		Linux:   &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: network}},
	}, after
}

func (f *fakeRuntime) ContainerStatus(ctx context.Context, id string) (*cri.ContainerStatus, error) {
	after, err := f.enter(ctx, "ContainerStatus", id)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[id]
	if c == nil {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &cri.ContainerStatus{
		Id: id, Metadata: c.Metadata, State: c.State, CreatedAt: c.CreatedAt, StartedAt: c.StartedAt, FinishedAt: c.FinishedAt,
		ExitCode: c.ExitCode, Image: c.Image, ImageRef: c.ImageRef, Reason: c.Reason, Labels: c.Labels, Annotations: c.Annotations,
		Mounts: c.Mounts, Resources: c.Resources,
	}, after
}

func (f *fakeRuntime) RunPodSandbox(ctx context.Context, config *cri.PodSandboxConfig, handler string) (string, error) {
	after, err := f.enter(ctx, "RunPodSandbox", config.Metadata.Name)
	if err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	uid := config.Metadata.Uid
	for _, s := range f.sandboxes {
		if s.Metadata.Uid == uid && s.State == cri.PodSandboxState_SANDBOX_READY {
			f.problem("pod %s: a second sandbox", uid)
		}
		if s.Metadata.Uid == uid && s.Metadata.Attempt == config.Metadata.Attempt {
			return "", status.Errorf(codes.Unknown, "name is reserved for %s", s.Id)
		}
	}
	f.n++
	id := fmt.Sprintf("box-%d", f.n)
	f.sandboxes[id] = &cri.PodSandbox{Id: id, Metadata: config.Metadata, State: cri.PodSandboxState_SANDBOX_READY,
		CreatedAt: time.Now().UnixNano(), Labels: config.Labels, Annotations: config.Annotations}
	f.boxes[id] = config
	f.tell(uid)
	return id, after
}

func (f *fakeRuntime) StopPodSandbox(ctx context.Context, id string) error {
	after, err := f.enter(ctx, "StopPodSandbox", id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[id]
	if s == nil {
		return after
	}
	for _, c := range f.containers {
		if c.sandbox == id && c.State == cri.ContainerState_CONTAINER_RUNNING {
			f.exit(c, 137, "Error")
		}
	}
	s.State = cri.PodSandboxState_SANDBOX_NOTREADY
	f.stopped[id] = true
	f.tell(s.Metadata.Uid)
	return after
}

func (f *fakeRuntime) RemovePodSandbox(ctx context.Context, id string) error {
	after, err := f.enter(ctx, "RemovePodSandbox", id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[id]
	if s == nil {
		return after
	}
	if !f.stopped[id] {
		f.problem("sandbox %s removed before it was stopped", id)
	}
	for cid, c := range f.containers {
		if c.sandbox == id {
			f.exit(c, 137, "Error")
			delete(f.containers, cid)
		}
	}
	delete(f.sandboxes, id)
	f.tell(s.Metadata.Uid)
	return after
}

func (f *fakeRuntime) CreateContainer(ctx context.Context, sandboxID string, config *cri.ContainerConfig, sandbox *cri.PodSandboxConfig) (string, error) {
	after, err := f.enter(ctx, "CreateContainer", config.Metadata.Name)
	if err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[sandboxID]
	if s == nil || s.State != cri.PodSandboxState_SANDBOX_READY {
		return "", status.Error(codes.Unknown, "sandbox is not running")
	}
	for _, c := range f.containers {
		if c.sandbox == sandboxID && c.Metadata.Name == config.Metadata.Name && c.Metadata.Attempt == config.Metadata.Attempt {
			return "", status.Errorf(codes.Unknown, "name is reserved for %s", c.Id)
		}
	}
	f.n++
	id := fmt.Sprintf("c-%d", f.n)
	f.containers[id] = &fakeContainer{sandbox: sandboxID, ended: make(chan struct{}), ContainerStatus: &cri.ContainerStatus{
		Id: id, Metadata: config.Metadata, State: cri.ContainerState_CONTAINER_CREATED, CreatedAt: time.Now().UnixNano(),
		Image: &cri.ImageSpec{Image: config.Image.UserSpecifiedImage}, ImageRef: config.Image.Image + "@sha256:0",
		Labels: config.Labels, Annotations: config.Annotations, Mounts: config.Mounts,
		Resources: &cri.ContainerResources{Linux: config.Linux.GetResources()},
	}}
	f.configs[id] = config
	return id, after
}

func (f *fakeRuntime) StartContainer(ctx context.Context, id string) error {
	after, err := f.enter(ctx, "StartContainer", id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[id]
	if c == nil {
		return status.Error(codes.NotFound, "no such container")
	}
	if c.State != cri.ContainerState_CONTAINER_CREATED {
		return status.Errorf(codes.Unknown, "container is in state %s", c.State)
	}
	uid := c.Labels[criconfig.LabelUID]
	for _, o := range f.containers {
		if o.Labels[criconfig.LabelUID] == uid && o.Metadata.Name == c.Metadata.Name && o.State == cri.ContainerState_CONTAINER_RUNNING {
			f.problem("pod %s: container %s runs twice", uid, c.Metadata.Name)
		}
	}
	f.starts[uid+"/"+c.Metadata.Name]++
	if f.onStart != nil {
		f.onStart(uid, c.Metadata.Name)
	}
	c.State, c.StartedAt = cri.ContainerState_CONTAINER_RUNNING, time.Now().UnixNano()
	if b := f.behaves(c.Metadata.Name, c.Metadata.Attempt); b.after > 0 {
		time.AfterFunc(b.after, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.exit(c, b.code, "")
		})
	}
	f.tell(uid)
	return after
}

// exit ends a container. The caller holds f.mu.
func (f *fakeRuntime) exit(c *fakeContainer, code int32, reason string) {
	if c.State == cri.ContainerState_CONTAINER_EXITED {
		return
	}
	c.State, c.ExitCode, c.FinishedAt = cri.ContainerState_CONTAINER_EXITED, code, time.Now().UnixNano()
	c.Reason = cmp.Or(reason, "Completed")
	if code != 0 && reason == "" {
		c.Reason = "Error"
	}
	close(c.ended)
	if code == 0 {
		f.succeeded[c.Labels[criconfig.LabelUID]+"/"+c.Metadata.Name] = true
	}
	f.tell(c.Labels[criconfig.LabelUID])
}

func (f *fakeRuntime) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	after, err := f.enter(ctx, "StopContainer", fmt.Sprintf("%s %v", id, grace))
	if err != nil {
		return err
	}
	f.mu.Lock()
	c := f.containers[id]
	f.mu.Unlock()
	if c == nil {
		return after
	}
	b := f.behaves(c.Metadata.Name, c.Metadata.Attempt)
	term := time.After(b.term)
	if b.deaf {
		term = nil
	}
	code := int32(143)
	select {
	case <-c.ended:
		return after
	case <-term:
	case <-time.After(grace):
		code = 137
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	f.mu.Lock()
	f.exit(c, code, "")
	f.mu.Unlock()
	return after
}

func (f *fakeRuntime) RemoveContainer(ctx context.Context, id string) error {
	after, err := f.enter(ctx, "RemoveContainer", id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil && c.State == cri.ContainerState_CONTAINER_RUNNING {
		f.problem("running container %s removed", c.Metadata.Name)
	}
	delete(f.containers, id)
	return after
}

func (f *fakeRuntime) UpdateContainerResources(ctx context.Context, id string, r *cri.LinuxContainerResources) error {
	after, err := f.enter(ctx, "UpdateContainerResources", id)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil {
		c.Resources = &cri.ContainerResources{Linux: r}
	}
	return after
}

func (f *fakeRuntime) Watch(ctx context.Context, changed func(types.UID)) error {
	f.mu.Lock()
	f.n++
	n := f.n
	f.watchers[n] = changed
	f.mu.Unlock()
	changed("")
	<-ctx.Done()
	f.mu.Lock()
	delete(f.watchers, n)
	f.mu.Unlock()
	return nil
}

// kill ends the running container of that name with code.
func (f *fakeRuntime) kill(name string, code int32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		if c.Metadata.Name == name {
			if c.State == cri.ContainerState_CONTAINER_RUNNING {
				f.exit(c, code, "")
			}
		}
	}
}

// reboot ends all sandboxes and containers, as the power going does.
func (f *fakeRuntime) reboot() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		if c.State == cri.ContainerState_CONTAINER_RUNNING {
			f.exit(c, 255, "Unknown")
		}
	}
	for _, s := range f.sandboxes {
		s.State = cri.PodSandboxState_SANDBOX_NOTREADY
	}
}

// wipe loses all that the runtime knows.
func (f *fakeRuntime) wipe() {
	f.reboot()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wiped = true
	clear(f.sandboxes)
	clear(f.containers)
}

// fakeSite is the rest of an edgelet: what the engine asks and tells. Its records
// and outbox outlive the engines.
type fakeSite struct {
	mu        sync.Mutex
	records   map[string]Record
	statuses  map[types.UID][]edge.PodStatus
	events    []string // "type reason container message"
	forgotten map[types.UID]bool
	mounted   map[types.UID]bool
	fails     map[string]error // by method
	probes    map[string]ProbeResult
	hooks     []string
	hookTime  time.Duration
	pulls     time.Duration
	node      *corev1.Node
	running   map[types.UID]map[string]RunningContainer
	slowPut   time.Duration
}

func newFakeSite() *fakeSite {
	return &fakeSite{records: map[string]Record{}, statuses: map[types.UID][]edge.PodStatus{}, forgotten: map[types.UID]bool{},
		mounted: map[types.UID]bool{}, fails: map[string]error{}, probes: map[string]ProbeResult{},
		running: map[types.UID]map[string]RunningContainer{}}
}

func (s *fakeSite) fail(method string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fails[method]
}

type reasoned struct {
	error
	reason string
}

func (r reasoned) Reason() string { return r.reason }

func (s *fakeSite) Ensure(ctx context.Context, image string, _ corev1.PullPolicy, _ []*corev1.Secret, _ *cri.PodSandboxConfig, event func(kind, reason, message string)) (Image, error) {
	select {
	case <-time.After(s.pulls):
	case <-ctx.Done():
		return Image{}, ctx.Err()
	}
	if err := s.fail("Ensure"); err != nil {
		return Image{}, err
	}
	event("Normal", "Pulled", "Container image present")
	return Image{Ref: image}, nil
}

func (s *fakeSite) Setup(_ context.Context, pod *corev1.Pod) error {
	if err := s.fail("Setup"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mounted[pod.UID] = true
	return nil
}

func (s *fakeSite) Mounts(context.Context, *corev1.Pod, *corev1.Container, []*cri.KeyValue) ([]*cri.Mount, error) {
	return nil, s.fail("Mounts")
}

func (s *fakeSite) Teardown(_ context.Context, uid types.UID) error {
	if err := s.fail("Teardown"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mounted, uid)
	return nil
}

func (s *fakeSite) Present() ([]types.UID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.mounted)), nil
}

func (s *fakeSite) Env(*corev1.Pod, *corev1.Container, []string) ([]*cri.KeyValue, error) {
	return nil, s.fail("Env")
}
func (s *fakeSite) Command(c *corev1.Container, _ []*cri.KeyValue) (command, args []string) {
	return c.Command, c.Args
}
func (s *fakeSite) Hostname(pod *corev1.Pod) (string, error)   { return pod.Name, nil }
func (s *fakeSite) DNS(*corev1.Pod) (*cri.DNSConfig, error)    { return nil, nil }
func (s *fakeSite) Hosts(_ *corev1.Pod, ips []string) []byte   { return []byte(fmt.Sprintln(ips)) }
func (s *fakeSite) Secret(_, _ string) (*corev1.Secret, error) { return nil, edge.ErrAbsent }
func (s *fakeSite) Node() (*corev1.Node, error)                { return s.node, s.fail("Node") }
func (s *fakeSite) RuntimeClass(string) (edge.RuntimeClass, error) {
	return edge.RuntimeClass{Handler: "kata"}, s.fail("RuntimeClass")
}

func (s *fakeSite) Sync(pod *corev1.Pod, _ string, running map[string]RunningContainer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running[pod.UID] = running
}

func (s *fakeSite) Result(_ types.UID, container, id string) ProbeResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.probes[container]; ok {
		return r
	}
	if r, ok := s.probes[id]; ok {
		return r
	}
	return ProbeResult{Started: true, Ready: true}
}

func (s *fakeSite) Forget(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, uid)
}

func (s *fakeSite) Run(ctx context.Context, _ *corev1.Pod, c *corev1.Container, _, _ string, h *corev1.LifecycleHandler) error {
	s.mu.Lock()
	s.hooks = append(s.hooks, c.Name)
	s.mu.Unlock()
	select {
	case <-time.After(s.hookTime):
		return s.fail("Hook")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fakeSite) All() (map[string]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.records), nil
}

func (s *fakeSite) Put(uid string, r Record) error {
	if err := s.fail("Put"); err != nil {
		return err
	}
	if s.slowPut > 0 {
		time.Sleep(s.slowPut)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[uid] = r
	return nil
}

func (s *fakeSite) Delete(uid string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, uid)
	return nil
}

func (s *fakeSite) PodStatus(st edge.PodStatus) error {
	if err := s.fail("PodStatus"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.statuses[st.UID] = append(s.statuses[st.UID], st)
	return nil
}

func (s *fakeSite) PodEvent(_ *corev1.Pod, container, kind, reason, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, fmt.Sprintf("%s %s %s %s", kind, reason, container, message))
}

func (s *fakeSite) PodForgotten(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgotten[uid] = true
}

func (s *fakeSite) forgot(uid types.UID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.forgotten[uid]
}

func (s *fakeSite) last(uid types.UID) edge.PodStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.statuses[uid]
	if len(all) == 0 {
		return edge.PodStatus{}
	}
	return all[len(all)-1]
}

// A world is a runtime, a site, and the engine that runs on them now.
type world struct {
	t    testing.TB
	rt   *fakeRuntime
	site *fakeSite
	dir  string

	m    *Manager
	stop context.CancelFunc
	done chan error
	conf func(*Config)
}

func newWorld(t testing.TB) *world {
	return &world{t: t, rt: newFakeRuntime(), site: newFakeSite(), dir: t.TempDir()}
}

func (w *world) config() Config {
	return Config{
		Runtime: w.rt, Images: w.site, Volumes: w.site, Environments: w.site, Probes: w.site, Hooks: w.site,
		Objects: w.site, Records: w.site, Sink: w.site,
		HostIPs: func() []string { return []string{"192.0.2.1"} },
		LogDir:  w.dir + "/logs", Dir: w.dir + "/pods", CgroupDir: w.dir + "/cgroup", Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// engine makes an engine that holds the pods, and runs it.
func (w *world) engine(pods ...*corev1.Pod) {
	w.t.Helper()
	config := w.config()
	if w.conf != nil {
		w.conf(&config)
	}
	m, err := NewManager(config)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, pod := range pods {
		if err := m.Set(pod); err != nil {
			w.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.m, w.stop, w.done = m, cancel, make(chan error, 1)
	go func() { w.done <- m.Run(ctx) }()
}

// end ends the engine, not the pods.
func (w *world) end() {
	w.t.Helper()
	w.stop()
	if err := <-w.done; err != nil {
		w.t.Errorf("Run = %v, want nil", err)
	}
	w.rt.mu.Lock()
	defer w.rt.mu.Unlock()
	for _, p := range w.rt.problems {
		w.t.Error(p)
	}
}

// sleep lets d pass, and what happens then come to rest.
func (w *world) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) status(uid types.UID) corev1.PodStatus { return w.site.last(uid).Status }

// newPod is a pod of one container, "web", that restarts always.
func newPod(change ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default", UID: "u1", Generation: 3},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyAlways, TerminationGracePeriodSeconds: new(int64(30)),
			Containers: []corev1.Container{{Name: "web", Image: "nginx:1", TerminationMessagePath: "/dev/termination-log"}},
		},
	}
	for _, f := range change {
		f(pod)
	}
	return pod
}

// deleted is pod as it is while it is being deleted.
func deleted(pod *corev1.Pod, grace int64) *corev1.Pod {
	p := pod.DeepCopy()
	p.DeletionTimestamp = new(metav1.NewTime(time.Now().Add(time.Duration(grace) * time.Second)))
	p.DeletionGracePeriodSeconds = &grace
	return p
}

var errFake = errors.New("injected")
