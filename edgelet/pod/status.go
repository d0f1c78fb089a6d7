package pod

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/pod/criconfig"
)

// Reasons that container statuses carry.
const (
	reasonCreating     = "ContainerCreating"
	reasonInitializing = "PodInitializing"
	reasonCrashLoop    = "CrashLoopBackOff"
	reasonConfig       = "CreateContainerConfigError"
	reasonCreate       = "CreateContainerError"
	reasonRun          = "RunContainerError"
	reasonPostStart    = "PostStartHookError"
	reasonUnknown      = "ContainerStatusUnknown"
	reasonOOMKilled    = "OOMKilled"
	reasonCompleted    = "Completed"
	reasonError        = "Error"
)

// Texts of containers that have gone without a trace.
const (
	lostRunning    = "The container could not be located when the pod was deleted.  The container used to be Running"
	lostTerminated = "The container could not be located when the pod was terminated"
)

// exitLost is the exit code that is assumed where nobody saw one.
const exitLost = 137

// A situation is all that the status of a pod is computed from.
type situation struct {
	spec    Spec
	obs     Observed
	old     *corev1.PodStatus // as last reported; nil: never
	ended   *Ending
	resize  Resize
	hostIPs []string
	runtime string // prefix of container IDs
	now     time.Time
}

// podStatus computes the status of a pod. It is pure.
func podStatus(s situation) corev1.PodStatus {
	if s.old == nil {
		s.old = &corev1.PodStatus{}
	}
	pod := s.spec.Pod
	status := corev1.PodStatus{
		ObservedGeneration: pod.Generation,
		StartTime:          s.old.StartTime,
		QOSClass:           criconfig.QOS(pod),
	}
	if status.StartTime == nil {
		status.StartTime = new(second(s.now))
	}
	s.addresses(&status)
	var ephemeral []corev1.Container
	for i := range pod.Spec.EphemeralContainers {
		ephemeral = append(ephemeral, corev1.Container(pod.Spec.EphemeralContainers[i].EphemeralContainerCommon))
	}
	status.InitContainerStatuses = s.containers(pod.Spec.InitContainers, s.old.InitContainerStatuses)
	status.ContainerStatuses = s.containers(pod.Spec.Containers, s.old.ContainerStatuses)
	status.EphemeralContainerStatuses = s.containers(ephemeral, s.old.EphemeralContainerStatuses)
	s.verdicts(&status)
	byName := func(a, b corev1.ContainerStatus) int { return cmp.Compare(a.Name, b.Name) }
	slices.SortFunc(status.ContainerStatuses, byName)
	slices.SortFunc(status.EphemeralContainerStatuses, byName)

	terminal := s.spec.Stop != nil && !anyAlive(s.obs)
	status.Phase = phase(pod, &status, s.begun(), terminal)
	if terminal && s.spec.Stop.Remove {
		s.finish(&status)
	}
	if s.ended != nil {
		status.Phase = corev1.PodFailed
	}
	if ended(s.old.Phase) {
		status.Phase = s.old.Phase // never left
	}
	if status.Phase == s.old.Phase {
		status.Reason, status.Message = s.old.Reason, s.old.Message
	}
	if s.ended != nil {
		status.Reason, status.Message = s.ended.Reason, s.ended.Message
	}
	status.Conditions = s.conditions(&status)
	return status
}

// ended reports whether a phase is never left again.
func ended(p corev1.PodPhase) bool { return p == corev1.PodSucceeded || p == corev1.PodFailed }

func anyAlive(obs Observed) bool {
	return slices.ContainsFunc(obs.Containers, func(c Container) bool { return mayRun(c.State) })
}

// begun reports whether a main container has been started in the latest sandbox.
func (s *situation) begun() bool {
	if len(s.obs.Sandboxes) == 0 {
		return false
	}
	return slices.ContainsFunc(s.obs.Containers, func(c Container) bool {
		return c.SandboxID == s.obs.Sandboxes[0].ID && c.State != cri.ContainerState_CONTAINER_CREATED &&
			slices.ContainsFunc(s.spec.Pod.Spec.Containers, func(m corev1.Container) bool { return m.Name == c.Name })
	})
}

func (s *situation) addresses(status *corev1.PodStatus) {
	host := onePerFamily(s.hostIPs)
	for _, ip := range host {
		status.HostIPs = append(status.HostIPs, corev1.HostIP{IP: ip})
	}
	if len(host) > 0 {
		status.HostIP = host[0]
	}
	ips := podIPs(s.spec.Pod, s.obs, host)
	for _, ip := range ips {
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: ip})
	}
	if len(ips) == 0 && s.ended == nil {
		status.PodIPs = s.old.PodIPs // of a sandbox that is gone
	}
	if len(status.PodIPs) > 0 {
		status.PodIP = status.PodIPs[0].IP
	}
}

// podIPs are the addresses of a pod, that of the host's first family first.
func podIPs(pod *corev1.Pod, obs Observed, host []string) []string {
	switch {
	case len(obs.Sandboxes) == 0:
		return nil
	case pod.Spec.HostNetwork:
		return host
	}
	ips := slices.Clone(obs.Sandboxes[0].IPs)
	if len(host) > 0 && len(ips) == 2 && is4(host[0]) != is4(ips[0]) {
		slices.Reverse(ips)
	}
	return ips
}

func is4(ip string) bool {
	a, err := netip.ParseAddr(ip)
	return err == nil && a.Is4()
}

// onePerFamily keeps the first address of each family, in their usual spelling.
func onePerFamily(ips []string) []string {
	var out []string
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil {
			continue
		}
		a = a.Unmap()
		if !slices.ContainsFunc(out, func(o string) bool { return is4(o) == a.Is4() }) {
			out = append(out, a.String())
		}
	}
	return out
}

// containers computes the statuses of one kind of containers, in spec order.
func (s *situation) containers(containers []corev1.Container, olds []corev1.ContainerStatus) []corev1.ContainerStatus {
	var all []corev1.ContainerStatus
	for i := range containers {
		c := &containers[i]
		old := corev1.ContainerStatus{}
		if k := slices.IndexFunc(olds, func(o corev1.ContainerStatus) bool { return o.Name == c.Name }); k >= 0 {
			old = olds[k]
		}
		all = append(all, s.container(c, old))
	}
	return all
}

func (s *situation) container(c *corev1.Container, old corev1.ContainerStatus) corev1.ContainerStatus {
	var runs []Container
	for _, run := range s.obs.Containers {
		if run.Name == c.Name {
			runs = append(runs, run)
		}
	}
	memory := s.obs.Memory[c.Name]
	status := corev1.ContainerStatus{
		Name:                 c.Name,
		Image:                c.Image,
		RestartCount:         old.RestartCount,
		LastTerminationState: old.LastTerminationState,
		VolumeMounts:         mountStatuses(c),
	}
	status.State.Waiting = &corev1.ContainerStateWaiting{Reason: reasonCreating}
	if len(s.spec.Pod.Spec.InitContainers) > 0 {
		status.State.Waiting.Reason = reasonInitializing
	}
	switch {
	case len(runs) > 0:
		s.fromRuns(&status, c, runs, old)
	case old.State.Terminated != nil && (!memory.Begun || sameEnd(old.State.Terminated, memory.Exited)):
		status = *old.DeepCopy()
		status.Ready, status.Started = false, nil
	case memory.Exited != nil:
		s.fromMemory(&status, memory, old)
	case old.State.Running != nil || memory.Begun:
		lost := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
			Reason: reasonUnknown, Message: lostRunning, ExitCode: exitLost,
		}}
		if s.spec.Stop == nil && restarts(s.spec.Pod, c, nil) {
			status.LastTerminationState = lost
			status.RestartCount = max(old.RestartCount, int32(memory.Next))
		} else {
			status.State, status.ContainerID, status.ImageID = lost, old.ContainerID, old.ImageID
		}
	}
	if w := s.waiting(c, runs, memory); w != nil {
		if status.State.Terminated != nil {
			status.LastTerminationState = status.State
		}
		status.State = corev1.ContainerState{Waiting: w}
	}
	return status
}

// fromRuns sets what the runtime tells of a container.
func (s *situation) fromRuns(status *corev1.ContainerStatus, c *corev1.Container, runs []Container, old corev1.ContainerStatus) {
	last := runs[0]
	status.ContainerID = s.runtime + "://" + last.ID
	status.Image, status.ImageID = cmp.Or(last.Image, c.Image), last.ImageID
	status.RestartCount = max(int32(last.Attempt), old.RestartCount)
	status.User = last.User
	status.Resources = reportedResources(c, last, s.obs.Memory[c.Name])
	status.AllocatedResources = c.Resources.Requests.DeepCopy()
	if state := s.state(last); state.Waiting == nil || last.State != cri.ContainerState_CONTAINER_CREATED {
		status.State = state
	}
	switch {
	case len(runs) > 1 && runs[1].State == cri.ContainerState_CONTAINER_EXITED:
		status.LastTerminationState = s.state(runs[1])
	case old.State.Terminated != nil && old.ContainerID != status.ContainerID:
		status.LastTerminationState = old.State
	}
}

// fromMemory sets what is remembered of the last run of a container, of which
// the runtime knows nothing any more and the last status did not tell yet. It
// must say what [Plan] goes by, or nothing would be done and no end be seen.
func (s *situation) fromMemory(status *corev1.ContainerStatus, m Memory, old corev1.ContainerStatus) {
	end := &corev1.ContainerStateTerminated{ExitCode: *m.Exited, Reason: reasonCompleted}
	if *m.Exited != 0 {
		end.Reason = reasonError
	}
	switch {
	case old.State.Running != nil:
		end.StartedAt, end.ContainerID = old.State.Running.StartedAt, old.ContainerID
		status.ContainerID, status.ImageID = old.ContainerID, old.ImageID
	case old.State.Terminated != nil:
		status.LastTerminationState = old.State
	}
	status.State = corev1.ContainerState{Terminated: end}
	status.RestartCount = max(old.RestartCount, int32(m.Next)-1)
}

// sameEnd reports whether end tells what is remembered of the last run; a nil
// code is an end that nobody saw.
func sameEnd(end *corev1.ContainerStateTerminated, code *int32) bool {
	told := knownCode(end)
	if told == nil || code == nil {
		return told == nil && code == nil
	}
	return *told == *code || *told == 0 && end.Reason == reasonOOMKilled
}

// state is the state of one run.
func (s *situation) state(run Container) corev1.ContainerState {
	switch run.State {
	case cri.ContainerState_CONTAINER_RUNNING:
		return corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: second(run.Started)}}
	case cri.ContainerState_CONTAINER_EXITED:
		t := &corev1.ContainerStateTerminated{
			ExitCode: run.ExitCode, Reason: run.Reason, Message: run.Message,
			FinishedAt:  second(run.Finished),
			ContainerID: s.runtime + "://" + run.ID,
		}
		if !run.Started.IsZero() {
			t.StartedAt = second(run.Started)
		}
		if t.Reason == "" {
			t.Reason = reasonError
			if run.ExitCode == 0 {
				t.Reason = reasonCompleted
			}
		}
		return corev1.ContainerState{Terminated: t}
	}
	return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}
}

// waiting says why a container that is to be started has not been; nil: it has,
// or it is about to be, or it never will.
func (s *situation) waiting(c *corev1.Container, runs []Container, m Memory) *corev1.ContainerStateWaiting {
	if s.spec.Stop != nil || s.ended != nil || len(runs) > 0 && mayRun(runs[0].State) {
		return nil
	}
	if len(runs) > 0 && runs[0].State == cri.ContainerState_CONTAINER_EXITED && !s.again(c, runs[0], m) {
		return nil
	}
	if m.Failure.Reason != "" {
		return &corev1.ContainerStateWaiting{Reason: m.Failure.Reason, Message: m.Failure.Message}
	}
	if len(runs) == 0 || runs[0].State != cri.ContainerState_CONTAINER_EXITED {
		return nil
	}
	delay := crashBackoff(m, c, runs[0].Finished)
	if delay == 0 || !s.now.Before(runs[0].Finished.Add(delay)) {
		return nil
	}
	return &corev1.ContainerStateWaiting{
		Reason:  reasonCrashLoop,
		Message: fmt.Sprintf("back-off %s restarting failed container=%s pod=%s", delay, c.Name, fullName(s.spec.Pod)),
	}
}

// again reports whether a container whose last run has ended is to run again.
func (s *situation) again(c *corev1.Container, run Container, m Memory) bool {
	code := exitCode(&run, m)
	isInit := slices.ContainsFunc(s.spec.Pod.Spec.InitContainers, func(i corev1.Container) bool { return i.Name == c.Name })
	if isInit && !criconfig.IsSidecar(c) && code != nil && *code == 0 {
		return false
	}
	return !isEphemeral(s.spec.Pod, c) && restarts(s.spec.Pod, c, code)
}

// fullName names a pod in messages.
func fullName(pod *corev1.Pod) string {
	return fmt.Sprintf("%s_%s(%s)", pod.Name, pod.Namespace, pod.UID)
}

func mountStatuses(c *corev1.Container) []corev1.VolumeMountStatus {
	var all []corev1.VolumeMountStatus
	for _, m := range c.VolumeMounts {
		s := corev1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := corev1.RecursiveReadOnlyDisabled
			if m.RecursiveReadOnly != nil && *m.RecursiveReadOnly == corev1.RecursiveReadOnlyEnabled {
				mode = corev1.RecursiveReadOnlyEnabled
			}
			s.RecursiveReadOnly = &mode
		}
		all = append(all, s)
	}
	return all
}

// verdicts sets Started and Ready.
func (s *situation) verdicts(status *corev1.PodStatus) {
	set := func(c *corev1.ContainerStatus) {
		i := slices.IndexFunc(s.obs.Containers, func(k Container) bool { return k.Name == c.Name })
		started, ready := false, false
		if c.State.Running != nil && i >= 0 {
			p := s.obs.Containers[i].Probe
			started, ready = p.Started, p.Started && p.Ready
		}
		c.Started, c.Ready = &started, ready
	}
	for i := range status.ContainerStatuses {
		set(&status.ContainerStatuses[i])
	}
	for i := range status.InitContainerStatuses {
		c := &status.InitContainerStatuses[i]
		set(c)
		if !criconfig.IsSidecar(&s.spec.Pod.Spec.InitContainers[i]) {
			c.Started = new(c.State.Running != nil)
			c.Ready = c.State.Terminated != nil && c.State.Terminated.ExitCode == 0
		}
	}
}

// finish gives every container that was ever due an end, and the pod an end too.
// What is not known to have succeeded has failed.
func (s *situation) finish(status *corev1.PodStatus) {
	unknown := func(c *corev1.ContainerStatus) {
		if c.State.Terminated == nil {
			c.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
				Reason: reasonUnknown, Message: lostTerminated, ExitCode: exitLost,
			}}
		}
	}
	evident := func(c corev1.ContainerStatus) bool {
		return c.State.Terminated != nil || c.State.Running != nil || c.LastTerminationState.Terminated != nil
	}
	initialized := len(s.spec.Pod.Spec.InitContainers) == 0 || slices.ContainsFunc(status.ContainerStatuses, evident)
	if initialized {
		for i := range status.ContainerStatuses {
			unknown(&status.ContainerStatuses[i])
		}
	}
	begun := initialized
	for i := len(status.InitContainerStatuses) - 1; i >= 0; i-- {
		if begun = begun || evident(status.InitContainerStatuses[i]); begun {
			unknown(&status.InitContainerStatuses[i])
		}
	}
	if !ended(status.Phase) {
		status.Phase = corev1.PodFailed
	}
}

// second is t as the API shows it.
func second(t time.Time) metav1.Time { return metav1.NewTime(t.UTC().Truncate(time.Second)) }

// Reference refers to a pod, or to one of its containers if container is not
// empty, as events do.
func Reference(pod *corev1.Pod, container string) corev1.ObjectReference {
	ref := corev1.ObjectReference{
		Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: types.UID(pod.UID),
		ResourceVersion: pod.ResourceVersion,
	}
	has := func(containers []corev1.Container) bool {
		return slices.ContainsFunc(containers, func(c corev1.Container) bool { return c.Name == container })
	}
	switch {
	case container == "":
	case has(pod.Spec.Containers):
		ref.FieldPath = "spec.containers{" + container + "}"
	case has(pod.Spec.InitContainers):
		ref.FieldPath = "spec.initContainers{" + container + "}"
	default:
		ref.FieldPath = "spec.ephemeralContainers{" + container + "}"
	}
	return ref
}
