package pod

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
	"github.com/skerry-io/skerry/internal/backoff"
)

// resizable are the resources that can change while a pod runs.
var resizable = []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory}

// A Resize is a change of a pod's resources that is not done yet.
type Resize struct {
	Pending string // Deferred or Infeasible: the site has no room; empty: it has
	Message string
	Running bool   // it has been allocated, and containers are being changed
	Error   string // why that does not succeed
}

// sameResources reports whether a and b ask for the same of what can be resized.
func sameResources(a, b *corev1.ResourceRequirements) bool {
	return len(changed(a, b)) == 0
}

// changed names the resources in which a and b differ.
func changed(a, b *corev1.ResourceRequirements) []corev1.ResourceName {
	var names []corev1.ResourceName
	for _, name := range resizable {
		ar, al := a.Requests[name], a.Limits[name]
		br, bl := b.Requests[name], b.Limits[name]
		if ar.Cmp(br) != 0 || al.Cmp(bl) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// needsRestart reports whether c must be restarted for its resources to become
// what is allocated to it.
func needsRestart(c *corev1.Container, applied *corev1.ResourceRequirements) bool {
	for _, name := range changed(&c.Resources, applied) {
		for _, p := range c.ResizePolicy {
			if p.ResourceName == name && p.RestartPolicy == corev1.RestartContainer {
				return true
			}
		}
	}
	return false
}

// allocate gives the pod the resources that it asks for, if the site has them,
// and makes w.current the pod with those that it has.
func (w *worker) allocate() {
	pod := w.current
	same := true
	for c := range criconfig.Containers(pod) {
		m := w.obs.Memory[c.Name]
		if m.Allocated == nil {
			m.Allocated = c.Resources.DeepCopy()
			w.obs.Memory[c.Name] = m
		}
		same = same && sameResources(&c.Resources, m.Allocated)
	}
	w.resize.Pending, w.resize.Message = "", ""
	if same || w.record.Ended != nil {
		return
	}
	w.m.admit.Lock()
	defer w.m.admit.Unlock()
	allocatable := w.m.Allocatable()
	if _, message := lacks(pod, nil, allocatable); message != "" {
		w.resize.Pending, w.resize.Message = corev1.PodReasonInfeasible, message
	} else if _, message := lacks(pod, w.m.running(pod), allocatable); message != "" {
		w.resize.Pending, w.resize.Message = corev1.PodReasonDeferred, message
	}
	if w.resize.Pending == "" {
		w.event("", corev1.EventTypeNormal, "ResizeStarted", "Pod resize started")
		for c := range criconfig.Containers(pod) {
			m := w.obs.Memory[c.Name]
			m.Allocated, m.ResizeRetry = c.Resources.DeepCopy(), time.Time{}
			w.obs.Memory[c.Name] = m
		}
		w.resize = Resize{Running: true}
		return
	}
	// What it has, it keeps.
	pod = pod.DeepCopy()
	for c := range criconfig.Containers(pod) {
		c.Resources = *w.obs.Memory[c.Name].Allocated.DeepCopy()
	}
	w.current = pod
}

// resized notes how far a resize has come.
func (w *worker) resized() {
	running := false
	for _, run := range w.obs.Containers {
		m := w.obs.Memory[run.Name]
		running = running || run.State == cri.ContainerState_CONTAINER_RUNNING &&
			m.Allocated != nil && m.Applied != nil && !sameResources(m.Allocated, m.Applied)
	}
	if w.resize.Running && !running {
		w.event("", corev1.EventTypeNormal, "ResizeCompleted", "Pod resize completed")
		w.resize.Error = ""
	}
	w.resize.Running = running
}

// resizeContainer changes the limits of a running container. If the runtime
// refuses, as when it uses more memory than it is to have, it is asked again later.
func (w *worker) resizeContainer(ctx context.Context, spec Spec, a ResizeContainer) error {
	c := specOf(spec.Pod, a.Name)
	m := w.obs.Memory[a.Name]
	err := w.m.Runtime.UpdateContainerResources(ctx, a.ID, criconfig.Resources(spec.Pod, c, w.m.Memory, w.m.pageSizes))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		if w.resize.Error != text(err) {
			w.event(a.Name, corev1.EventTypeWarning, "ResizeError", "Error: "+text(err))
		}
		w.resize.Error = text(err)
		m.ResizeRetry = time.Now().Add(retryBase + backoff.Delay(4, retryBase, retryLimit))
	default:
		m.Applied, m.ResizeRetry = c.Resources.DeepCopy(), time.Time{}
	}
	w.obs.Memory[a.Name] = m
	return nil
}

// reportedResources are those that a container has: what was applied to it while
// it runs, what is allocated to it while it does not.
func reportedResources(c *corev1.Container, run Container, m Memory) *corev1.ResourceRequirements {
	r := c.Resources.DeepCopy()
	if run.State != cri.ContainerState_CONTAINER_RUNNING || m.Applied == nil {
		return r
	}
	for _, name := range resizable {
		if q, ok := m.Applied.Requests[name]; ok && r.Requests != nil {
			r.Requests[name] = q.DeepCopy()
		}
		if q, ok := m.Applied.Limits[name]; ok && r.Limits != nil {
			r.Limits[name] = q.DeepCopy()
		}
	}
	return r
}

// resizeConditions are the conditions of a resize that is not done.
func (s *situation) resizeConditions() []corev1.PodCondition {
	var all []corev1.PodCondition
	if s.resize.Pending != "" {
		all = append(all, corev1.PodCondition{
			Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: s.resize.Pending, Message: s.resize.Message,
		})
	}
	if s.resize.Running {
		c := corev1.PodCondition{Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue}
		if s.resize.Error != "" {
			c.Reason, c.Message = corev1.PodReasonError, s.resize.Error
		}
		all = append(all, c)
	}
	return all
}
