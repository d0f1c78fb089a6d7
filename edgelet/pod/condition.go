package pod

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// phase computes a pod's phase from the statuses of its containers. Begun says
// that a main container has been started in the pod's sandbox; terminal, that
// nothing of the pod will be started again.
func phase(pod *corev1.Pod, status *corev1.PodStatus, begun, terminal bool) corev1.PodPhase {
	pending, failed := initProgress(pod, status.InitContainerStatuses)
	if failed {
		return corev1.PodFailed
	}
	var n struct{ running, waiting, stopped, final, succeeded int }
	slow := 0 // sidecars that have not started yet
	for i := range pod.Spec.InitContainers {
		if !criconfig.IsSidecar(&pod.Spec.InitContainers[i]) {
			continue
		}
		s := status.InitContainerStatuses[i]
		switch {
		case s.State.Running != nil:
			n.running++
			if s.Started == nil || !*s.Started {
				slow++
			}
		case s.State.Waiting != nil && s.LastTerminationState.Terminated == nil:
			n.waiting++
			slow++
		}
	}
	for i := range status.ContainerStatuses {
		s := &status.ContainerStatuses[i]
		end := s.State.Terminated
		if end == nil && s.State.Waiting != nil {
			end = s.LastTerminationState.Terminated
		}
		switch {
		case s.State.Running != nil:
			n.running++
		case end == nil:
			n.waiting++
		default:
			n.stopped++
			if !restarts(pod, specOf(pod, s.Name), knownCode(end)) {
				n.final++
			}
			if s.State.Terminated != nil && end.ExitCode == 0 {
				n.succeeded++
			}
		}
	}
	switch {
	case pending > 0, slow > 0 && !begun, n.waiting > 0:
		return corev1.PodPending
	case n.running > 0:
		return corev1.PodRunning
	case n.stopped == 0:
		return corev1.PodPending
	case !terminal && n.stopped != n.final:
		return corev1.PodRunning // about to be restarted
	case n.stopped == n.succeeded:
		return corev1.PodSucceeded
	}
	return corev1.PodFailed
}

// initProgress counts the init containers that are still to succeed, and says
// whether one has failed for good.
func initProgress(pod *corev1.Pod, statuses []corev1.ContainerStatus) (pending int, failed bool) {
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if criconfig.IsSidecar(c) {
			continue
		}
		s := statuses[i]
		end := s.State.Terminated
		if end == nil && s.State.Waiting != nil {
			end = s.LastTerminationState.Terminated
		}
		switch {
		case end == nil:
			pending++
		case end.ExitCode != 0 && !restarts(pod, c, knownCode(end)):
			failed = true
		case end.ExitCode != 0 || s.State.Terminated == nil:
			pending++
		}
	}
	return pending, failed
}

// knownCode is the exit code of an end, nil if nobody saw it.
func knownCode(end *corev1.ContainerStateTerminated) *int32 {
	if end.Reason == reasonUnknown {
		return nil
	}
	return &end.ExitCode
}

func specOf(pod *corev1.Pod, name string) *corev1.Container {
	for c := range criconfig.Containers(pod) {
		if c.Name == name {
			return c
		}
	}
	return &corev1.Container{Name: name}
}

// conditions are those that a kubelet owns. Readiness gates do not count here,
// they are known in the cloud alone.
func (s *situation) conditions(status *corev1.PodStatus) []corev1.PodCondition {
	ready := s.containersReady(status)
	problem := sandboxProblem(s.spec.Pod, s.obs)
	start := corev1.PodCondition{Type: corev1.PodReadyToStartContainers, Status: corev1.ConditionTrue}
	if problem != "" {
		start = falseCondition(corev1.PodReadyToStartContainers, "PodSandboxNotReady", problem)
	}
	podReady := ready
	podReady.Type = corev1.PodReady
	all := []corev1.PodCondition{start, s.initialized(status), podReady, ready,
		{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}}
	all = append(all, s.resizeConditions()...)
	if s.ended != nil && s.ended.Disruption {
		all = append(all, corev1.PodCondition{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue,
			Reason: corev1.PodReasonTerminationByKubelet, Message: s.ended.Message})
	}
	for i := range all {
		all[i].ObservedGeneration = s.spec.Pod.Generation
		all[i].LastTransitionTime = second(s.now)
		for _, old := range slices.Concat(s.old.Conditions, s.spec.Pod.Status.Conditions) {
			if old.Type == all[i].Type && old.Status == all[i].Status && !old.LastTransitionTime.IsZero() {
				all[i].LastTransitionTime = old.LastTransitionTime
				break
			}
		}
	}
	return all
}

func falseCondition(t corev1.PodConditionType, reason, message string) corev1.PodCondition {
	return corev1.PodCondition{Type: t, Status: corev1.ConditionFalse, Reason: reason, Message: message}
}

func (s *situation) containersReady(status *corev1.PodStatus) corev1.PodCondition {
	const t = corev1.ContainersReady
	switch status.Phase {
	case corev1.PodSucceeded:
		return falseCondition(t, "PodCompleted", "")
	case corev1.PodFailed:
		return falseCondition(t, "PodFailed", "")
	}
	var unready []string
	for i := range s.spec.Pod.Spec.InitContainers {
		c := &s.spec.Pod.Spec.InitContainers[i]
		if criconfig.IsSidecar(c) && !status.InitContainerStatuses[i].Ready {
			unready = append(unready, c.Name)
		}
	}
	for i := range s.spec.Pod.Spec.Containers {
		name := s.spec.Pod.Spec.Containers[i].Name
		if !slices.ContainsFunc(status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Name == name && c.Ready }) {
			unready = append(unready, name)
		}
	}
	if len(unready) > 0 {
		return falseCondition(t, "ContainersNotReady",
			fmt.Sprintf("containers with unready status: [%s]", strings.Join(unready, " ")))
	}
	return corev1.PodCondition{Type: t, Status: corev1.ConditionTrue}
}

func (s *situation) initialized(status *corev1.PodStatus) corev1.PodCondition {
	const t = corev1.PodInitialized
	if status.Phase == corev1.PodSucceeded {
		return corev1.PodCondition{Type: t, Status: corev1.ConditionTrue, Reason: "PodCompleted"}
	}
	if slices.ContainsFunc(status.ContainerStatuses, func(c corev1.ContainerStatus) bool {
		return c.State.Running != nil || c.State.Terminated != nil || c.LastTerminationState.Terminated != nil
	}) {
		return corev1.PodCondition{Type: t, Status: corev1.ConditionTrue}
	}
	var incomplete []string
	for i := range s.spec.Pod.Spec.InitContainers {
		c := &s.spec.Pod.Spec.InitContainers[i]
		st := status.InitContainerStatuses[i]
		if criconfig.IsSidecar(c) && (st.Started == nil || !*st.Started) || !criconfig.IsSidecar(c) && !st.Ready {
			incomplete = append(incomplete, c.Name)
		}
	}
	if len(incomplete) > 0 {
		return falseCondition(t, "ContainersNotInitialized",
			fmt.Sprintf("containers with incomplete status: [%s]", strings.Join(incomplete, " ")))
	}
	return corev1.PodCondition{Type: t, Status: corev1.ConditionTrue}
}

// sandboxProblem says why the pod cannot use its latest sandbox; empty: it can.
func sandboxProblem(pod *corev1.Pod, obs Observed) string {
	ready := 0
	for _, s := range obs.Sandboxes {
		if s.Ready {
			ready++
		}
	}
	switch {
	case len(obs.Sandboxes) == 0:
		return "no pod sandbox exists"
	case ready > 1:
		return "multiple pod sandboxes are ready and need to be reconciled"
	case !obs.Sandboxes[0].Ready:
		return "pod sandbox is not ready"
	case obs.Sandboxes[0].Network != criconfig.NetworkMode(pod):
		return "network namespace mode changed and sandbox needs to be recreated"
	case !pod.Spec.HostNetwork && len(obs.Sandboxes[0].IPs) == 0:
		return "pod sandbox has no IP address"
	}
	return ""
}
