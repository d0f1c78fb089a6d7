package critest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exitKilled is the exit code of a process that was killed.
const exitKilled = 137

func (s *sandbox) uid() types.UID { return types.UID(s.config.GetMetadata().GetUid()) }

// ListPodSandbox implements Runtime.
func (f *Fake) ListPodSandbox(ctx context.Context) (list []*cri.PodSandbox, err error) {
	err = f.call(ctx, Call{Method: "ListPodSandbox"}, func() error {
		for _, id := range slices.Sorted(maps.Keys(f.sandboxes)) {
			s := f.sandboxes[id]
			list = append(list, &cri.PodSandbox{
				Id: id, Metadata: proto.CloneOf(s.config.Metadata), State: s.status.State, CreatedAt: s.status.CreatedAt,
				Labels: maps.Clone(s.config.Labels), Annotations: maps.Clone(s.config.Annotations), RuntimeHandler: s.handler,
			})
		}
		return nil
	})
	return list, err
}

// ListContainers implements Runtime.
func (f *Fake) ListContainers(ctx context.Context) (list []*cri.Container, err error) {
	err = f.call(ctx, Call{Method: "ListContainers"}, func() error {
		for _, id := range slices.Sorted(maps.Keys(f.containers)) {
			c := f.containers[id]
			list = append(list, &cri.Container{
				Id: id, PodSandboxId: c.sandboxID, Metadata: proto.CloneOf(c.config.Metadata),
				Image: proto.CloneOf(c.config.Image), ImageRef: c.status.ImageRef, ImageId: c.status.ImageId,
				State: c.status.State, CreatedAt: c.status.CreatedAt,
				Labels: maps.Clone(c.config.Labels), Annotations: maps.Clone(c.config.Annotations),
			})
		}
		return nil
	})
	return list, err
}

// PodSandboxStatus implements Runtime.
func (f *Fake) PodSandboxStatus(ctx context.Context, id string) (result *cri.PodSandboxStatus, err error) {
	err = f.call(ctx, Call{Method: "PodSandboxStatus", Object: id}, func() error {
		s := f.sandboxes[id]
		if s == nil {
			return notFound("sandbox", id)
		}
		result = proto.CloneOf(s.status)
		return nil
	})
	return result, err
}

// ContainerStatus implements Runtime.
func (f *Fake) ContainerStatus(ctx context.Context, id string) (result *cri.ContainerStatus, err error) {
	err = f.call(ctx, Call{Method: "ContainerStatus", Object: id}, func() error {
		c := f.containers[id]
		if c == nil {
			return notFound("container", id)
		}
		result = proto.CloneOf(c.status)
		return nil
	})
	return result, err
}

// RunPodSandbox implements Runtime.
func (f *Fake) RunPodSandbox(ctx context.Context, config *cri.PodSandboxConfig, handler string) (id string, err error) {
	meta := config.GetMetadata()
	uid := types.UID(meta.GetUid())
	err = f.call(ctx, Call{"RunPodSandbox", meta.GetName(), uid}, func() error {
		for other, s := range f.sandboxes {
			if proto.Equal(s.config.Metadata, meta) {
				return status.Errorf(codes.Unknown, "failed to reserve sandbox name: name is reserved for %q", other)
			}
			if s.uid() == uid && s.status.State == cri.PodSandboxState_SANDBOX_READY {
				f.overlaps = append(f.overlaps, fmt.Sprintf("pod %s (%s): second sandbox while %s is ready", meta.GetName(), uid, other))
			}
		}
		id = f.newID()
		s := &sandbox{config: proto.CloneOf(config), handler: handler}
		namespaces := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
		s.status = &cri.PodSandboxStatus{
			Id: id, Metadata: s.config.Metadata, State: cri.PodSandboxState_SANDBOX_READY,
			CreatedAt: time.Now().UnixNano(), Labels: s.config.Labels, Annotations: s.config.Annotations, RuntimeHandler: handler,
			Linux:   &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: namespaces}},
			Network: &cri.PodSandboxNetworkStatus{},
		}
		if namespaces.GetNetwork() != cri.NamespaceMode_NODE {
			s.status.Network.Ip = fmt.Sprintf("10.88.%d.%d", f.ids>>8&255, f.ids&255)
		}
		f.sandboxes[id] = s
		f.notify(uid)
		return nil
	})
	return onlyIf(id, err)
}

// onlyIf drops a result whose reply has been lost.
func onlyIf(id string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	return id, nil
}

// StopPodSandbox implements Runtime.
func (f *Fake) StopPodSandbox(ctx context.Context, id string) error {
	return f.call(ctx, Call{Method: "StopPodSandbox", Object: id, UID: f.podOf(id)}, func() error {
		if s := f.sandboxes[id]; s != nil {
			f.endSandbox(s)
		}
		return nil
	})
}

// RemovePodSandbox implements Runtime.
func (f *Fake) RemovePodSandbox(ctx context.Context, id string) error {
	return f.call(ctx, Call{Method: "RemovePodSandbox", Object: id, UID: f.podOf(id)}, func() error {
		s := f.sandboxes[id]
		if s == nil {
			return nil
		}
		f.endSandbox(s)
		maps.DeleteFunc(f.containers, func(_ string, c *container) bool { return c.sandboxID == id })
		delete(f.sandboxes, id)
		f.notify(s.uid())
		return nil
	})
}

// podOf finds the pod of a sandbox or container.
func (f *Fake) podOf(id string) types.UID {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[id]; s != nil {
		return s.uid()
	}
	if c := f.containers[id]; c != nil {
		return c.sandbox.uid()
	}
	return ""
}

// endSandbox kills what runs in a sandbox and makes it not ready.
func (f *Fake) endSandbox(s *sandbox) {
	for _, c := range f.containers {
		if c.sandbox == s {
			f.end(c, exitKilled, "")
		}
	}
	if s.status.State == cri.PodSandboxState_SANDBOX_READY {
		s.status.State = cri.PodSandboxState_SANDBOX_NOTREADY
		s.status.Network = &cri.PodSandboxNetworkStatus{}
		f.notify(s.uid())
	}
}

// CreateContainer implements Runtime.
func (f *Fake) CreateContainer(ctx context.Context, sandboxID string, config *cri.ContainerConfig, pod *cri.PodSandboxConfig) (id string, err error) {
	call := Call{"CreateContainer", config.GetMetadata().GetName(), types.UID(pod.GetMetadata().GetUid())}
	err = f.call(ctx, call, func() error {
		s := f.sandboxes[sandboxID]
		switch {
		case s == nil:
			return notFound("sandbox", sandboxID)
		case s.status.State != cri.PodSandboxState_SANDBOX_READY:
			return status.Errorf(codes.Unknown, "sandbox %q is not running", sandboxID)
		}
		for other, c := range f.containers {
			if c.sandboxID == sandboxID && proto.Equal(c.config.Metadata, config.Metadata) {
				return status.Errorf(codes.Unknown, "failed to reserve container name: name is reserved for %q", other)
			}
		}
		image := f.findImage(config.GetImage().GetImage())
		if image == nil {
			return notFound("image", config.GetImage().GetImage())
		}
		id = f.newID()
		f.containers[id] = f.newContainer(id, s, proto.CloneOf(config), image)
		f.containers[id].sandboxID = sandboxID
		return nil
	})
	return onlyIf(id, err)
}

func (f *Fake) newContainer(id string, s *sandbox, config *cri.ContainerConfig, image *cri.Image) *container {
	c := &container{sandbox: s, config: config, ended: make(chan struct{})}
	if f.options.Behave != nil {
		c.behaviour = f.options.Behave(s.config, config)
	} else {
		c.behaviour = parseCommand(append(slices.Clone(config.Command), config.Args...))
	}
	c.status = &cri.ContainerStatus{
		Id: id, Metadata: config.Metadata, State: cri.ContainerState_CONTAINER_CREATED, CreatedAt: time.Now().UnixNano(),
		Image: config.Image, ImageRef: image.Id, ImageId: image.Id, Labels: config.Labels, Annotations: config.Annotations, Mounts: config.Mounts,
		Resources: &cri.ContainerResources{Linux: config.GetLinux().GetResources()},
	}
	if config.LogPath != "" && s.config.LogDirectory != "" {
		c.status.LogPath = filepath.Join(s.config.LogDirectory, config.LogPath)
	}
	return c
}

// StartContainer implements Runtime.
func (f *Fake) StartContainer(ctx context.Context, id string) error {
	return f.call(ctx, Call{"StartContainer", id, f.podOf(id)}, func() error {
		c := f.containers[id]
		switch {
		case c == nil:
			return notFound("container", id)
		case c.status.State != cri.ContainerState_CONTAINER_CREATED:
			return status.Errorf(codes.Unknown, "container is in %s state", c.status.State)
		case c.sandbox.status.State != cri.PodSandboxState_SANDBOX_READY:
			return status.Errorf(codes.Unknown, "sandbox container %q is not running", c.sandboxID)
		}
		return f.start(c)
	})
}

func (f *Fake) start(c *container) error {
	name := c.config.GetMetadata().GetName()
	for _, other := range f.containers {
		if other.sandbox.uid() == c.sandbox.uid() && other.config.GetMetadata().GetName() == name && other.status.State == cri.ContainerState_CONTAINER_RUNNING {
			f.overlaps = append(f.overlaps, fmt.Sprintf("pod %s (%s): container %s runs twice", c.sandbox.config.GetMetadata().GetName(), c.sandbox.uid(), name))
		}
	}
	if c.behaviour.StartError != "" {
		c.status.State, c.status.ExitCode = cri.ContainerState_CONTAINER_EXITED, 128
		c.status.Reason, c.status.Message = "StartError", c.behaviour.StartError
		c.status.FinishedAt = time.Now().UnixNano()
		close(c.ended)
		return status.Error(codes.Unknown, c.behaviour.StartError)
	}
	log, err := openLog(c.status.LogPath)
	if err != nil {
		return status.Error(codes.Unknown, err.Error())
	}
	c.log = log
	c.log.write(c.behaviour.Output)
	f.starts[string(c.sandbox.uid())+"/"+name]++
	c.status.State, c.status.StartedAt = cri.ContainerState_CONTAINER_RUNNING, time.Now().UnixNano()
	if c.behaviour.Exits {
		f.endAfter(c, c.behaviour.ExitAfter, c.behaviour.ExitCode)
	}
	f.notify(c.sandbox.uid())
	return nil
}

// end ends a running container.
func (f *Fake) end(c *container, code int32, reason string) {
	if c.status.State != cri.ContainerState_CONTAINER_RUNNING {
		return
	}
	for _, timer := range c.timers {
		timer.Stop()
	}
	c.log.close()
	usual := "Completed"
	if code != 0 {
		usual = "Error"
	}
	c.status.State, c.status.ExitCode, c.status.FinishedAt = cri.ContainerState_CONTAINER_EXITED, code, time.Now().UnixNano()
	c.status.Reason = cmp.Or(reason, usual)
	close(c.ended)
	f.notify(c.sandbox.uid())
}

// StopContainer implements Runtime.
func (f *Fake) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	var ended chan struct{}
	call := Call{"StopContainer", id, f.podOf(id)}
	err := f.call(ctx, call, func() error {
		c := f.containers[id]
		if c == nil || c.status.State != cri.ContainerState_CONTAINER_RUNNING {
			return nil
		}
		ended = c.ended
		f.term(c, grace)
		return nil
	})
	if err != nil || ended == nil {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// term lets a container end as it will, after grace at the latest. Of several
// that ask, the shortest grace counts.
func (f *Fake) term(c *container, grace time.Duration) {
	if grace <= 0 {
		f.end(c, exitKilled, "")
		return
	}
	after, code := grace, int32(exitKilled)
	if !c.behaviour.IgnoreTerm && c.behaviour.TermAfter < grace {
		after, code = c.behaviour.TermAfter, c.behaviour.TermCode
	}
	f.endAfter(c, after, code)
}

// endAfter ends a container when some time has passed, unless it has ended by then.
func (f *Fake) endAfter(c *container, after time.Duration, code int32) {
	c.timers = append(c.timers, time.AfterFunc(after, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.end(c, code, "")
	}))
}

// RemoveContainer implements Runtime.
func (f *Fake) RemoveContainer(ctx context.Context, id string) error {
	return f.call(ctx, Call{"RemoveContainer", id, f.podOf(id)}, func() error {
		c := f.containers[id]
		if c == nil {
			return nil
		}
		f.end(c, exitKilled, "")
		delete(f.containers, id)
		f.notify(c.sandbox.uid())
		return nil
	})
}

// UpdateContainerResources implements Runtime.
func (f *Fake) UpdateContainerResources(ctx context.Context, id string, resources *cri.LinuxContainerResources) error {
	return f.call(ctx, Call{"UpdateContainerResources", id, f.podOf(id)}, func() error {
		c := f.containers[id]
		if c == nil {
			return notFound("container", id)
		}
		next := &cri.LinuxContainerResources{}
		if c.status.Resources.Linux != nil {
			next = proto.CloneOf(c.status.Resources.Linux)
		}
		proto.Merge(next, resources)
		c.status.Resources.Linux = next
		return nil
	})
}
