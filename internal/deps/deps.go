//go:build tools

// Package deps holds modules in go.mod until their users have landed.
package deps

import (
	_ "github.com/virtual-kubelet/virtual-kubelet/node"
	_ "k8s.io/api/core/v1"
	_ "k8s.io/apimachinery/pkg/apis/meta/v1"
	_ "k8s.io/client-go/kubernetes"
	_ "k8s.io/cri-api/pkg/apis/runtime/v1"
	_ "k8s.io/component-helpers/resource"
	_ "k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	_ "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	_ "google.golang.org/grpc"
	_ "google.golang.org/grpc/health/grpc_health_v1"
	_ "google.golang.org/protobuf/proto"
	_ "github.com/hashicorp/yamux"
	_ "go.etcd.io/bbolt"
	_ "golang.org/x/net/http2"
	_ "golang.org/x/net/http/httpproxy"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/sync/errgroup"
	_ "github.com/spf13/cobra"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
	_ "github.com/distribution/reference"
	_ "github.com/google/go-containerregistry/pkg/v1"
	_ "github.com/google/go-containerregistry/pkg/v1/tarball"
	_ "github.com/google/go-containerregistry/pkg/v1/layout"
	_ "github.com/google/go-containerregistry/pkg/v1/mutate"
	_ "github.com/fsnotify/fsnotify"
	_ "github.com/coreos/go-systemd/v22/daemon"
	_ "github.com/containerd/containerd/api/services/events/v1"
	_ "github.com/containerd/containerd/api/events"
	_ "sigs.k8s.io/yaml"
	_ "github.com/coder/websocket"
	_ "golang.org/x/term"
)
