// Command skerry-provider is the cloud half of Skerry: the kubelet of all sites,
// and the tools to let sites in and to shut them out.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/skerry-io/skerry/internal/version"
	"github.com/skerry-io/skerry/provider/identity"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "skerry-provider:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "skerry-provider",
		Short: "Make edge sites nodes of this Kubernetes cluster",
		Long: `skerry-provider is the kubelet of all edge sites: it registers each as a Node,
hands it its pods and what these need, writes what it observes, and passes
kubectl logs, exec, port-forward and the like on to it. Sites dial in; nothing
has to be reachable at a site.`,
		Example: `  # in the cluster
  kubectl apply -k manifests/

  # let a machine in: prints the line to run there
  skerry-provider token create --server https://edge.example.com --site shop-1

  # shut a stolen machine out
  skerry-provider site revoke shop-1 --why stolen`,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(), tokenCommand(), siteCommand())
	return root
}

// A kube says how to reach the cluster.
type kube struct {
	kubeconfig string
	namespace  string
}

// flags adds the flags of k to cmd and its subcommands.
func (k *kube) flags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&k.kubeconfig, "kubeconfig", "", "file; default the pod's own account, else $KUBECONFIG or ~/.kube/config")
	f.StringVar(&k.namespace, "namespace", cmp.Or(os.Getenv("POD_NAMESPACE"), identity.DefaultNamespace), "namespace of the provider")
}

// config returns the client configuration: inside a cluster the pod's account.
func (k *kube) config() (*rest.Config, error) {
	if k.kubeconfig == "" {
		if config, err := rest.InClusterConfig(); err == nil {
			return config, nil
		}
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = k.kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("no cluster to talk to: %w; give --kubeconfig", err)
	}
	return config, nil
}
