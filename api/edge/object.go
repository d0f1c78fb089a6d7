package edge

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Kinds of objects that a site can hold.
const (
	KindPod          = "Pod"
	KindConfigMap    = "ConfigMap"
	KindSecret       = "Secret"
	KindToken        = "Token"
	KindServices     = "Services"
	KindCluster      = "Cluster"
	KindNode         = "Node"
	KindRuntimeClass = "RuntimeClass"
)

// A Key names an object of the desired set. UID is set where the identity of the
// object is more than its name: on pods, and on tokens, which are bound to one.
type Key struct {
	Kind      string    `json:"kind"`
	Namespace string    `json:"namespace,omitempty"`
	Name      string    `json:"name,omitempty"`
	UID       types.UID `json:"uid,omitempty"`
}

// String is the key as one path, kind/namespace/name/uid. [ParseKey] inverts it.
func (k Key) String() string {
	return k.Kind + "/" + k.Namespace + "/" + k.Name + "/" + string(k.UID)
}

// ParseKey reads what [Key.String] wrote. Only the name may contain slashes.
func ParseKey(s string) (Key, error) {
	kind, rest, ok := strings.Cut(s, "/")
	namespace, rest, ok2 := strings.Cut(rest, "/")
	i := strings.LastIndexByte(rest, '/')
	if !ok || !ok2 || i < 0 || kind == "" {
		return Key{}, fmt.Errorf("object key %q: want kind/namespace/name/uid", s)
	}
	return Key{kind, namespace, rest[:i], types.UID(rest[i+1:])}, nil
}

// An Object is one member of the desired set. Version is the resourceVersion for
// what has one; any change of Data changes it. Absent says that the API server
// has no such object, which an optional reference needs to know; Data is then empty.
type Object struct {
	Key
	Version string          `json:"version"`
	Absent  bool            `json:"absent,omitempty"`
	Data    json.RawMessage `json:"data,omitempty"`
}

// NewObject encodes value as the data of an object.
func NewObject(key Key, version string, value any) (Object, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return Object{}, fmt.Errorf("encode %s: %w", key, err)
	}
	return Object{Key: key, Version: version, Data: data}, nil
}

// Decode reads the object's data into value. An absent object is [ErrAbsent].
func (o Object) Decode(value any) error {
	if o.Absent {
		return fmt.Errorf("%s: %w", o.Key, ErrAbsent)
	}
	if err := json.Unmarshal(o.Data, value); err != nil {
		return fmt.Errorf("decode %s: %w", o.Key, err)
	}
	return nil
}

// A Held is a key and the version at which a site holds it.
type Held struct {
	Key
	Version string `json:"version"`
}

// Changes is one step of the desired set. Upserts are applied before removals.
type Changes struct {
	Upserts  []Object `json:"upserts,omitempty"`
	Removals []Key    `json:"removals,omitempty"`

	// Complete says that with this step the site holds all that it should, as
	// of the provider's synced caches. It ends the first difference of every
	// session. Only after it may a site that has lost its store end pods which
	// it finds running and does not know.
	Complete bool `json:"complete,omitempty"`
}

// Empty reports whether there is nothing to do.
func (c Changes) Empty() bool {
	return len(c.Upserts) == 0 && len(c.Removals) == 0 && !c.Complete
}

// A Token is a service-account token bound to one pod.
type Token struct {
	Token   string      `json:"token"`
	Expires metav1.Time `json:"expires"`
}

// TokenName is the name, within a pod, of the token for a service account,
// audience and requested life; the object's UID is the pod's. Audience is last,
// because it alone may contain anything.
func TokenName(serviceAccount, audience string, expirationSeconds int64) string {
	return fmt.Sprintf("%s/%d/%s", serviceAccount, expirationSeconds, audience)
}

// TokenVersion encodes when a token was issued and when it expires, so that a
// provider can tell from an inventory alone whether renewal is due.
func TokenVersion(issued, expires time.Time) string {
	return fmt.Sprintf("%d-%d", issued.Unix(), expires.Unix())
}

// ParseTokenVersion inverts [TokenVersion].
func ParseTokenVersion(version string) (issued, expires time.Time, err error) {
	var i, e int64
	if _, err := fmt.Sscanf(version, "%d-%d", &i, &e); err != nil {
		return time.Time{}, time.Time{}, fmt.Errorf("token version %q: %w", version, err)
	}
	return time.Unix(i, 0), time.Unix(e, 0), nil
}

// A Service is as much of a corev1.Service as the environment of a pod shows.
type Service struct {
	Name      string        `json:"name"`
	ClusterIP string        `json:"clusterIP"`
	Ports     []ServicePort `json:"ports"`
}

// A ServicePort is one port of a [Service].
type ServicePort struct {
	Name     string          `json:"name,omitempty"`
	Protocol corev1.Protocol `json:"protocol"`
	Port     int32           `json:"port"`
}

// Cluster is what a pod may see of the cluster that it is part of.
type Cluster struct {
	DNS    []string `json:"dns,omitempty"`    // addresses of the cluster's DNS servers; empty: there is none that the site can reach
	Domain string   `json:"domain,omitempty"` // default cluster.local
}

// A RuntimeClass is as much of a node.k8s.io RuntimeClass as a site needs.
type RuntimeClass struct {
	Handler string `json:"handler"`
}
