package provider

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

// Bounds of what a site may say.
const (
	maxText = 4 << 10 // bytes of one text, as of a termination message
	maxIPs  = 8       // addresses of a pod or its host
)

// ownedConditions are those that a node says of its pods. All others belong to
// whoever has set them: schedulers, load balancers, readiness gates.
var ownedConditions = map[corev1.PodConditionType]bool{
	corev1.PodReady:                  true,
	corev1.ContainersReady:           true,
	corev1.PodInitialized:            true,
	corev1.PodReadyToStartContainers: true,
	corev1.PodResizePending:          true,
	corev1.PodResizeInProgress:       true,
	corev1.AllContainersRestarting:   true,
}

// mergeStatus returns the status that pod should have after its site has
// reported one. It is pure. Taken from the report is only what a node may say;
// what others own stays. A terminal phase is never left, a running pod is never
// pending again, and no restart count decreases.
func mergeStatus(pod *corev1.Pod, reported corev1.PodStatus) corev1.PodStatus {
	current := &pod.Status
	if terminal(current.Phase) && !terminal(reported.Phase) {
		return *current.DeepCopy() // a late word of a time before the end
	}
	reported = *reported.DeepCopy()
	cleanText(reflect.ValueOf(&reported).Elem())

	next := *current.DeepCopy()
	next.Phase = nextPhase(current.Phase, reported.Phase)
	next.Message, next.Reason = reported.Message, reported.Reason
	next.ObservedGeneration = max(current.ObservedGeneration, reported.ObservedGeneration)
	next.HostIP, next.HostIPs = hostIPs(reported)
	next.PodIP, next.PodIPs = podIPs(reported)
	if next.StartTime == nil {
		next.StartTime = reported.StartTime
	}
	next.AllocatedResources, next.Resources = reported.AllocatedResources, reported.Resources
	next.InitContainerStatuses = mergeContainers(rules(pod, pod.Spec.InitContainers), current.InitContainerStatuses, reported.InitContainerStatuses)
	next.ContainerStatuses = mergeContainers(rules(pod, pod.Spec.Containers), current.ContainerStatuses, reported.ContainerStatuses)
	next.EphemeralContainerStatuses = mergeContainers(ephemeralRules(pod.Spec.EphemeralContainers), current.EphemeralContainerStatuses, reported.EphemeralContainerStatuses)
	next.Conditions = mergeConditions(current.Conditions, reported.Conditions)
	next.Conditions = gateReady(pod, next.Conditions, reported.Conditions)
	return next
}

// regate returns pod's status with Ready computed anew. Others flip what Ready
// depends on, and the controller manager flips Ready itself when a node is away.
func regate(pod *corev1.Pod) corev1.PodStatus {
	next := *pod.Status.DeepCopy()
	next.Conditions = gateReady(pod, next.Conditions, nil)
	return next
}

func terminal(phase corev1.PodPhase) bool {
	return phase == corev1.PodSucceeded || phase == corev1.PodFailed
}

func nextPhase(current, reported corev1.PodPhase) corev1.PodPhase {
	switch {
	case terminal(current):
		return current
	case current == corev1.PodRunning && reported == corev1.PodPending:
		return current
	case reported == corev1.PodPending, reported == corev1.PodRunning, terminal(reported):
		return reported
	}
	return current
}

// A restartRule says whether a container that has ended with a code may run again.
type restartRule func(exitCode int32) bool

// rules returns by name the containers that a status may be about.
func rules(pod *corev1.Pod, containers []corev1.Container) map[string]restartRule {
	rules := make(map[string]restartRule, len(containers))
	for _, c := range containers {
		rules[c.Name] = func(exitCode int32) bool {
			switch {
			case c.RestartPolicy != nil, pod.Spec.RestartPolicy == corev1.RestartPolicyAlways, pod.Spec.RestartPolicy == "":
				return true
			}
			return pod.Spec.RestartPolicy == corev1.RestartPolicyOnFailure && exitCode != 0
		}
	}
	return rules
}

func ephemeralRules(containers []corev1.EphemeralContainer) map[string]restartRule {
	rules := make(map[string]restartRule, len(containers))
	for _, c := range containers {
		rules[c.Name] = func(int32) bool { return false }
	}
	return rules
}

// mergeContainers keeps of what is reported the containers that the spec names,
// each once. What has ended for good stays as it ended: the API server would
// refuse the whole status for it.
func mergeContainers(rules map[string]restartRule, current, reported []corev1.ContainerStatus) []corev1.ContainerStatus {
	var next []corev1.ContainerStatus
	for _, r := range reported {
		mayRestart, known := rules[r.Name]
		if !known || slices.ContainsFunc(next, func(n corev1.ContainerStatus) bool { return n.Name == r.Name }) {
			continue
		}
		for _, c := range current {
			if c.Name != r.Name {
				continue
			}
			r.RestartCount = max(r.RestartCount, c.RestartCount)
			if c.State.Terminated != nil && r.State.Terminated == nil && !mayRestart(c.State.Terminated.ExitCode) {
				r = c
			}
		}
		next = append(next, r)
	}
	if len(next) == 0 {
		return current
	}
	return next
}

// mergeConditions takes the owned conditions as reported and all others as they
// are. PodScheduled is the scheduler's unless it said nothing, DisruptionTarget
// the site's if it says it.
func mergeConditions(current, reported []corev1.PodCondition) []corev1.PodCondition {
	var next []corev1.PodCondition
	fromSite := func(c corev1.PodCondition) bool {
		switch c.Type {
		case corev1.PodScheduled:
			return podCondition(current, c.Type) == nil
		case corev1.DisruptionTarget:
			return true
		}
		return ownedConditions[c.Type]
	}
	for _, c := range current {
		if !ownedConditions[c.Type] && (c.Type != corev1.DisruptionTarget || podCondition(reported, c.Type) == nil) {
			next = append(next, c)
		}
	}
	for _, c := range reported {
		if !fromSite(c) || podCondition(next, c.Type) != nil || !knownStatus(c.Status) {
			continue
		}
		if was := podCondition(current, c.Type); was != nil && was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
		next = append(next, c)
	}
	return next
}

func knownStatus(s corev1.ConditionStatus) bool {
	return s == corev1.ConditionTrue || s == corev1.ConditionFalse || s == corev1.ConditionUnknown
}

// gateReady sets Ready: the containers are, and every readiness gate is true.
// Without ContainersReady nothing can be said. Of reported it takes only the
// words in which a site says why containers are not ready.
func gateReady(pod *corev1.Pod, conditions, reported []corev1.PodCondition) []corev1.PodCondition {
	containers := podCondition(conditions, corev1.ContainersReady)
	if containers == nil {
		return conditions
	}
	ready := corev1.PodCondition{
		Type: corev1.PodReady, Status: containers.Status, Reason: containers.Reason, Message: containers.Message,
		LastTransitionTime: containers.LastTransitionTime, ObservedGeneration: containers.ObservedGeneration,
	}
	if r := podCondition(reported, corev1.PodReady); r != nil && r.Status == ready.Status {
		ready = *r
	}
	if missing := closedGates(pod, conditions); ready.Status == corev1.ConditionTrue && len(missing) > 0 {
		ready.Status, ready.Reason = corev1.ConditionFalse, "ReadinessGatesNotReady"
		ready.Message = "waiting for readiness gates: " + strings.Join(missing, ", ")
	}
	was := podCondition(pod.Status.Conditions, corev1.PodReady)
	switch {
	case was != nil && was.Status == ready.Status:
		ready.LastTransitionTime = was.LastTransitionTime
	case was != nil && was.LastTransitionTime.After(ready.LastTransitionTime.Time):
		// Later than the containers: a gate or the controller manager flipped it.
		ready.LastTransitionTime = metav1.Now().Rfc3339Copy()
	}
	if ready.LastTransitionTime.IsZero() {
		ready.LastTransitionTime = metav1.Now().Rfc3339Copy()
	}
	next := slices.DeleteFunc(slices.Clone(conditions), func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady })
	return append(next, ready)
}

func closedGates(pod *corev1.Pod, conditions []corev1.PodCondition) []string {
	var closed []string
	for _, gate := range pod.Spec.ReadinessGates {
		if c := podCondition(conditions, gate.ConditionType); c == nil || c.Status != corev1.ConditionTrue {
			closed = append(closed, string(gate.ConditionType))
		}
	}
	return closed
}

func podCondition(conditions []corev1.PodCondition, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range conditions {
		if conditions[i].Type == t {
			return &conditions[i]
		}
	}
	return nil
}

func hostIPs(s corev1.PodStatus) (string, []corev1.HostIP) {
	ips := make([]string, len(s.HostIPs))
	for i, ip := range s.HostIPs {
		ips[i] = ip.IP
	}
	var list []corev1.HostIP
	for _, ip := range addresses(s.HostIP, ips) {
		list = append(list, corev1.HostIP{IP: ip})
	}
	if list == nil {
		return "", nil
	}
	return list[0].IP, list
}

func podIPs(s corev1.PodStatus) (string, []corev1.PodIP) {
	ips := make([]string, len(s.PodIPs))
	for i, ip := range s.PodIPs {
		ips[i] = ip.IP
	}
	var list []corev1.PodIP
	for _, ip := range addresses(s.PodIP, ips) {
		list = append(list, corev1.PodIP{IP: ip})
	}
	if list == nil {
		return "", nil
	}
	return list[0].IP, list
}

// addresses returns those that are addresses, each once, first first.
func addresses(first string, rest []string) []string {
	var valid []string
	for _, s := range append([]string{first}, rest...) {
		if ip, err := netip.ParseAddr(s); err == nil && ip.Zone() == "" && !slices.Contains(valid, s) && len(valid) < maxIPs {
			valid = append(valid, s)
		}
	}
	return valid
}

// cleanText cleans every string within v, which must be settable, with [clean].
func cleanText(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(clean(v.String(), maxText))
	case reflect.Pointer:
		if !v.IsNil() {
			cleanText(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			cleanText(v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				cleanText(f)
			}
		}
	}
}

// clean makes text of a site safe to show in a terminal: valid UTF-8 without
// control characters but newline and tab, without characters that reorder
// others, and of at most limit bytes.
func clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n', r == '\t':
			return r
		case r < ' ', r >= 0x7f && r < 0xa0: // C0, DEL, C1
			return -1
		case r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069, r == 0x200e, r == 0x200f, r == 0x061c, r == 0x2028, r == 0x2029:
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) <= limit {
		return s
	}
	s = s[:limit]
	for len(s) > 0 && !utf8.ValidString(s[max(0, len(s)-utf8.UTFMax):]) && !utf8.RuneStart(s[len(s)-1]) {
		s = s[:len(s)-1]
	}
	return strings.ToValidUTF8(s, "")
}

// statusPatch returns the strategic merge patch that makes pod's status next,
// or nil if it is so already. The patch holds for this pod at this version only.
func statusPatch(pod *corev1.Pod, next corev1.PodStatus) ([]byte, error) {
	was, err := json.Marshal(corev1.Pod{Status: pod.Status})
	if err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	is, err := json.Marshal(corev1.Pod{Status: next})
	if err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	changes, err := strategicpatch.CreateTwoWayMergePatch(was, is, corev1.Pod{})
	if err != nil {
		return nil, fmt.Errorf("patch of status: %w", err)
	}
	if string(changes) == "{}" {
		return nil, nil
	}
	return precondition(changes, pod.UID, pod.ResourceVersion)
}

// precondition adds to a patch which object, and of which version, it is for.
func precondition(patch []byte, uid types.UID, version string) ([]byte, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(patch, &fields); err != nil {
		return nil, fmt.Errorf("patch: %w", err)
	}
	meta, err := json.Marshal(metav1.ObjectMeta{UID: uid, ResourceVersion: version})
	if err != nil {
		return nil, fmt.Errorf("patch: %w", err)
	}
	fields["metadata"] = meta
	return json.Marshal(fields)
}
