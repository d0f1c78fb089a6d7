// Package provider is the kubelet of all sites, as the API server sees it: it
// keeps a Node for each, hands a site the pods and objects that it must hold,
// and writes what the site observes.
//
// # Level-triggered
//
// The API server is the only truth; a provider keeps nothing that a restart
// would lose. For each live session one loop, woken by marks that something may
// have changed, computes what the site should hold from the caches, compares it
// with what the site does hold, and sends the difference. virtual-kubelet's
// PodController, one for all sites, is one of the sources of such marks.
//
// # Identity
//
// What is read or written for a site is done as system:node:<site>, so that the
// API server's own Node authorizer and NodeRestriction keep sites apart. The
// provider's own identity sees pods, nodes, services, runtime classes and the
// leases of its namespace, and can read no Secret.
//
// # Deleting
//
// A pod leaves the API in two cases only: the site has said that nothing of it
// is left, or the site is connected and has never held nor reported it. While a
// site is away its pods stay Terminating, as those of an unreachable kubelet do.
//
// # Nodes
//
// While a session lives, its node's lease is renewed and Ready is true. When it
// ends, EdgeConnected becomes false after two seconds and the lease lapses, so
// that Ready becomes Unknown by the controller manager's own clock: an honest
// answer, since nobody can know. Pods are not evicted for that, because the
// default five minutes of their not-ready and unreachable tolerations are lifted
// for as long as the node's annotation skerry.io/autonomy-duration says.
//
// # Goroutines
//
// A session costs the goroutine that called [Provider.Serve] and one more. A
// watched Secret or ConfigMap costs a watch for each object, however many sites
// refer to it.
package provider

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// Config configures a provider. Kubernetes, Namespace, Replica, Address and
// Ports are required.
type Config struct {
	Kubernetes    *rest.Config                             // the provider's own identity
	Namespace     string                                   // of the leases that say which replica has a site's session
	Replica       string                                   // identity of this replica, unique among all
	Address       string                                   // InternalIP of this replica, where the kubelet API is served
	Ports         interface{ Port(string) (int32, error) } // port of the kubelet API for a site, on this replica
	Version       string                                   // of Skerry; default "dev"
	Taint         bool                                     // new nodes get virtual-kubelet.io/provider=skerry:NoSchedule
	ClusterDNS    []string                                 // addresses of DNS servers that pods at sites can reach
	ClusterDomain string                                   // default cluster.local
	Revoke        func(site string)                        // called when a person has deleted the Node: the site must join again. Nil: the Node is made again
	Log           *slog.Logger                             // default slog.Default()
	Registerer    prometheus.Registerer                    // default none
}

func (c Config) withDefaults() (Config, error) {
	c.Version = cmp.Or(c.Version, "dev")
	c.ClusterDomain = cmp.Or(c.ClusterDomain, "cluster.local")
	c.Log = cmp.Or(c.Log, slog.Default())
	var errs []error
	for name, missing := range map[string]bool{
		"Kubernetes": c.Kubernetes == nil, "Namespace": c.Namespace == "", "Replica": c.Replica == "",
		"Address": c.Address == "", "Ports": c.Ports == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("%s is required", name))
		}
	}
	return c, errors.Join(errs...)
}

// A Session is the live connection to one site; normally a *tunnel.Session.
type Session interface {
	http.RoundTripper                                      // towards the site
	Serve(ctx context.Context, handler http.Handler) error // answers the site until ctx is done or the session ends
	Peer() string                                          // the site's authenticated name
	Done() <-chan struct{}
	Close() error
}

// An OfflineError says that a site has no session with this replica. Since is
// zero if it has had none in living memory.
type OfflineError struct {
	Site  string
	Since time.Time
}

func (e *OfflineError) Error() string {
	if e.Since.IsZero() {
		return fmt.Sprintf("site %s is not connected", e.Site)
	}
	return fmt.Sprintf("site %s is disconnected since %s", e.Site, e.Since.UTC().Format(time.RFC3339))
}

// A Provider serves the sites of one replica. Its methods are safe for
// concurrent use.
type Provider struct {
	cfg     Config
	log     *slog.Logger
	client  kubernetes.Interface // acts as the provider, or as the site that the context names; see as
	caches  caches
	view    *podView
	objects *objects
	wheel   *wheel
	metrics metrics
	written written       // statuses written but not yet seen in the cache
	writes  chan struct{} // holds a token for each status write in flight, of all sites
	deleted chan string   // names of nodes that are said to be deleted
	synced  chan struct{} // closed when all caches have synced

	mu     sync.Mutex
	links  map[string]*link     // live sessions, by site
	left   map[string]time.Time // when a site's last session ended
	epochs map[string]uint64    // of the last ownership acquired here, by site
}

// maxWrites bounds the writes of pod statuses in flight, of all sites together.
const maxWrites = 128

// New returns a provider that does nothing until Run is called.
func New(config Config) (*Provider, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("provider: %w", err)
	}
	kube := rest.CopyConfig(config.Kubernetes)
	kube.QPS = -1 // the API server's priority and fairness decides
	kube.ContentType = "application/vnd.kubernetes.protobuf"
	kube.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	kube.Wrap(impersonate)
	client, err := kubernetes.NewForConfig(kube)
	if err != nil {
		return nil, fmt.Errorf("provider: client: %w", err)
	}
	return newProvider(config, client)
}

func newProvider(config Config, client kubernetes.Interface) (*Provider, error) {
	p := &Provider{
		cfg: config, log: config.Log, client: client,
		caches:  newCaches(client, config.Namespace),
		writes:  make(chan struct{}, maxWrites),
		deleted: make(chan string, 128),
		synced:  make(chan struct{}),
		links:   map[string]*link{},
		left:    map[string]time.Time{},
		epochs:  map[string]uint64{},
	}
	p.objects = newObjects(client, p.mark, p.log)
	p.wheel = newWheel(p.renew, p.departed)
	p.view = newPodView(p.caches.pods, func(node string) bool { return p.caches.node(node) != nil })
	p.metrics = newMetrics(p.connected)
	if err := p.metrics.register(config.Registerer); err != nil {
		return nil, fmt.Errorf("provider: metrics: %w", err)
	}
	return p, p.watch()
}

// Run keeps the caches, leases and nodes until ctx is done. Sessions are served
// by the callers of Serve, who must have returned before Run's end is waited for.
func (p *Provider) Run(ctx context.Context) error {
	defer p.objects.close()
	g, ctx := errgroup.WithContext(ctx)
	p.caches.run(ctx, g)
	g.Go(func() error {
		if !p.caches.wait(ctx) {
			return nil // asked to stop before anything had begun
		}
		close(p.synced)
		p.log.Info("caches synced", "pods", len(p.caches.pods.GetStore().ListKeys()), "nodes", len(p.caches.nodes.GetStore().ListKeys()))
		return nil
	})
	g.Go(func() error { return p.wheel.run(ctx) })
	g.Go(func() error { return p.watchDeleted(ctx) })
	g.Go(func() error { return p.runPodController(ctx) })
	return g.Wait()
}

// Site returns the live session of a site, or an *OfflineError.
func (p *Provider) Site(name string) (http.RoundTripper, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.links[name]; l != nil {
		return l.session, nil
	}
	since := p.left[name]
	if node := p.caches.node(name); since.IsZero() && node != nil {
		if c := nodeCondition(node.Status.Conditions, EdgeConnected); c != nil && c.Status != corev1.ConditionTrue {
			since = c.LastTransitionTime.Time
		}
	}
	return nil, &OfflineError{name, since}
}

// HasPod reports whether a pod is bound to a site.
func (p *Provider) HasPod(namespace, name, site string) bool {
	pod := p.caches.pod(namespace, name)
	return pod != nil && pod.Spec.NodeName == site
}

// mark says that what a site should hold may have changed.
func (p *Provider) mark(site string) {
	if l := p.link(site); l != nil {
		l.mark()
	}
}

func (p *Provider) link(site string) *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.links[site]
}

func (p *Provider) connected() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// watch connects the caches with what must hear of changes.
func (p *Provider) watch() error {
	markPod := func(pod *corev1.Pod) { p.mark(pod.Spec.NodeName) }
	_, err := p.caches.pods.AddEventHandler(handler[*corev1.Pod]{
		add: p.view.add,
		update: func(old, pod *corev1.Pod) {
			p.written.seen(pod)
			p.view.update(old, pod)
			if statusMatters(old, pod) || old.Generation != pod.Generation {
				markPod(pod)
			}
		},
		delete: func(pod *corev1.Pod) { p.written.forget(pod.UID); p.view.delete(pod); markPod(pod) },
	})
	_, err2 := p.caches.nodes.AddEventHandler(handler[*corev1.Node]{
		add:    func(node *corev1.Node) { p.view.adopt(p.caches.podsOf(node.Name)); p.mark(node.Name) },
		update: func(_, node *corev1.Node) { p.mark(node.Name); p.noticeLost(node) },
		delete: p.noticeDeleted,
	})
	_, err3 := p.caches.services.AddEventHandler(handler[*corev1.Service]{
		add:    func(s *corev1.Service) { p.markServices(s) },
		update: func(_, s *corev1.Service) { p.markServices(s) },
		delete: func(s *corev1.Service) { p.markServices(s) },
	})
	_, err4 := p.caches.leases.AddEventHandler(leaseHandler(p.fence))
	_, err5 := p.caches.classes.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { p.markAll() }, UpdateFunc: func(any, any) { p.markAll() }, DeleteFunc: func(any) { p.markAll() },
	})
	return errors.Join(err, err2, err3, err4, err5)
}

// markServices marks the sites that have pods in the service's namespace, or
// all if it is the one that every pod sees.
func (p *Provider) markServices(s *corev1.Service) {
	if isMaster(s) {
		p.markAll()
		return
	}
	for _, name := range p.connectedSites() {
		for _, pod := range p.caches.podsOf(name) {
			if pod.Namespace == s.Namespace {
				p.mark(name)
				break
			}
		}
	}
}

func (p *Provider) markAll() {
	for _, name := range p.connectedSites() {
		p.mark(name)
	}
}

func (p *Provider) connectedSites() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.links))
	for name := range p.links {
		names = append(names, name)
	}
	return names
}

// isMaster reports whether a service is seen by the pods of all namespaces.
func isMaster(s *corev1.Service) bool {
	return s.Namespace == metav1.NamespaceDefault && s.Name == "kubernetes"
}

// metrics are few: what an operator cannot see in the API server.
type metrics struct {
	sites         prometheus.GaugeFunc
	rounds        prometheus.Histogram
	applied       prometheus.Counter
	statuses      *prometheus.CounterVec
	eventsDropped prometheus.Counter
	leaseFailures prometheus.Counter
}

func newMetrics(connected func() int) metrics {
	return metrics{
		sites: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "skerry_provider_sites_connected", Help: "Sites with a session with this replica."},
			func() float64 { return float64(connected()) }),
		rounds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "skerry_provider_sync_seconds", Help: "Duration of one round of a site's loop.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60}}),
		applied: prometheus.NewCounter(prometheus.CounterOpts{Name: "skerry_provider_objects_applied_total", Help: "Objects sent to or removed from sites."}),
		statuses: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "skerry_provider_pod_status_writes_total", Help: "Writes of pod statuses by result."},
			[]string{"result"}),
		eventsDropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "skerry_provider_events_dropped_total", Help: "Events of sites that were not theirs to tell, or that the API server refused."}),
		leaseFailures: prometheus.NewCounter(prometheus.CounterOpts{Name: "skerry_provider_lease_renewal_failures_total", Help: "Failed renewals of node leases."}),
	}
}

func (m metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.sites, m.rounds, m.applied, m.statuses, m.eventsDropped, m.leaseFailures} {
		errs = append(errs, r.Register(c))
	}
	return errors.Join(errs...)
}
