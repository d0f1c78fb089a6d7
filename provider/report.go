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
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

// Bounds of what one site may write.
const (
	siteWrites  = 16                     // statuses at once
	eventRate   = 20                     // events a second, in the long run
	eventBurst  = 300                    // events at once
	retryReport = 500 * time.Millisecond // after which what failed is to be reported again
	retryRefuse = 30 * time.Second       // the same for what the API server finds invalid
)

var (
	errGone    = errors.New("there is no such pod any more")
	errForeign = errors.New("the pod is not of this site")
)

// A podID names one pod, and the site that speaks for it.
type podID struct {
	namespace, name string
	uid             types.UID
	site            string
}

// written holds pods as the API server has answered writes of their status, for
// as long as the cache is behind.
type written struct {
	mu   sync.Mutex
	pods map[types.UID]*corev1.Pod
}

func (w *written) put(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pods == nil {
		w.pods = map[types.UID]*corev1.Pod{}
	}
	w.pods[pod.UID] = pod
}

// seen says that the cache has pod.
func (w *written) seen(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if mine, ok := w.pods[pod.UID]; ok && !newer(mine.ResourceVersion, pod.ResourceVersion) {
		delete(w.pods, pod.UID)
	}
}

func (w *written) forget(uid types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.pods, uid)
}

// latest returns pod, or what was written since.
func (w *written) latest(pod *corev1.Pod) *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	if mine, ok := w.pods[pod.UID]; ok && newer(mine.ResourceVersion, pod.ResourceVersion) {
		return mine
	}
	return pod
}

// live reads a pod from the API server. The error is errGone if there is none
// with this UID.
func (p *Provider) live(ctx context.Context, id podID) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pod, err := p.client.CoreV1().Pods(id.namespace).Get(ctx, id.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), err == nil && pod.UID != id.uid:
		return nil, errGone
	case err != nil:
		return nil, fmt.Errorf("get pod %s/%s: %w", id.namespace, id.name, err)
	}
	return pod, nil
}

// writeStatus makes the status of a pod what change says of the present one, and
// returns the pod as it then is. A cached pod is good enough to write against,
// since the patch holds for its version only, but not to find that nothing is to
// be written.
func (p *Provider) writeStatus(ctx context.Context, id podID, change func(*corev1.Pod) corev1.PodStatus) (*corev1.Pod, error) {
	var pod *corev1.Pod
	if cached := p.caches.pod(id.namespace, id.name); cached != nil && cached.UID == id.uid {
		pod = p.written.latest(cached)
	}
	for live, tries := false, 0; tries < 8; tries++ {
		var err error
		if pod == nil {
			if pod, err = p.live(ctx, id); err != nil {
				return nil, err
			}
			live = true
		}
		if pod.Spec.NodeName != id.site {
			return nil, errForeign
		}
		patch, err := statusPatch(pod, change(pod))
		if err != nil {
			return nil, err
		}
		if patch == nil {
			if live {
				return pod, nil
			}
			pod = nil
			continue
		}
		got, err := p.patchStatus(ctx, id, patch)
		switch {
		case err == nil:
			p.written.put(got)
			p.metrics.statuses.WithLabelValues("written").Inc()
			return got, nil
		case apierrors.IsNotFound(err):
			return nil, errGone
		case apierrors.IsConflict(err):
			pod = nil // changed by another, or another pod by now
		default:
			p.metrics.statuses.WithLabelValues("failed").Inc()
			return nil, fmt.Errorf("status of pod %s/%s: %w", id.namespace, id.name, err)
		}
	}
	return nil, fmt.Errorf("status of pod %s/%s: it changes too fast", id.namespace, id.name)
}

func (p *Provider) patchStatus(ctx context.Context, id podID, patch []byte) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(as(ctx, id.site), callTimeout)
	defer cancel()
	return p.client.CoreV1().Pods(id.namespace).Patch(ctx, id.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
}

// Report implements [edge.Cloud] for one site. One report is served at a time.
func (l *link) Report(ctx context.Context, report edge.Report) (edge.Ack, error) {
	select {
	case l.reporting <- struct{}{}:
		defer func() { <-l.reporting }()
	case <-ctx.Done():
		return edge.Ack{}, fmt.Errorf("report of %s: %w", l.name, context.Cause(ctx))
	}
	ack := edge.Ack{Pods: map[types.UID]uint64{}}
	var retry time.Duration
	if report.Node != nil {
		seq, err := l.reportNode(ctx, report.Node)
		ack.Node, retry = seq, max(retry, retryAfter(err))
	}
	retry = max(retry, l.reportPods(ctx, report.Pods, ack.Pods))
	seq, err := l.reportEvents(ctx, report.Events)
	ack.Events, retry = seq, max(retry, retryAfter(err))
	ack.RetryAfter = retry
	return ack, nil
}

// retryAfter is how long a site waits before it reports again what failed.
func retryAfter(err error) time.Duration {
	switch {
	case err == nil:
		return 0
	case refused(err):
		return retryRefuse
	}
	if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
		return time.Duration(seconds) * time.Second
	}
	return retryReport
}

// refused reports whether the API server will never take what it was given.
func refused(err error) bool {
	return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) || apierrors.IsRequestEntityTooLargeError(err)
}

// reportPods writes statuses, several at once, and puts into ack those that are
// written or can no longer matter.
func (l *link) reportPods(ctx context.Context, pods []edge.PodStatus, ack map[types.UID]uint64) (retry time.Duration) {
	var g errgroup.Group
	g.SetLimit(siteWrites)
	var mu sync.Mutex // guards seqs, ack and retry
	latest := map[types.UID]edge.PodStatus{}
	for _, s := range pods {
		if s.Seq >= latest[s.UID].Seq {
			latest[s.UID] = s
		}
	}
	for uid, s := range latest {
		if done := l.seqs[uid]; s.Seq <= done {
			ack[uid] = done // already written, or a newer one
			delete(latest, uid)
		}
	}
	for uid, s := range latest {
		g.Go(func() error {
			gone, err := l.reportPod(ctx, s)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				retry = max(retry, retryAfter(err))
				l.p.log.Debug("status not written", "site", l.name, "pod", s.Namespace+"/"+s.Name, "err", err)
				return nil
			}
			ack[uid] = s.Seq
			if l.seqs[uid] = s.Seq; gone {
				delete(l.seqs, uid)
			}
			return nil
		})
	}
	g.Wait()
	return retry
}

// reportPod writes one status, and deletes the pod if nothing of it is left at
// the site. gone says that the pod is not in the API any more, or not the site's.
func (l *link) reportPod(ctx context.Context, s edge.PodStatus) (gone bool, err error) {
	select {
	case l.p.writes <- struct{}{}:
		defer func() { <-l.p.writes }()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	id := podID{s.Namespace, s.Name, s.UID, l.name}
	pod, err := l.p.writeStatus(ctx, id, func(pod *corev1.Pod) corev1.PodStatus { return mergeStatus(pod, s.Status) })
	if err == nil && s.Gone && pod.DeletionTimestamp == nil {
		pod, err = l.p.live(ctx, id) // the site may know of the deletion before the cache does
	}
	switch {
	case errors.Is(err, errForeign):
		l.p.log.Warn("site reports a pod that is not its own", "site", l.name, "pod", s.Namespace+"/"+s.Name, "uid", s.UID)
		return true, nil
	case errors.Is(err, errGone):
		l.mark() // the site still holds it
		return true, nil
	case refused(err) && s.Gone:
		// The last word of a pod is that it is gone, whatever else it says.
		if current, liveErr := l.p.live(ctx, id); liveErr != nil || current.DeletionTimestamp == nil {
			return false, err
		} else if pod = current; pod.Spec.NodeName != l.name {
			return false, err
		}
		l.p.log.Warn("last status of a pod is refused", "site", l.name, "pod", s.Namespace+"/"+s.Name, "err", err)
	case err != nil:
		return false, err
	}
	if s.Gone && pod.DeletionTimestamp != nil {
		return true, l.p.finalize(ctx, pod)
	}
	return false, nil
}

// reportEvents writes events in the order of their Seq and returns the highest
// up to which all are written or can never be.
func (l *link) reportEvents(ctx context.Context, events []edge.Event) (uint64, error) {
	slices.SortStableFunc(events, func(a, b edge.Event) int { return cmp.Compare(a.Seq, b.Seq) })
	for _, e := range events {
		if e.Seq <= l.eventSeq {
			continue
		}
		if !l.mayTell(e) {
			l.p.metrics.eventsDropped.Inc()
			l.eventSeq = e.Seq
			continue
		}
		if !l.events.TryAccept() {
			return l.eventSeq, errors.New("too many events")
		}
		if err := l.writeEvent(ctx, e); err != nil {
			return l.eventSeq, err
		}
		l.eventSeq = e.Seq
	}
	return l.eventSeq, nil
}

// mayTell reports whether an event is about the site's own node or pods. The last
// events of a pod may come when it has left the API.
func (l *link) mayTell(e edge.Event) bool {
	switch e.Object.Kind {
	case "Node":
		return e.Object.Name == l.name
	case "Pod":
		if pod := l.p.caches.pod(e.Object.Namespace, e.Object.Name); pod != nil && pod.UID == e.Object.UID {
			return pod.Spec.NodeName == l.name
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		name, ok := l.pods[e.Object.UID]
		return ok && name.Namespace == e.Object.Namespace && name.Name == e.Object.Name
	}
	return false
}

// eventObject is an event as kubectl describe shows it. Its name is a digest of
// what it says and since when, so that reporting it twice makes one object and a
// higher count of the same updates it.
func eventObject(site string, e edge.Event) *corev1.Event {
	object := e.Object
	object.APIVersion, object.ResourceVersion = "v1", ""
	namespace := object.Namespace
	if object.Kind == "Node" {
		object.Namespace, namespace = "", metav1.NamespaceDefault
		object.UID = types.UID(site) // as kubelets do: kubectl describe node asks for it
	}
	kind := corev1.EventTypeNormal
	if e.Type == corev1.EventTypeWarning {
		kind = corev1.EventTypeWarning
	}
	reason, message := clean(e.Reason, 128), clean(e.Message, 1024)
	object.FieldPath = clean(object.FieldPath, 256)
	digest := sha256.Sum256(fmt.Append(nil, site, "\n", object.UID, "\n", object.FieldPath, "\n", kind, "\n", reason, "\n", e.FirstTime.Unix(), "\n", message))
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: object.Name[:min(len(object.Name), 200)] + "." + hex.EncodeToString(digest[:8])},
		InvolvedObject: object,
		Reason:         reason, Message: message, Type: kind,
		Source:         corev1.EventSource{Component: "edgelet", Host: site},
		FirstTimestamp: e.FirstTime, LastTimestamp: e.LastTime, Count: max(e.Count, 1),
		ReportingController: "skerry.io/edgelet", ReportingInstance: site,
	}
}

// writeEvent writes an event as the provider: to be a site's node would give no
// protection, since nodes may write any event; mayTell is what keeps sites apart.
func (l *link) writeEvent(ctx context.Context, e edge.Event) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	object := eventObject(l.name, e)
	events := l.p.client.CoreV1().Events(object.Namespace)
	_, err := events.Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) && object.Count > 1 {
		patch, encodeErr := json.Marshal(map[string]any{"count": object.Count, "lastTimestamp": object.LastTimestamp})
		if encodeErr != nil {
			return fmt.Errorf("event: %w", encodeErr)
		}
		_, err = events.Patch(ctx, object.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	switch {
	case err == nil, apierrors.IsAlreadyExists(err):
		return nil
	case refused(err), apierrors.IsForbidden(err), apierrors.IsNotFound(err):
		l.p.metrics.eventsDropped.Inc() // its namespace is on its way out, or it makes no sense
		return nil
	}
	return fmt.Errorf("event of %s: %w", l.name, err)
}
