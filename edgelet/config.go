package edgelet

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Config configures an edgelet. Every field but Site and Server may be left zero.
// It is what `edgelet join` writes and `edgelet run` reads.
type Config struct {
	Site   string `json:"site"`   // name of the site and of its Node
	Server string `json:"server"` // provider, as https://edge.example.com or host:port

	DataDir         string            `json:"dataDir,omitempty"`         // default /var/lib/edgelet; must survive reboots
	LogDir          string            `json:"logDir,omitempty"`          // logs of containers; default /var/log/pods
	Socket          string            `json:"socket,omitempty"`          // for local commands; default /run/edgelet/edgelet.sock
	RuntimeEndpoint string            `json:"runtimeEndpoint,omitempty"` // CRI, as unix:///run/containerd/containerd.sock; default the first that is found
	Transport       string            `json:"transport,omitempty"`       // way to the provider: auto (default), direct or http2
	Labels          map[string]string `json:"labels,omitempty"`          // of the Node
	MaxPods         int               `json:"maxPods,omitempty"`         // default 110

	// Reserved is what the machine keeps for itself, as cpu and memory; default
	// nothing.
	Reserved corev1.ResourceList `json:"reserved,omitempty"`

	// The following are set by the program.
	Log        *slog.Logger         `json:"-"` // default slog.Default()
	Registerer *prometheus.Registry `json:"-"` // of metrics; default a new one
}

// WithDefaults returns c with its defaults, or every problem found.
func (c Config) WithDefaults() (Config, error) {
	c.DataDir = cmp.Or(c.DataDir, "/var/lib/edgelet")
	c.LogDir = cmp.Or(c.LogDir, "/var/log/pods")
	c.Socket = cmp.Or(c.Socket, "/run/edgelet/edgelet.sock")
	c.Transport = cmp.Or(c.Transport, "auto")
	c.MaxPods = cmp.Or(c.MaxPods, 110)
	c.Log = cmp.Or(c.Log, slog.Default())
	c.Registerer = cmp.Or(c.Registerer, prometheus.NewRegistry())
	var errs []error
	if c.Site == "" || c.Server == "" {
		errs = append(errs, errors.New("site and server must be set: edgelet join writes them"))
	}
	for _, problem := range validation.IsDNS1123Subdomain(c.Site) {
		if c.Site != "" {
			errs = append(errs, fmt.Errorf("site %q: %s", c.Site, problem))
		}
	}
	for name, path := range map[string]string{"dataDir": c.DataDir, "logDir": c.LogDir, "socket": c.Socket} {
		if !filepath.IsAbs(path) {
			errs = append(errs, fmt.Errorf("%s %q: must be an absolute path", name, path))
		}
	}
	if c.MaxPods < 1 {
		errs = append(errs, fmt.Errorf("maxPods %d: must be at least 1", c.MaxPods))
	}
	for key, value := range c.Labels {
		for _, problem := range append(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)...) {
			errs = append(errs, fmt.Errorf("label %s=%s: %s", key, value, problem))
		}
	}
	return c, errors.Join(errs...)
}
