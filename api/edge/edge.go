package edge

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Edge is what a provider can ask of one edgelet, besides the kubelet API, which
// the same session serves under its usual paths.
type Edge interface {
	// Inventory lists what the site holds, in key order.
	Inventory(ctx context.Context) ([]Held, error)

	// Apply changes the desired set. When it returns nil the change is durable at
	// the site; it does not wait until pods have started or stopped.
	Apply(ctx context.Context, changes Changes) error
}

// Cloud is what an edgelet can ask of the provider.
type Cloud interface {
	// Report hands over observed state. What the answer does not acknowledge has
	// not been written and must be reported again, not before RetryAfter.
	Report(ctx context.Context, report Report) (Ack, error)
}

// A Report is observed state, the latest of each. Any part may be missing.
type Report struct {
	Pods   []PodStatus `json:"pods,omitempty"`
	Node   *NodeStatus `json:"node,omitempty"`
	Events []Event     `json:"events,omitempty"`
}

// A PodStatus is the latest observed status of one pod.
type PodStatus struct {
	UID       types.UID `json:"uid"`
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`

	// Seq grows with every change of this pod's status, across restarts of the
	// edgelet. Of two statuses the one with the higher Seq counts.
	Seq uint64 `json:"seq"`

	// Status is complete but for the conditions that others own, and for the
	// conditions Ready's readiness gates, which the provider computes.
	Status corev1.PodStatus `json:"status"`

	// Gone says that every container has ended, the sandbox is removed and the
	// volumes are unmounted, after the pod was asked to terminate: the pod may
	// leave the API.
	Gone bool `json:"gone,omitempty"`
}

// A NodeStatus is what a site says of its machine.
type NodeStatus struct {
	Seq             uint64                      `json:"seq"`
	Capacity        corev1.ResourceList         `json:"capacity"`
	Allocatable     corev1.ResourceList         `json:"allocatable"`
	Info            corev1.NodeSystemInfo       `json:"info"`                // KubeletVersion is left to the provider
	Addresses       []string                    `json:"addresses,omitempty"` // the site's own addresses, the primary of each family first
	Conditions      []corev1.NodeCondition      `json:"conditions,omitempty"`
	Images          []corev1.ContainerImage     `json:"images,omitempty"` // the 50 largest at most
	Labels          map[string]string           `json:"labels,omitempty"` // asked for at the site; kubernetes.io labels other than topology's are ignored
	RuntimeHandlers []corev1.NodeRuntimeHandler `json:"runtimeHandlers,omitempty"`
}

// An Event is a Kubernetes event about a pod or the node of a site. Two reports of
// the same object, type, reason, message and FirstTime are of one event; the one
// with the higher Count is the later.
type Event struct {
	Seq uint64 `json:"seq"`

	Object    corev1.ObjectReference `json:"object"` // kind Pod or Node
	Type      string                 `json:"type"`   // corev1.EventTypeNormal or EventTypeWarning
	Reason    string                 `json:"reason"`
	Message   string                 `json:"message"`
	FirstTime metav1.Time            `json:"firstTime"`
	LastTime  metav1.Time            `json:"lastTime"`
	Count     int32                  `json:"count"` // how often between FirstTime and LastTime; at least 1
}

// An Ack names what a report has achieved.
type Ack struct {
	Pods       map[types.UID]uint64 `json:"pods,omitempty"`       // Seq that is in the API server, or that can no longer matter
	Node       uint64               `json:"node,omitempty"`       // Seq of the node's status
	Events     uint64               `json:"events,omitempty"`     // all events up to this Seq
	RetryAfter time.Duration        `json:"retryAfter,omitempty"` // nanoseconds; zero: at once if something changed
}

// Errors that callers test for. The handlers and clients of this package carry
// them across a session.
var (
	ErrAbsent  = errors.New("the API server has no such object")    // known not to exist
	ErrUnknown = errors.New("the object has not been received yet") // not known whether it exists
	ErrInvalid = errors.New("invalid request")                      // repeating it cannot help
)

// A ReferenceError says in a kubelet's words that an object which a pod refers to
// could not be read.
type ReferenceError struct {
	Kind, Name string // as configmap
	Err        error
}

func (e *ReferenceError) Error() string {
	switch {
	case errors.Is(e.Err, ErrAbsent):
		return fmt.Sprintf("%s %q not found", e.Kind, e.Name)
	case errors.Is(e.Err, ErrUnknown):
		return fmt.Sprintf("%s %q has not been received yet", e.Kind, e.Name)
	}
	return fmt.Sprintf("%s %q: %v", e.Kind, e.Name, e.Err)
}

func (e *ReferenceError) Unwrap() error { return e.Err }
