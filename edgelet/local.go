package edgelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/edgelet/server"
	"github.com/skerry-io/skerry/edgelet/stats"
	"github.com/skerry-io/skerry/internal/version"
)

// StatusPath is where the local socket answers with a Status.
const StatusPath = "/skerry/v1/status"

// Status is how a site is doing.
type Status struct {
	Site, Server, Version string
	Started               time.Time
	Connected             bool
	Since                 time.Time // when the link came or went; zero: it never came
	LastError             string    // why it went
	RTT                   time.Duration
	Runtime               string // name and version
	Pods, Running         int
	CertificateExpires    time.Time
	StoreBytes            int64 // size of the store
	StoreWritten          int64 // bytes written to it since Started
}

// Status returns how the site is doing.
func (e *Edgelet) Status() Status {
	s := Status{
		Site: e.config.Site, Server: e.config.Server, Version: version.String(), Started: e.started,
		Runtime: e.facts.Load().Info.ContainerRuntimeVersion, CertificateExpires: e.identity.Certificate().NotAfter, StoreWritten: e.db.Written(),
	}
	s.StoreBytes, _ = e.db.Size() // 0 if it can't be told
	for _, p := range e.pods.Pods() {
		s.Pods++
		if p.Status.Phase == corev1.PodRunning {
			s.Running++
		}
	}
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	s.Since = e.link.since
	if e.link.session != nil {
		s.Connected, s.RTT = true, e.link.session.RTT()
	} else if e.link.lastError != nil {
		s.LastError = e.link.lastError.Error()
	}
	return s
}

// kubeletAPI is the kubelet API of this site.
func (e *Edgelet) kubeletAPI() http.Handler {
	return server.New(server.Config{
		Pods: e.pods, Streams: e.runtime, Logs: e.logs, Stats: usage{e.node},
		Sandbox: e.sandbox, Exec: e.exec,
		Metrics:      promhttp.HandlerFor(e.config.Registerer, promhttp.HandlerOpts{}),
		ProbeMetrics: e.probes.WriteMetrics,
		Configz:      func() any { return e.config },
		Log:          e.log,
	})
}

// usage is what the kubelet API serves of the machine's use.
type usage struct{ *stats.Node }

func (u usage) ResourceMetrics(ctx context.Context, w io.Writer) error {
	summary, err := u.Summary(ctx)
	return stats.WriteResourceMetrics(w, summary, err)
}

// sandbox is the running sandbox of a pod.
func (e *Edgelet) sandbox(ctx context.Context, uid types.UID) (string, error) {
	list, err := e.runtime.ListPodSandbox(ctx)
	if err != nil {
		return "", err
	}
	for _, s := range list {
		if s.Metadata.GetUid() == string(uid) && s.State == runtime.PodSandboxState_SANDBOX_READY {
			return s.Id, nil
		}
	}
	return "", fmt.Errorf("pod %s has no running sandbox", uid)
}

// serveLocal serves the kubelet API and the status on a socket for root.
func (e *Edgelet) serveLocal(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(e.config.Socket), 0o700); err != nil {
		return err
	}
	if err := os.Remove(e.config.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", e.config.Socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(e.config.Socket, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+StatusPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(e.Status()) // an error means that the reader has gone
	})
	mux.Handle("/", e.kubeletAPI())
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// notifySystemd tells systemd, if that has started the edgelet, that it runs, and
// goes on telling it for the watchdog.
func (e *Edgelet) notifySystemd(ctx context.Context) error {
	if sent, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil || !sent {
		return err
	}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return err
	}
	if interval == 0 {
		interval = time.Hour
	}
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
			return err
		case <-tick.C:
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
				return err
			}
		}
	}
}
