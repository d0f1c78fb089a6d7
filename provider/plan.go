package provider

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// A plan is what one site should hold, as far as it is known.
type plan struct {
	order   []edge.Key // what an object needs comes before it
	want    map[edge.Key]candidate
	keep    map[edge.Key]bool // could not be read just now: neither sent nor removed
	due     time.Time         // when the plan changes by itself, by a token's renewal; zero: never
	missing error             // why something could not be read, nil if all was
}

// A candidate is one object of a plan; its value is made only if it is sent.
type candidate struct {
	version string
	absent  bool
	value   any
}

func newPlan() *plan {
	return &plan{want: map[edge.Key]candidate{}, keep: map[edge.Key]bool{}}
}

func (p *plan) add(key edge.Key, c candidate) {
	if _, ok := p.want[key]; !ok {
		p.order = append(p.order, key)
	}
	p.want[key] = c
}

func (p *plan) later(key edge.Key, err error) {
	p.keep[key] = true
	p.missing = errors.Join(p.missing, err)
}

func (p *plan) dueAt(t time.Time) {
	if p.due.IsZero() || t.Before(p.due) {
		p.due = t
	}
}

// diff returns which objects a site that holds held lacks or has in another
// version, in the plan's order, and which it holds but should not, in key order.
func (p *plan) diff(held map[edge.Key]string) (upserts, removals []edge.Key) {
	for _, key := range p.order {
		if version, ok := held[key]; !ok || version != p.want[key].version {
			upserts = append(upserts, key)
		}
	}
	for key := range held {
		if _, ok := p.want[key]; !ok && !p.keep[key] {
			removals = append(removals, key)
		}
	}
	slices.SortFunc(removals, func(a, b edge.Key) int { return cmp.Compare(a.String(), b.String()) })
	return upserts, removals
}

// encode makes the objects of keys.
func (p *plan) encode(keys []edge.Key) ([]edge.Object, error) {
	objects := make([]edge.Object, 0, len(keys))
	for _, key := range keys {
		c := p.want[key]
		if c.absent {
			objects = append(objects, edge.Object{Key: key, Version: c.version, Absent: true})
			continue
		}
		o, err := edge.NewObject(key, c.version, c.value)
		if err != nil {
			return nil, err
		}
		objects = append(objects, o)
	}
	return objects, nil
}

// versionOf is a version for what has none of its own: a digest of its JSON.
func versionOf(value any) (string, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return "", fmt.Errorf("encode %T: %w", value, err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:12]), nil
}

func (p *plan) addHashed(key edge.Key, value any) {
	version, err := versionOf(value)
	if err != nil {
		p.later(key, err)
		return
	}
	p.add(key, candidate{version: version, value: value})
}

// plan computes what the site should hold from the caches and, for what they do
// not have, from the API server. It is called by the loop only.
func (l *link) plan(ctx context.Context, pods []*corev1.Pod) *plan {
	p := newPlan()
	p.addHashed(edge.Key{Kind: edge.KindCluster}, edge.Cluster{DNS: l.p.cfg.ClusterDNS, Domain: l.p.cfg.ClusterDomain})
	nodeKey := edge.Key{Kind: edge.KindNode, Name: l.name}
	if node := l.p.caches.node(l.name); node != nil {
		p.addHashed(nodeKey, nodeForEdge(node))
	} else {
		p.keep[nodeKey] = true
	}
	var wanted []*corev1.Pod
	refs := map[types.UID]references{}
	needed := map[edge.Key]bool{} // Secrets and ConfigMaps
	for _, pod := range pods {
		if !l.wants(pod) {
			continue
		}
		wanted = append(wanted, pod)
		if terminal(pod.Status.Phase) {
			continue // needs nothing any more, and the API server would refuse it
		}
		r := referencesOf(pod)
		refs[pod.UID] = r
		for _, name := range r.secrets {
			needed[edge.Key{Kind: edge.KindSecret, Namespace: pod.Namespace, Name: name}] = true
		}
		for _, name := range r.configMaps {
			needed[edge.Key{Kind: edge.KindConfigMap, Namespace: pod.Namespace, Name: name}] = true
		}
		services := edge.Key{Kind: edge.KindServices, Namespace: pod.Namespace}
		if _, ok := p.want[services]; !ok {
			p.addHashed(services, servicesForEdge(l.p.caches.servicesFor(pod.Namespace)))
		}
		l.planClass(p, r.class)
	}
	l.planObjects(ctx, p, needed)
	for _, pod := range wanted {
		l.planTokens(ctx, p, pod, refs[pod.UID])
		l.planPod(p, pod)
	}
	return p
}

// wants reports whether the site should hold a pod. A pod that has ended, or
// that was deleted before it ever reached the site, is not sent any more.
func (l *link) wants(pod *corev1.Pod) bool {
	if _, held := l.held[podKey(pod)]; held {
		return true
	}
	return !l.finalizable(pod) && (pod.DeletionTimestamp != nil || !terminal(pod.Status.Phase))
}

// finalizable reports whether a pod was deleted before the site could have seen
// it: not held by the site, and nothing of it ever reported.
func (l *link) finalizable(pod *corev1.Pod) bool {
	_, held := l.held[podKey(pod)]
	return pod.DeletionTimestamp != nil && !held && pod.Status.StartTime == nil &&
		len(pod.Status.ContainerStatuses)+len(pod.Status.InitContainerStatuses) == 0
}

func podKey(pod *corev1.Pod) edge.Key {
	return edge.Key{Kind: edge.KindPod, Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
}

// planPod adds a pod. Its version is a digest of what the site sees of it, so
// that writing its status does not send it again.
func (l *link) planPod(p *plan, pod *corev1.Pod) {
	key := podKey(pod)
	sent := podForEdge(pod)
	if known, ok := l.digests[pod.UID]; ok && known.of == pod.ResourceVersion && known.of != "" {
		p.add(key, candidate{version: known.version, value: sent})
		return
	}
	version, err := versionOf(sent)
	if err != nil {
		p.later(key, err)
		return
	}
	l.digests[pod.UID] = digest{pod.ResourceVersion, version}
	p.add(key, candidate{version: version, value: sent})
}

// A digest is the version at which a pod of some resourceVersion is sent.
type digest struct{ of, version string }

// podForEdge is as much of a pod as its site needs: all but the status, which
// the site knows better. It shares memory with pod.
func podForEdge(pod *corev1.Pod) *corev1.Pod {
	sent := &corev1.Pod{ObjectMeta: pod.ObjectMeta, Spec: pod.Spec, Status: corev1.PodStatus{QOSClass: pod.Status.QOSClass}}
	sent.ResourceVersion, sent.ManagedFields = "", nil
	return sent
}

func nodeForEdge(node *corev1.Node) *corev1.Node {
	sent := &corev1.Node{ObjectMeta: node.ObjectMeta, Spec: node.Spec}
	sent.ResourceVersion, sent.ManagedFields = "", nil
	return sent
}

// servicesForEdge is what a pod's environment shows: services with an address of
// the cluster, and of two with the same name the pod's own namespace's.
func servicesForEdge(services []*corev1.Service) []edge.Service {
	list := []edge.Service{}
	for _, s := range services {
		if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone ||
			slices.ContainsFunc(list, func(e edge.Service) bool { return e.Name == s.Name }) {
			continue
		}
		e := edge.Service{Name: s.Name, ClusterIP: s.Spec.ClusterIP}
		for _, port := range s.Spec.Ports {
			e.Ports = append(e.Ports, edge.ServicePort{Name: port.Name, Protocol: port.Protocol, Port: port.Port})
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b edge.Service) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

func (l *link) planClass(p *plan, name string) {
	key := edge.Key{Kind: edge.KindRuntimeClass, Name: name}
	if name == "" || p.want[key].version != "" {
		return
	}
	class := l.p.caches.class(name)
	if class == nil {
		p.add(key, candidate{version: absentVersion, absent: true})
		return
	}
	p.add(key, candidate{version: class.ResourceVersion, value: edge.RuntimeClass{Handler: class.Handler}})
}

// planObjects adds the Secrets and ConfigMaps, several read at once.
func (l *link) planObjects(ctx context.Context, p *plan, needed map[edge.Key]bool) {
	l.p.objects.release(l.name, needed)
	keys := make([]edge.Key, 0, len(needed))
	for key := range needed {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b edge.Key) int { return cmp.Compare(a.String(), b.String()) })
	states, errs := make([]objectState, len(keys)), make([]error, len(keys))
	var g errgroup.Group
	g.SetLimit(8)
	for i, key := range keys {
		g.Go(func() error { states[i], errs[i] = l.read(ctx, key); return nil })
	}
	g.Wait()
	for i, key := range keys {
		if errs[i] != nil {
			p.later(key, errs[i])
			continue
		}
		p.add(key, candidate{version: states[i].version, absent: states[i].absent, value: states[i].value})
	}
}

// read reads an object. The Node authorizer learns of a binding a moment after
// the scheduler has made it; so "no relationship found" is asked again at once.
func (l *link) read(ctx context.Context, key edge.Key) (state objectState, err error) {
	const tries = 6
	for n := range backoff.Retry(ctx, 5*time.Millisecond, 100*time.Millisecond) {
		state, err = l.p.objects.need(ctx, l.name, key)
		if !apierrors.IsForbidden(err) || n == tries {
			return state, err
		}
	}
	return state, cmp.Or(err, context.Cause(ctx))
}

// planTokens adds the tokens of a pod: those that the site holds while they are
// not due, new ones else.
func (l *link) planTokens(ctx context.Context, p *plan, pod *corev1.Pod, refs references) {
	for _, ref := range refs.tokens {
		key := ref.key(pod.Namespace, pod.UID)
		version, held := l.held[key]
		if t, ok := l.tokens[key]; ok {
			if t.version != version {
				p.add(key, candidate{version: t.version, value: t.Token})
				continue
			}
			delete(l.tokens, key) // has arrived
		}
		if held {
			issued, expires, err := edge.ParseTokenVersion(version)
			due := renewalOf(issued, expires)
			if err == nil && (time.Now().Before(due) || pod.DeletionTimestamp != nil) {
				p.add(key, candidate{version: version})
				if pod.DeletionTimestamp == nil {
					p.dueAt(due)
				}
				continue
			}
		}
		t, err := l.requestToken(ctx, pod, ref)
		if err != nil {
			p.later(key, err)
			continue
		}
		l.tokens[key] = t
		p.add(key, candidate{version: t.version, value: t.Token})
	}
}

func (l *link) requestToken(ctx context.Context, pod *corev1.Pod, ref tokenRef) (t token, err error) {
	const tries = 6
	for n := range backoff.Retry(ctx, 5*time.Millisecond, 100*time.Millisecond) {
		t, err = requestToken(ctx, l.p.client, pod, ref)
		if !apierrors.IsForbidden(err) || n == tries {
			return t, err
		}
	}
	return t, cmp.Or(err, context.Cause(ctx))
}
