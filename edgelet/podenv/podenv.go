// Package podenv resolves what a container sees of its pod, its node and its
// cluster: environment variables, command line, hostname, DNS and hosts file,
// and the fields and resources of the downward API.
//
// It answers from what the site holds and from a few files of the host, never
// from the network, so that a pod can be started with the cloud gone. What a
// container gets is what a kubelet would give it, except that the order of
// environment variables and DNS options is always the same, and that sizes are
// bounded (see [MaxValue] and [MaxTotal]).
//
// # Errors
//
// The text of an error is what a person finds in the pod's events, so that it
// reads as a kubelet's does: `configmap "x" not found`. A reference to an object
// that does not exist wraps [edge.ErrAbsent], one to an object that the site has
// not received yet wraps [edge.ErrUnknown]. Only the first is forgiven where the
// reference is optional; the second may still turn out to exist.
package podenv

import (
	"io"
	"log/slog"

	corev1 "k8s.io/api/core/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// Objects reads what environments refer to. Errors wrap [edge.ErrAbsent] or
// [edge.ErrUnknown]. What it returns is not changed.
type Objects interface {
	ConfigMap(namespace, name string) (*corev1.ConfigMap, error)
	Secret(namespace, name string) (*corev1.Secret, error)
	// Services lists the services of a namespace and, in any namespace, the API
	// server's, which is named kubernetes.
	Services(namespace string) ([]edge.Service, error)
	Cluster() edge.Cluster
}

// Config configures a Resolver. Only Objects is required.
type Config struct {
	Objects Objects

	// NodeName stands in for spec.nodeName where a pod has none.
	NodeName string

	// HostIPs returns the addresses of the site, the primary one first. The
	// family of the first decides which of a pod's addresses is status.podIP.
	HostIPs func() []string

	// Allocatable returns what the node has for pods, the value of limits that
	// are not set. Nil or empty: such limits read as 0.
	Allocatable func() corev1.ResourceList

	// ReadVolumeFile opens a file of a volume of pod for fileKeyRef, never
	// outside the volume. An error that is fs.ErrNotExist says that there is no
	// such file. Nil: fileKeyRef is an error.
	ReadVolumeFile func(pod *corev1.Pod, volume, path string) (io.ReadCloser, error)

	// ResolvConf is the resolver configuration that pods start from. Default
	// /etc/resolv.conf, or what systemd-resolved keeps in /run/systemd/resolve
	// if /etc/resolv.conf names only its stub on loopback, which no pod reaches.
	ResolvConf string

	// HostsFile is what pods in the host's network see. Default /etc/hosts.
	HostsFile string

	Log *slog.Logger // default slog.Default()
}

// A Resolver resolves environments. Its methods may be called at any time and
// from any goroutine.
type Resolver struct {
	config Config
	resolv []string // files to try in this order, the last in any case
}

// New returns a Resolver.
func New(config Config) *Resolver {
	if config.HostIPs == nil {
		config.HostIPs = func() []string { return nil }
	}
	if config.Allocatable == nil {
		config.Allocatable = func() corev1.ResourceList { return nil }
	}
	if config.HostsFile == "" {
		config.HostsFile = "/etc/hosts"
	}
	if config.Log == nil {
		config.Log = slog.Default()
	}
	r := &Resolver{config: config, resolv: []string{config.ResolvConf}}
	if config.ResolvConf == "" {
		r.resolv = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}
	}
	return r
}

// domain is the DNS domain of the cluster.
func (r *Resolver) domain() string {
	if d := r.config.Objects.Cluster().Domain; d != "" {
		return d
	}
	return "cluster.local"
}
