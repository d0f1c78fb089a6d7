// Package stats tells what a machine is and what it uses: the facts and conditions
// of its Node, the summary that /stats/summary serves, and the text of
// /metrics/resource, which metrics-server reads.
//
// Everything comes from files below /proc, /sys and /etc, from statfs and from the
// runtime's own accounting; it does not matter whether cgroups are v1 or v2. What
// is asked for is computed then and kept for a second, so an unobserved machine
// spends nothing on it. Only the conditions are looked at every ten seconds.
package stats

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// Runtime is the part of CRI that knows about use.
type Runtime interface {
	Version(ctx context.Context) (*cri.VersionResponse, error)
	Status(ctx context.Context) (*cri.StatusResponse, error)
	ListPodSandbox(ctx context.Context) ([]*cri.PodSandbox, error)
	ListContainers(ctx context.Context) ([]*cri.Container, error)
	ListPodSandboxStats(ctx context.Context) ([]*cri.PodSandboxStats, error)
	ListImages(ctx context.Context) ([]*cri.Image, error)
	ImageFsInfo(ctx context.Context) (*cri.ImageFsInfoResponse, error)
}

// Config configures a node. Every field but Runtime and DataDir may be left zero.
type Config struct {
	Runtime    Runtime
	NodeName   string              // in the summary
	DataDir    string              // on the file system that counts as the node's own
	Reserved   corev1.ResourceList // kept from pods, taken off capacity
	MaxPods    int64               // default 110
	Addresses  []string            // of the node; default those of its interfaces
	Thresholds Thresholds

	Statfs func(path string) (Filesystem, error) // default the system's
	Root   string                                // where proc, sys and etc are, default /
	Log    *slog.Logger                          // default slog.Default()
}

// A Node knows about the machine that it runs on. Its methods may be called
// concurrently.
type Node struct {
	config  Config
	machine machine

	lock     chan struct{} // holds one token, which guards the following; a channel, since waiting must heed contexts
	summary  *statsapi.Summary
	failed   error // of the runtime, when summary was made
	made     time.Time
	previous map[string]sample // by container, pod or "" for the node
	imageDir string            // mount point of the image file system, once the runtime has told
	status   cached
	pressure PressureState
}

// A sample is a CPU counter at a time, from which the next yields a rate.
type sample struct {
	at    time.Time
	value uint64 // nanoseconds
	rate  *uint64
}

// New makes a node.
func New(config Config) *Node {
	config.MaxPods = cmp.Or(config.MaxPods, 110)
	config.Root = cmp.Or(config.Root, "/")
	config.Log = cmp.Or(config.Log, slog.Default())
	config.Thresholds = config.Thresholds.withDefaults()
	if config.Statfs == nil {
		config.Statfs = statfs
	}
	n := &Node{config: config, machine: machine{config.Root}, lock: make(chan struct{}, 1), previous: map[string]sample{}}
	n.lock <- struct{}{}
	return n
}

// acquire takes the lock, unless ctx ends before.
func (n *Node) acquire(ctx context.Context) error {
	select {
	case <-n.lock:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (n *Node) release() { n.lock <- struct{}{} }

// hostname is the node's name in a summary.
func (n *Node) hostname() string {
	if n.config.NodeName != "" {
		return n.config.NodeName
	}
	name, _ := os.Hostname()
	return name
}
