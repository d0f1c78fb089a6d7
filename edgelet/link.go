package edgelet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skerry-io/skerry/api/edge"
	"github.com/skerry-io/skerry/internal/version"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// A link is the state of the connection to the provider.
type link struct {
	mu        sync.Mutex // guards the following
	session   *tunnel.Session
	since     time.Time // of the last change
	lastError error
}

func (l *link) up(s *tunnel.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session, l.since = s, time.Now()
}

func (l *link) down(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session, l.since, l.lastError = nil, time.Now(), err
}

// failed notes why there is no session yet.
func (l *link) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lastError = err
}

// keepLink keeps a session to the provider, and the certificate for it.
func (e *Edgelet) keepLink(ctx context.Context) error {
	dialer := &tunnel.Dialer{
		Server: e.config.Server, Transport: e.config.Transport, TLS: e.identity.TLSConfig(bootstrap.ServerName),
		Hello: func() tunnel.Hello {
			return tunnel.Hello{Version: version.String(), Site: e.config.Site, Time: time.Now()}
		},
		Accept:  e.fence,
		Log:     e.log,
		Metrics: tunnel.NewMetrics(e.config.Registerer),
	}
	rotator, err := bootstrap.NewRotator(bootstrap.RotatorConfig{Identity: e.identity, Server: e.config.Server, Dial: dialer.DialContext, Log: e.log})
	if err != nil {
		return err
	}
	dialer.Failed = func(err error) {
		e.link.failed(err)
		rotator.Nudge()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return rotator.Run(ctx) })
	group.Go(func() error { return dialer.Run(ctx, e.useSession) })
	return group.Wait()
}

// fence refuses a provider that has been replaced as the owner of this site.
func (e *Edgelet) fence(peer tunnel.Hello) error {
	highest, err := e.db.Meta().RaiseEpoch(peer.Epoch)
	if err == nil && peer.Epoch < highest {
		err = fmt.Errorf("provider has epoch %d, but %d has been seen: another replica owns this site now", peer.Epoch, highest)
	}
	return err
}

// useSession serves the provider and reports to it while the session lasts.
func (e *Edgelet) useSession(ctx context.Context, s *tunnel.Session) error {
	e.link.up(s)
	e.pulls.RetryNow() // what failed may have failed for the lack of a network
	mux := http.NewServeMux()
	edge.HandleEdge(mux, e.desired)
	mux.Handle("/", e.kubeletAPI())
	ctx, cancel := context.WithCancel(ctx)
	var reporting sync.WaitGroup
	reporting.Go(func() { e.outbox.Run(ctx, edge.NewCloudClient(s)) })
	err := s.Serve(ctx, mux)
	cancel()
	reporting.Wait()
	if err == nil {
		err = errors.New("session ended")
	}
	e.link.down(err)
	return err
}
