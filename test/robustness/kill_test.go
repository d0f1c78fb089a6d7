//go:build e2e

package robustness

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/test/cluster"
	"github.com/skerry-io/skerry/test/lab"
)

// faultRounds is how often something is killed; each of the four at least twice.
const faultRounds = 12

// witness is the command of every container: it writes down that it has started. A
// job's ends by itself; the others when they are told to.
const witness = `
            echo start >> /witness/$POD_UID
            trap 'exit 0' TERM
            sleep $LIFE & wait $!`

// podSpec is what all workloads have in common.
const podSpec = `
      nodeSelector: {skerry.io/site: $SITE}
      terminationGracePeriodSeconds: 20
      restartPolicy: $POLICY
      automountServiceAccountToken: false
      volumes: [{name: witness, hostPath: {path: $DIR, type: Directory}}]
      containers:
        - name: main
          image: ` + lab.Busybox + `
          env:
            - {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
            - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: LIFE, value: "$LIFE"}
          volumeMounts: [{name: witness, mountPath: /witness}]
          command:
          - sh
          - -c
          - |` + witness

const deployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:` + podSpec

const statefulSet = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  replicas: 1
  serviceName: db
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:` + podSpec

const job = `
apiVersion: batch/v1
kind: Job
metadata: {name: $NAME}
spec:
  completions: 2
  parallelism: 2
  backoffLimit: 50
  template:
    metadata: {labels: {app: job}}
    spec:` + podSpec

const lastPod = `
apiVersion: v1
kind: Pod
metadata: {name: last}
spec:` + podSpec

// A storm is pods that are made and deleted all the time while parts are killed.
type storm struct {
	ns      string
	site    *lab.Site
	dir     string // where the containers write
	random  *rand.Rand
	record  *recorder
	jobs    int
	changes map[string]int // how many of each kind were made
}

func (s *storm) expand(manifest, policy, life string) string {
	return strings.NewReplacer("$SITE", s.site.Name, "$DIR", s.dir, "$POLICY", policy, `"$LIFE"`, `"`+life+`"`, "$NAME", fmt.Sprintf("job-%d", s.jobs)).Replace(manifest)
}

// churn makes changes until ctx is done. What fails because the API server is away
// has failed: the next change comes.
func (s *storm) churn(ctx context.Context) {
	for ctx.Err() == nil {
		change := []struct {
			name string
			do   func(context.Context) error
		}{
			{"deployment scaled", func(ctx context.Context) error { return s.scale(ctx, "deployments", "web", s.random.IntN(5)) }},
			{"statefulset scaled", func(ctx context.Context) error { return s.scale(ctx, "statefulsets", "db", s.random.IntN(3)) }},
			{"job made", s.newJob},
			{"pod deleted", func(ctx context.Context) error { return s.deletePod(ctx, "app in (web, db)", false) }},
			{"pod deleted by force", func(ctx context.Context) error { return s.deletePod(ctx, "app=web", true) }},
		}[s.random.IntN(5)]
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		if err := change.do(call); err == nil {
			s.changes[change.name]++
		}
		cancel()
		pause(ctx, time.Duration(s.random.IntN(700))*time.Millisecond)
	}
}

func (s *storm) scale(ctx context.Context, kind, name string, n int) error {
	return admin.AppsV1().RESTClient().Patch(types.MergePatchType).Namespace(s.ns).Resource(kind).Name(name).
		Body(fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, n)).Do(ctx).Error()
}

func (s *storm) newJob(ctx context.Context) error {
	if s.jobs == 15 {
		return errors.New("enough")
	}
	s.jobs++
	life := fmt.Sprintf("%.1f", s.random.Float64()*3)
	_, err := shared.KubectlInput(ctx, s.expand(job, "Never", life), "-n", s.ns, "apply", "-f", "-")
	return err
}

func (s *storm) deletePod(ctx context.Context, selector string, force bool) error {
	pods, err := admin.CoreV1().Pods(s.ns).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return err
	}
	if len(pods.Items) == 0 {
		return errors.New("there is none")
	}
	pod := pods.Items[s.random.IntN(len(pods.Items))]
	options := metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))}
	if force {
		s.record.force(string(pod.UID))
		options.GracePeriodSeconds = new(int64)
	}
	return admin.CoreV1().Pods(s.ns).Delete(ctx, pod.Name, options)
}

// A fault kills one part as kill -9 does, and starts it again.
type fault struct {
	name        string
	kill, start func(context.Context) error
}

// kill kills a process, and fails if it had ended by itself.
func kill(p *cluster.Process) error {
	if err := alive(p); err != nil {
		return err
	}
	p.Kill()
	return nil
}

// alive fails if a process has ended.
func alive(p *cluster.Process) error {
	select {
	case <-p.Done():
		return fmt.Errorf("%s has ended by itself:\n%s", filepath.Base(p.Log()), ending(p))
	default:
		return nil
	}
}

// ending is what a process has said last, from the beginning of a panic if it
// ended by one.
func ending(p *cluster.Process) string {
	data, _ := os.ReadFile(p.Log())
	text := string(data)
	for _, sign := range []string{"\npanic: ", "\nfatal error: "} {
		if i := strings.LastIndex(text, sign); i >= 0 {
			return text[i:min(len(text), i+6000)]
		}
	}
	return p.Tail()
}

func faults(site *lab.Site) []fault {
	return []fault{
		{"edgelet", func(context.Context) error { return kill(site.Edgelet) }, site.Run},
		{"provider", func(context.Context) error { return kill(shared.Provider) }, func(ctx context.Context) error { return shared.StartProvider(ctx) }},
		{"containerd", func(context.Context) error { return site.Containerd.Kill() }, site.Containerd.Run},
		{"kube-apiserver", func(context.Context) error { return kill(shared.Cluster.Process("kube-apiserver")) }, shared.Cluster.StartAPIServer},
	}
}

// strike kills the parts in turn, each at some moment, and some two at once.
func strike(t *testing.T, site *lab.Site, random *rand.Rand) {
	all := faults(site)
	begun := time.Now()
	for round := range faultRounds {
		if round%len(all) == 0 {
			random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		}
		struck := []fault{all[round%len(all)]}
		if round >= 2*len(all) { // the last rounds: two that depend on each other, or not
			struck = append(struck, all[(round+1)%len(all)])
		}
		pause(t.Context(), time.Duration(200+random.IntN(1800))*time.Millisecond)
		away := time.Duration(random.IntN(1500)) * time.Millisecond
		for _, f := range struck {
			t.Logf("%5.1f s: kill -9 %s, away for %s", time.Since(begun).Seconds(), f.name, away)
			if err := f.kill(t.Context()); err != nil {
				t.Fatalf("kill %s: %v", f.name, err)
			}
		}
		pause(t.Context(), away)
		// The provider's start asks the API server, so that comes first.
		slices.SortFunc(struck, func(a, b fault) int { return strings.Compare(a.name, b.name) })
		for _, f := range struck {
			if err := f.start(t.Context()); err != nil {
				t.Fatalf("start %s: %v", f.name, err)
			}
		}
	}
}

// supervise starts the scheduler and the controller manager again when they end, as
// a kubelet does with static pods, until ctx is done: both may end by themselves
// when they lose the API server, the scheduler for what it then finds in its cache.
func supervise(ctx context.Context) (wait func()) {
	var work sync.WaitGroup
	for _, name := range []string{"kube-scheduler", "kube-controller-manager"} {
		work.Go(func() {
			p := shared.Cluster.Process(name)
			line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID()))
			argv := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
			for err == nil {
				select {
				case <-ctx.Done():
					return
				case <-p.Done():
				}
				if pause(ctx, time.Second); ctx.Err() == nil {
					p, err = shared.Cluster.Run(name, argv...)
				}
			}
		})
	}
	return work.Wait
}

func TestKillsLoseNothing(t *testing.T) {
	needSites(t, 1)
	site := sites[0]
	ns := namespace(t)
	s := &storm{ns: ns, site: site, dir: t.TempDir(), random: rand.New(rand.NewPCG(*seed, 1)), record: record(t, ns, site), changes: map[string]int{}}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	apply(t, ns, s.expand(deployment, "Always", "100000"))
	apply(t, ns, s.expand(statefulSet, "Always", "100000"))
	ctx, cancel := context.WithCancel(t.Context())
	watch, unwatch := context.WithCancel(t.Context())
	supervised := supervise(watch)
	defer func() { unwatch(); supervised() }()
	churned := make(chan struct{})
	go func() { defer close(churned); s.churn(ctx) }()
	defer func() { cancel(); <-churned }()
	strike(t, site, rand.New(rand.NewPCG(*seed, 2)))
	cancel()
	<-churned
	for _, p := range []*cluster.Process{site.Edgelet, shared.Provider} {
		if err := alive(p); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("changes: %v", s.changes)

	// Controllers may take minutes to see that they have missed something while the
	// API server was away, so what must be there is what the API says, and a pod that
	// is bound by nobody's leave but the scheduler's.
	apply(t, ns, s.expand(lastPod, "Always", "100000"))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/last")
	until(t, 90*time.Second, "everything has settled", s.settled)
	s.judge(t)

	kubectl(t, "-n", ns, "delete", "deployments,statefulsets,jobs,pods", "--all", "--timeout=90s")
	until(t, 60*time.Second, "the runtime holds nothing any more", func() error {
		now, err := s.record.look(t.Context())
		if err == nil && len(now.Sandboxes)+len(now.Containers) > 0 {
			err = fmt.Errorf("%d sandboxes, %d containers", len(now.Sandboxes), len(now.Containers))
		}
		return err
	})
	s.judge(t)
}

// settled is nil when nothing is on its way any more, and the runtime and the machine
// run exactly what the API says.
func (s *storm) settled() error {
	list, err := admin.CoreV1().Pods(s.ns).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return err
	}
	pods := map[string]PodEvent{}
	for i := range list.Items {
		pod := &list.Items[i]
		e := eventOf(pod, time.Now(), false)
		if e.Deleting || !e.Bound || e.Phase == string(corev1.PodPending) || strings.HasPrefix(e.Name, "job-") && !Terminal(e.Phase) {
			return fmt.Errorf("pod %s (%s): %s, bound %v, deleting %v", e.Name, e.UID, e.Phase, e.Bound, e.Deleting)
		}
		pods[e.UID] = e
	}
	now, err := s.record.look(context.Background())
	if err != nil {
		return err
	}
	found := append(NoLostPod(pods, []Snapshot{now}), NoLostPod(pods, []Snapshot{processesNow()})...)
	if len(found) > 0 {
		return errors.New(strings.Join(found, "; "))
	}
	return nil
}

// judge checks what must hold at any time.
func (s *storm) judge(t *testing.T) {
	t.Helper()
	events, snapshots, processes := s.record.ledgers()
	last, starts := Last(events), map[string]int{}
	never := map[string]PodEvent{}
	for uid, e := range last {
		data, err := os.ReadFile(filepath.Join(s.dir, uid))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		n := strings.Count(string(data), "\n")
		switch {
		case strings.HasPrefix(e.Name, "job-"):
			never[uid], starts[uid] = e, n
		case n > 1 && e.Restarts["main"] == 0 && !e.Gone:
			t.Errorf("pod %s (%s): started %d times, which its restart count does not say", e.Name, uid, n)
		}
	}
	t.Logf("%d pods, %d of jobs, %d changes of them, %d looks at the runtime, %d at processes, %d lists", len(last), len(never), len(events), len(snapshots), len(processes), s.record.relists)
	report(t, "status going backwards", StatusMonotone(events))
	report(t, "run twice", SingleRun(snapshots))
	report(t, "run twice", SingleRun(processes))
	report(t, "two pods of one name", SingleRun(byName(processes, last)))
	report(t, "started twice", StartedOnce(starts, never))
	report(t, "forgotten too early", NoEarlyForget(events, snapshots))
	report(t, "forgotten too early", NoEarlyForget(events, processes))
	if len(last) < 15 || len(never) < 4 || len(snapshots) < 50 {
		t.Errorf("too little has happened for the checks to mean anything")
	}
}

// byName returns processes as those of pods' names: of a StatefulSet's pods only one
// of each name may run. Those deleted by force are left out.
func byName(processes []Snapshot, pods map[string]PodEvent) []Snapshot {
	var named []Snapshot
	for _, s := range processes {
		n := Snapshot{Began: s.Began, Ended: s.Ended}
		for _, c := range s.Containers {
			if p := pods[c.UID]; !p.Forced {
				n.Containers = append(n.Containers, Container{c.ID, p.Name, c.Name, c.Running})
			}
		}
		named = append(named, n)
	}
	return named
}

func report(t *testing.T, what string, found []string) {
	t.Helper()
	for _, f := range found {
		t.Errorf("%s: %s", what, strings.TrimSpace(f))
	}
}
