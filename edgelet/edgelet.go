// Package edgelet is the agent at a site: it composes and supervises the parts in
// the folders below it, which do not know each other.
//
// The way of the data: what the cloud wants arrives in the [desiredSet], which
// stores it and tells the pod engine; what the engine observes goes to the
// [outbox], which stores it and reports it until the cloud has confirmed. Neither
// waits for the other, and the engine waits for neither.
package edgelet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/edgelet/image"
	"github.com/skerry-io/skerry/edgelet/logs"
	"github.com/skerry-io/skerry/edgelet/pod"
	"github.com/skerry-io/skerry/edgelet/podenv"
	"github.com/skerry-io/skerry/edgelet/probe"
	"github.com/skerry-io/skerry/edgelet/stats"
	"github.com/skerry-io/skerry/edgelet/store"
	"github.com/skerry-io/skerry/edgelet/volume"
	"github.com/skerry-io/skerry/internal/version"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// IdentityDir is where the identity of a site is kept.
func IdentityDir(c Config) string { return filepath.Join(c.DataDir, "identity") }

// An Edgelet is one agent. Run runs it, once.
type Edgelet struct {
	config   Config
	log      *slog.Logger
	started  time.Time
	identity *bootstrap.Identity
	db       *store.DB
	desired  *desiredSet
	complete chan struct{} // closed when the provider has first said that the desired set is complete
	outbox   *outbox
	runtime  *cri.Client
	node     *stats.Node
	facts    atomic.Pointer[edge.NodeStatus] // latest
	driver   atomic.Pointer[string]          // of cgroups, once the runtime has told
	probes   *probe.Manager
	pods     *pod.Manager
	pulls    *image.Manager
	images   *image.Collector
	logs     *logs.Reader
	rotator  *logs.Rotator
	link     link
}

// New prepares an edgelet: it opens the store and loads the identity, and dials
// nothing. The caller must Run it, which closes the store.
func New(c Config) (_ *Edgelet, err error) {
	c, err = c.WithDefaults()
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	e := &Edgelet{config: c, log: c.Log, started: time.Now(), complete: make(chan struct{})}
	if e.identity, err = bootstrap.Load(IdentityDir(c)); err != nil {
		return nil, err
	}
	if e.identity.Site() != c.Site {
		return nil, fmt.Errorf("configuration says site %s, but this machine has joined as %s", c.Site, e.identity.Site())
	}
	if err := e.openStore(); err != nil {
		return nil, err
	}
	if err := e.compose(); err != nil {
		return nil, errors.Join(err, e.db.Close())
	}
	e.registerMetrics()
	return e, nil
}

func (e *Edgelet) openStore() error {
	if err := os.MkdirAll(e.config.DataDir, 0o700); err != nil {
		return err
	}
	key, err := store.LoadKey(filepath.Join(e.config.DataDir, "store.key"))
	if err != nil {
		return err
	}
	e.db, err = store.Open(store.Options{Path: filepath.Join(e.config.DataDir, "edgelet.db"), Key: key, Log: e.log})
	if err != nil {
		return err
	}
	e.desired, err = newDesiredSet(newObjectTables(e.db), e.log)
	if errors.Is(err, store.ErrKey) {
		e.log.Error("the store's key is lost: secrets are fetched again from the cloud", "err", err)
		if err = e.db.Reseal(key); err == nil {
			e.desired, err = newDesiredSet(newObjectTables(e.db), e.log)
		}
	}
	if err == nil {
		events := events{store.NewQueue[edge.Event](e.db, "events", store.Limit{Items: 4096, Bytes: 2 << 20})}
		e.outbox, err = newOutbox(store.NewTable[edge.PodStatus](e.db, "outbox"), events, e.config.Site, e.log)
	}
	if err != nil {
		return errors.Join(err, e.db.Close())
	}
	return nil
}

// compose makes the parts and connects them.
func (e *Edgelet) compose() (err error) {
	if e.runtime, err = cri.Dial(cri.Config{Endpoint: e.config.RuntimeEndpoint, Log: e.log}); err != nil {
		return err
	}
	e.node = stats.New(stats.Config{
		Runtime: e.runtime, NodeName: e.config.Site, DataDir: e.config.DataDir,
		MaxPods: int64(e.config.MaxPods), Reserved: e.config.Reserved, Log: e.log,
	})
	if err := e.firstLook(); err != nil {
		return err
	}
	memory := times{store.NewTable[map[string]time.Time](e.db, "images")}
	dir := filepath.Join(e.config.DataDir, "pods")
	var volumes *volume.Manager
	env := podenv.New(podenv.Config{
		Objects: e.desired, NodeName: e.config.Site, HostIPs: e.addresses, Allocatable: e.allocatable, Log: e.log,
		ReadVolumeFile: func(pod *corev1.Pod, name, path string) (io.ReadCloser, error) { return volumes.Open(pod, name, path) },
	})
	if volumes, err = volume.New(volume.Config{Dir: dir, Objects: e.desired, Fields: env, Expand: podenv.Expand, Log: e.log}); err != nil {
		return err
	}
	probing := probe.Config{
		Exec: e.exec, Event: e.probeEvent, Was: e.outbox.was, Log: e.log,
		Changed: func(uid types.UID) { e.pods.Changed(uid) },
	}
	e.probes = probe.New(probing)
	e.pulls, err = image.New(image.Config{Runtime: e.runtime, Memory: memory, Log: e.log})
	if err != nil {
		return err
	}
	e.pods, err = pod.NewManager(pod.Config{
		Runtime:      e.runtime,
		Images:       e.pulls,
		Volumes:      volumes,
		Environments: env,
		Probes:       e.probes,
		Hooks:        probe.NewHooks(probing),
		Objects:      e.desired,
		Records:      store.NewTable[pod.Record](e.db, "pods"),
		Sink:         e.outbox,
		HostIPs:      e.addresses,
		RuntimeName:  e.runtimeName,
		CgroupDriver: e.cgroupDriver,
		Allocatable:  e.allocatable,
		Memory:       e.facts.Load().Capacity.Memory().Value(),
		LogDir:       e.config.LogDir,
		Dir:          dir,
		Log:          e.log,
	})
	if err != nil {
		return err
	}
	e.images, err = image.NewCollector(image.CollectorConfig{
		Store: e.runtime, Memory: memory, Wanted: e.wantedImages, Event: e.outbox.NodeEvent, Log: e.log,
	})
	e.logs = logs.NewReader(e.config.LogDir, e.log)
	e.rotator = logs.NewRotator(logs.RotatorConfig{Root: e.config.LogDir, Runtime: e.runtime, Log: e.log})
	return err
}

// exec runs a command in a container for probes and hooks, its output joined.
func (e *Edgelet) exec(ctx context.Context, containerID string, cmd []string, timeout time.Duration) ([]byte, int, error) {
	stdout, stderr, exit, err := e.runtime.ExecSync(ctx, containerID, cmd, timeout)
	return append(stdout, stderr...), int(exit), err
}

// probeEvent is an event of a container's probe or hook.
func (e *Edgelet) probeEvent(p *corev1.Pod, eventType, reason, message string) {
	e.outbox.PodEvent(p, "", eventType, reason, message)
}

// wantedImages are the images of the desired pods: without a network nothing
// would bring them back.
func (e *Edgelet) wantedImages() []string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	sandbox, err := e.runtime.SandboxImage(ctx)
	if err != nil {
		e.log.Debug("sandbox image is not known", "err", err)
	}
	names := []string{sandbox}
	for _, p := range e.pods.Pods() {
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			names = append(names, c.Image)
		}
	}
	return names
}

// Run runs the site until ctx is done, and leaves the pods running.
func (e *Edgelet) Run(ctx context.Context) error {
	e.log.Info("edgelet starts", "site", e.config.Site, "version", version.String(), "runtime", e.runtime.Endpoint())
	e.desired.complete = sync.OnceFunc(func() { close(e.complete) })
	e.desired.start(e.pods)
	group, ctx := errgroup.WithContext(ctx)
	for name, run := range map[string]func(context.Context) error{
		"pods":          e.runPods,
		"probes":        e.probes.Run,
		"images":        e.images.Run,
		"log rotation":  e.rotator.Run,
		"node status":   e.watchNode,
		"local socket":  e.serveLocal,
		"link":          e.keepLink,
		"store":         e.watchStore,
		"service state": e.notifySystemd,
	} {
		group.Go(func() error {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	err := group.Wait()
	e.outbox.flush()
	e.log.Info("edgelet stops; its pods go on", "err", err)
	return errors.Join(err, e.runtime.Close(), e.db.Close())
}

// runPods runs the pod engine. A store that has lost something does not know all
// pods that may run here: then nothing is touched until the provider has said that
// it has sent everything, however often the edgelet is started before.
func (e *Edgelet) runPods(ctx context.Context) error {
	state := store.NewTable[bool](e.db, "state")
	const incomplete = "incomplete"
	if damage := e.db.Damage(); e.db.Fresh() || len(damage) > 0 {
		if err := state.Put(incomplete, true); err != nil {
			return err
		}
	}
	if waiting, err := state.Get(incomplete); err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	} else if waiting {
		e.log.Error("the store has lost something: pods are left alone until the provider has sent the desired set", "damage", e.db.Damage())
		select {
		case <-ctx.Done():
			return nil
		case <-e.complete:
		}
		if err := state.Delete(incomplete); err != nil {
			return err
		}
		e.log.Info("the desired set is complete again")
	}
	return e.pods.Run(ctx)
}

// watchStore ends the edgelet when its store has failed: systemd starts it again,
// and opening the store repairs what can be repaired.
func (e *Edgelet) watchStore(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-e.db.Failed():
		return errors.New("the store has failed")
	}
}

// watchNode keeps the node's status fresh.
func (e *Edgelet) watchNode(ctx context.Context) error {
	return e.node.Run(ctx, func(status edge.NodeStatus) {
		status.Labels = e.config.Labels
		e.facts.Store(&status)
		e.outbox.SetNode(status)
	})
}

// firstLook learns what the machine is before the parts ask. The runtime may be
// down; what only it knows comes later.
func (e *Edgelet) firstLook() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	status, err := e.node.Status(ctx)
	if err != nil {
		return fmt.Errorf("look at the machine: %w", err)
	}
	e.facts.Store(&status)
	return nil
}

func (e *Edgelet) addresses() []string              { return e.facts.Load().Addresses }
func (e *Edgelet) allocatable() corev1.ResourceList { return e.facts.Load().Allocatable }

// runtimeName is the scheme of container IDs, as containerd.
func (e *Edgelet) runtimeName() string {
	name, _, _ := strings.Cut(e.facts.Load().Info.ContainerRuntimeVersion, "://")
	return cmp.Or(name, "containerd")
}

// cgroupDriver is the runtime's, which must be asked while it is up.
func (e *Edgelet) cgroupDriver() string {
	if driver := e.driver.Load(); driver != nil {
		return *driver
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	driver, err := e.runtime.CgroupDriver(ctx)
	if err != nil {
		return "" // the pod engine's default; asked again next time
	}
	e.driver.Store(new(string(driver)))
	return string(driver)
}

// was is what the last stored status says of a container, so that its probes go on
// from there.
func (o *outbox) was(uid types.UID, container, containerID string) (started, ready bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	status := o.pods[uid].Status
	for _, c := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses) {
		if c.Name == container && c.State.Running != nil && filepath.Base(c.ContainerID) == containerID {
			return c.Started != nil && *c.Started, c.Ready
		}
	}
	return false, false
}

// times keeps the image parts' memory in the store.
type times struct {
	table *store.Table[map[string]time.Time]
}

func (t times) Load(key string) (map[string]time.Time, error) {
	value, err := t.table.Get(key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return value, err
}

func (t times) Save(key string, value map[string]time.Time) error { return t.table.Put(key, value) }

// events is the store's queue as the outbox sees it.
type events struct{ *store.Queue[edge.Event] }

func (q events) PushAll(list []edge.Event) error {
	_, err := q.Queue.PushAll(list)
	return err
}

func (q events) Peek(limit int) ([]queuedEvent, error) {
	items, err := q.Queue.Peek(limit)
	queued := make([]queuedEvent, len(items))
	for i, item := range items {
		queued[i] = queuedEvent{item.Seq, item.Value}
	}
	return queued, err
}

// objectTables is the desired set in the store: a table for each kind, those of
// Secrets and tokens sealed. Objects of kinds that only a newer provider knows are
// kept too, sealed, and mean nothing here: refusing them would refuse the pods
// that come with them.
type objectTables struct {
	db     *store.DB
	tables map[string]*store.Table[edge.Object] // by kind
	other  *store.Table[edge.Object]
}

func newObjectTables(db *store.DB) *objectTables {
	t := &objectTables{
		db: db, tables: map[string]*store.Table[edge.Object]{},
		other: store.NewSealedTable[edge.Object](db, "sealed/desired/other"),
	}
	for _, kind := range []string{edge.KindPod, edge.KindConfigMap, edge.KindServices, edge.KindCluster, edge.KindNode, edge.KindRuntimeClass} {
		t.tables[kind] = store.NewTable[edge.Object](db, "desired/"+kind)
	}
	for _, kind := range []string{edge.KindSecret, edge.KindToken} {
		t.tables[kind] = store.NewSealedTable[edge.Object](db, "sealed/desired/"+kind)
	}
	return t
}

// All implements objectStore.
func (t *objectTables) All() (map[string]edge.Object, error) {
	all, err := t.other.All()
	if err != nil {
		return nil, fmt.Errorf("other kinds: %w", err)
	}
	for kind, table := range t.tables {
		objects, err := table.All()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kind, err)
		}
		maps.Copy(all, objects) // over what an older version has kept as another kind
	}
	return all, nil
}

// Write implements objectStore.
func (t *objectTables) Write(put map[string]edge.Object, remove []string) error {
	return t.db.Update(func(tx *store.Tx) error {
		for key, o := range put {
			if err := cmp.Or(t.tables[o.Kind], t.other).PutTx(tx, key, o); err != nil {
				return err
			}
		}
		for _, name := range remove {
			key, err := edge.ParseKey(name)
			if err != nil {
				return err
			}
			if table := t.tables[key.Kind]; table != nil {
				err = table.DeleteTx(tx, name)
			}
			// An older version may have kept it as another kind.
			if err := errors.Join(err, t.other.DeleteTx(tx, name)); err != nil {
				return err
			}
		}
		return nil
	})
}
