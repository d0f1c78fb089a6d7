// Package image makes images present on a machine and removes those that nothing
// needs any more.
//
// A [Manager] pulls by the rules of a kubelet: pull policies, pull secrets, back-off
// per pod and image, with the events and error texts that users know. Pods that
// want the same image with the same credentials share one pull.
//
// One rule is the edge's own: a pod with policy Always whose image has been pulled
// for this very pod before starts with what is present when the registry cannot be
// reached, since a site must come back from a power cut without a network.
//
// A [Collector] frees the image file system, the longest unused image first.
package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime is the part of CRI that pulls images.
type Runtime interface {
	PullImage(ctx context.Context, image *cri.ImageSpec, auth *cri.AuthConfig, sandbox *cri.PodSandboxConfig) (ref string, err error)
	ImageStatus(ctx context.Context, image *cri.ImageSpec) (*cri.Image, error) // nil if not present
}

// Config configures a manager. Every field but Runtime may be left zero.
type Config struct {
	Runtime    Runtime
	Memory     Memory        // what outlives the process; default nothing does
	Parallel   int           // pulls at once; default 3
	BackOff    time.Duration // after the first failure; default 10s, doubled with each
	MaxBackOff time.Duration // default 5m
	Log        *slog.Logger  // default slog.Default()
}

// An Image is a present image, and the user that it runs as unless told otherwise.
type Image = struct {
	Ref      string // what CreateContainer takes
	ID       string // digest reference for status.imageID
	UID      *int64 // numeric user of the image, if it names one
	Username string // user name of the image, if it names one instead
}

// A Manager makes images present. Its methods may be called concurrently.
type Manager struct {
	config  Config
	slots   chan struct{} // holds a token for each pull that runs
	backoff backOff
	grants  grants

	mu    sync.Mutex
	pulls map[string]*pull // guarded by mu; by image and credentials
}

// New makes a manager and reads what an earlier one remembered.
func New(config Config) (*Manager, error) {
	config.Parallel = cmp.Or(config.Parallel, 3)
	config.BackOff = cmp.Or(config.BackOff, 10*time.Second)
	config.MaxBackOff = cmp.Or(config.MaxBackOff, 5*time.Minute)
	config.Log = cmp.Or(config.Log, slog.Default())
	config.Memory = cmp.Or[Memory](config.Memory, forgetful{})
	granted, err := config.Memory.Load(grantsKey)
	if err != nil {
		return nil, fmt.Errorf("load image memory: %w", err)
	}
	return &Manager{
		config:  config,
		slots:   make(chan struct{}, config.Parallel),
		backoff: backOff{base: config.BackOff, limit: config.MaxBackOff, entries: map[string]*failure{}},
		grants:  grants{memory: config.Memory, times: granted},
		pulls:   map[string]*pull{},
	}, nil
}

// A request is what Ensure is asked for.
type request struct {
	name    string // as the pod has it
	spec    *cri.ImageSpec
	secrets []*corev1.Secret
	sandbox *cri.PodSandboxConfig
	event   func(kind, reason, message string)
	key     string // of the pod and the image
}

// Ensure makes an image present as policy wants it, and returns it. Policy may be
// empty: Always for the tag latest, else IfNotPresent. Errors are of type [*Error],
// unless ctx has ended.
func (m *Manager) Ensure(ctx context.Context, image string, policy corev1.PullPolicy, secrets []*corev1.Secret, sandbox *cri.PodSandboxConfig, event func(kind, reason, message string)) (Image, error) {
	full, err := withTag(image)
	if err != nil {
		message := fmt.Sprintf("Failed to apply default image tag %q: %v", clean(image), err)
		event(corev1.EventTypeWarning, "InspectFailed", message)
		return Image{}, m.fail(event, ReasonInvalidName, message)
	}
	if policy == "" {
		policy = corev1.PullIfNotPresent
		if strings.HasSuffix(full, ":latest") {
			policy = corev1.PullAlways
		}
	}
	r := request{
		name: image, secrets: secrets, sandbox: sandbox, event: event,
		spec: &cri.ImageSpec{Image: full, UserSpecifiedImage: image, Annotations: sandbox.GetAnnotations()},
		key:  sandbox.GetMetadata().GetUid() + "/" + full,
	}
	if policy != corev1.PullAlways {
		present, err := m.config.Runtime.ImageStatus(ctx, r.spec)
		switch {
		case ctx.Err() != nil:
			return Image{}, context.Cause(ctx)
		case err != nil:
			message := fmt.Sprintf("Failed to inspect image %q: %v", image, clean(err.Error()))
			event(corev1.EventTypeWarning, "InspectFailed", message)
			return Image{}, m.fail(event, ReasonInspect, message)
		case present != nil:
			event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Container image %q already present on machine", image))
			return describe(present, full), nil
		case policy == corev1.PullNever:
			message := fmt.Sprintf("Container image %q is not present with pull policy of Never", image)
			event(corev1.EventTypeWarning, ReasonNeverPull, message)
			return Image{}, m.fail(event, ReasonNeverPull, message)
		}
	}
	pulled, err := m.pullFor(ctx, r)
	if failed := (*Error)(nil); policy == corev1.PullAlways && errors.As(err, &failed) && m.grants.has(r.key) {
		if present, _ := m.config.Runtime.ImageStatus(ctx, r.spec); present != nil {
			event(corev1.EventTypeWarning, "PulledStale", fmt.Sprintf("Using the present image %q, which was pulled for this pod before, as pulling fails: %v", image, failed))
			return describe(present, full), nil
		}
	}
	if failed := (*Error)(nil); errors.As(err, &failed) {
		event(corev1.EventTypeWarning, "Failed", "Error: "+failed.reason)
	}
	return pulled, err
}

// fail reports why a container cannot start, as a kubelet does beside the cause.
func (m *Manager) fail(event func(kind, reason, message string), reason, message string) error {
	event(corev1.EventTypeWarning, "Failed", "Error: "+reason)
	return &Error{reason: reason, message: message}
}

// pullFor pulls for one pod, unless the last failure is too recent.
func (m *Manager) pullFor(ctx context.Context, r request) (Image, error) {
	auths, err := credentials(r.secrets, r.spec.Image)
	if err != nil {
		// A kubelet pulls without a secret that it cannot read, too.
		m.config.Log.Warn("pull secret ignored", "image", r.name, "error", err)
	}
	key := r.key + "/" + fingerprint(auths)
	if last, waiting := m.backoff.waiting(key, time.Now()); waiting {
		message := fmt.Sprintf("Back-off pulling image %q", r.name)
		r.event(corev1.EventTypeNormal, "BackOff", message)
		return Image{}, &Error{reason: ReasonBackOff, message: fmt.Sprintf("%s: %s: %s", message, ReasonPull, last)}
	}
	r.event(corev1.EventTypeNormal, "Pulling", fmt.Sprintf("Pulling image %q", r.name))
	began := time.Now()
	result, err := m.shared(ctx, r, auths)
	if ctx.Err() != nil {
		return Image{}, context.Cause(ctx)
	}
	if err != nil {
		message := clean(err.Error())
		r.event(corev1.EventTypeWarning, "Failed", fmt.Sprintf("Failed to pull image %q: %s", r.name, message))
		m.backoff.failed(key, message, time.Now())
		return Image{}, &Error{reason: ReasonPull, message: message}
	}
	m.backoff.succeeded(key)
	if err := m.grants.add(r.key); err != nil {
		m.config.Log.Warn("image memory not saved", "error", err)
	}
	r.event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.",
		r.name, result.took.Truncate(time.Millisecond), time.Since(began).Truncate(time.Millisecond), result.image.Size))
	return describe(result.image, r.spec.Image), nil
}

// RetryNow forgets all back-offs: the network has changed.
func (m *Manager) RetryNow() { m.backoff.clear() }

// withTag adds the default tag to a reference that has neither tag nor digest. The
// rest stays as it was written, since short names are the runtime's to resolve.
func withTag(image string) (string, error) {
	parsed, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", fmt.Errorf("couldn't parse image reference %q: %w", clean(image), err)
	}
	if reference.IsNameOnly(parsed) {
		image += ":latest"
	}
	return image, nil
}

// describe takes from an image what containers need. Of several digests it takes
// that of the repository which was asked for.
func describe(image *cri.Image, name string) Image {
	out := Image{Ref: image.Id, ID: image.Id, Username: image.Username}
	if image.Uid != nil {
		out.UID = new(image.Uid.Value)
	}
	if len(image.RepoDigests) > 0 {
		out.ID = image.RepoDigests[0]
	}
	wanted, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return out
	}
	for _, digest := range image.RepoDigests {
		if has, err := reference.ParseNormalizedNamed(digest); err == nil && has.Name() == wanted.Name() {
			out.ID = digest
		}
	}
	return out
}
