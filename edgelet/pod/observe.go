package pod

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// seen is what a listing of the runtime tells of one pod.
type seen struct {
	sandboxes  []*cri.PodSandbox
	containers []*cri.Container
}

// A lister lists the runtime for all workers. Those that ask while a listing is
// under way share the next one, so that a hundred events cost two listings.
type lister struct {
	runtime Runtime

	mu      sync.Mutex
	running *listing // under way
	next    *listing // begins when running has ended
}

type listing struct {
	done chan struct{} // closed when the rest is set, which never changes then
	pods map[types.UID]*seen
	err  error
}

// fresh returns a listing that began after the call, by pod. Base bounds the
// listing itself, which others may share, ctx the wait for it.
func (l *lister) fresh(ctx, base context.Context, wg *sync.WaitGroup) (map[types.UID]*seen, error) {
	l.mu.Lock()
	var mine *listing
	switch {
	case l.running == nil:
		mine = &listing{done: make(chan struct{})}
		l.running = mine
		wg.Go(func() { l.run(base) })
	case l.next == nil:
		l.next = &listing{done: make(chan struct{})}
		fallthrough
	default:
		mine = l.next
	}
	l.mu.Unlock()
	select {
	case <-mine.done:
		return mine.pods, mine.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (l *lister) run(ctx context.Context) {
	for {
		l.mu.Lock()
		c := l.running
		l.mu.Unlock()
		c.pods, c.err = list(ctx, l.runtime)
		l.mu.Lock()
		l.running, l.next = l.next, nil
		more := l.running != nil
		l.mu.Unlock()
		close(c.done)
		if !more {
			return
		}
	}
}

// list returns what the runtime holds that is ours, by pod.
func list(ctx context.Context, runtime Runtime) (map[types.UID]*seen, error) {
	// Sandboxes first: a container is never seen without its sandbox then,
	// unless the sandbox is being removed.
	sandboxes, err := runtime.ListPodSandbox(ctx)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	containers, err := runtime.ListContainers(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	pods := map[types.UID]*seen{}
	of := func(labels map[string]string) *seen {
		uid := types.UID(labels[criconfig.LabelUID])
		if labels[criconfig.LabelManaged] != "true" || criconfig.CheckUID(uid) != nil {
			return &seen{} // not ours
		}
		if pods[uid] == nil {
			pods[uid] = &seen{}
		}
		return pods[uid]
	}
	for _, s := range sandboxes {
		p := of(s.Labels)
		p.sandboxes = append(p.sandboxes, s)
	}
	for _, c := range containers {
		p := of(c.Labels)
		p.containers = append(p.containers, c)
	}
	return pods, nil
}

// observe brings w.obs to what s says, asking the runtime for the details of
// what is new.
func (w *worker) observe(ctx context.Context, s *seen) error {
	if s == nil {
		s = &seen{}
	}
	var sandboxes []Sandbox
	for _, listed := range s.sandboxes {
		sandbox, err := w.sandbox(ctx, listed)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		sandboxes = append(sandboxes, sandbox)
	}
	var containers []Container
	for _, listed := range s.containers {
		i := slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.ID == listed.Id })
		if i >= 0 && w.obs.Containers[i].State == listed.State {
			containers = append(containers, w.obs.Containers[i])
			continue
		}
		c, err := w.container(ctx, listed.Id, listed.PodSandboxId)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		containers = append(containers, c)
	}
	w.obs.Sandboxes, w.obs.Containers = sandboxes, containers
	w.order()
	return nil
}

// order sorts what was observed as [Observed] promises.
func (w *worker) order() {
	slices.SortFunc(w.obs.Sandboxes, func(a, b Sandbox) int {
		return cmp.Or(cmp.Compare(b.Attempt, a.Attempt), b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	slices.SortFunc(w.obs.Containers, func(a, b Container) int {
		return cmp.Or(cmp.Compare(b.Attempt, a.Attempt), b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
}

func (w *worker) sandbox(ctx context.Context, listed *cri.PodSandbox) (Sandbox, error) {
	s := Sandbox{
		ID:      listed.Id,
		Attempt: listed.GetMetadata().GetAttempt(),
		Ready:   listed.State == cri.PodSandboxState_SANDBOX_READY,
		Created: time.Unix(0, listed.CreatedAt),
	}
	if i := slices.IndexFunc(w.obs.Sandboxes, func(k Sandbox) bool { return k.ID == s.ID }); i >= 0 {
		known := w.obs.Sandboxes[i]
		s.Stopped, s.Network, s.IPs = known.Stopped && !s.Ready, known.Network, known.IPs
		if !s.Ready || known.Ready && (len(s.IPs) > 0 || s.Network == cri.NamespaceMode_NODE) {
			return s, nil
		}
	}
	if !s.Ready {
		return s, nil
	}
	details, err := w.m.Runtime.PodSandboxStatus(ctx, s.ID)
	if err != nil {
		return s, fmt.Errorf("status of sandbox %s: %w", s.ID, err)
	}
	s.Network = details.GetLinux().GetNamespaces().GetOptions().GetNetwork()
	s.IPs = sandboxIPs(details)
	return s, nil
}

// sandboxIPs are a sandbox's addresses, at most one of each family, the
// primary first.
func sandboxIPs(s *cri.PodSandboxStatus) []string {
	all := []string{s.GetNetwork().GetIp()}
	for _, ip := range s.GetNetwork().GetAdditionalIps() {
		all = append(all, ip.Ip)
	}
	return onePerFamily(all)
}

// container asks for the details of one container.
func (w *worker) container(ctx context.Context, id, sandboxID string) (Container, error) {
	s, err := w.m.Runtime.ContainerStatus(ctx, id)
	if err != nil {
		return Container{}, fmt.Errorf("status of container %s: %w", id, err)
	}
	c := Container{
		ID:        id,
		SandboxID: sandboxID,
		Name:      s.GetLabels()[criconfig.LabelContainer],
		Attempt:   s.GetMetadata().GetAttempt(),
		State:     s.State,
		Hash:      s.GetAnnotations()[criconfig.AnnotationHash],
		Created:   time.Unix(0, s.CreatedAt),
		Started:   unixNano(s.StartedAt),
		Finished:  unixNano(s.FinishedAt),
		ExitCode:  s.ExitCode,
		Reason:    s.Reason,
		Message:   s.Message,
		Image:     s.GetImage().GetImage(),
		ImageID:   cmp.Or(s.ImageRef, s.ImageId),
		Limits:    s.GetResources().GetLinux(),
	}
	if u := s.GetUser().GetLinux(); u != nil {
		c.User = &corev1.ContainerUser{Linux: &corev1.LinuxContainerUser{
			UID: u.Uid, GID: u.Gid, SupplementalGroups: u.SupplementalGroups,
		}}
	}
	if c.State == cri.ContainerState_CONTAINER_EXITED {
		if c.Finished.IsZero() {
			c.Finished = c.Created
		}
		w.readMessage(&c, s)
		if c.ExitCode == exitLost && c.Reason == reasonError && !w.killing[id] && time.Since(c.Finished) < doubtFor {
			w.doubts[id] = time.Now().Add(doubtFor)
		}
	}
	return c, nil
}

// doubtFor is how long a runtime may take to find out that a container which was
// killed has been killed for want of memory.
const doubtFor = 500 * time.Millisecond

// reconsider looks again at containers whose reason for ending may have become
// known since.
func (w *worker) reconsider(ctx context.Context) error {
	for id, at := range w.doubts {
		if time.Now().Before(at) {
			w.due(at)
			continue
		}
		delete(w.doubts, id)
		if err := w.look(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// unixNano is the time that CRI means by n; zero means that it has not come.
func unixNano(n int64) time.Time {
	if n <= 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

func isNotFound(err error) bool { return status.Code(err) == codes.NotFound }
