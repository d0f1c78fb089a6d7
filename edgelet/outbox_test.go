package edgelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

type memoryStatuses map[string]edge.PodStatus

func (m memoryStatuses) All() (map[string]edge.PodStatus, error) { return maps.Clone(m), nil }
func (m memoryStatuses) Put(uid string, s edge.PodStatus) error  { m[uid] = s; return nil }
func (m memoryStatuses) Delete(uid string) error                 { delete(m, uid); return nil }

type memoryEvents struct {
	mu     sync.Mutex
	next   uint64
	queued []queuedEvent
}

func (q *memoryEvents) PushAll(events []edge.Event) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range events {
		q.next++
		q.queued = append(q.queued, queuedEvent{q.next, e})
	}
	return nil
}

func (q *memoryEvents) Peek(limit int) ([]queuedEvent, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return append([]queuedEvent(nil), q.queued[:min(limit, len(q.queued))]...), nil
}

func (q *memoryEvents) Ack(seq uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.queued) > 0 && q.queued[0].Seq <= seq {
		q.queued = q.queued[1:]
	}
	return nil
}

// A cloud records reports, and answers as told.
type cloud struct {
	mu      sync.Mutex
	reports []edge.Report
	answer  func(edge.Report) (edge.Ack, error)
}

func (c *cloud) Report(_ context.Context, r edge.Report) (edge.Ack, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, r)
	return c.answer(r)
}

func (c *cloud) take() []edge.Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	reports := c.reports
	c.reports = nil
	return reports
}

// all acknowledges everything.
func all(r edge.Report) (edge.Ack, error) {
	ack := edge.Ack{Pods: map[types.UID]uint64{}}
	for _, p := range r.Pods {
		ack.Pods[p.UID] = p.Seq
	}
	if r.Node != nil {
		ack.Node = r.Node.Seq
	}
	for _, e := range r.Events {
		ack.Events = e.Seq
	}
	return ack, nil
}

// inOutbox runs a test with an outbox that reports to a cloud, in fake time.
func inOutbox(t *testing.T, test func(t *testing.T, o *outbox, c *cloud)) {
	synctest.Test(t, func(t *testing.T) {
		o, err := newOutbox(memoryStatuses{}, &memoryEvents{}, "site", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		c := &cloud{answer: all}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { o.Run(ctx, c) })
		synctest.Wait()
		test(t, o, c)
		cancel()
		running.Wait()
		o.flush()
	})
}

func status(uid types.UID, seq uint64) edge.PodStatus { return edge.PodStatus{UID: uid, Seq: seq} }

func TestStatusIsReportedAtOnceAndOnce(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		start := time.Now()
		o.PodStatus(status("u", 1))
		synctest.Wait()
		if r := c.take(); len(r) != 1 || len(r[0].Pods) != 1 || time.Since(start) != 0 {
			t.Errorf("after %s: %+v", time.Since(start), r)
		}
		time.Sleep(time.Hour)
		if r := c.take(); len(r) != 0 {
			t.Errorf("repeated though confirmed: %+v", r)
		}
	})
}

func TestUnconfirmedStatusIsRepeatedAndTheLatestWins(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		fail := true
		c.answer = func(r edge.Report) (edge.Ack, error) {
			if fail {
				return edge.Ack{}, errors.New("API server is away")
			}
			return all(r)
		}
		o.PodStatus(status("u", 1))
		time.Sleep(10 * time.Second)
		o.PodStatus(status("u", 2))
		c.mu.Lock()
		fail = false
		c.mu.Unlock()
		time.Sleep(10 * time.Second)
		reports := c.take()
		last := reports[len(reports)-1]
		if len(reports) < 5 || len(last.Pods) != 1 || last.Pods[0].Seq != 2 {
			t.Errorf("%d reports, the last %+v", len(reports), last)
		}
	})
}

func TestOlderStatusIsPassedOver(t *testing.T) {
	stored := memoryStatuses{}
	o, err := newOutbox(stored, &memoryEvents{}, "site", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, seq := range []uint64{7, 5} {
		if err := o.PodStatus(status("u", seq)); err != nil {
			t.Fatal(err)
		}
	}
	if stored["u"].Seq != 7 || o.pods["u"].Seq != 7 {
		t.Errorf("stored %d, to be reported %d; want 7", stored["u"].Seq, o.pods["u"].Seq)
	}
}

func TestPartlyConfirmedReport(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		c.answer = func(r edge.Report) (edge.Ack, error) {
			ack, _ := all(r)
			delete(ack.Pods, "stuck")
			return ack, nil
		}
		o.PodStatus(status("fine", 1))
		o.PodStatus(status("stuck", 1))
		time.Sleep(3 * time.Second)
		reports := c.take()
		last := reports[len(reports)-1]
		if len(last.Pods) != 1 || last.Pods[0].UID != "stuck" {
			t.Errorf("what is repeated: %+v", last.Pods)
		}
	})
}

func TestPodsThatCannotBeWrittenHoldUpNoOther(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		c.answer = func(r edge.Report) (edge.Ack, error) {
			ack, _ := all(r)
			for uid := range ack.Pods {
				if uid != "z" {
					delete(ack.Pods, uid)
				}
			}
			return ack, nil
		}
		for i := range 200 {
			o.PodStatus(status(types.UID(fmt.Sprintf("stuck-%03d", i)), 1))
		}
		o.PodStatus(status("z", 1))
		time.Sleep(5 * time.Second)
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.acked["z"] != 1 {
			t.Error("a pod's status waits behind those of others")
		}
	})
}

func TestRepeatedEventsAreOneWithACount(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u"}}
		for range 3 {
			o.PodEvent(p, "", corev1.EventTypeWarning, "BackOff", "again")
		}
		time.Sleep(2 * time.Second)
		first := c.take()
		if len(first) != 1 || len(first[0].Events) != 1 || first[0].Events[0].Count != 3 {
			t.Fatalf("reported %+v", first)
		}
		o.PodEvent(p, "", corev1.EventTypeWarning, "BackOff", "again")
		time.Sleep(2 * time.Second)
		second := c.take()
		e := second[0].Events[0]
		if e.Count != 4 || !e.FirstTime.Equal(&first[0].Events[0].FirstTime) || e.Seq == first[0].Events[0].Seq {
			t.Errorf("the repetition: %+v, the first: %+v", e, first[0].Events[0])
		}
	})
}

func TestEventsWaitForTheCloud(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		queue := &memoryEvents{}
		o, err := newOutbox(memoryStatuses{}, queue, "site", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u"}}
		o.PodEvent(p, "", corev1.EventTypeNormal, "Started", "while offline")
		happened := time.Now()
		time.Sleep(24 * time.Hour)
		c := &cloud{answer: all}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { o.Run(ctx, c) })
		synctest.Wait()
		reports := c.take()
		if len(reports) != 1 || len(reports[0].Events) != 1 || !reports[0].Events[0].LastTime.Time.Equal(happened) {
			t.Errorf("reported %+v, it happened at %s", reports, happened)
		}
		if len(queue.queued) != 0 {
			t.Errorf("confirmed events stay: %+v", queue.queued)
		}
		cancel()
		running.Wait()
	})
}

// TestNewSessionReportsAll: the API server may have changed statuses while nobody
// spoke for the site, so all are reported again, once.
func TestNewSessionReportsAll(t *testing.T) {
	inOutbox(t, func(t *testing.T, o *outbox, c *cloud) {
		o.PodStatus(status("u", 1))
		o.SetNode(edge.NodeStatus{})
		synctest.Wait()
		c.take()
		again := &cloud{answer: all}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { o.Run(ctx, again) })
		synctest.Wait()
		if r := again.take(); len(r) != 1 || len(r[0].Pods) != 1 || r[0].Node == nil {
			t.Errorf("the new session was told %+v", r)
		}
		cancel()
		running.Wait()
	})
}
