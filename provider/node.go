package provider

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/backoff"
)

// EdgeConnected is the condition of a node that says whether its site has a
// session with a provider.
const EdgeConnected corev1.NodeConditionType = "EdgeConnected"

const (
	// kubernetesVersion is the release whose API the provider speaks.
	kubernetesVersion = "v1.37.2"

	annotationLabels = "skerry.io/site-labels" // which labels the site has asked for, comma separated
	annotationLifted = "skerry.io/autonomy"    // on pods whose tolerations were lifted: for how long

	maxLabels   = 32  // that a site may ask for
	maxImages   = 50  // of a node
	maxHandlers = 50  // runtime handlers of a node
	maxResource = 100 // kinds of resources of a node
)

// siteConditions are those of a node that its site says, and what they are while
// it says nothing.
var siteConditions = []corev1.NodeCondition{
	{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "EdgeletReady", Message: "the edgelet is connected"},
	{Type: corev1.NodeMemoryPressure, Status: corev1.ConditionFalse, Reason: "SufficientMemory", Message: "the site has reported no pressure"},
	{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse, Reason: "SufficientDisk", Message: "the site has reported no pressure"},
	{Type: corev1.NodePIDPressure, Status: corev1.ConditionFalse, Reason: "SufficientPIDs", Message: "the site has reported no pressure"},
}

// newNode is the Node of a site that has just joined.
func newNode(site string, taint bool) *corev1.Node {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: site, Labels: siteLabels(site, nil)},
		Spec:       corev1.NodeSpec{ProviderID: "skerry://" + site},
	}
	if taint {
		node.Spec.Taints = []corev1.Taint{{Key: "virtual-kubelet.io/provider", Value: "skerry", Effect: corev1.TaintEffectNoSchedule}}
	}
	return node
}

// siteLabels are the labels of a site's node that the provider sees to.
func siteLabels(site string, status *edge.NodeStatus) map[string]string {
	arch, os := "amd64", "linux"
	if status != nil {
		arch, os = cmp.Or(status.Info.Architecture, arch), cmp.Or(status.Info.OperatingSystem, os)
	}
	labels := map[string]string{
		LabelSite:                        site,
		"type":                           "virtual-kubelet",
		"node-role.kubernetes.io/edge":   "",
		corev1.LabelHostname:             site,
		corev1.LabelOSStable:             os,
		corev1.LabelArchStable:           arch,
		corev1.LabelNodeExcludeBalancers: "",
	}
	maps.DeleteFunc(labels, func(_, value string) bool { return len(validation.IsValidLabelValue(value)) > 0 })
	return labels
}

// askedLabels are those of a site's own labels that it may have: none that
// Kubernetes or Skerry give a meaning, but where it is.
func askedLabels(asked map[string]string) map[string]string {
	labels := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(asked)) {
		domain, _, _ := strings.Cut(key, "/")
		if !strings.Contains(key, "/") {
			domain = ""
		}
		reserved := key == "type" || ownDomain(domain, "kubernetes.io") || ownDomain(domain, "k8s.io") || ownDomain(domain, "skerry.io")
		if key == corev1.LabelTopologyZone || key == corev1.LabelTopologyRegion {
			reserved = false
		}
		if reserved || len(labels) >= maxLabels || len(validation.IsQualifiedName(key)) > 0 || len(validation.IsValidLabelValue(asked[key])) > 0 {
			continue
		}
		labels[key] = asked[key]
	}
	return labels
}

func ownDomain(domain, owner string) bool {
	return domain == owner || strings.HasSuffix(domain, "."+owner)
}

// ensureNode creates the Node of a site if there is none. A node that is not a
// site's is not touched.
func (p *Provider) ensureNode(ctx context.Context, site string) (*corev1.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	nodes := p.client.CoreV1().Nodes()
	node, err := nodes.Get(ctx, site, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		node, err = nodes.Create(ctx, newNode(site, p.cfg.Taint), metav1.CreateOptions{})
		if err == nil {
			p.log.Info("node created", "site", site)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", site, err)
	}
	if node.Labels[LabelSite] != site {
		return nil, fmt.Errorf("node %s: %w: there is a node of that name that is not a site; choose another name", site, edge.ErrInvalid)
	}
	return node, nil
}

// nodeMeta returns the merge patch that gives a node the labels it should have,
// nil if it has them. Labels that a site no longer asks for are taken away; those
// that others have set stay.
func nodeMeta(node *corev1.Node, status *edge.NodeStatus) ([]byte, error) {
	labels, annotations := map[string]any{}, map[string]any{}
	set := func(key, value string) {
		if was, ok := node.Labels[key]; !ok || was != value {
			labels[key] = value
		}
	}
	for key, value := range siteLabels(node.Name, status) {
		if status == nil && (key == corev1.LabelArchStable || key == corev1.LabelOSStable) && node.Labels[key] != "" {
			continue // known from an earlier report
		}
		set(key, value)
	}
	if status != nil {
		asked := askedLabels(status.Labels)
		for key, value := range asked {
			set(key, value)
		}
		before := node.Annotations[annotationLabels]
		for key := range strings.SplitSeq(before, ",") {
			if _, still := asked[key]; key != "" && !still {
				labels[key] = nil
			}
		}
		if now := strings.Join(slices.Sorted(maps.Keys(asked)), ","); now != before {
			annotations[annotationLabels] = now
		}
	}
	meta := map[string]any{}
	if len(labels) > 0 {
		meta["labels"] = labels
	}
	if len(annotations) > 0 {
		meta["annotations"] = annotations
	}
	patch := map[string]any{}
	if len(meta) > 0 {
		patch["metadata"] = meta
	}
	if node.Spec.ProviderID == "" {
		patch["spec"] = map[string]any{"providerID": "skerry://" + node.Name}
	}
	if len(patch) == 0 {
		return nil, nil
	}
	return json.Marshal(patch)
}

// A view of the cloud's side of a node.
type endpoint struct {
	address, version string
	port             int32
	since            time.Time // of the session
}

// nodeStatus returns the status that the node of a connected site should have.
// It is pure. Without a report what an earlier one said stays.
func nodeStatus(node *corev1.Node, status *edge.NodeStatus, at endpoint, now time.Time) corev1.NodeStatus {
	next := *node.Status.DeepCopy()
	next.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: at.address}}
	next.DaemonEndpoints.KubeletEndpoint.Port = at.port
	said := []corev1.NodeCondition(nil)
	if status != nil {
		status = cleanNode(status)
		next.Capacity, next.Allocatable = status.Capacity, status.Allocatable
		next.NodeInfo, next.Images, next.RuntimeHandlers = status.Info, status.Images, status.RuntimeHandlers
		said = status.Conditions
	}
	next.NodeInfo.KubeletVersion = kubernetesVersion + "-skerry-" + at.version
	if len(next.Capacity) > 0 { // before the first report nothing can run there
		for _, c := range siteConditions {
			if s := nodeCondition(said, c.Type); s != nil && knownStatus(s.Status) {
				c = *s
			} else if was := nodeCondition(node.Status.Conditions, c.Type); was != nil && was.Status != corev1.ConditionUnknown && status == nil {
				c = *was
			}
			next.Conditions = setCondition(next.Conditions, c, now)
		}
	}
	next.Conditions = setCondition(next.Conditions, corev1.NodeCondition{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "SiteNetwork", Message: "the site has a network of its own",
	}, now)
	connected := corev1.NodeCondition{Type: EdgeConnected, Status: corev1.ConditionTrue, Reason: "SessionEstablished",
		Message: "connected since " + at.since.UTC().Format(time.RFC3339)}
	next.Conditions = setCondition(next.Conditions, connected, now)
	return next
}

// cleanNode returns what a site says of its machine, within bounds.
func cleanNode(status *edge.NodeStatus) *edge.NodeStatus {
	data, err := json.Marshal(status)
	var c edge.NodeStatus
	if err != nil || json.Unmarshal(data, &c) != nil { // cannot be: it has come as JSON
		c = edge.NodeStatus{}
	}
	cleanText(reflect.ValueOf(&c).Elem())
	c.Images = c.Images[:min(len(c.Images), maxImages)]
	c.RuntimeHandlers = c.RuntimeHandlers[:min(len(c.RuntimeHandlers), maxHandlers)]
	for _, list := range []corev1.ResourceList{c.Capacity, c.Allocatable} {
		maps.DeleteFunc(list, func(name corev1.ResourceName, _ resource.Quantity) bool {
			return len(validation.IsQualifiedName(string(name))) > 0
		})
		for len(list) > maxResource {
			for name := range list {
				delete(list, name)
				break
			}
		}
	}
	return &c
}

func nodeCondition(conditions []corev1.NodeCondition, t corev1.NodeConditionType) *corev1.NodeCondition {
	for i := range conditions {
		if conditions[i].Type == t {
			return &conditions[i]
		}
	}
	return nil
}

// setCondition returns conditions with c, at the time now if its status is new.
// The heartbeat is left as it was; see [beat].
func setCondition(conditions []corev1.NodeCondition, c corev1.NodeCondition, now time.Time) []corev1.NodeCondition {
	c.LastTransitionTime = metav1.NewTime(now).Rfc3339Copy()
	c.LastHeartbeatTime = c.LastTransitionTime
	if was := nodeCondition(conditions, c.Type); was != nil {
		if was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
		c.LastHeartbeatTime = was.LastHeartbeatTime
		*was = c
		return conditions
	}
	return append(conditions, c)
}

// beat sets the heartbeat of all conditions that a kubelet would write.
func beat(conditions []corev1.NodeCondition, now time.Time) {
	ours := func(t corev1.NodeConditionType) bool {
		return t == EdgeConnected || t == corev1.NodeNetworkUnavailable || nodeCondition(siteConditions, t) != nil
	}
	for i := range conditions {
		if ours(conditions[i].Type) {
			conditions[i].LastHeartbeatTime = metav1.NewTime(now).Rfc3339Copy()
		}
	}
}

// reportNode takes what a site says of its machine and returns its Seq once it
// is written.
func (l *link) reportNode(ctx context.Context, status *edge.NodeStatus) (uint64, error) {
	if status.Seq < l.nodeSeq {
		return l.nodeSeq, nil
	}
	l.nodeMu.Lock()
	l.reported = status
	l.nodeMu.Unlock()
	if err := l.syncNode(ctx); err != nil {
		return 0, err
	}
	l.nodeSeq = status.Seq
	return status.Seq, nil
}

// syncNode brings the Node of a connected site up to date. It writes nothing if
// all is as it should be and the heartbeat is young.
func (l *link) syncNode(ctx context.Context) error {
	l.nodeMu.Lock()
	defer l.nodeMu.Unlock()
	port, err := l.p.cfg.Ports.Port(l.name)
	if err != nil {
		return fmt.Errorf("port of %s: %w", l.name, err)
	}
	at := endpoint{l.p.cfg.Address, l.p.cfg.Version, port, l.since}
	node := l.p.caches.node(l.name)
	if node != nil && l.node != nil && l.node.UID == node.UID && newer(l.node.ResourceVersion, node.ResourceVersion) {
		node = l.node
	}
	if node == nil {
		if l.p.cfg.Revoke != nil && l.epoch != 0 {
			return nil // Acquire has made it: so it has been deleted, or is not in the cache yet
		}
		if node, err = l.p.ensureNode(ctx, l.name); err != nil {
			return err
		}
	}
	patch, err := nodeMeta(node, l.reported)
	if err != nil {
		return fmt.Errorf("node %s: %w", l.name, err)
	}
	if patch != nil {
		if node, err = l.p.patchNode(ctx, l.name, types.MergePatchType, patch); err != nil {
			return err
		}
		l.node = node
	}
	written, err := l.p.writeNodeStatus(ctx, node, func(node *corev1.Node, now time.Time) corev1.NodeStatus {
		return nodeStatus(node, l.reported, at, now)
	})
	if written != nil {
		l.node = written
	}
	return err
}

// writeNodeStatus makes a node's status what change says, as the node. It
// returns nil if nothing had to be written.
func (p *Provider) writeNodeStatus(ctx context.Context, node *corev1.Node, change func(*corev1.Node, time.Time) corev1.NodeStatus) (*corev1.Node, error) {
	now := time.Now()
	next := change(node, now)
	var last time.Time
	if c := nodeCondition(node.Status.Conditions, EdgeConnected); c != nil {
		last = c.LastHeartbeatTime.Time
	}
	if equality.Semantic.DeepEqual(next, node.Status) && now.Sub(last) < resync-10*time.Second {
		return nil, nil
	}
	beat(next.Conditions, now)
	was, err := json.Marshal(corev1.Node{Status: node.Status})
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", node.Name, err)
	}
	is, err := json.Marshal(corev1.Node{Status: next})
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", node.Name, err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(was, is, corev1.Node{})
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", node.Name, err)
	}
	// For this node only, should another of its name have been made. The version
	// is left open: the controller manager writes conditions of other types.
	if patch, err = precondition(patch, node.UID, ""); err != nil {
		return nil, fmt.Errorf("node %s: %w", node.Name, err)
	}
	return p.patchNode(as(ctx, node.Name), node.Name, types.StrategicMergePatchType, patch, "status")
}

func (p *Provider) patchNode(ctx context.Context, name string, kind types.PatchType, patch []byte, sub ...string) (*corev1.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	node, err := p.client.CoreV1().Nodes().Patch(ctx, name, kind, patch, metav1.PatchOptions{}, sub...)
	if err != nil {
		return nil, fmt.Errorf("patch node %s: %w", name, err)
	}
	return node, nil
}

// disconnect says on the node of a site that it has no session. The conditions
// of which nobody can know now are the controller manager's to set.
func (p *Provider) disconnect(ctx context.Context, site, message string) error {
	node := p.caches.node(site)
	if node == nil {
		return nil
	}
	_, err := p.writeNodeStatus(ctx, node, func(node *corev1.Node, now time.Time) corev1.NodeStatus {
		next := *node.Status.DeepCopy()
		next.Conditions = setCondition(next.Conditions, corev1.NodeCondition{
			Type: EdgeConnected, Status: corev1.ConditionFalse, Reason: "SessionEnded", Message: message,
		}, now)
		return next
	})
	return err
}

// noticeDeleted hands a node that has left the cache to watchDeleted.
func (p *Provider) noticeDeleted(node *corev1.Node) {
	select {
	case p.deleted <- node.Name:
	default:
		p.log.Warn("too many nodes deleted at once; their sites are cut off when they connect again", "site", node.Name)
		if l := p.link(node.Name); l != nil {
			l.session.Close() // Acquire finds out
		}
	}
}

// watchDeleted cuts off the sites whose nodes are deleted, until ctx is done.
func (p *Provider) watchDeleted(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case site := <-p.deleted:
			for n := range backoff.Retry(ctx, firstDelay, lastDelay) {
				err := p.nodeDeleted(ctx, site)
				if err == nil || n == 8 {
					break
				}
				p.log.Warn("deleted node", "site", site, "err", err)
			}
		}
	}
}

// nodeDeleted revokes a site whose Node is really gone, and makes the Node again
// where there is no way to revoke. A node that has only lost its label gets it back.
func (p *Provider) nodeDeleted(ctx context.Context, site string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := p.client.CoreV1().Nodes().Get(ctx, site, metav1.GetOptions{})
	switch {
	case err == nil:
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, LabelSite, site)
		_, err = p.patchNode(ctx, site, types.MergePatchType, patch)
		return err
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("node %s: %w", site, err)
	case p.cfg.Revoke == nil:
		p.mark(site) // the loop makes it again
		return nil
	}
	return p.revoke(ctx, site)
}

// revoke ends what a site has, because its Node was deleted.
func (p *Provider) revoke(ctx context.Context, site string) error {
	p.log.Warn("node deleted: the site is cut off and must join again", "site", site)
	p.cfg.Revoke(site)
	if l := p.link(site); l != nil {
		l.session.Close()
	}
	return p.disown(ctx, site)
}

// noticeLost lets the wheel look after a node that says it is connected though
// its lease has lapsed: the replica that had its session is gone.
func (p *Provider) noticeLost(node *corev1.Node) {
	ready, connected := nodeCondition(node.Status.Conditions, corev1.NodeReady), nodeCondition(node.Status.Conditions, EdgeConnected)
	if ready != nil && ready.Status == corev1.ConditionUnknown && connected != nil && connected.Status == corev1.ConditionTrue && p.link(node.Name) == nil {
		p.wheel.leave(node.Name)
	}
}

// departed is called some seconds after a site's session has ended.
func (p *Provider) departed(ctx context.Context, site string) error {
	if p.link(site) != nil {
		return nil
	}
	node := p.caches.node(site)
	lease := p.caches.lease(p.cfg.Namespace, leaseName(site))
	if node == nil {
		return nil
	}
	ready := nodeCondition(node.Status.Conditions, corev1.NodeReady)
	mine := lease == nil || lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == p.cfg.Replica
	if !mine && (ready == nil || ready.Status != corev1.ConditionUnknown) {
		return nil // another replica has it, and says so
	}
	p.mu.Lock()
	left, known := p.left[site]
	p.mu.Unlock()
	message := "the replica that had the session is gone"
	if known {
		message = "disconnected since " + left.UTC().Format(time.RFC3339)
	}
	return p.disconnect(ctx, site, message)
}

// autonomyOf returns for how long pods of a node outlive a lost connection, nil
// for ever. What cannot be read counts as for ever: it is the safe side.
func autonomyOf(node *corev1.Node) *int64 {
	if node == nil {
		return nil
	}
	d, err := time.ParseDuration(node.Annotations[AnnotationAutonomy])
	if err != nil || d <= 0 {
		return nil
	}
	return new(int64(max(d/time.Second, 1)))
}

// liftTolerations returns the tolerations that a pod of a site should have, and
// ok if it has others. Only the two tolerations that the API server adds by
// default are lifted, five minutes for a node that is not ready or unreachable;
// those that a person has given other times stay. mark remembers what was done,
// for when autonomy changes. It is pure.
func liftTolerations(pod *corev1.Pod, autonomy *int64) (tolerations []corev1.Toleration, mark string, ok bool) {
	const byDefault = 300
	mark = "forever"
	if autonomy != nil {
		mark = fmt.Sprintf("%ds", *autonomy)
	}
	before, lifted := pod.Annotations[annotationLifted]
	if lifted && before == mark {
		return nil, mark, false
	}
	was := new(int64(byDefault))
	if lifted {
		was = nil
		var seconds int64
		if _, err := fmt.Sscanf(before, "%ds", &seconds); err == nil {
			was = &seconds
		}
	}
	tolerations = slices.Clone(pod.Spec.Tolerations)
	for i, t := range tolerations {
		if t.Key != corev1.TaintNodeNotReady && t.Key != corev1.TaintNodeUnreachable ||
			t.Effect != corev1.TaintEffectNoExecute || t.Operator != corev1.TolerationOpExists || !equality.Semantic.DeepEqual(t.TolerationSeconds, was) {
			continue
		}
		tolerations[i].TolerationSeconds = autonomy
		ok = true
	}
	return tolerations, mark, ok
}

// setTolerations writes what liftTolerations returned, as the provider: a node
// may not change its pods.
func (p *Provider) setTolerations(ctx context.Context, pod *corev1.Pod, tolerations []corev1.Toleration, mark string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion, "annotations": map[string]string{annotationLifted: mark}},
		"spec":     map[string]any{"tolerations": tolerations},
	})
	if err != nil {
		return fmt.Errorf("tolerations: %w", err)
	}
	_, err = p.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		p.mark(pod.Spec.NodeName) // against what the cache has next
		return nil
	}
	if err != nil {
		return fmt.Errorf("tolerations of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

var errRevoked = errors.New("its node was deleted: the site must join again")
