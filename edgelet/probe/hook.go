package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Hooks runs postStart and preStop. Its method may be called
// from any goroutine.
type Hooks struct {
	cfg    Config
	client *http.Client
}

// NewHooks returns hooks that use Exec, Event and Version of cfg.
func NewHooks(cfg Config) *Hooks {
	return &Hooks{cfg: cfg.withDefaults(), client: newHTTPClient(false)}
}

// Run runs a hook to its end, or until ctx is done: a hook has no timeout of its
// own. A command that exits with another code than 0 is an error; an HTTP server
// may answer with any status. A tcpSocket hook, which the API still allows, is an
// error, as it is to a kubelet.
func (h *Hooks) Run(ctx context.Context, pod *corev1.Pod, container *corev1.Container, containerID, podIP string, hook *corev1.LifecycleHandler) error {
	switch {
	case hook.Exec != nil:
		return h.command(ctx, containerID, hook.Exec.Command)
	case hook.HTTPGet != nil:
		if err := h.get(ctx, pod, container, podIP, hook.HTTPGet); err != nil {
			return fmt.Errorf("HTTP lifecycle hook (%s) for container %q: %w", hook.HTTPGet.Path, container.Name, err)
		}
		return nil
	case hook.Sleep != nil:
		return sleep(ctx, time.Duration(hook.Sleep.Seconds)*time.Second)
	case hook.TCPSocket != nil:
		return errors.New("lifecycle hook: tcpSocket is not supported by Kubernetes")
	}
	return errors.New("lifecycle hook: neither exec, httpGet nor sleep is set")
}

func (h *Hooks) command(ctx context.Context, containerID string, cmd []string) error {
	limit := time.Duration(0)
	if end, ok := ctx.Deadline(); ok {
		limit = max(time.Until(end), time.Millisecond) // so that the runtime ends the command too
	}
	output, exit, err := h.cfg.Exec(ctx, containerID, cmd, limit)
	switch text := clip(string(output), maxMessage); {
	case err != nil:
		return fmt.Errorf("exec lifecycle hook %q: %w, message: %q", cmd, err, text)
	case exit != 0:
		return fmt.Errorf("exec lifecycle hook %q exited with %d, message: %q", cmd, exit, text)
	}
	return nil
}

// get sends the request of a hook. A server that speaks plain HTTP where HTTPS
// was asked for gets the request again in its own language, as from a kubelet.
func (h *Hooks) get(ctx context.Context, pod *corev1.Pod, container *corev1.Container, ip string, action *corev1.HTTPGetAction) error {
	req, err := newRequest(ctx, action, container, ip, "kube-lifecycle/"+h.cfg.Version)
	if err != nil {
		return err
	}
	err = h.do(req)
	if !errors.Is(err, http.ErrSchemeMismatch) {
		return err
	}
	again := req.Clone(ctx)
	again.URL.Scheme = "http"
	again.Header.Del("Authorization")
	if h.do(again) != nil {
		return err
	}
	h.cfg.Event(pod, corev1.EventTypeWarning, "LifecycleHTTPFallback",
		fmt.Sprintf("request to HTTPS lifecycle hook %s got HTTP response, retry with HTTP succeeded", req.URL.Host))
	return nil
}

func (h *Hooks) do(req *http.Request) error {
	resp, err := h.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.CopyN(io.Discard, resp.Body, maxOutput) // let a short answer be written to its end
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return errors.New("container terminated before sleep hook finished")
	}
}
