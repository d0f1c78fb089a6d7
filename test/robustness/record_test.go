//go:build e2e

package robustness

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/test/lab"
)

// A recorder writes the ledgers of one namespace and one site until it is stopped.
type recorder struct {
	namespace string
	client    cri.RuntimeServiceClient
	conn      *grpc.ClientConn
	cancel    context.CancelFunc
	work      sync.WaitGroup

	mu        sync.Mutex // guards the following
	events    []PodEvent
	snapshots []Snapshot      // of the runtime
	processes []Snapshot      // of the processes on this machine, whatever the runtime says
	forced    map[string]bool // UIDs of pods that a person deletes by force
	relists   int             // times that the watcher missed changes
}

func record(t *testing.T, namespace string, site *lab.Site) *recorder {
	t.Helper()
	conn, err := grpc.NewClient(site.Containerd.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &recorder{namespace: namespace, client: cri.NewRuntimeServiceClient(conn), conn: conn, cancel: cancel, forced: map[string]bool{}}
	r.work.Go(func() { r.watchPods(ctx) })
	r.work.Go(func() { r.watchRuntime(ctx) })
	r.work.Go(func() { r.watchProcesses(ctx) })
	t.Cleanup(r.stop)
	return r
}

func (r *recorder) stop() {
	r.cancel()
	r.work.Wait()
	r.conn.Close()
}

// ledgers returns what has been recorded so far.
func (r *recorder) ledgers() (events []PodEvent, runtime, processes []Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events), slices.Clone(r.snapshots), slices.Clone(r.processes)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// watchPods goes on from the last version that it saw as long as the API server
// still knows it; a restarted one does not, then everything is listed anew.
func (r *recorder) watchPods(ctx context.Context) {
	pods, version := admin.CoreV1().Pods(r.namespace), ""
	for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
		if version == "" {
			began := time.Now()
			list, err := pods.List(ctx, metav1.ListOptions{})
			if err != nil {
				continue
			}
			r.relisted(began, list.Items)
			version = list.ResourceVersion
		}
		w, err := pods.Watch(ctx, metav1.ListOptions{ResourceVersion: version})
		if err != nil {
			if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
				version = ""
			}
			continue
		}
		version = r.follow(ctx, w, version)
	}
}

// follow records until the watch ends and returns the last version that it saw,
// empty if the API server does not know it any more.
func (r *recorder) follow(ctx context.Context, w watch.Interface, version string) string {
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return version
		case e, ok := <-w.ResultChan():
			if !ok {
				return version
			}
			pod, isPod := e.Object.(*corev1.Pod)
			if !isPod {
				if err := apierrors.FromObject(e.Object); apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
					return ""
				}
				return version
			}
			version = pod.ResourceVersion
			r.add(eventOf(pod, time.Now(), e.Type == watch.Deleted))
		}
	}
}

func (r *recorder) add(e PodEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Forced = r.forced[e.UID]
	r.events = append(r.events, e)
}

// force is called before a pod is deleted by force.
func (r *recorder) force(uid string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forced[uid] = true
}

// relisted records what a list shows, and that what it does not show has gone.
func (r *recorder) relisted(began time.Time, pods []corev1.Pod) {
	present := map[string]bool{}
	for i := range pods {
		present[string(pods[i].UID)] = true
		r.add(eventOf(&pods[i], began, false))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.relists++
	for uid, e := range Last(r.events) {
		if !present[uid] && !e.Gone {
			e.At, e.Gone, e.Forced = time.Now(), true, r.forced[uid]
			r.events = append(r.events, e)
		}
	}
}

func eventOf(pod *corev1.Pod, at time.Time, gone bool) PodEvent {
	e := PodEvent{
		At: at, Gone: gone, UID: string(pod.UID), Name: pod.Name, Phase: string(pod.Status.Phase),
		Restarts: map[string]int32{}, Ended: map[string]int32{},
		Bound: pod.Spec.NodeName != "", Deleting: pod.DeletionTimestamp != nil,
	}
	if pod.Status.StartTime != nil {
		e.Start = pod.Status.StartTime.UTC().Format(time.RFC3339)
	}
	for _, c := range pod.Status.ContainerStatuses {
		e.Restarts[c.Name] = c.RestartCount
		if c.State.Terminated != nil && pod.Spec.RestartPolicy == corev1.RestartPolicyNever {
			e.Ended[c.Name] = c.State.Terminated.ExitCode
		}
	}
	return e
}

// watchRuntime looks at the runtime ten times a second, as long as it is up.
func (r *recorder) watchRuntime(ctx context.Context) {
	for ; ctx.Err() == nil; pause(ctx, 100*time.Millisecond) {
		if s, err := r.look(ctx); err == nil {
			r.mu.Lock()
			r.snapshots = append(r.snapshots, s)
			r.mu.Unlock()
		}
	}
}

// look takes a snapshot of the namespace's pods in the runtime.
func (r *recorder) look(ctx context.Context) (Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r.conn.ResetConnectBackoff()
	s := Snapshot{Began: time.Now()}
	sandboxes, err := r.client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return s, fmt.Errorf("list sandboxes: %w", err)
	}
	mine := map[string]string{}
	for _, sb := range sandboxes.Items {
		if sb.Metadata.Namespace == r.namespace {
			mine[sb.Id] = sb.Metadata.Uid
			s.Sandboxes = append(s.Sandboxes, Sandbox{sb.Id, sb.Metadata.Uid, sb.State == cri.PodSandboxState_SANDBOX_READY})
		}
	}
	containers, err := r.client.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return s, fmt.Errorf("list containers: %w", err)
	}
	for _, c := range containers.Containers {
		if uid, ok := mine[c.PodSandboxId]; ok {
			s.Containers = append(s.Containers, Container{c.Id, uid, c.Metadata.Name, c.State == cri.ContainerState_CONTAINER_RUNNING})
		}
	}
	s.Ended = time.Now()
	return s, nil
}

// watchProcesses looks at the processes twenty times a second.
func (r *recorder) watchProcesses(ctx context.Context) {
	for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
		s := processesNow()
		r.mu.Lock()
		r.processes = append(r.processes, s)
		r.mu.Unlock()
	}
}

// processesNow lists the first processes of containers that run witness.
func processesNow() Snapshot {
	s := Snapshot{Began: time.Now()}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		// What can't be read has ended meanwhile.
		line, _ := os.ReadFile(dir + "/cmdline")
		if !bytes.Contains(line, []byte("/witness/$POD_UID")) {
			continue
		}
		status, _ := os.ReadFile(dir + "/status")
		if !regexp.MustCompile(`(?m)^NSpid:.*\t1$`).Match(status) || bytes.Contains(status, []byte("State:\tZ")) {
			continue
		}
		environment, _ := os.ReadFile(dir + "/environ")
		for v := range bytes.SplitSeq(environment, []byte{0}) {
			if uid, ok := bytes.CutPrefix(v, []byte("POD_UID=")); ok {
				s.Containers = append(s.Containers, Container{filepath.Base(dir), string(uid), "main", true})
			}
		}
	}
	s.Ended = time.Now()
	return s
}
