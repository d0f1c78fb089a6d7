package provider

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// Times of node leases, as a kubelet's.
const (
	leaseSeconds = 40
	leaseRenewal = 10 // seconds, and slots of the wheel
	leaseWorkers = 16
	departDelay  = 2 // seconds between a session's end and what is said of it
)

func leaseName(site string) string { return "site-" + site }

// Acquire takes the ownership of a site for this replica and returns its epoch,
// which is higher than any before. Ownership is the Lease site-<name>: its holder
// is the replica, its count of transitions the epoch. Only its spec is touched.
//
// A site whose Node has been deleted since it was last owned is revoked instead.
func (p *Provider) Acquire(ctx context.Context, site string) (uint64, error) {
	if problems := append(validation.IsDNS1123Subdomain(site), validation.IsValidLabelValue(site)...); len(problems) > 0 {
		return 0, fmt.Errorf("site name %q: %w: %s", site, edge.ErrInvalid, strings.Join(problems, "; "))
	}
	const tries = 10
	var epoch uint64
	var err error
	for n := range backoff.Retry(ctx, 10*time.Millisecond, time.Second) {
		epoch, err = p.acquire(ctx, site)
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) || n == tries {
			break
		}
	}
	if err == nil && epoch == 0 {
		err = context.Cause(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("acquire site %s: %w", site, err)
	}
	p.mu.Lock()
	p.epochs[site] = max(epoch, p.epochs[site])
	p.mu.Unlock()
	return epoch, nil
}

func (p *Provider) acquire(ctx context.Context, site string) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	leases := p.client.CoordinationV1().Leases(p.cfg.Namespace)
	lease, err := leases.Get(ctx, leaseName(site), metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	if missing {
		lease, err = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: p.cfg.Namespace, Name: leaseName(site)}}, nil
	}
	if err != nil {
		return 0, err
	}
	if p.cfg.Revoke != nil && owned(lease) {
		// Whoever owned it has made its Node first. That it is gone is a person's
		// doing, at a time when no replica looked.
		if _, err := p.client.CoreV1().Nodes().Get(ctx, site, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			if err := p.revoke(ctx, site); err != nil {
				return 0, err
			}
			return 0, errRevoked
		} else if err != nil {
			return 0, err
		}
	}
	if _, err := p.ensureNode(ctx, site); err != nil {
		return 0, err
	}
	now := metav1.NowMicro()
	epoch := int32(1)
	if lease.Spec.LeaseTransitions != nil {
		epoch = *lease.Spec.LeaseTransitions + 1
	}
	lease.Spec.HolderIdentity, lease.Spec.LeaseTransitions = &p.cfg.Replica, &epoch
	lease.Spec.AcquireTime, lease.Spec.RenewTime = &now, &now
	if missing {
		_, err = leases.Create(ctx, lease, metav1.CreateOptions{})
	} else {
		_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	return uint64(epoch), err
}

func owned(lease *coordinationv1.Lease) bool {
	return lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != ""
}

// disown takes the holder from a site's Lease, so that the site's next session
// counts as that of a new one. The epoch stays: it never goes back.
func (p *Provider) disown(ctx context.Context, site string) error {
	leases := p.client.CoordinationV1().Leases(p.cfg.Namespace)
	for n := range backoff.Retry(ctx, 10*time.Millisecond, time.Second) {
		lease, err := leases.Get(ctx, leaseName(site), metav1.GetOptions{})
		if err == nil && owned(lease) {
			lease.Spec.HolderIdentity = nil
			_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
		}
		if err == nil || apierrors.IsNotFound(err) {
			return nil
		}
		if !apierrors.IsConflict(err) || n == 10 {
			return fmt.Errorf("disown site %s: %w", site, err)
		}
	}
	return context.Cause(ctx)
}

// fence ends a session whose site has been acquired anew since.
func (p *Provider) fence(lease *coordinationv1.Lease) {
	site, ok := strings.CutPrefix(lease.Name, "site-")
	if !ok || lease.Spec.LeaseTransitions == nil {
		return
	}
	if l := p.link(site); l != nil && l.epoch != 0 && uint64(*lease.Spec.LeaseTransitions) > l.epoch {
		p.log.Info("site has a newer session", "site", site, "epoch", l.epoch, "newer", *lease.Spec.LeaseTransitions)
		l.session.Close()
	}
}

// A wheel renews the leases of many nodes with a few goroutines: each site has a
// slot of ten, and every second one slot is due. It also calls when a site that
// has left is to be spoken of.
type wheel struct {
	renew, departed func(ctx context.Context, site string) error

	mu     sync.Mutex
	now    int
	slots  [leaseRenewal]map[string]bool
	slotOf map[string]int
	left   map[string]int // seconds to go
	jobs   chan job
}

type job struct {
	site string
	do   func(ctx context.Context, site string) error
}

func newWheel(renew, departed func(ctx context.Context, site string) error) *wheel {
	w := &wheel{renew: renew, departed: departed, slotOf: map[string]int{}, left: map[string]int{}, jobs: make(chan job, 1024)}
	for i := range w.slots {
		w.slots[i] = map[string]bool{}
	}
	return w
}

// join has a site's lease renewed at once and from then on.
func (w *wheel) join(site string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.left, site)
	if _, ok := w.slotOf[site]; ok {
		return
	}
	slot := w.now
	select {
	case w.jobs <- job{site, w.renew}:
	default:
		slot = (w.now + 1) % leaseRenewal // too many at once: in a second
	}
	w.slotOf[site] = slot
	w.slots[slot][site] = true
}

// leave ends the renewal of a site's lease and has departed called soon.
func (w *wheel) leave(site string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot, ok := w.slotOf[site]; ok {
		delete(w.slots[slot], site)
		delete(w.slotOf, site)
	}
	if _, ok := w.left[site]; !ok {
		w.left[site] = departDelay
	}
}

// run turns the wheel until ctx is done.
func (w *wheel) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for range leaseWorkers {
		g.Go(func() error { w.work(ctx); return nil })
	}
	g.Go(func() error {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
			for _, j := range w.turn() {
				select {
				case w.jobs <- j:
				case <-ctx.Done():
					return nil
				}
			}
		}
	})
	return g.Wait()
}

// turn moves the wheel by a second and returns what is due.
func (w *wheel) turn() []job {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = (w.now + 1) % leaseRenewal
	due := make([]job, 0, len(w.slots[w.now]))
	for site := range w.slots[w.now] {
		due = append(due, job{site, w.renew})
	}
	for site := range w.left {
		if w.left[site]--; w.left[site] <= 0 {
			delete(w.left, site)
			due = append(due, job{site, w.departed})
		}
	}
	return due
}

func (w *wheel) work(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-w.jobs:
			if err := j.do(ctx, j.site); err != nil && ctx.Err() == nil {
				w.again(j.site)
			}
		}
	}
}

// again moves a site to the next second's slot, because its renewal has failed.
func (w *wheel) again(site string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot, ok := w.slotOf[site]; ok {
		delete(w.slots[slot], site)
		next := (w.now + 1) % leaseRenewal
		w.slotOf[site] = next
		w.slots[next][site] = true
		return
	}
	if _, ok := w.left[site]; !ok {
		w.left[site] = departDelay
	}
}

// renew renews the lease of a site's node, as the node, while it has a session.
func (p *Provider) renew(ctx context.Context, site string) error {
	l, node := p.link(site), p.caches.node(site)
	if l == nil || node == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(as(ctx, site), callTimeout)
	defer cancel()
	err := l.renewLease(ctx, node)
	if err != nil {
		p.metrics.leaseFailures.Inc()
		p.log.Debug("lease not renewed", "site", site, "err", err)
	}
	return err
}

// renewLease writes the lease, against the version of its last writing if it is
// known. One call at a time is made for each link, by the wheel.
func (l *link) renewLease(ctx context.Context, node *corev1.Node) error {
	leases := l.p.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	now := metav1.NowMicro()
	if lease := l.lease.Load(); lease != nil {
		next := lease.DeepCopy()
		next.Spec.RenewTime = &now
		got, err := leases.Update(ctx, next, metav1.UpdateOptions{})
		if err == nil {
			l.lease.Store(got)
			return nil
		}
		l.lease.Store(nil)
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return err
		}
	}
	lease, err := leases.Get(ctx, l.name, metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	if missing {
		lease, err = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: l.name}}, nil
	}
	if err != nil {
		return err
	}
	lease.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}}
	lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds, lease.Spec.RenewTime = &l.name, new(int32(leaseSeconds)), &now
	if missing {
		lease, err = leases.Create(ctx, lease, metav1.CreateOptions{})
	} else {
		lease, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	if err == nil {
		l.lease.Store(lease)
	}
	return err
}
