package provider

import (
	"context"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	coordinationinformers "k8s.io/client-go/informers/coordination/v1"
	coreinformers "k8s.io/client-go/informers/core/v1"
	nodeinformers "k8s.io/client-go/informers/node/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Labels and annotations of nodes.
const (
	LabelSite          = "skerry.io/site"              // on every node that is a site; its value is the site's name
	AnnotationAutonomy = "skerry.io/autonomy-duration" // how long pods outlive a lost connection, as 72h; absent or 0: for ever
)

const byNode = "node" // index of pods

// caches are the informers of one replica, one for each resource.
type caches struct {
	pods, nodes, services, classes, leases cache.SharedIndexInformer
}

func newCaches(client kubernetes.Interface, namespace string) caches {
	const resync = 0
	none := cache.Indexers{}
	c := caches{
		pods: coreinformers.NewFilteredPodInformer(client, metav1.NamespaceAll, resync, cache.Indexers{byNode: func(obj any) ([]string, error) {
			return []string{obj.(*corev1.Pod).Spec.NodeName}, nil
		}}, func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermNotEqualSelector("spec.nodeName", "").String()
		}),
		nodes: coreinformers.NewFilteredNodeInformer(client, resync, none, func(o *metav1.ListOptions) { o.LabelSelector = LabelSite }),
		services: coreinformers.NewServiceInformer(client, metav1.NamespaceAll, resync,
			cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}),
		classes: nodeinformers.NewRuntimeClassInformer(client, resync, none),
		leases:  coordinationinformers.NewLeaseInformer(client, namespace, resync, none),
	}
	for _, informer := range c.all() {
		// An error would mean that it has been started already.
		_ = informer.SetTransform(dropManagedFields)
	}
	return c
}

// dropManagedFields saves the memory of what nobody here reads.
func dropManagedFields(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

func (c caches) all() []cache.SharedIndexInformer {
	return []cache.SharedIndexInformer{c.pods, c.nodes, c.services, c.classes, c.leases}
}

func (c caches) run(ctx context.Context, g *errgroup.Group) {
	for _, informer := range c.all() {
		g.Go(func() error { informer.RunWithContext(ctx); return nil })
	}
}

// wait blocks until all caches have synced and reports whether they have.
func (c caches) wait(ctx context.Context) bool {
	for _, informer := range c.all() {
		if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			return false
		}
	}
	return true
}

// node returns the cached Node of a site, or nil.
func (c caches) node(site string) *corev1.Node {
	obj, ok, err := c.nodes.GetStore().GetByKey(site)
	if err != nil || !ok {
		return nil
	}
	return obj.(*corev1.Node)
}

func (c caches) pod(namespace, name string) *corev1.Pod {
	obj, ok, err := c.pods.GetStore().GetByKey(namespace + "/" + name)
	if err != nil || !ok {
		return nil
	}
	return obj.(*corev1.Pod)
}

func (c caches) podsOf(site string) []*corev1.Pod {
	objs, err := c.pods.GetIndexer().ByIndex(byNode, site)
	if err != nil {
		return nil // there is no such index: impossible
	}
	pods := make([]*corev1.Pod, len(objs))
	for i, obj := range objs {
		pods[i] = obj.(*corev1.Pod)
	}
	return pods
}

// servicesFor returns what the pods of a namespace see: its own services and
// those that every pod sees.
func (c caches) servicesFor(namespace string) []*corev1.Service {
	var services []*corev1.Service
	objs, err := c.services.GetIndexer().ByIndex(cache.NamespaceIndex, namespace)
	if err != nil {
		return nil // there is no such index: impossible
	}
	for _, obj := range objs {
		services = append(services, obj.(*corev1.Service))
	}
	if namespace == metav1.NamespaceDefault {
		return services
	}
	if obj, ok, err := c.services.GetStore().GetByKey(metav1.NamespaceDefault + "/kubernetes"); err == nil && ok {
		services = append(services, obj.(*corev1.Service))
	}
	return services
}

func (c caches) class(name string) *nodev1.RuntimeClass {
	obj, ok, err := c.classes.GetStore().GetByKey(name)
	if err != nil || !ok {
		return nil
	}
	return obj.(*nodev1.RuntimeClass)
}

func (c caches) lease(namespace, name string) *coordinationv1.Lease {
	obj, ok, err := c.leases.GetStore().GetByKey(namespace + "/" + name)
	if err != nil || !ok {
		return nil
	}
	return obj.(*coordinationv1.Lease)
}

// A handler hears of changes by type. A deletion that was missed and noticed
// later is a deletion all the same.
type handler[T any] struct {
	add    func(T)
	update func(old, obj T)
	delete func(T)
}

func (h handler[T]) OnAdd(obj any, _ bool) { h.add(obj.(T)) }
func (h handler[T]) OnUpdate(old, obj any) { h.update(old.(T), obj.(T)) }
func (h handler[T]) OnDelete(obj any) {
	if tombstone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = tombstone.Obj
	}
	if t, ok := obj.(T); ok {
		h.delete(t)
	}
}

func leaseHandler(changed func(*coordinationv1.Lease)) cache.ResourceEventHandler {
	return handler[*coordinationv1.Lease]{
		add: changed, update: func(_, l *coordinationv1.Lease) { changed(l) }, delete: func(*coordinationv1.Lease) {},
	}
}

// newer reports whether version a is later than b. Versions that cannot be
// compared are not.
func newer(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order > 0
}

type siteKey struct{}

// as returns a context whose API requests are made as the node of a site.
func as(ctx context.Context, site string) context.Context {
	return context.WithValue(ctx, siteKey{}, site)
}

// impersonate adds to each request the identity that [as] has put into its
// context. Only the user name is set; the API server adds the group.
func impersonate(next http.RoundTripper) http.RoundTripper { return impersonator{next} }

type impersonator struct{ next http.RoundTripper }

func (i impersonator) RoundTrip(req *http.Request) (*http.Response, error) {
	if site, ok := req.Context().Value(siteKey{}).(string); ok {
		req = req.Clone(req.Context())
		req.Header.Set("Impersonate-User", "system:node:"+site)
	}
	return i.next.RoundTrip(req)
}

// WrappedRoundTripper lets client-go find the transport below.
func (i impersonator) WrappedRoundTripper() http.RoundTripper { return i.next }

// statusMatters reports whether others than the site have changed a status in a
// way that bears on what is computed in the cloud: conditions that readiness
// gates name, and Ready itself, which the controller manager also writes.
func statusMatters(old, pod *corev1.Pod) bool {
	if len(old.Status.Conditions) != len(pod.Status.Conditions) {
		return true
	}
	for _, c := range pod.Status.Conditions {
		if was := podCondition(old.Status.Conditions, c.Type); was == nil || was.Status != c.Status {
			return true
		}
	}
	return false
}

// callTimeout bounds one call to the API server made for a site.
const callTimeout = 30 * time.Second
