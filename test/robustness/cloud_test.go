//go:build e2e

package robustness

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/test/containerd"
	"github.com/skerry-io/skerry/test/lab"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
	"github.com/skerry-io/skerry/tunnel/bootstrap/bootstraptest"
)

// attackedMemory is what an edgelet may use, in bytes, while its own provider sends
// the largest bodies that it takes, of 16 MiB, which are decoded whole.
const attackedMemory = 96 << 20

// A cloud is a provider of the test's own, that sends what no API server would let
// pass. It can also throw bytes at who dials.
type cloud struct {
	ca       *bootstrap.CA
	cert     *tls.Certificate
	listener net.Listener
	sessions chan *tunnel.Session

	mu       sync.Mutex // guards the following
	statuses map[types.UID]edge.PodStatus
	warnings map[types.UID]string // latest warning event of each pod
	welcome  func(net.Conn)       // in the place of a session, if set
}

// Report implements edge.Cloud.
func (c *cloud) Report(_ context.Context, report edge.Report) (edge.Ack, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ack := edge.Ack{Pods: map[types.UID]uint64{}}
	for _, s := range report.Pods {
		c.statuses[s.UID] = s
		ack.Pods[s.UID] = s.Seq
	}
	for _, e := range report.Events {
		ack.Events = max(ack.Events, e.Seq)
		if e.Type == corev1.EventTypeWarning {
			c.warnings[e.Object.UID] = e.Reason + ": " + e.Message
		}
	}
	if report.Node != nil {
		ack.Node = report.Node.Seq
	}
	return ack, nil
}

func (c *cloud) status(uid types.UID) corev1.PodStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.statuses[uid].Status
}

// outcome is what has become of a pod, as its status, an event or the edgelet's log
// says; an error if nothing says it yet.
func (c *cloud) outcome(uid types.UID, v *victim) (string, error) {
	s := c.status(uid)
	c.mu.Lock()
	warning := c.warnings[uid]
	c.mu.Unlock()
	if s.Phase == corev1.PodFailed || s.Phase == corev1.PodSucceeded {
		return fmt.Sprintf("%s: %s: %s", s.Phase, s.Reason, s.Message), nil
	}
	for _, c := range s.ContainerStatuses {
		if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return w.Reason + ": " + w.Message, nil
		}
		if c.State.Running != nil {
			return "it runs", nil
		}
	}
	if warning != "" {
		return "event: " + warning, nil
	}
	log, err := os.ReadFile(v.process.Log())
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "pod not taken over") && strings.Contains(line, "uid="+cmp.Or(string(uid), `""`)+" ") {
			return "log: " + line[strings.Index(line, "err="):], nil
		}
	}
	return "", errors.Join(err, fmt.Errorf("phase %q, reason %q, containers %v", s.Phase, s.Reason, s.ContainerStatuses))
}

// Accept implements net.Listener for the tunnel's server: connections that are to be
// treated badly do not get there.
func (c *cloud) Accept() (net.Conn, error) {
	for {
		conn, err := c.listener.Accept()
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		welcome := c.welcome
		c.mu.Unlock()
		if welcome == nil {
			return conn, nil
		}
		go welcome(conn)
	}
}

func (c *cloud) Close() error   { return c.listener.Close() }
func (c *cloud) Addr() net.Addr { return c.listener.Addr() }

func (c *cloud) greet(welcome func(net.Conn)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.welcome = welcome
}

// startCloud serves until the test ends, and returns a token for a site.
func startCloud(t *testing.T, site string) (c *cloud, token string) {
	t.Helper()
	c = &cloud{sessions: make(chan *tunnel.Session, 16), statuses: map[types.UID]edge.PodStatus{}, warnings: map[types.UID]string{}}
	var err error
	if c.ca, err = bootstrap.NewCA(time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if c.cert, err = c.ca.IssueServer([]string{"127.0.0.1"}, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	keeper := &bootstraptest.Memory{}
	quiet := slog.New(slog.DiscardHandler)
	joining, err := bootstrap.NewHandler(bootstrap.HandlerConfig{CA: c.ca, Tokens: keeper, Authority: keeper, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	if c.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	server := &tunnel.Server{
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*c.cert}, ClientCAs: c.ca.Pool()},
		Authenticate: func(s *tls.ConnectionState) (string, error) {
			return bootstrap.SiteFromCertificate(s.PeerCertificates[0])
		},
		Use: func(ctx context.Context, s *tunnel.Session) {
			mux := http.NewServeMux()
			edge.HandleCloud(mux, c)
			c.sessions <- s
			s.Serve(ctx, mux)
		},
		HTTP: joining, Log: quiet,
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("tunnel: %v", err)
		}
	})
	return c, keeper.Token(site, false, time.Hour)
}

// session is the next that the site opens.
func (c *cloud) session(t *testing.T) *tunnel.Session {
	t.Helper()
	for {
		select {
		case s := <-c.sessions:
			if s.Err() == nil {
				return s
			}
		case <-time.After(90 * time.Second):
			t.Fatal("the site does not come back")
		}
	}
}

// A victim is an edgelet whose provider is hostile.
type victim struct {
	dir string

	process *cluster.Process
}

func startVictim(t *testing.T, c *cloud, site, token string) *victim {
	t.Helper()
	v := &victim{dir: filepath.Join(shared.Dir, site)}
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	runtime, err := containerd.Start(t.Context(), containerd.Options{Dir: filepath.Join(v.dir, "c"), Archives: []string{filepath.Join(shared.Dir, "images.tar")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if v.process != nil {
			v.process.Stop(10 * time.Second)
		}
		if err := runtime.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	program, config := filepath.Join(*binaries, "edgelet"), filepath.Join(v.dir, "edgelet.yaml")
	if *binaries == "" {
		program = filepath.Join(lab.Root(), "bin", "edgelet")
	}
	out, err := exec.CommandContext(t.Context(), program, "join", "https://"+c.listener.Addr().String(), "--token", token, "--ca-cert-hash", c.ca.Pin(), "--site", site,
		"--data-dir="+filepath.Join(v.dir, "data"), "--config="+config, "--socket="+v.socket(), "--runtime-endpoint="+runtime.Endpoint,
		"--log-dir="+filepath.Join(v.dir, "logs"), "--start=false").CombinedOutput()
	if err != nil {
		t.Fatalf("edgelet join: %v: %s", err, out)
	}
	if v.process, err = shared.Cluster.Run("edgelet-"+site, program, "run", "--config="+config); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *victim) socket() string { return filepath.Join(v.dir, "s.sock") }

// ps is what the edgelet says at the site: it is well if that is soon.
func (v *victim) ps(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	program := fmt.Sprintf("/proc/%d/exe", v.process.PID())
	if out, err := exec.CommandContext(ctx, program, "ps", "--socket="+v.socket()).CombinedOutput(); err != nil {
		t.Errorf("edgelet ps: %v: %s", err, out)
	}
	if err := alive(v.process); err != nil {
		t.Error(err)
	}
}

// evil is in the name of all that may not appear outside of the edgelet's folders.
const evil = "evil-7c1e"

// A bad pod and what becomes of it: refused with the whole change, or taken and not
// run, or run where nothing is bad about it that leads anywhere.
type bad struct {
	name   string
	change func(*corev1.Pod)
	more   []edge.Object // that it refers to
}

func mount(v corev1.VolumeSource, m corev1.VolumeMount) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		m.Name = "v"
		if m.MountPath == "" {
			m.MountPath = "/v"
		}
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: v}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{m}
	}
}

func badPods(dir string) []bad {
	up := strings.Repeat("../", 14)
	empty := corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}
	out := up + strings.TrimPrefix(dir, "/") + "/" + evil // a path that leads out, to where it would be found
	config := func(name string, keys map[string]string) edge.Object {
		o, err := edge.NewObject(edge.Key{Kind: edge.KindConfigMap, Namespace: "default", Name: name}, "1",
			corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: keys})
		if err != nil {
			panic(err) // a ConfigMap can be encoded
		}
		return o
	}
	from := func(name string, items ...corev1.KeyToPath) corev1.VolumeSource {
		return corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Items: items}}
	}
	field := &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}
	list := []bad{
		{"subPath", mount(empty, corev1.VolumeMount{SubPath: out}), nil},
		{"subPath absolute", mount(empty, corev1.VolumeMount{SubPath: "/etc"}), nil},
		{"subPath dots within", mount(empty, corev1.VolumeMount{SubPath: "a/../../" + evil}), nil},
		{"subPathExpr", func(p *corev1.Pod) {
			mount(empty, corev1.VolumeMount{SubPathExpr: "$(WHERE)"})(p)
			p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "WHERE", Value: out}}
		}, nil},
		{"volume name", func(p *corev1.Pod) {
			mount(empty, corev1.VolumeMount{})(p)
			p.Spec.Volumes[0].Name, p.Spec.Containers[0].VolumeMounts[0].Name = out, out
		}, nil},
		{"container name", func(p *corev1.Pod) { p.Spec.Containers[0].Name = out }, nil},
		{"container name with zero", func(p *corev1.Pod) { p.Spec.Containers[0].Name = "a\x00b" }, nil},
		{"pod name", func(p *corev1.Pod) { p.Name = out }, nil},
		{"namespace", func(p *corev1.Pod) { p.Namespace = out }, nil},
		{"uid", func(p *corev1.Pod) { p.UID = types.UID(out) }, nil},
		{"uid dots", func(p *corev1.Pod) { p.UID = ".." }, nil},
		{"uid empty", func(p *corev1.Pod) { p.UID = "" }, nil},
		{"item path", mount(from("items", corev1.KeyToPath{Key: "key", Path: out}), corev1.VolumeMount{}), []edge.Object{config("items", map[string]string{"key": evil})}},
		{"item path absolute", mount(from("items", corev1.KeyToPath{Key: "key", Path: filepath.Join(dir, evil)}), corev1.VolumeMount{}), nil},
		{"item path reserved", mount(from("items", corev1.KeyToPath{Key: "key", Path: "..data/" + evil}), corev1.VolumeMount{}), nil},
		{"key of a ConfigMap", mount(from("keys"), corev1.VolumeMount{}), []edge.Object{config("keys", map[string]string{out: evil})}},
		{"name of a ConfigMap", mount(from(out), corev1.VolumeMount{}), []edge.Object{config(out, map[string]string{"key": evil})}},
		{"projected path", mount(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{DownwardAPI: &corev1.DownwardAPIProjection{
			Items: []corev1.DownwardAPIVolumeFile{{Path: out, FieldRef: field}}}}}}}, corev1.VolumeMount{}), nil},
		{"downward path", mount(corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{{Path: out, FieldRef: field}}}}, corev1.VolumeMount{}), nil},
		{"terminationMessagePath", func(p *corev1.Pod) { p.Spec.Containers[0].TerminationMessagePath = up + evil }, nil},
		{"hostPath with dots", mount(corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: dir + "/../" + evil, Type: new(corev1.HostPathDirectoryOrCreate)}}, corev1.VolumeMount{}), nil},
		{"hostname", func(p *corev1.Pod) { p.Spec.Hostname = "a\n127.0.0.1 " + evil }, nil},
		{"host alias", func(p *corev1.Pod) {
			p.Spec.HostAliases = []corev1.HostAlias{{IP: "1.1.1.1\n2.2.2.2", Hostnames: []string{out}}}
		}, nil},
		{"two containers of one name", func(p *corev1.Pod) { p.Spec.Containers = append(p.Spec.Containers, p.Spec.Containers[0]) }, nil},
		{"a mount of no volume", func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "none", MountPath: "/v"}}
		}, nil},
		{"a huge name", func(p *corev1.Pod) { p.Name = strings.Repeat("x", 1<<20) }, nil},
		{"a huge environment", func(p *corev1.Pod) {
			for i := range 2000 {
				p.Spec.Containers[0].Env = append(p.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprintf("E%d", i), Value: strings.Repeat("$(E0)", 200)})
			}
		}, nil},
		{"no image", func(p *corev1.Pod) { p.Spec.Containers[0].Image = "" }, nil},
		{"an image that is none", func(p *corev1.Pod) { p.Spec.Containers[0].Image = up + "etc/passwd" }, nil},
	}
	return list
}

func podOf(i int, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("pod-%d", i), UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", i))},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: new(int64(1)), DNSPolicy: corev1.DNSDefault,
			Containers: []corev1.Container{{
				Name: "main", Image: lab.Busybox, ImagePullPolicy: corev1.PullNever, TerminationMessagePath: "/dev/termination-log", TerminationMessagePolicy: corev1.TerminationMessageReadFile,
				Command: []string{"sh", "-c", "find /v -maxdepth 3 2>/dev/null; trap exit TERM; sleep 1000 & wait $!"},
			}},
		},
	}
	if change != nil {
		change(p)
	}
	return p
}

func object(t *testing.T, p *corev1.Pod) edge.Object {
	t.Helper()
	o, err := edge.NewObject(edge.Key{Kind: edge.KindPod, Namespace: p.Namespace, Name: p.Name, UID: p.UID}, "1", p)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestBadProvider joins an edgelet to a provider that sends pods which the API server
// would never let pass, malformed contract, and noise.
func TestBadProvider(t *testing.T) {
	const site = "victim"
	c, token := startCloud(t, site)
	v := startVictim(t, c, site, token)
	stop := watchMemory(t, v.process.PID())
	session := c.session(t)
	basics := edge.Changes{}
	for _, o := range []struct {
		key   edge.Key
		value any
	}{
		{edge.Key{Kind: edge.KindCluster}, edge.Cluster{}},
		{edge.Key{Kind: edge.KindServices, Namespace: "default"}, []edge.Service{}},
		{edge.Key{Kind: edge.KindNode, Name: site}, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: site}}},
	} {
		made, err := edge.NewObject(o.key, "1", o.value)
		if err != nil {
			t.Fatal(err)
		}
		basics.Upserts = append(basics.Upserts, made)
	}
	good := podOf(0, nil)
	basics.Upserts = append(basics.Upserts, object(t, good))
	if err := edge.NewEdgeClient(session).Apply(t.Context(), basics); err != nil {
		t.Fatal(err)
	}
	running := func(uid types.UID) error {
		if s := c.status(uid); s.Phase != corev1.PodRunning {
			return fmt.Errorf("it is %q %s %s", s.Phase, s.Reason, s.Message)
		}
		return nil
	}
	until(t, 60*time.Second, "a good pod runs", func() error { return running(good.UID) })

	t.Run("pods", func(t *testing.T) { sendBadPods(t, c, v, session) })
	t.Run("contract", func(t *testing.T) { sendBadContract(t, v, session) })
	t.Run("bytes", func(t *testing.T) { throwAtEdgelet(t, c, v, session) })

	session = c.session(t)
	last := podOf(999, nil)
	if err := edge.NewEdgeClient(session).Apply(t.Context(), edge.Changes{Upserts: []edge.Object{object(t, last)}}); err != nil {
		t.Errorf("after all that: %v", err)
	}
	until(t, 60*time.Second, "a good pod runs after all that", func() error { return running(last.UID) })
	if err := running(good.UID); err != nil {
		t.Errorf("the first good pod: %v", err)
	}
	most := stop()
	t.Logf("the edgelet's memory was %d MiB at most", most>>20)
	if most > attackedMemory {
		t.Errorf("the edgelet's memory was %d MiB, at most %d are allowed", most>>20, attackedMemory>>20)
	}
	v.ps(t)
}

// sendBadPods sends each bad pod, waits for a clear result, and looks for what may
// have come of it elsewhere.
func sendBadPods(t *testing.T, c *cloud, v *victim, session *tunnel.Session) {
	site := edge.NewEdgeClient(session)
	sent := map[types.UID]string{}
	for i, b := range badPods(v.dir) {
		p := podOf(i+1, b.change)
		err := site.Apply(t.Context(), edge.Changes{Upserts: append(slices.Clone(b.more), object(t, p))})
		switch {
		case err == nil:
			sent[p.UID] = b.name
		case errors.Is(err, edge.ErrInvalid):
			t.Logf("%s: refused: %.200s", b.name, strings.ReplaceAll(err.Error(), v.dir, "DIR"))
		default:
			t.Errorf("%s: %v: not said to be invalid", b.name, err)
		}
		v.ps(t)
	}
	waiting := maps.Clone(sent)
	err := shared.Until(t.Context(), 45*time.Second, "a result of each", func() (err error) {
		for uid, name := range waiting {
			result, missing := c.outcome(uid, v)
			if missing != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", name, missing))
				continue
			}
			delete(waiting, uid)
			t.Logf("%s: %.300s", name, strings.ReplaceAll(result, v.dir, "DIR"))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	lookForEvil(t, v)
	var removals []edge.Key
	for i, b := range badPods(v.dir) {
		if p := podOf(i+1, b.change); sent[p.UID] != "" {
			removals = append(removals, edge.Key{Kind: edge.KindPod, Namespace: p.Namespace, Name: p.Name, UID: p.UID})
		}
	}
	if err := site.Apply(t.Context(), edge.Changes{Removals: removals}); err != nil {
		t.Errorf("removal: %v", err)
	}
	lookForEvil(t, v)
}

// lookForEvil looks for files where no pod may make any. Below the folders of pods
// and logs anything may be; not what those names lead to from there.
func lookForEvil(t *testing.T, v *victim) {
	t.Helper()
	for _, dir := range []string{"/", "/tmp", "/etc", "/var", "/var/log", "/run", shared.Dir, v.dir, filepath.Join(v.dir, "data"), filepath.Join(v.dir, "logs"), filepath.Join(v.dir, "data", "pods")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range entries {
			if strings.Contains(e.Name(), evil) {
				t.Errorf("there is %s", filepath.Join(dir, e.Name()))
			}
		}
	}
}

// sendBadContract sends what is no contract.
func sendBadContract(t *testing.T, v *victim, session *tunnel.Session) {
	for name, body := range map[string]string{
		"nothing": "", "null": "null", "no object": "[]", "half an object": `{"upserts":[`, "wrong types": `{"upserts":"x"}`,
		"no kind": `{"upserts":[{}]}`, "an unknown kind": `{"upserts":[{"kind":"../..","name":"../../x","version":"1","data":{}}]}`,
		"a pod that is none": `{"upserts":[{"kind":"Pod","namespace":"a","name":"b","uid":"c","version":"1","data":"x"}]}`,
		"another pod's data": `{"upserts":[{"kind":"Pod","namespace":"a","name":"b","uid":"c","version":"1","data":{"metadata":{"namespace":"a","name":"b","uid":"d"}}}]}`,
		"deeply nested":      strings.Repeat(`{"upserts":[`, 100000), "deeply nested data": `{"upserts":[{"kind":"ConfigMap","namespace":"a","name":"b","version":"1","data":` + strings.Repeat("[", 1<<20) + `}]}`,
		"more than is allowed": `{"upserts":[{"kind":"ConfigMap","name":"` + strings.Repeat("x", 17<<20) + `"}]}`,
		"removal of all":       `{"removals":[{}]}`,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://site/skerry/v1/changes", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := session.RoundTrip(req)
		if err != nil {
			t.Errorf("%s: %v, not an answer", name, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode >= 500 {
			t.Errorf("%s: %s", name, resp.Status)
		}
		t.Logf("%s: %s", name, resp.Status)
	}
	for _, path := range []string{"/containerLogs/../../etc/passwd", "/containerLogs/default/%2e%2e%2f%2e%2e/main", "/logs/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/exec/default/pod-0/main", "/attach/default/none/main", "/portForward/default/pod-0", "/x"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://site"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := session.RoundTrip(req)
		if err != nil {
			t.Errorf("%s: %v, not an answer", path, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode < 300 || resp.StatusCode >= 500 {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	v.ps(t)
}

// throwAtEdgelet answers the edgelet's dialing with what no provider says.
func throwAtEdgelet(t *testing.T, c *cloud, v *victim, session *tunnel.Session) {
	random := rand.New(rand.NewPCG(*seed, 4))
	before := early(clientHello(t), random)
	after := late(random)
	for _, m := range []missile{{"the server's side of yamux", append(frame(0, window, syn, 2, 0, ""), noise(random, 2000)...), true}, {"streams of its own", append(frame(0, window, syn, 2, 0, ""), frame(0, data, syn, 4, 0xffffff, "x")...), true}} {
		after = append(after, m)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*c.cert}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{tunnel.ALPN}}
	var mu sync.Mutex
	dials, thrown := 0, map[bool]int{} // before and after the handshake
	c.greet(func(conn net.Conn) {
		mu.Lock()
		dials++
		early := dials%2 == 0
		m := before[random.IntN(len(before))]
		if !early {
			m = after[random.IntN(len(after))]
		}
		mu.Unlock()
		if !early {
			secure := tls.Server(conn, config)
			if secure.HandshakeContext(t.Context()) != nil {
				conn.Close()
				return
			}
			conn = secure
		}
		mu.Lock()
		thrown[early]++
		mu.Unlock()
		throw(conn, m, 200*time.Millisecond)
	})
	session.Close()
	until(t, 90*time.Second, "enough has been thrown", func() error {
		mu.Lock()
		defer mu.Unlock()
		if thrown[true] < 6 || thrown[false] < 2 {
			return fmt.Errorf("%v in %d dials", thrown, dials)
		}
		return nil
	})
	c.greet(nil)
	mu.Lock()
	t.Logf("%d dials, %d met noise before the handshake, %d after", dials, thrown[true], thrown[false])
	mu.Unlock()
	v.ps(t)
}
