package provider

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// objects reads and watches Secrets and ConfigMaps one by one, by name, as the
// nodes of the sites that refer to them.
//
// A site sees an object only after the API server has let that site itself read
// it, once for each time that it begins to refer to it. After that one watch
// serves all sites that refer to the object, made as one of them: a thousand
// sites cost one watch of kube-root-ca.crt for each namespace, not a thousand.
type objects struct {
	client  kubernetes.Interface
	changed func(site string) // must not block
	log     *slog.Logger
	ctx     context.Context // of the watches, which outlive the calls that start them
	cancel  context.CancelFunc
	watches sync.WaitGroup

	mu      sync.Mutex
	entries map[edge.Key]*entry
}

// An entry is one object. Its fields are guarded by objects.mu; the object that
// state holds is never changed.
type entry struct {
	sites  map[string]bool // which refer to it; true once the API server has let the site read it
	state  objectState
	known  bool
	cancel context.CancelFunc // ends the watch; nil: there is none
}

// An objectState is an object as the API server has it: absent, or value.
type objectState struct {
	version string
	absent  bool
	value   runtime.Object
}

const absentVersion = "absent"

func newObjects(client kubernetes.Interface, changed func(string), log *slog.Logger) *objects {
	ctx, cancel := context.WithCancel(context.Background())
	return &objects{client: client, changed: changed, log: log, ctx: ctx, cancel: cancel, entries: map[edge.Key]*entry{}}
}

// close ends all watches and waits for them.
func (o *objects) close() {
	o.cancel()
	o.watches.Wait()
}

// need returns the state of an object for a site that refers to it, and keeps
// the site told of changes until it is released. The error is the API server's.
func (o *objects) need(ctx context.Context, site string, key edge.Key) (objectState, error) {
	o.mu.Lock()
	e := o.entries[key]
	if e == nil {
		e = &entry{sites: map[string]bool{}}
		o.entries[key] = e
	}
	if e.sites[site] && e.known {
		defer o.mu.Unlock()
		return e.state, nil
	}
	e.sites[site] = false
	o.mu.Unlock()

	state, err := o.get(as(ctx, site), key)
	if err != nil {
		return objectState{}, fmt.Errorf("read %s as site %s: %w", key, site, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.entries[key] != e { // released meanwhile
		return state, nil
	}
	e.sites[site] = true
	if !e.known || !state.absent && (e.state.absent || newer(state.version, e.state.version)) {
		o.set(e, state)
	}
	if e.cancel == nil && o.ctx.Err() == nil {
		watchCtx, cancel := context.WithCancel(o.ctx)
		e.cancel = cancel
		o.watches.Go(func() { o.watch(watchCtx, key, e) })
	}
	return e.state, nil
}

// release ends a site's references to all objects but those to keep.
func (o *objects) release(site string, keep map[edge.Key]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for key, e := range o.entries {
		if _, refers := e.sites[site]; !refers || keep[key] {
			continue
		}
		delete(e.sites, site)
		if len(e.sites) == 0 {
			if e.cancel != nil {
				e.cancel()
			}
			delete(o.entries, key)
		}
	}
}

// set makes state that of e and tells the sites if it differs. o.mu is held.
func (o *objects) set(e *entry, state objectState) {
	if e.known && e.state.version == state.version {
		return
	}
	e.state, e.known = state, true
	for site, may := range e.sites {
		if may {
			o.changed(site)
		}
	}
}

func (o *objects) get(ctx context.Context, key edge.Key) (objectState, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var obj runtime.Object
	var err error
	switch key.Kind {
	case edge.KindSecret:
		obj, err = o.client.CoreV1().Secrets(key.Namespace).Get(ctx, key.Name, metav1.GetOptions{})
	case edge.KindConfigMap:
		obj, err = o.client.CoreV1().ConfigMaps(key.Namespace).Get(ctx, key.Name, metav1.GetOptions{})
	default:
		return objectState{}, fmt.Errorf("%w: kind %s is not read by name", edge.ErrInvalid, key.Kind)
	}
	switch {
	case apierrors.IsNotFound(err):
		return objectState{version: absentVersion, absent: true}, nil
	case err != nil:
		return objectState{}, err
	}
	return present(obj), nil
}

// present is the state of an object that exists, without what no pod can see.
func present(obj runtime.Object) objectState {
	meta, ok := obj.(metav1.Object)
	if !ok {
		return objectState{version: absentVersion, absent: true}
	}
	meta.SetManagedFields(nil)
	annotations := meta.GetAnnotations()
	delete(annotations, corev1.LastAppliedConfigAnnotation)
	meta.SetAnnotations(annotations)
	return objectState{version: meta.GetResourceVersion(), value: obj}
}

// watch keeps e current until ctx is done.
func (o *objects) watch(ctx context.Context, key edge.Key, e *entry) {
	const base, limit = 100 * time.Millisecond, 30 * time.Second
	failures := 0
	for ctx.Err() == nil {
		site := o.reader(e)
		if site == "" {
			return
		}
		err := o.watchAs(as(ctx, site), key, e)
		if apierrors.IsForbidden(err) {
			o.refuse(e, site)
			continue
		}
		if err == nil {
			failures = 0
			continue
		}
		o.log.Debug("watch", "object", key.String(), "site", site, "err", err)
		if backoff.Sleep(ctx, backoff.Delay(failures, base, limit)) != nil {
			return
		}
		failures++
	}
}

// reader returns a site that may read e. If there is none it ends the watch and
// returns ""; a site that tries again and may starts a new one.
func (o *objects) reader(e *entry) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	for site, may := range e.sites {
		if may {
			return site
		}
	}
	if e.cancel != nil {
		e.cancel()
		e.cancel, e.known = nil, false
	}
	return ""
}

// refuse notes that the API server no longer lets a site read e.
func (o *objects) refuse(e *entry, site string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, refers := e.sites[site]; refers {
		e.sites[site] = false
		o.changed(site)
	}
}

// watchAs lists and watches the object until the watch ends.
func (o *objects) watchAs(ctx context.Context, key edge.Key, e *entry) error {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", key.Name).String()}
	state, version, err := o.list(ctx, key, options)
	if err != nil {
		return err
	}
	o.mu.Lock()
	o.set(e, state)
	o.mu.Unlock()

	seconds := int64(300 + rand.N(300)) // so that watches do not all end together
	options.ResourceVersion, options.TimeoutSeconds, options.AllowWatchBookmarks = version, &seconds, true
	for {
		version, err = o.follow(ctx, key, e, options)
		if err != nil || version == "" || ctx.Err() != nil {
			return err
		}
		options.ResourceVersion = version
	}
}

// follow watches from options.ResourceVersion on and returns from where to go
// on, "" for a new list.
func (o *objects) follow(ctx context.Context, key edge.Key, e *entry, options metav1.ListOptions) (version string, err error) {
	var w watch.Interface
	if key.Kind == edge.KindSecret {
		w, err = o.client.CoreV1().Secrets(key.Namespace).Watch(ctx, options)
	} else {
		w, err = o.client.CoreV1().ConfigMaps(key.Namespace).Watch(ctx, options)
	}
	if err != nil {
		return "", err
	}
	defer w.Stop()
	for {
		var event watch.Event
		var ok bool
		select {
		case <-ctx.Done():
			return "", nil
		case event, ok = <-w.ResultChan():
		}
		if !ok {
			return version, nil
		}
		if event.Type == watch.Error {
			return "", apierrors.FromObject(event.Object)
		}
		meta, ok := event.Object.(metav1.Object)
		if !ok {
			continue
		}
		version = meta.GetResourceVersion()
		if event.Type == watch.Bookmark || meta.GetName() != key.Name {
			continue
		}
		state := present(event.Object)
		if event.Type == watch.Deleted {
			state = objectState{version: absentVersion, absent: true}
		}
		o.mu.Lock()
		// A site's own read may have been ahead of the watch.
		if state.absent || e.state.absent || !newer(e.state.version, state.version) {
			o.set(e, state)
		}
		o.mu.Unlock()
	}
}

func (o *objects) list(ctx context.Context, key edge.Key, options metav1.ListOptions) (objectState, string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	state := objectState{version: absentVersion, absent: true}
	if key.Kind == edge.KindSecret {
		list, err := o.client.CoreV1().Secrets(key.Namespace).List(ctx, options)
		if err != nil {
			return state, "", err
		}
		for i := range list.Items {
			if list.Items[i].Name == key.Name {
				state = present(&list.Items[i])
			}
		}
		return state, list.ResourceVersion, nil
	}
	list, err := o.client.CoreV1().ConfigMaps(key.Namespace).List(ctx, options)
	if err != nil {
		return state, "", err
	}
	for i := range list.Items {
		if list.Items[i].Name == key.Name {
			state = present(&list.Items[i])
		}
	}
	return state, list.ResourceVersion, nil
}

// A token is one that has been issued but is not yet known to be at the site.
type token struct {
	version string
	edge.Token
}

// renewalOf returns when a token is to be renewed: at 80% of its life or after a
// day, whichever is first.
func renewalOf(issued, expires time.Time) time.Time {
	life := expires.Sub(issued)
	return issued.Add(min(life*8/10, 24*time.Hour))
}

// requestToken asks for a token bound to a pod, as the pod's node.
func requestToken(ctx context.Context, client kubernetes.Interface, pod *corev1.Pod, ref tokenRef) (token, error) {
	ctx, cancel := context.WithTimeout(as(ctx, pod.Spec.NodeName), callTimeout)
	defer cancel()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &ref.seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if ref.audience != "" {
		request.Spec.Audiences = []string{ref.audience}
	}
	issued := time.Now()
	answer, err := client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, ref.account, request, metav1.CreateOptions{})
	if err != nil {
		return token{}, fmt.Errorf("token of %s/%s for pod %s: %w", pod.Namespace, ref.account, pod.Name, err)
	}
	return token{
		version: edge.TokenVersion(issued, answer.Status.ExpirationTimestamp.Time),
		Token:   edge.Token{Token: answer.Status.Token, Expires: answer.Status.ExpirationTimestamp},
	}, nil
}
