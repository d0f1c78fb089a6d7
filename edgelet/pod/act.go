package pod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"google.golang.org/grpc/status"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/internal/backoff"
)

// act carries out actions in order. Acted reports that there was anything to do
// besides waiting. A container that cannot be started does not stop the rest;
// the failure is remembered, and Plan says when to try again.
func (w *worker) act(ctx context.Context, spec Spec, actions []Action) (acted bool, failed error) {
	unready := false // volumes are not there, so nothing may start
	for len(actions) > 0 && ctx.Err() == nil {
		action := actions[0]
		actions = actions[1:]
		var err error
		switch a := action.(type) {
		case Wait:
			w.due(a.Until)
			continue
		case SetUpVolumes:
			if err = w.setUp(ctx, spec); err != nil {
				unready, failed, err = true, err, nil
			}
		case RunSandbox:
			if unready {
				return acted, failed
			}
			err = w.runSandbox(ctx, spec, a)
		case StartContainer:
			if unready {
				continue
			}
			w.startContainer(ctx, spec, a)
		case StopContainer:
			group := []StopContainer{a}
			for len(actions) > 0 {
				next, ok := actions[0].(StopContainer)
				if !ok {
					break
				}
				group, actions = append(group, next), actions[1:]
			}
			err = w.stopContainers(ctx, spec, group)
		case ResizeContainer:
			err = w.resizeContainer(ctx, spec, a)
		case RemoveContainer:
			err = w.removeContainer(ctx, a)
		case StopSandbox:
			err = w.stopSandbox(ctx, a.ID)
		case RemoveSandbox:
			err = w.removeSandbox(ctx, a.ID)
		case TearDown:
			err = w.tearDown(ctx, a)
		}
		acted = true
		if err != nil {
			w.unsure = true
			return acted, err
		}
		if w.unsure {
			return acted, failed
		}
		w.report(time.Now())
	}
	return acted, failed
}

func (w *worker) setUp(ctx context.Context, spec Spec) error {
	if w.obs.Volumes {
		return nil // in this very pass
	}
	err := w.m.Volumes.Setup(ctx, spec.Pod)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		if w.mountErr != err.Error() || w.failures%8 == 0 {
			w.event("", corev1.EventTypeWarning, "FailedMount", err.Error())
		}
		w.mountErr = err.Error()
		return fmt.Errorf("set up volumes: %w", err)
	}
	w.mountErr = ""
	w.obs.Volumes, w.obs.TornDown = true, false
	// Refreshes of many pods must not come together.
	w.refresh = time.Now().Add(w.m.Refresh*3/4 + backoff.Delay(0, w.m.Refresh/4, w.m.Refresh/4))
	return nil
}

// sandboxConfig is what a sandbox was, or is to be, created with.
func (w *worker) sandboxConfig(pod *corev1.Pod, attempt uint32) (*cri.PodSandboxConfig, error) {
	hostname, err := w.m.Environments.Hostname(pod)
	if err != nil {
		return nil, err
	}
	dns, err := w.m.Environments.DNS(pod)
	if err != nil {
		return nil, err
	}
	return criconfig.Sandbox(pod, criconfig.SandboxOptions{
		Attempt: attempt, LogDir: w.m.LogDir, Hostname: hostname, DNS: dns,
		CgroupParent: criconfig.CgroupParent(w.m.CgroupRoot, w.m.CgroupDriver(), pod),
	})
}

func (w *worker) runSandbox(ctx context.Context, spec Spec, a RunSandbox) error {
	if a.Attempt > 0 {
		w.event("", corev1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
	}
	s, err := w.newSandbox(ctx, spec.Pod, a.Attempt)
	if err != nil {
		if ctx.Err() == nil {
			w.event("", corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: "+text(err))
		}
		return fmt.Errorf("create sandbox: %w", err)
	}
	w.obs.Sandboxes = append(w.obs.Sandboxes, s)
	w.order()
	return nil
}

func (w *worker) newSandbox(ctx context.Context, pod *corev1.Pod, attempt uint32) (Sandbox, error) {
	handler := ""
	if name := pod.Spec.RuntimeClassName; name != nil && *name != "" {
		class, err := w.m.Objects.RuntimeClass(*name)
		if err != nil {
			return Sandbox{}, fmt.Errorf("runtime class %s: %w", *name, err)
		}
		handler = class.Handler
	}
	config, err := w.sandboxConfig(pod, attempt)
	if err != nil {
		return Sandbox{}, err
	}
	if err := w.makeLogDir(""); err != nil {
		return Sandbox{}, err
	}
	id, err := w.m.Runtime.RunPodSandbox(ctx, config, handler)
	if err != nil {
		return Sandbox{}, err
	}
	return w.sandbox(ctx, &cri.PodSandbox{
		Id: id, Metadata: config.Metadata, State: cri.PodSandboxState_SANDBOX_READY, CreatedAt: time.Now().UnixNano(),
	})
}

// A startError is why a container could not be started, as its status shows it.
type startError struct {
	reason string
	err    error
}

func (e *startError) Error() string { return text(e.err) }
func (e *startError) Unwrap() error { return e.err }

// text is the message of an error, without what gRPC puts around it.
func text(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

// startContainer starts a container or remembers why it could not.
func (w *worker) startContainer(ctx context.Context, spec Spec, a StartContainer) {
	c := specOf(spec.Pod, a.Name)
	err := w.start(ctx, spec.Pod, c, a)
	if ctx.Err() != nil {
		w.unsure = true
		return
	}
	m := w.obs.Memory[a.Name]
	if err == nil {
		m.Failure = Failure{}
		w.obs.Memory[a.Name] = m
		return
	}
	f := Failure{Reason: reasonRun, Message: text(err), Attempt: a.Attempt, Count: m.Failure.Count + 1}
	if e, ok := errors.AsType[*startError](err); ok {
		f.Reason = e.reason
		if e.reason == reasonPostStart {
			f.Attempt++ // this one did
		}
	}
	f.Retry = time.Now().Add(retryLeast + backoff.Delay(m.Failure.Count, retryBase, retryLimit))
	if e, ok := errors.AsType[interface {
		error
		Reason() string
	}](err); ok {
		f.Reason, f.Retry = e.Reason(), time.Now().Add(10*time.Second)
	}
	if e, ok := errors.AsType[interface {
		error
		RetryAt() time.Time
	}](err); ok {
		f.Retry = laterOf(e.RetryAt(), time.Now().Add(retryLeast))
	}
	m.Failure = f
	w.obs.Memory[a.Name] = m
	w.log().Info("container cannot be started", "container", a.Name, "reason", f.Reason, "err", err)
}

func laterOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// start creates and starts c, and runs its postStart hook.
func (w *worker) start(ctx context.Context, pod *corev1.Pod, c *corev1.Container, a StartContainer) error {
	if len(w.obs.Sandboxes) == 0 {
		return errors.New("the pod has no sandbox")
	}
	sandbox := w.obs.Sandboxes[0]
	m := w.obs.Memory[c.Name]
	if i := slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.Name == c.Name }); a.ID == "" && i >= 0 &&
		w.obs.Containers[i].State == cri.ContainerState_CONTAINER_EXITED && w.obs.Containers[i].SandboxID == sandbox.ID {
		m = backedOff(m, c, w.obs.Containers[i].Finished, time.Now())
	}
	id := a.ID
	if id == "" {
		var err error
		if id, err = w.create(ctx, pod, c, sandbox, a.Attempt); err != nil {
			return err
		}
		w.event(c.Name, corev1.EventTypeNormal, "Created", "Container created")
	}
	m.Begun, m.Next, m.Exited = true, max(m.Next, a.Attempt+1), nil
	if a.ID == "" {
		m.Applied = c.Resources.DeepCopy()
	}
	w.obs.Memory[c.Name] = m
	if records, learned := w.remember(); learned {
		w.change(func(r *Record) { r.Containers = records })
	}
	if atMostOnce(pod, c) || isEphemeral(pod, c) {
		// From here on it may have run, whatever becomes of us.
		if err := w.save(); err != nil {
			return &startError{reasonRun, err}
		}
	}
	w.unsure = true // until it has been looked at
	if err := w.m.Runtime.StartContainer(ctx, id); err != nil {
		if ctx.Err() == nil {
			w.event(c.Name, corev1.EventTypeWarning, "Failed", "Error: "+text(err))
		}
		return &startError{reasonRun, err}
	}
	w.event(c.Name, corev1.EventTypeNormal, "Started", "Container started")
	return w.begun(ctx, pod, c, id, sandbox.ID)
}

// begun looks at a container that has just been started, and runs its hook.
func (w *worker) begun(ctx context.Context, pod *corev1.Pod, c *corev1.Container, id, sandboxID string) error {
	run, err := w.container(ctx, id, sandboxID)
	if err != nil {
		return &startError{reasonRun, err}
	}
	w.put(run)
	w.unsure = false
	if c.Lifecycle == nil || c.Lifecycle.PostStart == nil {
		return nil
	}
	err = w.m.Hooks.Run(ctx, pod, c, id, w.ip(), c.Lifecycle.PostStart)
	if err == nil || ctx.Err() != nil {
		return nil
	}
	w.event(c.Name, corev1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed")
	stop := []StopContainer{{Name: c.Name, ID: id, Grace: podGrace(pod), Message: "FailedPostStartHook"}}
	if err := w.stopContainers(ctx, Spec{Pod: pod}, stop); err != nil {
		return &startError{reasonPostStart, err}
	}
	return &startError{reasonPostStart, errors.New("PostStartHook failed")}
}

// put makes run part of what was observed.
func (w *worker) put(run Container) {
	if i := slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.ID == run.ID }); i >= 0 {
		w.obs.Containers[i] = run
	} else {
		w.obs.Containers = append(w.obs.Containers, run)
	}
	w.order()
}

func (w *worker) ip() string {
	if ips := w.ips(); len(ips) > 0 {
		return ips[0]
	}
	return ""
}

func isEphemeral(pod *corev1.Pod, c *corev1.Container) bool {
	return slices.ContainsFunc(pod.Spec.EphemeralContainers, func(e corev1.EphemeralContainer) bool { return e.Name == c.Name })
}

// create makes the image present and creates the container.
func (w *worker) create(ctx context.Context, pod *corev1.Pod, c *corev1.Container, sandbox Sandbox, attempt uint32) (string, error) {
	fail := func(reason string, err error) (string, error) {
		if ctx.Err() == nil {
			w.event(c.Name, corev1.EventTypeWarning, "Failed", "Error: "+text(err))
		}
		return "", &startError{reason, err}
	}
	box, err := w.sandboxConfig(pod, sandbox.Attempt)
	if err != nil {
		return fail(reasonConfig, err)
	}
	image, err := w.m.Images.Ensure(ctx, c.Image, c.ImagePullPolicy, w.pullSecrets(pod), box,
		func(kind, reason, message string) { w.event(c.Name, kind, reason, message) })
	if err != nil {
		if e, ok := errors.AsType[interface {
			error
			Reason() string
		}](err); ok && ctx.Err() == nil {
			w.event(c.Name, corev1.EventTypeWarning, "Failed", "Error: "+e.Reason())
		}
		return "", err
	}
	config, err := w.containerConfig(ctx, pod, c, image, attempt)
	if err != nil {
		return fail(reasonConfig, err)
	}
	w.unsure = true // until what was created has been looked at
	id, err := w.m.Runtime.CreateContainer(ctx, sandbox.ID, config, box)
	if err != nil {
		return fail(reasonCreate, err)
	}
	return id, nil
}

func (w *worker) containerConfig(ctx context.Context, pod *corev1.Pod, c *corev1.Container, image Image, attempt uint32) (*cri.ContainerConfig, error) {
	ips := w.ips()
	env, err := w.m.Environments.Env(pod, c, ips)
	if err != nil {
		return nil, err
	}
	command, args := w.m.Environments.Command(c, env)
	mounts, err := w.m.Volumes.Mounts(ctx, pod, c, env)
	if err != nil {
		return nil, err
	}
	own, err := w.ownMounts(pod, c, ips)
	if err != nil {
		return nil, err
	}
	if err := w.makeLogDir(c.Name); err != nil {
		return nil, err
	}
	target := ""
	for _, e := range pod.Spec.EphemeralContainers {
		if e.Name != c.Name || e.TargetContainerName == "" {
			continue
		}
		i := slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.Name == e.TargetContainerName })
		if i < 0 {
			return nil, fmt.Errorf("unable to find target container %v", e.TargetContainerName)
		}
		target = w.obs.Containers[i].ID
	}
	return criconfig.Container(pod, c, criconfig.ContainerOptions{
		Attempt: attempt, Image: image.Ref, ImageUID: image.UID, ImageUsername: image.Username,
		Command: command, Args: args, Env: env, Mounts: append(mounts, own...), TargetID: target,
		SeccompDir: w.m.SeccompDir, Memory: w.m.Memory, PageSizes: w.m.pageSizes,
	})
}

// pullSecrets are the pod's pull secrets as far as they are known: the image may
// be public, or be present.
func (w *worker) pullSecrets(pod *corev1.Pod) []*corev1.Secret {
	var secrets []*corev1.Secret
	var missing []string
	for _, ref := range pod.Spec.ImagePullSecrets {
		s, err := w.m.Objects.Secret(pod.Namespace, ref.Name)
		switch {
		case err == nil:
			secrets = append(secrets, s)
		case ref.Name == "":
		case errors.Is(err, edge.ErrAbsent) || errors.Is(err, edge.ErrUnknown):
			missing = append(missing, ref.Name)
		default:
			w.log().Warn("pull secret cannot be read", "secret", ref.Name, "err", err)
		}
	}
	if len(missing) > 0 {
		w.event("", corev1.EventTypeWarning, "FailedToRetrieveImagePullSecret",
			fmt.Sprintf("Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", strings.Join(missing, ", ")))
	}
	return secrets
}
