// Package cluster runs a real Kubernetes control plane on this machine, for tests
// and demonstrations: etcd, kube-apiserver, kube-controller-manager and
// kube-scheduler, and if asked for a kubelet and kube-proxy of its own.
//
// The programs are built from their Go modules (the module in kube/) into a
// cache, which takes some minutes the first time and nothing after; see [Build].
// The cluster is set up as a hardened one is: a CA of its own, TLS everywhere,
// client certificates, --kubelet-certificate-authority, Node and RBAC
// authorization, NodeRestriction, no anonymous access.
//
// Nothing outlives the process that started it, even when that is killed: the
// kernel ends the components with it.
package cluster
