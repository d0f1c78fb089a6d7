package pod

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// leastGrace is what a container has at least between its stop signal and
// SIGKILL, even when its preStop hook has used up the grace period.
const leastGrace = 2 * time.Second

// stopContainers ends containers, all at the same time but for what each says it
// comes after. It returns when all have ended or could not be ended.
func (w *worker) stopContainers(ctx context.Context, spec Spec, stops []StopContainer) error {
	began := time.Now()
	ended := map[string]chan struct{}{} // by container name; closed when it has ended
	for _, s := range stops {
		ended[s.Name] = make(chan struct{})
	}
	if w.killing == nil {
		w.killing, w.stopped = map[string]bool{}, map[string]bool{}
	}
	var mu sync.Mutex // guards what follows
	var errs []error
	hooked := map[string]bool{}
	var wg sync.WaitGroup
	for _, s := range stops {
		if !w.killing[s.ID] {
			w.killing[s.ID] = true
			w.event(s.Name, corev1.EventTypeNormal, "Killing", cmp.Or(s.Message, "Stopping container "+s.Name))
		}
		hook := !w.stopped[s.ID]
		wg.Go(func() {
			defer close(ended[s.Name])
			if hook && w.preStop(ctx, spec.Pod, s) {
				mu.Lock()
				hooked[s.ID] = true
				mu.Unlock()
			}
			rest := func() time.Duration { return s.Grace - time.Since(began) }
			for _, name := range s.After {
				await(ctx, ended[name], rest())
			}
			err := w.m.Runtime.StopContainer(ctx, s.ID, max(rest(), leastGrace).Round(time.Second))
			if err != nil && !isNotFound(err) {
				mu.Lock()
				errs = append(errs, fmt.Errorf("stop container %s: %w", s.Name, err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for id := range hooked {
		w.stopped[id] = true
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, s := range stops {
		if err := w.look(ctx, s.ID); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// await waits for done, for ctx or for at most d.
func await(ctx context.Context, done <-chan struct{}, d time.Duration) {
	if done == nil {
		return
	}
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// look observes one known container again.
func (w *worker) look(ctx context.Context, id string) error {
	i := slices.IndexFunc(w.obs.Containers, func(k Container) bool { return k.ID == id })
	if i < 0 {
		return nil
	}
	run, err := w.container(ctx, id, w.obs.Containers[i].SandboxID)
	switch {
	case isNotFound(err):
		w.obs.Containers = slices.Delete(w.obs.Containers, i, i+1)
		return nil
	case err != nil:
		return err
	}
	w.put(run)
	delete(w.killing, id)
	if run.State == cri.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("container %s still runs after it was stopped", run.Name)
	}
	return nil
}

// preStop runs a container's preStop hook within the grace period. It reports
// whether the hook need not run again.
func (w *worker) preStop(ctx context.Context, pod *corev1.Pod, s StopContainer) bool {
	c := specOf(pod, s.Name)
	if c.Lifecycle == nil || c.Lifecycle.PreStop == nil || s.Grace <= 0 {
		return true
	}
	limited, cancel := context.WithTimeout(ctx, s.Grace)
	defer cancel()
	err := w.m.Hooks.Run(limited, pod, c, s.ID, w.ip(), c.Lifecycle.PreStop)
	switch {
	case ctx.Err() != nil:
		return false
	case limited.Err() != nil:
		w.log().Info("preStop hook has used up the grace period", "container", s.Name)
	case err != nil:
		w.event(s.Name, corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed")
	}
	return true
}

func (w *worker) stopSandbox(ctx context.Context, id string) error {
	err := w.m.Runtime.StopPodSandbox(ctx, id)
	if err != nil && !isNotFound(err) {
		if ctx.Err() == nil {
			w.event("", corev1.EventTypeWarning, "FailedKillPod", "error killing pod: "+text(err))
		}
		return fmt.Errorf("stop sandbox: %w", err)
	}
	for i := range w.obs.Sandboxes {
		if s := &w.obs.Sandboxes[i]; s.ID == id {
			s.Ready, s.Stopped = false, true
		}
	}
	// Stopping a sandbox ends what was left running in it.
	for _, c := range slices.Clone(w.obs.Containers) {
		if c.SandboxID == id && mayRun(c.State) {
			if err := w.look(ctx, c.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *worker) removeSandbox(ctx context.Context, id string) error {
	if i := slices.IndexFunc(w.obs.Sandboxes, func(s Sandbox) bool { return s.ID == id }); i >= 0 && !w.obs.Sandboxes[i].Stopped {
		if err := w.stopSandbox(ctx, id); err != nil {
			return err
		}
	}
	if err := w.m.Runtime.RemovePodSandbox(ctx, id); err != nil && !isNotFound(err) {
		return fmt.Errorf("remove sandbox: %w", err)
	}
	w.obs.Sandboxes = slices.DeleteFunc(w.obs.Sandboxes, func(s Sandbox) bool { return s.ID == id })
	w.obs.Containers = slices.DeleteFunc(w.obs.Containers, func(c Container) bool { return c.SandboxID == id })
	return nil
}

func (w *worker) removeContainer(ctx context.Context, a RemoveContainer) error {
	if err := w.m.Runtime.RemoveContainer(ctx, a.ID); err != nil && !isNotFound(err) {
		return fmt.Errorf("remove container %s: %w", a.Name, err)
	}
	w.obs.Containers = slices.DeleteFunc(w.obs.Containers, func(c Container) bool { return c.ID == a.ID })
	w.removeRun(a.Name, a.Attempt)
	return nil
}

func (w *worker) tearDown(ctx context.Context, a TearDown) error {
	w.m.Probes.Forget(w.uid)
	if err := w.m.Volumes.Teardown(ctx, w.uid); err != nil {
		return fmt.Errorf("tear down volumes: %w", err)
	}
	w.obs.Volumes, w.obs.TornDown = false, true
	if !a.All {
		return nil
	}
	if err := errors.Join(w.removeFiles(), w.removeCgroup()); err != nil {
		return err
	}
	w.finished = true
	return nil
}

// graceFrom reads the termination grace period that a sandbox was given.
func graceFrom(annotations map[string]string) *int64 {
	n, err := strconv.ParseInt(annotations[criconfig.AnnotationGrace], 10, 32)
	if err != nil {
		return nil
	}
	return &n
}

// preStopFrom reads the preStop hook that a container was given.
func preStopFrom(annotations map[string]string) *corev1.Lifecycle {
	data := annotations[criconfig.AnnotationPreStop]
	var hook corev1.LifecycleHandler
	if data == "" || json.Unmarshal([]byte(data), &hook) != nil {
		return nil
	}
	return &corev1.Lifecycle{PreStop: &hook}
}
