package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/provider/identity"
)

func tokenCommand() *cobra.Command {
	var k kube
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make, list and delete join tokens",
	}
	k.flags(cmd)
	cmd.AddCommand(tokenCreateCommand(&k), tokenListCommand(&k), tokenDeleteCommand(&k))
	return cmd
}

func (k *kube) client() (*kubernetes.Clientset, error) {
	config, err := k.config()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

func tokenCreateCommand(k *kube) *cobra.Command {
	var o identity.TokenOptions
	var server string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a join token and print the line to run at the site",
		Example: `  skerry-provider token create --server https://edge.example.com
  skerry-provider token create --site shop-1 --ttl 1h
  skerry-provider token create --site shop-1 --replace   # new hardware for an old site`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := k.client()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if server == "" {
				if server, err = publicAddress(ctx, client, k.namespace); err != nil {
					return err
				}
			}
			ca, err := identity.LoadCA(ctx, identity.CAConfig{Client: client, Namespace: k.namespace})
			if err != nil {
				return err
			}
			token, err := identity.CreateToken(ctx, client, k.namespace, o)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), identity.JoinCommand(server, token, ca.Pin(), o.Site))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&server, "server", "", "address of the provider as sites reach it; default that of the Service skerry-provider")
	f.StringVar(&o.Site, "site", "", "the only site that may join with it; default any whose name is free")
	f.BoolVar(&o.Replace, "replace", false, "the site may have joined before; its old certificate ends")
	f.BoolVar(&o.Reusable, "reusable", false, "many machines may join with it, each under a free name")
	f.DurationVar(&o.TTL, "ttl", 24*time.Hour, "how long it may be used")
	f.StringVar(&o.Description, "description", "", "for people")
	return cmd
}

// publicAddress finds where sites reach the provider from its Service.
func publicAddress(ctx context.Context, client kubernetes.Interface, namespace string) (string, error) {
	service, err := client.CoreV1().Services(namespace).Get(ctx, "skerry-provider", metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("address of the provider: %w; give --server", err)
	}
	host := ""
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		host = ingress.IP + ingress.Hostname
	}
	if len(service.Spec.ExternalIPs) > 0 {
		host = service.Spec.ExternalIPs[0]
	}
	if host == "" || len(service.Spec.Ports) == 0 {
		return "", errors.New("the Service skerry-provider has no external address yet; give --server https://HOST[:PORT] as sites reach it")
	}
	if port := service.Spec.Ports[0].Port; port != 443 {
		host = net.JoinHostPort(host, fmt.Sprint(port))
	}
	return "https://" + host, nil
}

func tokenListCommand(k *kube) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List join tokens",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := k.client()
			if err != nil {
				return err
			}
			tokens, err := identity.ListTokens(cmd.Context(), client, k.namespace)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "TOKEN\tSITE\tEXPIRES\tUSED BY\tDESCRIPTION")
			for _, t := range tokens {
				expires := "expired"
				if left := time.Until(t.Expires); left > 0 {
					expires = "in " + duration.HumanDuration(left)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", t.ID, dash(t.Site), expires, dash(t.RedeemedBy), t.Description)
			}
			return w.Flush()
		},
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func tokenDeleteCommand(k *kube) *cobra.Command {
	return &cobra.Command{
		Use:   "delete TOKEN",
		Short: "Delete a join token, by its first six characters or whole",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := k.client()
			if err != nil {
				return err
			}
			return identity.DeleteToken(cmd.Context(), client, k.namespace, args[0])
		},
	}
}

func siteCommand() *cobra.Command {
	var k kube
	var why string
	cmd := &cobra.Command{Use: "site", Short: "Shut sites out, and let them in again"}
	k.flags(cmd)
	set := func(cmd *cobra.Command, site, why string) error {
		client, err := k.client()
		if err != nil {
			return err
		}
		return identity.Revoke(cmd.Context(), client, k.namespace, site, why)
	}
	revoke := &cobra.Command{
		Use:     "revoke SITE",
		Short:   "End a site's session within a second and refuse it from then on",
		Example: "  skerry-provider site revoke shop-1 --why 'stolen on Friday'",
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return set(cmd, args[0], why) },
	}
	revoke.Flags().StringVar(&why, "why", "revoked by an administrator", "reason, for people")
	cmd.AddCommand(revoke, &cobra.Command{
		Use:   "restore SITE",
		Short: "Let a revoked site in again",
		Args:  cobra.ExactArgs(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return set(cmd, args[0], "") },
	})
	return cmd
}
