// Command cluster runs a real Kubernetes control plane on this machine until it
// is told to stop, and prints how to talk to it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/skerry-io/skerry/test/cluster"
)

func main() {
	address := flag.String("address", "", "address of the API server; default a bridge of its own, 10.98.9.1, which pods can reach")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *address); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, address string) error {
	if address == "" {
		const bridge = "skerry-cluster"
		address = "10.98.9.1"
		if err := cluster.AddBridge(bridge, address+"/24"); err != nil {
			return fmt.Errorf("%w (run as root, or give --address)", err)
		}
		defer cluster.DeleteBridge(bridge)
	}
	dir, err := os.MkdirTemp("", "skerry-cluster-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Println("Starting etcd, kube-apiserver, kube-controller-manager and kube-scheduler", cluster.Version)
	c, err := cluster.Start(ctx, cluster.Options{Dir: dir, Address: address, Out: os.Stdout})
	if err != nil {
		return err
	}
	defer c.Stop()
	fmt.Printf("Ready at %s. In another terminal:\n\n  export KUBECONFIG=%s\n  alias kubectl=%s\n  kubectl get namespaces\n\nCtrl-C stops it and removes all of it.\n", c.Server, c.Kubeconfig, c.Kubectl)
	select {
	case <-ctx.Done():
	case <-c.Process("kube-apiserver").Done():
		return fmt.Errorf("kube-apiserver ended:\n%s", c.Process("kube-apiserver").Tail())
	}
	return nil
}
