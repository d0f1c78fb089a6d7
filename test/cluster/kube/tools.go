//go:build tools

package main

// The programs that are built from their modules as they are.
import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kubectl"
)
