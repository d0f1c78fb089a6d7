package probe

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// The three kinds of probe. The names are those of events and metrics.
const (
	startup kind = iota
	readiness
	liveness
	kinds = 3
)

type kind int

func (k kind) String() string { return [kinds]string{"Startup", "Readiness", "Liveness"}[k] }

// An answer is what one execution of a probe has found.
type answer int

const (
	success answer = iota
	warning        // success, but worth an event
	failure
	unknown // there was no answer, which counts for nothing
	answers = 4
)

func (a answer) String() string {
	return [answers]string{"success", "warning", "failure", "unknown"}[a]
}

// A container is one running container that has probes. It is guarded by the
// manager's mu.
type container struct {
	pod       *pod
	spec      *corev1.Container
	id        string
	startedAt time.Time
	adopted   bool // it ran before the edgelet did
	wasReady  bool // at any time
	result    Result
	probes    [kinds]*probe // nil: none, or not any more
}

// A probe is one probe of one container. It is guarded by the manager's mu.
type probe struct {
	container *container
	kind      kind
	spec      *corev1.Probe

	due    time.Time          // of the next execution
	index  int                // in the queue, -1: not queued
	cancel context.CancelFunc // of the execution under way, nil: none
	done   bool               // has given its verdict on this container

	last    answer // success or failure
	run     int    // how many equal answers in a row
	hurry   time.Duration
	counted [answers]uint64 // executions by answer, for metrics
}

func newContainer(declared *corev1.Container, is RunningContainer, started, ready bool) *container {
	c := &container{spec: declared, id: is.ID, startedAt: is.StartedAt, adopted: started || ready}
	for k, spec := range [kinds]*corev1.Probe{declared.StartupProbe, declared.ReadinessProbe, declared.LivenessProbe} {
		if spec != nil {
			c.probes[k] = &probe{container: c, kind: kind(k), spec: spec, index: -1}
		}
	}
	c.result.Started = started || ready || c.probes[startup] == nil
	if p := c.probes[startup]; p != nil && c.result.Started {
		p.done = true
	}
	c.result.Ready = ready || c.result.Started && c.probes[readiness] == nil
	c.wasReady = c.result.Ready
	return c
}

// judge takes one answer into account and reports whether the verdict on the
// container has changed by it.
func (p *probe) judge(got answer, output string) (changed bool) {
	p.counted[got]++
	switch got {
	case unknown:
		return false
	case warning:
		got = success
	}
	if p.last != got {
		p.last, p.run = got, 0
	}
	p.run++
	if p.run < threshold(p.spec, got) {
		return false
	}
	r := &p.container.result
	switch p.kind {
	case readiness:
		changed = r.Ready != (got == success)
		r.Ready = got == success
		p.container.wasReady = p.container.wasReady || r.Ready
		return changed
	case liveness:
		if got == success {
			return false
		}
	case startup:
		if got == success {
			p.done = true
			r.Started = true
			r.Ready = p.container.probes[readiness] == nil
			return true
		}
	}
	p.done = true
	r.Unhealthy = map[kind]string{liveness: "liveness", startup: "startup"}[p.kind]
	r.Message = output
	r.Grace = p.spec.TerminationGracePeriodSeconds
	return true
}

// event is what a kubelet says of an answer; an empty reason: nothing.
func (p *probe) event(got answer, output string) (reason, message string) {
	switch got {
	case warning:
		return "ProbeWarning", fmt.Sprintf("%s probe warning: %s", p.kind, output)
	case failure:
		return "Unhealthy", fmt.Sprintf("%s probe failed: %s", p.kind, output)
	case unknown:
		return "Unhealthy", fmt.Sprintf("%s probe errored and resulted in unknown state: %s", p.kind, output)
	}
	return "", ""
}

// runnable reports whether the probe has anything to ask at this time.
func (p *probe) runnable() bool {
	return !p.done && (p.kind == startup) == !p.container.result.Started
}

// Defaults of a probe, for pods that no API server has completed.
const (
	defaultPeriod  = 10 * time.Second
	defaultTimeout = time.Second
)

func threshold(spec *corev1.Probe, got answer) int {
	if got == success {
		return max(int(spec.SuccessThreshold), 1)
	}
	if spec.FailureThreshold <= 0 {
		return 3
	}
	return int(spec.FailureThreshold)
}

func period(spec *corev1.Probe) time.Duration  { return seconds(spec.PeriodSeconds, defaultPeriod) }
func timeout(spec *corev1.Probe) time.Duration { return seconds(spec.TimeoutSeconds, defaultTimeout) }

func seconds(n int32, otherwise time.Duration) time.Duration {
	if n <= 0 {
		return otherwise
	}
	return time.Duration(n) * time.Second
}
