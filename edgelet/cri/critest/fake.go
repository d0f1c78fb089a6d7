// Package critest provides a container runtime in memory, and the contract that it
// and real runtimes fulfil alike.
//
// A [Fake] behaves as containerd does in what an agent can observe, in real time or
// in the fake time of testing/synctest. Containers do what their [Behaviour] says,
// calls fail as an injected [Fault] says, and the fake itself notices when one pod
// or container runs twice. [RunSuite] is the contract.
package critest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Options configure a fake.
type Options struct {
	Images []string // present from the start; CreateContainer wants its image present

	// Behave says what a container does. Default: what its command asks for, see
	// [Command], and else running until it is stopped. It must not call the fake.
	Behave func(sandbox *cri.PodSandboxConfig, container *cri.ContainerConfig) Behaviour

	// Exec answers ExecSync. Default: exit code 0. It must not call the fake.
	Exec func(container *cri.ContainerConfig, command []string) (stdout, stderr []byte, exit int32, err error)

	// Pull decides on a pull, after whatever time it takes. Default: success.
	Pull func(ctx context.Context, image string, auth *cri.AuthConfig) error
}

// A Call is one call of a runtime, as a fault may look at it.
type Call struct {
	Method string    // such as "StartContainer"
	Object string    // id, or name for what is being made
	UID    types.UID // of the pod, if known
}

// A Fault is what goes wrong in a call. The zero value is nothing.
type Fault struct {
	Delay time.Duration // before anything happens, or until the caller's context ends
	Err   error         // returned; by default, nothing has happened then
	Lost  bool          // the call has had its effect, and yet Err is returned
}

// A Fake is a runtime in memory. Its methods may be called concurrently.
type Fake struct {
	options Options

	mu         sync.Mutex // guards the following
	down       bool
	fault      func(Call) Fault
	sandboxes  map[string]*sandbox
	containers map[string]*container
	images     map[string]*cri.Image
	watchers   map[*watcher]bool
	ids        int
	overlaps   []string
	starts     map[string]int
}

type sandbox struct {
	config  *cri.PodSandboxConfig
	handler string
	status  *cri.PodSandboxStatus
}

type container struct {
	sandbox   *sandbox
	sandboxID string
	config    *cri.ContainerConfig
	behaviour Behaviour
	status    *cri.ContainerStatus
	timers    []*time.Timer // that will end it
	ended     chan struct{} // closed when it has ended
	log       *logFile
}

// New makes a runtime without pods.
func New(options Options) *Fake {
	f := &Fake{
		options: options, sandboxes: map[string]*sandbox{}, containers: map[string]*container{},
		images: map[string]*cri.Image{}, watchers: map[*watcher]bool{}, starts: map[string]int{},
		fault: func(Call) Fault { return Fault{} },
	}
	for _, name := range options.Images {
		f.images[name] = newImage(name)
	}
	return f
}

// Inject makes fault decide what goes wrong from now on; nil: nothing. It must not
// call the fake.
func (f *Fake) Inject(fault func(Call) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fault == nil {
		fault = func(Call) Fault { return Fault{} }
	}
	f.fault = fault
}

// SetDown makes the daemon unreachable, or reachable again. Containers go on.
func (f *Fake) SetDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
	if !down {
		f.notify("")
	}
}

// Exit ends a running container from within, as a crash or an OOM kill does.
// Reason may be empty.
func (f *Fake) Exit(id string, code int32, reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil {
		f.end(c, code, reason)
	}
}

// KillSandbox ends a sandbox and what runs in it, as the death of its pause
// process does.
func (f *Fake) KillSandbox(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[id]; s != nil {
		f.endSandbox(s)
	}
}

// Reboot ends everything, as a reboot of the machine does: containers are known
// to have been there, with exit code 255.
func (f *Fake) Reboot() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		f.end(c, 255, "Unknown")
	}
	for _, s := range f.sandboxes {
		s.status.State = cri.PodSandboxState_SANDBOX_NOTREADY
	}
	f.notify("")
}

// Overlaps tells of each time when a pod had two ready sandboxes or a container
// of it ran twice at once.
func (f *Fake) Overlaps() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.overlaps)
}

// Starts is how often a container of a pod has been started.
func (f *Fake) Starts(uid types.UID, name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.starts[string(uid)+"/"+name]
}

// Config returns what a container was created with; nil if there is none.
func (f *Fake) Config(id string) (*cri.ContainerConfig, *cri.PodSandboxConfig) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil {
		return proto.CloneOf(c.config), proto.CloneOf(c.sandbox.config)
	}
	return nil, nil
}

// call runs effect under the lock as a call that may be late, fail, or lose its reply.
func (f *Fake) call(ctx context.Context, call Call, effect func() error) error {
	f.mu.Lock()
	fault, down := f.fault(call), f.down
	f.mu.Unlock()
	if fault.Delay > 0 {
		if err := sleep(ctx, fault.Delay); err != nil {
			return err
		}
	}
	switch {
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case down:
		return status.Error(codes.Unavailable, "connection refused")
	case fault.Err != nil && !fault.Lost:
		return fault.Err
	}
	f.mu.Lock()
	err := effect()
	f.mu.Unlock()
	return cmp.Or(err, fault.Err)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// newID makes an id that looks like a runtime's.
func (f *Fake) newID() string {
	f.ids++
	return fmt.Sprintf("%064x", f.ids)
}

func notFound(kind, id string) error {
	return status.Errorf(codes.NotFound, "%s %q: not found", kind, id)
}

// A watcher collects what has changed until its Watch has told it.
type watcher struct {
	pending map[types.UID]bool // guarded by Fake.mu
	wake    chan struct{}
}

// notify tells all watchers of a pod, "" when that is not known.
func (f *Fake) notify(uid types.UID) {
	if f.down {
		return // the events of a daemon that is down are lost
	}
	for w := range f.watchers {
		w.pending[uid] = true
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// Watch implements Runtime.
func (f *Fake) Watch(ctx context.Context, changed func(types.UID)) error {
	w := &watcher{pending: map[types.UID]bool{"": true}, wake: make(chan struct{}, 1)}
	w.wake <- struct{}{}
	f.mu.Lock()
	f.watchers[w] = true
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.watchers, w)
		f.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-w.wake:
		}
		f.mu.Lock()
		pending := w.pending
		w.pending = map[types.UID]bool{}
		f.mu.Unlock()
		for uid := range pending {
			changed(uid)
		}
	}
}
