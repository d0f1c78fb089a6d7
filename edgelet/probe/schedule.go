package probe

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Run executes probes as they become due, until ctx is done. It returns when the
// last of them has ended.
func (m *Manager) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next, ok := m.start(ctx, &running)
		if ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-m.wake:
		}
	}
}

// start executes all probes that are due, each in a goroutine of its own, and
// returns when the next will be. It reports false when only a change can tell:
// no probe waits, or as many run as may.
func (m *Manager) start(ctx context.Context, running *sync.WaitGroup) (next time.Time, ok bool) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.busy < m.cfg.Concurrency && len(m.queue) > 0 {
		p := m.queue[0]
		if p.due.After(now) {
			return p.due, true
		}
		heap.Pop(&m.queue)
		m.busy++
		c := p.container
		job := job{
			probe: p.spec, pod: c.pod.spec, container: c.spec, id: c.id, ip: c.pod.ip,
		}
		var pctx context.Context
		pctx, p.cancel = context.WithCancel(ctx)
		running.Go(func() { m.execute(pctx, p, job) })
	}
	return time.Time{}, false
}

// execute runs one probe once, and schedules it again.
func (m *Manager) execute(ctx context.Context, p *probe, job job) {
	begun := time.Now()
	got, output := m.check.run(ctx, job)

	m.mu.Lock()
	stale := ctx.Err() != nil || p.done // dropped, or the manager ends
	m.busy--
	full := m.busy == m.cfg.Concurrency-1
	changed, quiet := false, false
	if p.cancel != nil {
		p.cancel()
		p.cancel = nil
	}
	if !stale {
		quiet = p.hurry > 0 && got != warning // beside the schedule, so not worth an event
		changed = p.judge(got, output)
		m.again(p, begun)
		if changed && p.kind == startup {
			m.release(p.container)
		}
	}
	reason, message := p.event(got, output)
	m.mu.Unlock()

	if full {
		m.poke()
	}
	if stale {
		return
	}
	if reason != "" && !quiet {
		m.cfg.Event(job.pod, corev1.EventTypeWarning, reason, clip(message, maxMessage))
	}
	if changed {
		m.cfg.Log.Info("probe verdict changed", "pod", job.pod.Name, "uid", job.pod.UID,
			"container", job.container.Name, "probe", p.kind.String(), "answer", got.String())
		m.cfg.Changed(job.pod.UID)
	}
}

// again schedules the execution after the one that began at begun.
func (m *Manager) again(p *probe, begun time.Time) {
	if !p.runnable() {
		return
	}
	gap := period(p.spec)
	p.hurry = hurry(p, gap)
	if p.hurry > 0 {
		gap = p.hurry
	}
	p.due = begun.Add(gap)
	m.push(p)
}

// hurry is the time after which a readiness probe that has never succeeded is
// repeated ahead of its period: 1, 2, 4… seconds; zero: not ahead of it.
func hurry(p *probe, period time.Duration) time.Duration {
	if p.kind != readiness || p.container.wasReady || p.last != failure || p.run == 0 {
		return 0
	}
	if next := time.Second << min(p.run-1, 10); next < period {
		return next
	}
	return 0
}

// begin schedules the first executions of a new container's probes.
func (m *Manager) begin(c *container, now time.Time) {
	for _, p := range c.probes {
		if p != nil && p.runnable() {
			p.due = first(p, now)
			m.push(p)
		}
	}
}

// release begins the probes that a startup probe has held back.
func (m *Manager) release(c *container) {
	if c.result.Started {
		m.begin(c, time.Now())
	}
}

// first is when a probe is to be executed for the first time. A container's
// start is a wall clock's time, and the clock may have jumped since: the delay
// is never longer than asked for.
func first(p *probe, now time.Time) time.Time {
	due := now
	if delay := time.Duration(p.spec.InitialDelaySeconds) * time.Second; delay > 0 {
		left := p.container.startedAt.Add(delay).Sub(now)
		due = due.Add(min(max(left, 0), delay))
	}
	if p.container.adopted || p.kind == liveness {
		due = due.Add(rand.N(period(p.spec)))
	}
	return due
}

// quiet ends what a terminating pod is no longer asked.
func (m *Manager) quiet(c *container) {
	for _, k := range []kind{startup, liveness} {
		if p := c.probes[k]; p != nil {
			m.end(p)
			c.probes[k] = nil
		}
	}
	c.result.Unhealthy, c.result.Message, c.result.Grace = "", "", nil
}

// drop ends all probes of a container.
func (m *Manager) drop(c *container) {
	for _, p := range c.probes {
		if p != nil {
			m.end(p)
		}
	}
}

func (m *Manager) end(p *probe) {
	p.done = true
	if p.index >= 0 {
		heap.Remove(&m.queue, p.index)
	}
	if p.cancel != nil {
		p.cancel()
	}
}

// push queues p and wakes Run if p is now the first.
func (m *Manager) push(p *probe) {
	if p.index >= 0 {
		heap.Fix(&m.queue, p.index)
	} else {
		heap.Push(&m.queue, p)
	}
	if p.index == 0 {
		m.poke()
	}
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// A queue is a heap of probes, the next that is due first.
type queue []*probe

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(x any) {
	p := x.(*probe)
	p.index = len(*q)
	*q = append(*q, p)
}

func (q *queue) Pop() any {
	old := *q
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	p.index = -1
	return p
}
