package edgelet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

// engine is what the desired set tells of its changes; *pod.Manager implements it.
type engine interface {
	Set(pod *corev1.Pod) error
	Remove(uid types.UID)
	Changed(uid types.UID)
}

// objectStore keeps objects in the store. Put and delete are one transaction,
// durable when Write returns.
type objectStore interface {
	All() (map[string]edge.Object, error)
	Write(put map[string]edge.Object, remove []string) error
}

// A desiredSet is all objects that the site must hold. The store has a copy, from
// which a boot without network begins. It is the site's edge.Edge, and answers
// what the parts of the edgelet ask about objects. Safe for concurrent use.
type desiredSet struct {
	store    objectStore
	log      *slog.Logger
	complete func() // called once the provider has said that the set is complete

	apply sync.Mutex // held over a whole Apply, so that changes reach the engine in their order

	mu      sync.RWMutex // guards the following
	objects map[edge.Key]edge.Object
	engine  engine // nil until start
}

func newDesiredSet(store objectStore, log *slog.Logger) (*desiredSet, error) {
	d := &desiredSet{store: store, log: log, complete: func() {}, objects: map[edge.Key]edge.Object{}}
	stored, err := store.All()
	if err != nil {
		return nil, fmt.Errorf("desired set: %w", err)
	}
	for _, o := range stored {
		d.objects[o.Key] = o
	}
	return d, nil
}

// start hands the stored pods to e, and from then on every change.
func (d *desiredSet) start(e engine) {
	d.apply.Lock()
	defer d.apply.Unlock()
	d.mu.Lock()
	d.engine = e
	d.mu.Unlock()
	for _, o := range d.kind(edge.KindPod, "") {
		d.setPod(o)
	}
}

// Inventory implements edge.Edge.
func (d *desiredSet) Inventory(context.Context) ([]edge.Held, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	held := make([]edge.Held, 0, len(d.objects))
	for key, o := range d.objects {
		held = append(held, edge.Held{Key: key, Version: o.Version})
	}
	slices.SortFunc(held, func(a, b edge.Held) int { return cmp.Compare(a.String(), b.String()) })
	return held, nil
}

// Apply implements edge.Edge.
func (d *desiredSet) Apply(_ context.Context, changes edge.Changes) error {
	if err := check(changes); err != nil {
		return err
	}
	d.apply.Lock()
	defer d.apply.Unlock()
	put := make(map[string]edge.Object, len(changes.Upserts))
	for _, o := range changes.Upserts {
		put[o.Key.String()] = o
	}
	var remove []string
	for _, key := range changes.Removals {
		remove = append(remove, key.String())
	}
	if len(put)+len(remove) > 0 {
		if err := d.store.Write(put, remove); err != nil {
			return fmt.Errorf("apply: %w", err)
		}
	}
	d.mu.Lock()
	for _, o := range changes.Upserts {
		d.objects[o.Key] = o
	}
	for _, key := range changes.Removals {
		delete(d.objects, key)
	}
	d.mu.Unlock()
	d.tell(changes)
	if changes.Complete {
		d.complete()
	}
	return nil
}

// maxKey bounds a key in bytes; only the audience of a token can make one long.
const maxKey = 8 << 10

// check refuses what no provider sends, before anything is stored.
func check(changes edge.Changes) error {
	var errs []error
	refuse := func(err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%w: %w", edge.ErrInvalid, err))
		}
	}
	for _, o := range changes.Upserts {
		if err := checkKey(o.Key); err != nil {
			refuse(err)
		} else if o.Kind == edge.KindPod {
			refuse(checkPod(o))
		}
	}
	for _, key := range changes.Removals {
		refuse(checkKey(key))
	}
	return errors.Join(errs...)
}

// checkKey refuses keys that cannot be stored, or be told from others once they are.
func checkKey(key edge.Key) error {
	text := key.String()
	if len(text) > maxKey {
		return fmt.Errorf("object key %.64q… has %d bytes, at most %d are allowed", text, len(text), maxKey)
	}
	parsed, err := edge.ParseKey(text)
	if err == nil && parsed != key {
		err = fmt.Errorf("object key %q: only its name may contain slashes", text)
	}
	return err
}

func checkPod(o edge.Object) error {
	var pod corev1.Pod
	if err := o.Decode(&pod); err != nil {
		return err
	}
	if pod.UID != o.UID || pod.Name != o.Name || pod.Namespace != o.Namespace {
		return fmt.Errorf("%s: data is of pod %s/%s with UID %q", o.Key, pod.Namespace, pod.Name, pod.UID)
	}
	return nil
}

// tell passes changes on to the engine: objects first, so that a new pod finds
// what it refers to.
func (d *desiredSet) tell(changes edge.Changes) {
	d.mu.RLock()
	e := d.engine
	d.mu.RUnlock()
	if e == nil {
		return
	}
	touched := map[types.UID]bool{}
	for _, o := range changes.Upserts {
		if o.Kind == edge.KindPod {
			d.setPod(o)
			delete(touched, o.UID)
			continue
		}
		d.users(o.Key, touched)
	}
	for _, key := range changes.Removals {
		if key.Kind == edge.KindPod {
			e.Remove(key.UID)
			delete(touched, key.UID)
		}
	}
	for uid := range touched {
		e.Changed(uid)
	}
}

func (d *desiredSet) setPod(o edge.Object) {
	var pod corev1.Pod
	err := o.Decode(&pod)
	if err == nil {
		err = d.engine.Set(&pod)
	}
	if err != nil {
		d.log.Error("pod not taken over", "pod", o.Namespace+"/"+o.Name, "uid", o.UID, "err", err)
	}
}

// users adds to uids the pods that a change of key may concern.
func (d *desiredSet) users(key edge.Key, uids map[types.UID]bool) {
	if key.UID != "" {
		uids[key.UID] = true
		return
	}
	for _, o := range d.kind(edge.KindPod, key.Namespace) {
		uids[o.UID] = true
	}
}

// kind lists the objects of a kind, of all namespaces if namespace is empty.
func (d *desiredSet) kind(kind, namespace string) []edge.Object {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var list []edge.Object
	for key, o := range d.objects {
		if key.Kind == kind && (namespace == "" || key.Namespace == namespace) {
			list = append(list, o)
		}
	}
	return list
}

func (d *desiredSet) decode(key edge.Key, value any) error {
	d.mu.RLock()
	o, ok := d.objects[key]
	d.mu.RUnlock()
	if !ok {
		return fmt.Errorf("%s %s/%s: %w", key.Kind, key.Namespace, key.Name, edge.ErrUnknown)
	}
	return o.Decode(value)
}

// get decodes the object under key into a new T.
func get[T any](d *desiredSet, key edge.Key) (*T, error) {
	value := new(T)
	if err := d.decode(key, value); err != nil {
		return nil, err
	}
	return value, nil
}

// ConfigMap returns a ConfigMap that a pod of the site refers to.
func (d *desiredSet) ConfigMap(namespace, name string) (*corev1.ConfigMap, error) {
	return get[corev1.ConfigMap](d, edge.Key{Kind: edge.KindConfigMap, Namespace: namespace, Name: name})
}

// Secret returns a Secret that a pod of the site refers to.
func (d *desiredSet) Secret(namespace, name string) (*corev1.Secret, error) {
	return get[corev1.Secret](d, edge.Key{Kind: edge.KindSecret, Namespace: namespace, Name: name})
}

// Token returns a service-account token of pod. It may have expired while the
// site was alone: a pod is better off with an old token than with none.
func (d *desiredSet) Token(pod *corev1.Pod, audience string, expirationSeconds int64) (string, error) {
	token, err := get[edge.Token](d, edge.Key{
		Kind: edge.KindToken, Namespace: pod.Namespace, UID: pod.UID,
		Name: edge.TokenName(pod.Spec.ServiceAccountName, audience, expirationSeconds),
	})
	if err != nil {
		return "", err
	}
	return token.Token, nil
}

// Services lists the services of a namespace.
func (d *desiredSet) Services(namespace string) ([]edge.Service, error) {
	services, err := get[[]edge.Service](d, edge.Key{Kind: edge.KindServices, Namespace: namespace})
	if err != nil {
		return nil, err
	}
	return *services, nil
}

// Cluster returns what pods may see of the cluster; zero if it is not known.
func (d *desiredSet) Cluster() edge.Cluster {
	c, err := get[edge.Cluster](d, edge.Key{Kind: edge.KindCluster})
	if err != nil {
		return edge.Cluster{}
	}
	return *c
}

// RuntimeClass returns the handler of a runtime class.
func (d *desiredSet) RuntimeClass(name string) (edge.RuntimeClass, error) {
	class, err := get[edge.RuntimeClass](d, edge.Key{Kind: edge.KindRuntimeClass, Name: name})
	if err != nil {
		return edge.RuntimeClass{}, err
	}
	return *class, nil
}

// Node returns the site's Node: labels, annotations and taints.
func (d *desiredSet) Node() (*corev1.Node, error) {
	nodes := d.kind(edge.KindNode, "")
	if len(nodes) == 0 {
		return nil, fmt.Errorf("node: %w", edge.ErrUnknown)
	}
	node := new(corev1.Node)
	return node, nodes[0].Decode(node)
}
