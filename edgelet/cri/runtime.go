package cri

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// podUIDLabel is on every container of a pod, as a kubelet sets it.
const podUIDLabel = "io.kubernetes.pod.uid"

// query is an operation that only looks.
func (c *Client) query(name, object string) operation {
	return operation{name, object, c.config.QueryTimeout}
}

// change is an operation that changes something.
func (c *Client) change(name, object string) operation {
	return operation{name, object, c.config.Timeout}
}

// ListPodSandbox lists all sandboxes, ready or not.
func (c *Client) ListPodSandbox(ctx context.Context) ([]*cri.PodSandbox, error) {
	began := time.Now()
	resp, err := do(ctx, c.query("list sandboxes", ""), c.runtime.ListPodSandbox, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	pods := make(map[string]types.UID, len(resp.Items))
	for _, item := range resp.Items {
		pods[item.Id] = types.UID(item.GetMetadata().GetUid())
	}
	c.index.replace(sandboxes, pods, began)
	return resp.Items, nil
}

// ListContainers lists all containers, running or not.
func (c *Client) ListContainers(ctx context.Context) ([]*cri.Container, error) {
	began := time.Now()
	resp, err := do(ctx, c.query("list containers", ""), c.runtime.ListContainers, &cri.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	pods := make(map[string]types.UID, len(resp.Containers))
	for _, item := range resp.Containers {
		pods[item.Id] = types.UID(item.Labels[podUIDLabel])
	}
	c.index.replace(containers, pods, began)
	return resp.Containers, nil
}

// PodSandboxStatus describes one sandbox; code NotFound if there is none.
func (c *Client) PodSandboxStatus(ctx context.Context, id string) (*cri.PodSandboxStatus, error) {
	resp, err := do(ctx, c.query("status of sandbox", id), c.runtime.PodSandboxStatus, &cri.PodSandboxStatusRequest{PodSandboxId: id})
	return resp.GetStatus(), err
}

// ContainerStatus describes one container; code NotFound if there is none.
func (c *Client) ContainerStatus(ctx context.Context, id string) (*cri.ContainerStatus, error) {
	resp, err := do(ctx, c.query("status of container", id), c.runtime.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: id})
	return resp.GetStatus(), err
}

// RunPodSandbox creates and starts a sandbox. After an error it may exist all the
// same, and shows in the next list.
func (c *Client) RunPodSandbox(ctx context.Context, config *cri.PodSandboxConfig, handler string) (string, error) {
	op := c.change("run sandbox", config.GetMetadata().GetName())
	op.limit *= 2
	resp, err := do(ctx, op, c.runtime.RunPodSandbox, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return "", err
	}
	c.index.add(sandboxes, resp.PodSandboxId, types.UID(config.GetMetadata().GetUid()))
	return resp.PodSandboxId, nil
}

// StopPodSandbox stops a sandbox, its containers and its network. Idempotent.
func (c *Client) StopPodSandbox(ctx context.Context, id string) error {
	_, err := do(ctx, c.change("stop sandbox", id), c.runtime.StopPodSandbox, &cri.StopPodSandboxRequest{PodSandboxId: id})
	return gone(err)
}

// RemovePodSandbox removes a sandbox and its containers. Idempotent.
func (c *Client) RemovePodSandbox(ctx context.Context, id string) error {
	_, err := do(ctx, c.change("remove sandbox", id), c.runtime.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return gone(err)
}

// CreateContainer creates a container in a sandbox of which sandbox is the config.
func (c *Client) CreateContainer(ctx context.Context, sandboxID string, config *cri.ContainerConfig, sandbox *cri.PodSandboxConfig) (string, error) {
	req := &cri.CreateContainerRequest{PodSandboxId: sandboxID, Config: config, SandboxConfig: sandbox}
	resp, err := do(ctx, c.change("create container", config.GetMetadata().GetName()), c.runtime.CreateContainer, req)
	if err != nil {
		return "", err
	}
	c.index.add(containers, resp.ContainerId, types.UID(sandbox.GetMetadata().GetUid()))
	return resp.ContainerId, nil
}

// StartContainer starts a created container.
func (c *Client) StartContainer(ctx context.Context, id string) error {
	_, err := do(ctx, c.change("start container", id), c.runtime.StartContainer, &cri.StartContainerRequest{ContainerId: id})
	return err
}

// StopContainer asks a container to end and kills it after grace, in whole seconds
// rounded up; none kills at once. It returns when the container has ended. Idempotent.
func (c *Client) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	grace = max(grace, 0)
	op := c.change("stop container", id)
	op.limit += grace
	req := &cri.StopContainerRequest{ContainerId: id, Timeout: seconds(grace)}
	_, err := do(ctx, op, c.runtime.StopContainer, req)
	return gone(err)
}

// RemoveContainer removes a container, killing it if it runs. Idempotent.
func (c *Client) RemoveContainer(ctx context.Context, id string) error {
	_, err := do(ctx, c.change("remove container", id), c.runtime.RemoveContainer, &cri.RemoveContainerRequest{ContainerId: id})
	return gone(err)
}

// UpdateContainerResources changes the limits of a running container.
func (c *Client) UpdateContainerResources(ctx context.Context, id string, resources *cri.LinuxContainerResources) error {
	req := &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: resources}
	_, err := do(ctx, c.change("update container", id), c.runtime.UpdateContainerResources, req)
	return err
}

// ReopenContainerLog makes the runtime write to a new log file, after the old one
// has been renamed.
func (c *Client) ReopenContainerLog(ctx context.Context, id string) error {
	_, err := do(ctx, c.change("reopen log of container", id), c.runtime.ReopenContainerLog, &cri.ReopenContainerLogRequest{ContainerId: id})
	return err
}

// CheckpointContainer writes the state of a container into a file.
func (c *Client) CheckpointContainer(ctx context.Context, id, file string, timeout time.Duration) error {
	op := c.change("checkpoint container", id)
	op.limit += timeout
	req := &cri.CheckpointContainerRequest{ContainerId: id, Location: file, Timeout: seconds(timeout)}
	_, err := do(ctx, op, c.runtime.CheckpointContainer, req)
	return err
}

// seconds rounds up to whole seconds, which is all that CRI knows.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// unimplemented reports whether the runtime does not know a call.
func unimplemented(err error) bool { return status.Code(err) == codes.Unimplemented }
