package provider

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/virtual-kubelet/virtual-kubelet/errdefs"
	"github.com/virtual-kubelet/virtual-kubelet/node"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	coreinformers "k8s.io/client-go/informers/core/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// Limits of virtual-kubelet's queues. Its own defaults let ten items a second
// through and forget an item after twenty tries.
const (
	podWorkers = 8
	firstRetry = time.Millisecond // also the delay of an item's first turn
	lastRetry  = 30 * time.Second
)

// runPodController runs the one PodController of this replica.
func (p *Provider) runPodController(ctx context.Context) error {
	config := p.podControllerConfig()
	controller, err := node.NewPodController(config)
	if err != nil {
		return fmt.Errorf("pod controller: %w", err)
	}
	if err := controller.Run(ctx, podWorkers); err != nil && ctx.Err() == nil {
		return fmt.Errorf("pod controller: %w", err)
	}
	return nil
}

func (p *Provider) podControllerConfig() node.PodControllerConfig {
	limiter := func() workqueue.TypedRateLimiter[any] {
		return workqueue.NewTypedItemExponentialFailureRateLimiter[any](firstRetry, lastRetry)
	}
	return node.PodControllerConfig{
		PodClient:         guardedClient{p},
		PodInformer:       p.view,
		EventRecorder:     silent{},
		Provider:          &dispatcher{p: p, handed: map[string]*corev1.Pod{}},
		ConfigMapInformer: noConfigMaps{}, SecretInformer: noSecrets{}, ServiceInformer: noServices{},

		SyncPodsFromKubernetesRateLimiter:        limiter(),
		SyncPodsFromKubernetesShouldRetryFunc:    retryForEver,
		DeletePodsFromKubernetesRateLimiter:      limiter(),
		DeletePodsFromKubernetesShouldRetryFunc:  retryForEver,
		SyncPodStatusFromProviderRateLimiter:     limiter(),
		SyncPodStatusFromProviderShouldRetryFunc: retryForEver,
		SkipDownwardAPIResolution:                true,
	}
}

// retryForEver leaves the delay to the rate limiter and never gives up.
func retryForEver(context.Context, string, int, time.Time, error) (*time.Duration, error) {
	return nil, nil
}

// A dispatcher turns what virtual-kubelet asks for into marks. It never blocks
// and never fails, so that the controller never writes a status of its own.
type dispatcher struct {
	p *Provider

	mu     sync.Mutex
	handed map[string]*corev1.Pod // as handed in last, by namespace/name
}

var (
	_ node.PodLifecycleHandler = (*dispatcher)(nil)
	_ node.PodNotifier         = (*dispatcher)(nil)
)

func (d *dispatcher) CreatePod(_ context.Context, pod *corev1.Pod) error { return d.hand(pod) }
func (d *dispatcher) UpdatePod(_ context.Context, pod *corev1.Pod) error { return d.hand(pod) }

func (d *dispatcher) hand(pod *corev1.Pod) error {
	// The controller hands in a deep copy. Where the cache has the same object,
	// keep that instead, and the copy can be collected.
	if cached := d.p.caches.pod(pod.Namespace, pod.Name); cached != nil && cached.UID == pod.UID && cached.ResourceVersion == pod.ResourceVersion {
		pod = cached
	}
	d.mu.Lock()
	d.handed[pod.Namespace+"/"+pod.Name] = pod
	d.mu.Unlock()
	d.p.mark(pod.Spec.NodeName)
	return nil
}

func (d *dispatcher) DeletePod(_ context.Context, pod *corev1.Pod) error {
	d.p.mark(pod.Spec.NodeName)
	return nil
}

// GetPod returns what was handed in last, unless the API has another pod of
// that name by now, or none: then the old one is for the site's loop to remove,
// and the controller must not take it for the new one.
func (d *dispatcher) GetPod(_ context.Context, namespace, name string) (*corev1.Pod, error) {
	key := namespace + "/" + name
	cached := d.p.caches.pod(namespace, name)
	d.mu.Lock()
	defer d.mu.Unlock()
	pod := d.handed[key]
	if pod == nil || cached == nil || cached.UID != pod.UID {
		delete(d.handed, key)
		return nil, errdefs.NotFoundf("pod %s is not known", key)
	}
	return pod, nil
}

func (d *dispatcher) GetPodStatus(ctx context.Context, namespace, name string) (*corev1.PodStatus, error) {
	pod, err := d.GetPod(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return pod.Status.DeepCopy(), nil
}

// GetPods returns nothing, since the controller deletes what it returns and the
// cache lacks. What a site should lose is decided against its own inventory.
func (d *dispatcher) GetPods(context.Context) ([]*corev1.Pod, error) { return nil, nil }

// NotifyPods only keeps the controller from polling; statuses are written as
// sites report them.
func (d *dispatcher) NotifyPods(context.Context, func(*corev1.Pod)) {}

// guardedClient is the PodsGetter of the controller, without the power to do
// what a kubelet would not.
type guardedClient struct{ p *Provider }

func (c guardedClient) Pods(namespace string) coreclient.PodInterface {
	return guardedPods{c.p.client.CoreV1().Pods(namespace), c.p, namespace}
}

type guardedPods struct {
	coreclient.PodInterface
	p         *Provider
	namespace string
}

// Delete never deletes. The controller calls it to force a deletion, when no
// container seems to run or the grace period is over; only the site knows. A
// conflict is what the controller takes without another word.
func (g guardedPods) Delete(_ context.Context, name string, _ metav1.DeleteOptions) error {
	if pod := g.p.caches.pod(g.namespace, name); pod != nil {
		g.p.mark(pod.Spec.NodeName)
	}
	return apierrors.NewConflict(corev1.Resource("pods"), name, fmt.Errorf("a pod is deleted when its site has confirmed it"))
}

// UpdateStatus patches what a site may say of the pod with this UID, and leaves
// all else as it is.
func (g guardedPods) UpdateStatus(ctx context.Context, pod *corev1.Pod, _ metav1.UpdateOptions) (*corev1.Pod, error) {
	id := podID{pod.Namespace, pod.Name, pod.UID, pod.Spec.NodeName}
	return g.p.writeStatus(ctx, id, func(current *corev1.Pod) corev1.PodStatus { return mergeStatus(current, pod.Status) })
}

// silent drops the controller's events: one ProviderUpdateSuccess for each
// label that anyone edits. What happens to pods is told by their sites.
type silent struct{}

func (silent) Event(runtime.Object, string, string, string)                                      {}
func (silent) Eventf(runtime.Object, string, string, string, ...any)                             {}
func (silent) AnnotatedEventf(runtime.Object, map[string]string, string, string, string, ...any) {}

// The controller wants listers of what only its resolution of the downward API
// would read, which is off.
type (
	noConfigMaps struct {
		coreinformers.ConfigMapInformer
	}
	noSecrets  struct{ coreinformers.SecretInformer }
	noServices struct{ coreinformers.ServiceInformer }
)

func (noConfigMaps) Lister() corelisters.ConfigMapLister {
	return corelisters.NewConfigMapLister(empty())
}
func (noSecrets) Lister() corelisters.SecretLister   { return corelisters.NewSecretLister(empty()) }
func (noServices) Lister() corelisters.ServiceLister { return corelisters.NewServiceLister(empty()) }

func empty() cache.Indexer {
	return cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
}
