package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/skerry-io/skerry/internal/version"
	"github.com/skerry-io/skerry/provider"
	"github.com/skerry-io/skerry/provider/identity"
	"github.com/skerry-io/skerry/provider/server"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// options are the flags of run.
type options struct {
	kube
	replica, address      string
	listen, listenH2C     string
	metricsListen         string
	publicNames           []string
	clusterDNS            []string
	clusterDomain         string
	firstPort, lastPort   int
	taint, manualApproval bool
	certificateLife       time.Duration
	maxOffline            time.Duration
	logLevel              string
}

func runCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve the sites",
		Long: `run serves the sites until it is told to stop. The manifests run it as a
Deployment; run by hand beside a cluster, it needs --kubeconfig and an --address
that the API server can reach.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	o.kube.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.replica, "replica", os.Getenv("POD_NAME"), "name of this replica; default $POD_NAME")
	f.StringVar(&o.address, "address", os.Getenv("POD_IP"), "IP address at which the API server reaches this replica; default $POD_IP")
	f.StringVar(&o.listen, "listen", ":8443", "where sites dial in")
	f.StringVar(&o.listenH2C, "listen-h2c", "", "where a layer-7 proxy that ends TLS forwards to; default nowhere")
	f.StringVar(&o.metricsListen, "metrics-listen", ":9090", "/metrics, /healthz and /readyz")
	f.StringSliceVar(&o.publicNames, "public-name", nil, "further names and addresses in the certificate that sites are shown; none is needed")
	f.StringSliceVar(&o.clusterDNS, "cluster-dns", nil, "DNS servers for pods, if sites can reach them")
	f.StringVar(&o.clusterDomain, "cluster-domain", "cluster.local", "DNS domain of the cluster")
	f.IntVar(&o.firstPort, "first-port", 20000, "first port of the kubelet API; each site has one")
	f.IntVar(&o.lastPort, "last-port", 29999, "last port of the kubelet API")
	f.BoolVar(&o.taint, "taint", false, "taint new nodes virtual-kubelet.io/provider=skerry:NoSchedule")
	f.BoolVar(&o.manualApproval, "manual-approval", false, "joins wait until a person runs kubectl certificate approve")
	f.DurationVar(&o.certificateLife, "certificate-life", 0, "life of sites' certificates; default 720h")
	f.DurationVar(&o.maxOffline, "max-offline", 0, "how long after its end a certificate still renews itself; default 43800h, negative: not at all")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

// A part runs until its context is done.
type part struct {
	name string
	run  func(context.Context) error
}

func (o *options) run(ctx context.Context) error {
	if o.replica == "" || o.address == "" {
		return errors.New("--replica and --address are required outside of a cluster")
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	config, err := o.config()
	if err != nil {
		return err
	}
	config.UserAgent = "skerry-provider/" + version.String()
	config.QPS = -1 // the API server's own fairness is the limit
	log.Info("starting", "version", version.String(), "replica", o.replica, "address", o.address, "namespace", o.namespace)
	parts, err := o.parts(ctx, config, log)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		group.Go(func() error {
			if err := p.run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// late breaks the circle between the provider, which shows the ports of the
// kubelet API, and the kubelet API, which serves the provider's sites.
type late struct{ *provider.Provider }

func (o *options) parts(ctx context.Context, config *rest.Config, log *slog.Logger) ([]part, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	serving, err := identity.NewServing(identity.ServingConfig{Client: client, Replica: o.replica, Address: o.address, Log: log})
	if err != nil {
		return nil, err
	}
	clientCA := server.NewClientCA(client, log)
	sites, reviews := &late{}, server.Reviews{Client: client}
	api, err := server.New(server.Config{
		Sites: sites, Certificate: serving.GetCertificate, ClientCAs: clientCA.Pool,
		Authenticator: reviews, Authorizer: reviews,
		Address: o.address, FirstPort: o.firstPort, LastPort: o.lastPort, Log: log, Registerer: registry,
	})
	if err != nil {
		return nil, err
	}
	sites.Provider, err = provider.New(provider.Config{
		Kubernetes: config, Namespace: o.namespace, Replica: o.replica, Address: o.address, Ports: api,
		Version: version.String(), Taint: o.taint, ClusterDNS: o.clusterDNS, ClusterDomain: o.clusterDomain,
		Revoke: func(site string) {
			if err := identity.Revoke(ctx, client, o.namespace, site, "its Node was deleted"); err != nil {
				log.Error("site not revoked", "site", site, "err", err)
			}
		},
		Log: log, Registerer: registry,
	})
	if err != nil {
		return nil, err
	}
	door, err := o.newDoor(ctx, client, sites.Provider, registry, log)
	if err != nil {
		return nil, err
	}
	return append(door.parts(),
		part{"kubelet API", api.Run},
		part{"client CA", clientCA.Run},
		part{"serving certificate", serving.Run},
		part{"provider", sites.Provider.Run},
		part{"metrics", o.metrics(registry, func() error { return errors.Join(serving.Ready(), door.ready()) })},
	), nil
}

// A door is where sites come in: the tunnel's listener, joining, and what decides
// who is admitted.
type door struct {
	*options
	log    *slog.Logger
	sites  *identity.Sites
	tokens *identity.Tokens
	tunnel *tunnel.Server
}

func (o *options) newDoor(ctx context.Context, client kubernetes.Interface, p *provider.Provider, registry prometheus.Registerer, log *slog.Logger) (*door, error) {
	ca, err := identity.LoadCA(ctx, identity.CAConfig{Client: client, Namespace: o.namespace, Log: log})
	if err != nil {
		return nil, err
	}
	d := &door{options: o, log: log}
	if d.sites, err = identity.NewSites(identity.SitesConfig{Client: client, Namespace: o.namespace, Log: log}); err != nil {
		return nil, err
	}
	authority, err := identity.NewAuthority(identity.AuthorityConfig{Client: client, Namespace: o.namespace, Manual: o.manualApproval, Log: log})
	if err != nil {
		return nil, err
	}
	if d.tokens, err = identity.NewTokens(identity.TokensConfig{Client: client, Namespace: o.namespace, Log: log}); err != nil {
		return nil, err
	}
	joining, err := bootstrap.NewHandler(bootstrap.HandlerConfig{
		CA: ca, Tokens: d.tokens, Authority: authority, Life: o.certificateLife, MaxOffline: o.maxOffline, Log: log,
	})
	if err != nil {
		return nil, err
	}
	shown, err := bootstrap.NewServerCertificate(bootstrap.ServerConfig{CA: ca, Names: o.publicNames, Log: log})
	if err != nil {
		return nil, err
	}
	d.tunnel = &tunnel.Server{
		TLS:     &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: shown.GetCertificate, ClientCAs: ca.Pool()},
		Version: version.String(),
		Authenticate: func(state *tls.ConnectionState) (string, error) {
			return d.sites.Admit(ctx, state.PeerCertificates[0])
		},
		Accept: func(ctx context.Context, site string, _ tunnel.Hello) (uint64, error) { return p.Acquire(ctx, site) },
		Use:    func(ctx context.Context, s *tunnel.Session) { p.Serve(ctx, s) },
		HTTP:   joining,
		Log:    log, Metrics: tunnel.NewMetrics(registry),
	}
	return d, nil
}

func (d *door) ready() error {
	if !d.sites.HasSynced() {
		return errors.New("the sites are not known yet")
	}
	return nil
}

func (d *door) parts() []part {
	return []part{
		{"sites", d.sites.Run},
		{"tokens", d.tokens.Run},
		{"revocation", func(ctx context.Context) error {
			return d.sites.Watch(ctx, func(site string, revoked bool) {
				if revoked {
					d.tunnel.Disconnect(site)
				}
			})
		}},
		{"tunnel", func(ctx context.Context) error {
			l, err := net.Listen("tcp", d.listen)
			if err != nil {
				return err
			}
			d.log.Info("sites may dial in", "address", l.Addr())
			return d.tunnel.Serve(ctx, l)
		}},
	}
}

// metrics serves what monitors ask for.
func (o *options) metrics(registry *prometheus.Registry, ready func() error) func(context.Context) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return func(ctx context.Context) error {
		srv := &http.Server{Addr: o.metricsListen, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
		stop := context.AfterFunc(ctx, func() { srv.Close() })
		defer stop()
		err := srv.ListenAndServe()
		if errors.Is(err, http.ErrServerClosed) {
			err = nil
		}
		return err
	}
}
