package cri

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListPodSandboxStats returns the use of each running pod with its containers. Where
// the runtime does not know the call, or fails it because of one pod, as containerd
// 1.x does, the pods are put together from their containers, and have then no
// network and no figures of their own.
func (c *Client) ListPodSandboxStats(ctx context.Context) ([]*cri.PodSandboxStats, error) {
	resp, err := do(ctx, c.query("stats of sandboxes", ""), c.runtime.ListPodSandboxStats, &cri.ListPodSandboxStatsRequest{})
	switch status.Code(err) {
	case codes.OK, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return resp.GetStats(), err
	}
	list, err := c.readySandboxes(ctx)
	if err != nil {
		return nil, err
	}
	stats, err := do(ctx, c.query("stats of containers", ""), c.runtime.ListContainerStats, &cri.ListContainerStatsRequest{})
	if err != nil {
		return nil, err
	}
	return group(list, stats.GetStats()), nil
}

// readySandboxes lists ready sandboxes.
func (c *Client) readySandboxes(ctx context.Context) ([]*cri.PodSandbox, error) {
	req := &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}}}
	resp, err := do(ctx, c.query("list sandboxes", ""), c.runtime.ListPodSandbox, req)
	return resp.GetItems(), err
}

// group assigns containers to sandboxes by the pod's UID. Of two sandboxes of one
// pod, the first gets them.
func group(list []*cri.PodSandbox, stats []*cri.ContainerStats) []*cri.PodSandboxStats {
	byUID := make(map[string]*cri.PodSandboxStats, len(list))
	pods := make([]*cri.PodSandboxStats, 0, len(list))
	for _, sandbox := range list {
		uid := sandbox.GetMetadata().GetUid()
		if byUID[uid] != nil {
			continue
		}
		pod := &cri.PodSandboxStats{
			Attributes: &cri.PodSandboxAttributes{Id: sandbox.Id, Metadata: sandbox.Metadata, Labels: sandbox.Labels, Annotations: sandbox.Annotations},
			Linux:      &cri.LinuxPodSandboxStats{},
		}
		byUID[uid] = pod
		pods = append(pods, pod)
	}
	for _, one := range stats {
		if pod := byUID[one.GetAttributes().GetLabels()[podUIDLabel]]; pod != nil {
			pod.Linux.Containers = append(pod.Linux.Containers, one)
		}
	}
	return pods
}
