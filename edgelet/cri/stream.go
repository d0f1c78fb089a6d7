package cri

import (
	"bytes"
	"context"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxOutput bounds what ExecSync returns of each stream, in bytes. What a command
// writes beyond it is dropped.
const maxOutput = 64 << 10

// ExecSync runs a command in a container and waits for it, at most timeout, in
// whole seconds rounded up; zero means the client's own timeout. A timeout is an
// error of code DeadlineExceeded; the exit code alone is none.
func (c *Client) ExecSync(ctx context.Context, id string, command []string, timeout time.Duration) (stdout, stderr []byte, exit int32, err error) {
	op := c.query("exec in container", id)
	if timeout > 0 {
		op.limit += timeout // the runtime's own answer comes first
	} else {
		op.limit = c.config.Timeout
	}
	req := &cri.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: seconds(max(timeout, 0))}
	resp, err := do(ctx, op, c.runtime.ExecSync, req)
	return head(resp.GetStdout()), head(resp.GetStderr()), resp.GetExitCode(), err
}

// head copies the start of a stream, so that the rest can be freed.
func head(data []byte) []byte { return bytes.Clone(data[:min(len(data), maxOutput)]) }

// Exec prepares a command with streams and returns the URL that serves it once.
func (c *Client) Exec(ctx context.Context, req *cri.ExecRequest) (string, error) {
	resp, err := do(ctx, c.query("exec in container", req.ContainerId), c.runtime.Exec, req)
	return resp.GetUrl(), err
}

// Attach prepares streams to a container's process and returns the URL that
// serves them once.
func (c *Client) Attach(ctx context.Context, req *cri.AttachRequest) (string, error) {
	resp, err := do(ctx, c.query("attach to container", req.ContainerId), c.runtime.Attach, req)
	return resp.GetUrl(), err
}

// PortForward prepares connections to ports of a sandbox and returns the URL that
// serves them once.
func (c *Client) PortForward(ctx context.Context, req *cri.PortForwardRequest) (string, error) {
	resp, err := do(ctx, c.query("forward ports of sandbox", req.PodSandboxId), c.runtime.PortForward, req)
	return resp.GetUrl(), err
}
