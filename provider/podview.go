package provider

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
	coreinformers "k8s.io/client-go/informers/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// A podView shows virtual-kubelet's PodController the pods of the fleet, out of
// a cache that holds those of all nodes. It is a PodInformer of which only
// HasSynced, AddEventHandler and Lister work, since no more is called.
//
// The controller panics on an update of what it has not been told of, overlooks
// deletions that were missed, and takes a pod for its predecessor of the same
// name. So the view remembers what it has told: an unknown pod is added first, a
// deletion is always a *Pod, and another UID is a deletion and an addition.
type podView struct {
	informer cache.SharedIndexInformer
	inFleet  func(node string) bool

	mu       sync.Mutex
	known    map[string]*corev1.Pod // as told last, by namespace/name
	handlers []cache.ResourceEventHandler
}

func newPodView(informer cache.SharedIndexInformer, inFleet func(node string) bool) *podView {
	return &podView{informer: informer, inFleet: inFleet, known: map[string]*corev1.Pod{}}
}

// Informer returns the view as the controller needs it.
func (v *podView) Informer() cache.SharedIndexInformer { return viewInformer{v: v} }

// Lister lists the pods of all nodes; the controller asks only for what it was told of.
func (v *podView) Lister() corelisters.PodLister {
	return corelisters.NewPodLister(v.informer.GetIndexer())
}

var _ coreinformers.PodInformer = (*podView)(nil)

type viewInformer struct {
	cache.SharedIndexInformer // nil: all else is not to be called
	v                         *podView
}

func (i viewInformer) HasSynced() bool { return i.v.informer.HasSynced() }

func (i viewInformer) AddEventHandler(h cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	i.v.mu.Lock()
	defer i.v.mu.Unlock()
	i.v.handlers = append(i.v.handlers, h)
	for _, pod := range i.v.known {
		h.OnAdd(pod, true)
	}
	return told{}, nil
}

// told is the registration of a handler that has been told all already.
type told struct {
	cache.ResourceEventHandlerRegistration
}

func (told) HasSynced() bool { return true }

// adopt tells of pods that were there before their node was known.
func (v *podView) adopt(pods []*corev1.Pod) {
	for _, pod := range pods {
		v.add(pod)
	}
}

func (v *podView) add(pod *corev1.Pod) { v.update(nil, pod) }

// update tells of pod's present state; its previous one is what was told last.
func (v *podView) update(_, pod *corev1.Pod) {
	v.mu.Lock()
	defer v.mu.Unlock()
	key := pod.Namespace + "/" + pod.Name
	was, known := v.known[key]
	if known && was.UID != pod.UID {
		v.tellDeleted(key, was)
		known = false
	}
	if !known && !v.inFleet(pod.Spec.NodeName) {
		return
	}
	v.known[key] = pod
	for _, h := range v.handlers {
		if known {
			h.OnUpdate(was, pod)
		} else {
			h.OnAdd(pod, false)
		}
	}
}

func (v *podView) delete(pod *corev1.Pod) {
	v.mu.Lock()
	defer v.mu.Unlock()
	key := pod.Namespace + "/" + pod.Name
	if was, known := v.known[key]; known && was.UID == pod.UID {
		v.tellDeleted(key, pod)
	}
}

func (v *podView) tellDeleted(key string, pod *corev1.Pod) {
	delete(v.known, key)
	for _, h := range v.handlers {
		h.OnDelete(pod)
	}
}
