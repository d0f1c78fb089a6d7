package edgelet

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/pod"
)

// Limits of one report, and pace of reporting.
const (
	reportPods    = 512 // more than a node has, so that none waits behind others that can't be written; still far below edge.MaxBody
	reportEvents  = 128
	reportTimeout = 30 * time.Second // one call; the provider answers sooner with what it has
	reportRetry   = time.Second      // after an error, or for what was not acknowledged
	eventDelay    = time.Second      // events wait this long for company, so that a burst is one write to flash
	eventMemory   = 4096             // recent events that a repetition can be counted on
)

// statusTable keeps the latest status of each pod; package store implements it.
type statusTable interface {
	All() (map[string]edge.PodStatus, error)
	Put(uid string, status edge.PodStatus) error
	Delete(uid string) error
}

// eventQueue is a bounded durable queue; package store implements it. The
// sequence numbers never repeat.
type eventQueue interface {
	PushAll(events []edge.Event) error
	Peek(limit int) ([]queuedEvent, error)
	Ack(seq uint64) error
}

type queuedEvent struct {
	Seq   uint64
	Event edge.Event
}

// An outbox holds what the cloud has to be told until it has confirmed that. It
// is the pod engine's Sink. Safe for concurrent use.
type outbox struct {
	statuses statusTable
	events   eventQueue
	log      *slog.Logger
	site     string
	now      func() time.Time
	wake     chan struct{} // holds a token when there may be something to report
	queued   atomic.Bool   // the queue may hold events

	mu       sync.Mutex // guards the following
	pods     map[types.UID]edge.PodStatus
	acked    map[types.UID]uint64 // sequence number that this session's provider has confirmed
	node     *edge.NodeStatus
	nodeSeq  uint64 // confirmed
	pending  []edge.Event
	recent   map[eventKey]edge.Event
	flushing *time.Timer
}

// An eventKey is what makes an event the same again.
type eventKey struct {
	uid                              types.UID
	fieldPath, kind, reason, message string
}

func keyOf(e edge.Event) eventKey {
	return eventKey{e.Object.UID, e.Object.FieldPath, e.Type, e.Reason, e.Message}
}

func newOutbox(statuses statusTable, events eventQueue, site string, log *slog.Logger) (*outbox, error) {
	o := &outbox{
		statuses: statuses, events: events, site: site, log: log, now: time.Now,
		wake: make(chan struct{}, 1), pods: map[types.UID]edge.PodStatus{},
		acked: map[types.UID]uint64{}, recent: map[eventKey]edge.Event{},
	}
	stored, err := statuses.All()
	if err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	for _, status := range stored {
		o.pods[status.UID] = status
	}
	return o, nil
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// PodStatus implements the pod engine's Sink. An engine that was killed after it had
// told a status and before it had recorded that may tell the one before again: it
// is passed over.
func (o *outbox) PodStatus(status edge.PodStatus) error {
	o.mu.Lock()
	old := o.pods[status.UID].Seq
	o.mu.Unlock()
	if status.Seq < old {
		return nil
	}
	if err := o.statuses.Put(string(status.UID), status); err != nil {
		return fmt.Errorf("status of %s/%s: %w", status.Namespace, status.Name, err)
	}
	o.mu.Lock()
	o.pods[status.UID] = status
	o.mu.Unlock()
	o.signal()
	return nil
}

// PodForgotten implements the pod engine's Sink.
func (o *outbox) PodForgotten(uid types.UID) {
	if err := o.statuses.Delete(string(uid)); err != nil {
		o.log.Error("status of a forgotten pod stays stored", "uid", uid, "err", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.pods, uid)
	delete(o.acked, uid)
}

// PodEvent implements the pod engine's Sink.
func (o *outbox) PodEvent(p *corev1.Pod, container, eventType, reason, message string) {
	o.event(pod.Reference(p, container), eventType, reason, message)
}

// NodeEvent is an event about the site itself.
func (o *outbox) NodeEvent(eventType, reason, message string) {
	o.event(corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: o.site, UID: types.UID(o.site)}, eventType, reason, message)
}

func (o *outbox) event(object corev1.ObjectReference, eventType, reason, message string) {
	const limit = 1024 // of the API server's validation
	message = message[:min(len(message), limit)]
	o.mu.Lock()
	defer o.mu.Unlock()
	now := metav1.NewTime(o.now())
	e := edge.Event{Object: object, Type: eventType, Reason: reason, Message: message, FirstTime: now}
	key := keyOf(e)
	if before, repeated := o.recent[key]; repeated {
		e = before
	} else if len(o.recent) >= eventMemory {
		clear(o.recent)
	}
	e.LastTime = now
	e.Count++
	o.recent[key] = e
	if i := slices.IndexFunc(o.pending, func(p edge.Event) bool { return keyOf(p) == key }); i >= 0 {
		o.pending[i] = e
	} else {
		o.pending = append(o.pending, e)
	}
	if o.flushing == nil {
		o.flushing = time.AfterFunc(eventDelay, o.flush)
	}
}

// flush makes the pending events durable and has them reported. Nobody who has an
// event to tell waits for the disk.
func (o *outbox) flush() {
	o.mu.Lock()
	pending := o.pending
	o.pending, o.flushing = nil, nil
	o.mu.Unlock()
	if len(pending) == 0 {
		return
	}
	if err := o.events.PushAll(pending); err != nil {
		o.log.Error("events lost", "count", len(pending), "err", err)
	}
	o.queued.Store(true)
	o.signal()
}

// SetNode replaces the site's node status, which is reported if it differs.
func (o *outbox) SetNode(status edge.NodeStatus) {
	o.mu.Lock()
	if o.node != nil {
		status.Seq = o.node.Seq + 1
	} else {
		status.Seq = 1
	}
	o.node = &status
	o.mu.Unlock()
	o.signal()
}

// Run reports to cloud until ctx is done, beginning with everything: what the API
// server holds may have changed while nobody spoke for the site.
func (o *outbox) Run(ctx context.Context, cloud edge.Cloud) {
	o.mu.Lock()
	clear(o.acked)
	o.nodeSeq = 0
	o.mu.Unlock()
	o.queued.Store(true)
	for {
		var retry <-chan time.Time
		if report := o.collect(); len(report.Pods) > 0 || report.Node != nil || len(report.Events) > 0 {
			pause := o.send(ctx, cloud, report)
			if pause == 0 {
				continue
			}
			retry = time.After(pause)
		}
		select {
		case <-ctx.Done():
			return
		case <-retry:
		case <-o.wake: // something new goes at once, and what waits goes with it
		}
	}
}

// send reports once and returns how long to pause before the next report.
func (o *outbox) send(ctx context.Context, cloud edge.Cloud, report edge.Report) time.Duration {
	call, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	ack, err := cloud.Report(call, report)
	if err != nil {
		if ctx.Err() == nil {
			o.log.Warn("report failed, will repeat", "err", err)
		}
		return reportRetry
	}
	return o.confirm(report, ack)
}

// collect is the next report: what has not been confirmed, within its limits.
func (o *outbox) collect() edge.Report {
	report := o.collectState()
	if !o.queued.Swap(false) {
		return report
	}
	queued, err := o.events.Peek(reportEvents)
	if err != nil {
		o.log.Error("stored events cannot be read", "err", err)
	}
	for _, q := range queued {
		q.Event.Seq = q.Seq
		report.Events = append(report.Events, q.Event)
	}
	if len(queued) > 0 {
		o.queued.Store(true) // until a look finds none
	}
	return report
}

// collectState is the part of the next report of which only the latest counts.
func (o *outbox) collectState() edge.Report {
	o.mu.Lock()
	defer o.mu.Unlock()
	var report edge.Report
	for _, uid := range slices.Sorted(maps.Keys(o.pods)) {
		if status := o.pods[uid]; o.acked[uid] < status.Seq && len(report.Pods) < reportPods {
			report.Pods = append(report.Pods, status)
		}
	}
	if o.node != nil && o.nodeSeq < o.node.Seq {
		report.Node = o.node
	}
	return report
}

// confirm takes note of what has been written, and returns how long to pause.
func (o *outbox) confirm(report edge.Report, ack edge.Ack) time.Duration {
	rest := o.confirmState(report, ack)
	if n := len(report.Events); n > 0 {
		last := min(ack.Events, report.Events[n-1].Seq)
		if last >= report.Events[0].Seq {
			if err := o.events.Ack(last); err != nil {
				o.log.Error("confirmed events stay queued", "err", err)
				rest = true // or they would be sent again without a pause
			}
		}
		rest = rest || last < report.Events[n-1].Seq
	}
	switch {
	case ack.RetryAfter > 0:
		return min(ack.RetryAfter, time.Minute)
	case rest:
		return reportRetry
	}
	return 0
}

// confirmState says whether something of the report's state remains to be written.
func (o *outbox) confirmState(report edge.Report, ack edge.Ack) (rest bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, status := range report.Pods {
		seq := min(ack.Pods[status.UID], status.Seq)
		o.acked[status.UID] = max(o.acked[status.UID], seq)
		rest = rest || seq < status.Seq
	}
	if report.Node != nil {
		o.nodeSeq = max(o.nodeSeq, min(ack.Node, report.Node.Seq))
		rest = rest || ack.Node < report.Node.Seq
	}
	return rest
}
