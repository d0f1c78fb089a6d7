package provider

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// Times of a site's loop.
const (
	settle     = 3 * time.Millisecond // marks that come within it are served by one round
	resync     = 5 * time.Minute      // without a mark; also how often a node's heartbeat is written
	applyLimit = 2 * time.Minute      // for one call to the site: 4 MiB at a third of a Mbit/s
	firstDelay = 50 * time.Millisecond
	lastDelay  = 30 * time.Second
)

// A link is one session of a site and what is known of the site during it.
type link struct {
	p       *Provider
	name    string
	session Session
	epoch   uint64 // of the ownership under which it runs; 0: none was acquired
	edge    edge.Edge
	since   time.Time
	wake    chan struct{} // holds a mark
	done    chan struct{} // closed when nothing of the link runs any more

	// Owned by the loop.
	held     map[edge.Key]string // what the site holds, at which version; nil: not known
	complete bool                // the site has been told that it holds all that it should
	tokens   map[edge.Key]token
	digests  map[types.UID]digest

	lease atomic.Pointer[coordinationv1.Lease] // of the node, as written last

	reporting chan struct{} // holds a token; who has it may use the fields below
	seqs      map[types.UID]uint64
	eventSeq  uint64
	nodeSeq   uint64
	events    flowcontrol.RateLimiter

	nodeMu   sync.Mutex       // held while the node is written
	reported *edge.NodeStatus // the latest, nil before the first
	node     *corev1.Node     // as written last

	mu   sync.Mutex
	pods map[types.UID]types.NamespacedName // of the site, which may send events of them
}

func newLink(p *Provider, s Session, epoch uint64) *link {
	return &link{
		p: p, name: s.Peer(), session: s, epoch: epoch, edge: edge.NewEdgeClient(s), since: time.Now(),
		wake: make(chan struct{}, 1), done: make(chan struct{}),
		tokens: map[edge.Key]token{}, digests: map[types.UID]digest{},
		reporting: make(chan struct{}, 1), seqs: map[types.UID]uint64{},
		events: flowcontrol.NewTokenBucketRateLimiter(eventRate, eventBurst),
	}
}

// Serve keeps a site in step with the API server until its session ends or ctx
// is done. Of two sessions of one site the newer ends the older.
func (p *Provider) Serve(ctx context.Context, s Session) {
	defer s.Close()
	select {
	case <-p.synced:
	case <-ctx.Done():
		return
	case <-s.Done():
		return
	}
	l := p.begin(ctx, s)
	if l == nil {
		return
	}
	defer p.end(l)
	ctx, cancel := context.WithCancel(ctx)
	mux := http.NewServeMux()
	edge.HandleCloud(mux, l)
	var loop sync.WaitGroup
	loop.Go(func() { l.run(ctx) })
	err := s.Serve(ctx, mux)
	cancel()
	loop.Wait()
	p.log.Info("site disconnected", "site", l.name, "epoch", l.epoch, "after", time.Since(l.since).Round(time.Second), "reason", err)
}

// begin makes s the session of its site, when the one before has ended. It
// returns nil if s ends while waiting.
func (p *Provider) begin(ctx context.Context, s Session) *link {
	p.mu.Lock()
	l := newLink(p, s, p.epochs[s.Peer()])
	old := p.links[l.name]
	p.links[l.name] = l
	p.mu.Unlock()
	if old != nil {
		old.session.Close()
		select {
		case <-old.done:
		case <-ctx.Done():
			p.end(l)
			return nil
		case <-s.Done():
			p.end(l)
			return nil
		}
	}
	p.log.Info("site connected", "site", l.name, "epoch", l.epoch)
	p.wheel.join(l.name)
	l.mark()
	return l
}

func (p *Provider) end(l *link) {
	p.mu.Lock()
	last := p.links[l.name] == l
	if last {
		delete(p.links, l.name)
		p.left[l.name] = time.Now()
	}
	p.mu.Unlock()
	p.objects.release(l.name, nil)
	if last {
		p.wheel.leave(l.name)
	}
	close(l.done)
}

func (l *link) mark() {
	select {
	case l.wake <- struct{}{}:
	default: // one mark is enough
	}
}

// run keeps the site in step until ctx is done.
func (l *link) run(ctx context.Context) {
	timer := time.NewTimer(resync)
	defer timer.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
			if backoff.Sleep(ctx, settle) != nil {
				return
			}
			select {
			case <-l.wake:
			default:
			}
		case <-timer.C:
		}
		begun := time.Now()
		next, err := l.sync(ctx)
		l.p.metrics.rounds.Observe(time.Since(begun).Seconds())
		switch {
		case err == nil && failures > 0:
			l.p.log.Info("site is in step again", "site", l.name, "failures", failures)
			failures = 0
		case err != nil && ctx.Err() == nil:
			// Full jitter, but never at once: half of the range is the least.
			next = backoff.Delay(failures, firstDelay, lastDelay)/2 + firstDelay
			if failures++; failures == 4 { // what settles by itself within a second is no news
				l.p.log.Warn("site is out of step", "site", l.name, "err", err)
			}
		}
		timer.Reset(next)
	}
}

// sync makes one round: it brings the site's node up to date, and what the site
// holds in line with what it should hold. It returns when the next round is due
// if nothing marks the site before.
func (l *link) sync(ctx context.Context) (next time.Duration, err error) {
	pods := l.p.caches.podsOf(l.name)
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.UID, b.UID))
	})
	// A node that is back is to be Ready before a slow link has carried
	// everything; after that, pods are what is waited for.
	first := l.held == nil
	if first {
		err = l.syncNode(ctx)
	}
	next, exchangeErr := l.exchange(ctx, pods)
	err = errors.Join(err, exchangeErr)
	if !first {
		err = errors.Join(err, l.syncNode(ctx))
	}
	return next, err
}

// exchange sends the site what it lacks, and then does what is to be done about
// its pods in the cloud.
func (l *link) exchange(ctx context.Context, pods []*corev1.Pod) (next time.Duration, err error) {
	if l.held == nil {
		if err := l.takeInventory(ctx); err != nil {
			return 0, err
		}
	}
	l.notePods(pods)
	plan := l.plan(ctx, pods)
	if err := l.apply(ctx, plan); err != nil {
		l.held = nil // nobody knows how far it came
		return 0, err
	}
	next = resync
	if !plan.due.IsZero() {
		next = min(next, max(time.Until(plan.due), time.Second))
	}
	return next, errors.Join(plan.missing, l.syncPods(ctx, pods))
}

func (l *link) takeInventory(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, applyLimit)
	defer cancel()
	inventory, err := l.edge.Inventory(ctx)
	if err != nil {
		return fmt.Errorf("inventory of %s: %w", l.name, err)
	}
	held := make(map[edge.Key]string, len(inventory))
	for _, h := range inventory {
		held[h.Key] = h.Version
	}
	l.held, l.complete = held, false
	return nil
}

// notePods remembers which pods are the site's, those that have left the API as
// long as it holds them. What it alone says that it holds counts for nothing.
func (l *link) notePods(pods []*corev1.Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	noted := make(map[types.UID]types.NamespacedName, len(pods))
	for uid, name := range l.pods {
		if _, held := l.held[edge.Key{Kind: edge.KindPod, Namespace: name.Namespace, Name: name.Name, UID: uid}]; held {
			noted[uid] = name
		}
	}
	for _, pod := range pods {
		noted[pod.UID] = types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
	}
	l.pods = noted
}

// apply sends the difference between the plan and what the site holds.
func (l *link) apply(ctx context.Context, p *plan) error {
	upserts, removals := p.diff(l.held)
	wanted := len(removals)
	removals, err := l.confirm(ctx, removals)
	if err != nil {
		return err
	}
	objects, err := p.encode(upserts)
	if err != nil {
		return err
	}
	// What could not be confirmed shows that the cache is behind: there may be pods
	// that it does not have yet.
	changes := edge.Changes{Upserts: objects, Removals: removals, Complete: !l.complete && len(removals) == wanted}
	for _, step := range edge.Split(changes, edge.MaxBody/4) {
		if err := l.send(ctx, step); err != nil {
			return err
		}
	}
	l.complete = l.complete || changes.Complete
	return nil
}

func (l *link) send(ctx context.Context, changes edge.Changes) error {
	ctx, cancel := context.WithTimeout(ctx, applyLimit)
	defer cancel()
	if err := l.edge.Apply(ctx, changes); err != nil {
		return fmt.Errorf("apply at %s: %w", l.name, err)
	}
	for _, o := range changes.Upserts {
		l.held[o.Key] = o.Version
	}
	for _, key := range changes.Removals {
		delete(l.held, key)
	}
	l.p.metrics.applied.Add(float64(len(changes.Upserts) + len(changes.Removals)))
	return nil
}

// confirm returns those removals that are surely right. The cache may be behind
// the one of the replica that sent a pod; so that a pod is gone is asked of the
// API server itself, and as long as the site holds a pod that the cache does not
// have yet, nothing that such a pod could need is removed.
func (l *link) confirm(ctx context.Context, removals []edge.Key) ([]edge.Key, error) {
	var confirmed []edge.Key
	behind := false
	for _, key := range removals {
		if key.Kind != edge.KindPod {
			continue
		}
		pod, err := l.p.live(ctx, podID{key.Namespace, key.Name, key.UID, l.name})
		switch {
		case errors.Is(err, errGone), err == nil && pod.Spec.NodeName != l.name:
			confirmed = append(confirmed, key)
			delete(l.digests, key.UID)
		case err != nil:
			return nil, fmt.Errorf("confirm removal of %s: %w", key, err)
		default:
			behind = true
		}
	}
	if behind {
		return confirmed, nil // the cache's own change will mark the site
	}
	for _, key := range removals {
		if key.Kind != edge.KindPod {
			confirmed = append(confirmed, key)
		}
	}
	return confirmed, nil
}

// syncPods does what the cloud has to do about the pods of a connected site:
// ends those that never reached it, lifts the tolerations of others, and keeps
// Ready true to what it depends on.
func (l *link) syncPods(ctx context.Context, pods []*corev1.Pod) error {
	var errs []error
	autonomy := autonomyOf(l.p.caches.node(l.name))
	present := make(map[types.UID]bool, len(pods))
	for _, pod := range pods {
		present[pod.UID] = true
		if l.finalizable(pod) {
			errs = append(errs, l.p.finalize(ctx, pod))
			continue
		}
		if terminal(pod.Status.Phase) || pod.DeletionTimestamp != nil {
			continue
		}
		if tolerations, mark, ok := liftTolerations(pod, autonomy); ok {
			errs = append(errs, l.p.setTolerations(ctx, pod, tolerations, mark))
		}
		if is := podCondition(pod.Status.Conditions, corev1.PodReady); is != nil {
			if should := podCondition(regate(pod).Conditions, corev1.PodReady); should.Status != is.Status {
				id := podID{pod.Namespace, pod.Name, pod.UID, l.name}
				if _, err := l.p.writeStatus(ctx, id, regate); !errors.Is(err, errGone) {
					errs = append(errs, err)
				}
			}
		}
	}
	for uid := range l.digests {
		if !present[uid] {
			delete(l.digests, uid)
		}
	}
	for key := range l.tokens {
		if !present[key.UID] {
			delete(l.tokens, key)
		}
	}
	return errors.Join(errs...)
}

// finalize removes a pod from the API, as its node.
func (p *Provider) finalize(ctx context.Context, pod *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(as(ctx, pod.Spec.NodeName), callTimeout)
	defer cancel()
	err := p.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64), Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
	})
	// A conflict means that the name is another pod's by now.
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}
