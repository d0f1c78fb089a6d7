package bootstrap

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/skerry-io/skerry/internal/backoff"
)

// RotatorConfig configures how a site keeps its certificate.
type RotatorConfig struct {
	Identity *Identity    // required
	Server   string       // https://HOST:PORT of the provider; required
	Dial     DialFunc     // default: TCP
	Renewed  func()       // called after each renewal, as when a refused dial may now work; may be nil
	Log      *slog.Logger // default slog.Default()
}

// A Rotator renews a site's certificate at about two thirds of its life, and for
// as long as it takes. It writes nothing else to disk.
type Rotator struct {
	id      *Identity
	server  remote // a template, see [Rotator.remote]
	renewed func()
	log     *slog.Logger
	nudge   chan struct{} // holds at most one

	// Owned by Run.
	asked time.Time     // when it last asked the provider
	gap   time.Duration // least time from then to the next check that is asked for
}

const (
	checkEvery = time.Hour   // the machine's clock may have been set meanwhile
	nudgeGap   = time.Minute // least time between checks that were asked for; it doubles
	nudgeLimit = 16          // times, as long as they find nothing, up to so many
)

// NewRotator returns a rotator; Run does its work.
func NewRotator(config RotatorConfig) (*Rotator, error) {
	if config.Identity == nil {
		return nil, errors.New("rotator: Identity is required")
	}
	remote, err := newRemote(config.Server, config.Dial, config.Log)
	if err != nil {
		return nil, fmt.Errorf("rotator: %w", err)
	}
	remote.site, remote.clock = config.Identity.site, config.Identity.clock
	return &Rotator{
		id:      config.Identity,
		server:  *remote,
		renewed: config.Renewed,
		log:     cmp.Or(config.Log, slog.Default()),
		nudge:   make(chan struct{}, 1),
		gap:     nudgeGap,
	}, nil
}

// remote returns the provider as the site trusts it now.
func (r *Rotator) remote() *remote {
	remote := r.server
	remote.trust = r.id.get().cas
	return &remote
}

// Nudge has the clock and the certificate checked soon. Call it when the provider
// could be reached but a TLS handshake with it failed: it may be for a wrong
// clock, or for a certificate that has expired meanwhile. It never blocks.
func (r *Rotator) Nudge() {
	select {
	case r.nudge <- struct{}{}:
	default:
	}
}

// Run keeps the certificate until ctx is done, which is no error.
func (r *Rotator) Run(ctx context.Context) error {
	nudged := false
	failures, last := 0, Code("")
	for {
		err := r.check(ctx, nudged)
		if ctx.Err() != nil {
			return nil
		}
		wait := min(max(r.id.due().Sub(r.id.Now()), time.Second), checkEvery)
		if err == nil {
			nudged, failures, last = false, 0, ""
		} else {
			last = r.complain(err, last)
			wait = retryAfter(err, failures)
			failures++
		}
		if nudge, err := r.wait(ctx, wait); err != nil {
			return nil
		} else if nudge {
			nudged = true
		}
	}
}

// complain logs err if it matters and is not what was logged last, which it
// returns: a site that is offline says so once.
func (r *Rotator) complain(err error, last Code) Code {
	code, _ := errors.AsType[Code](err)
	if !r.due() && passing(err) {
		// Asked for by a nudge, and whoever nudged has said what is wrong.
		r.log.Debug("provider's time not known", "err", err)
		return last
	}
	if cmp.Or(code, Unavailable) != last {
		r.log.Warn("certificate not renewed; trying again", "until", r.id.Certificate().NotAfter, "err", err)
	}
	return cmp.Or(code, Unavailable)
}

// due reports whether the certificate should be renewed now.
func (r *Rotator) due() bool { return !r.id.Now().Before(r.id.due()) }

// wait returns after d, or soon after a nudge, but nudgeGap after the last check.
func (r *Rotator) wait(ctx context.Context, d time.Duration) (nudged bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-timer.C:
		return false, nil
	case <-r.nudge:
		gap := max(0, r.gap-time.Since(r.asked))
		return true, backoff.Sleep(ctx, gap+backoff.Delay(0, 2*time.Second, 2*time.Second))
	}
}

// retryAfter is how long to wait after failure number n. What only a person can
// put right is asked for seldom, but never given up: nobody may come by.
func retryAfter(err error, n int) time.Duration {
	if passing(err) {
		return 2*time.Second + backoff.Delay(n, 4*time.Second, 10*time.Minute)
	}
	return time.Minute + backoff.Delay(n, 5*time.Minute, time.Hour)
}

// check renews the certificate if that is due, after making sure of the time.
func (r *Rotator) check(ctx context.Context, nudged bool) error {
	if !nudged && !r.due() && !r.id.clock.behind() {
		return nil
	}
	if time.Since(r.asked) > checkEvery {
		r.gap = nudgeGap
	}
	r.asked = time.Now()
	if err := r.remote().askTime(ctx, nil); err != nil {
		return err
	}
	if !r.due() {
		r.gap = min(2*r.gap, nudgeLimit*nudgeGap)
		return nil
	}
	return r.Renew(ctx)
}

// Renew gets a new key and certificate now. At any point it may be interrupted,
// by kill -9 and power cuts too, and done again: the old certificate is good
// until the new one is stored. What goes wrong is an [*Error].
func (r *Rotator) Renew(ctx context.Context) error {
	r.id.renewing.Lock()
	defer r.id.renewing.Unlock()
	f, err := openFiles(r.id.dir, false)
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	defer f.close()
	f.step = r.id.step
	old := r.id.get()
	key, err := f.pendingKey()
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	request, err := newRenewal(r.id.site, key, old)
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	remote := r.remote()
	var answer issuedAnswer
	if err := remote.post(ctx, PathRenew, "", request, &answer); err != nil {
		return err
	}
	b, err := accept(r.id.site, bundle{key: key}, answer)
	if err != nil {
		return remote.fail(NotProvider, "its answer does not fit: "+err.Error(), err)
	}
	if err := f.store(b); err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	r.id.set(b)
	r.log.Info("certificate renewed", "site", r.id.site, "until", b.cert.NotAfter.UTC().Format(time.RFC3339))
	if r.renewed != nil {
		r.renewed()
	}
	return nil
}

// newRenewal asks for a certificate for key on the strength of old.
func newRenewal(site string, key *ecdsa.PrivateKey, old bundle) (renewRequest, error) {
	csr, err := newCSR(site, key)
	if err != nil {
		return renewRequest{}, err
	}
	parsed, err := parseCSR(string(csr))
	if err != nil {
		return renewRequest{}, err
	}
	proof, err := ecdsa.SignASN1(rand.Reader, old.key, proofMessage(parsed.Raw, old.cert.Raw))
	if err != nil {
		return renewRequest{}, fmt.Errorf("proof: %w", err)
	}
	return renewRequest{CSR: string(csr), Certificate: string(certificatePEM(old.cert)), Proof: proof}, nil
}
