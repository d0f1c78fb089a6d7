package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pull is one transfer that several pods may wait for. It runs as long as
// somebody waits; the last to leave ends it and sees it end.
type pull struct {
	image   string
	began   time.Time
	cancel  context.CancelFunc
	waiters int           // guarded by Manager.mu
	done    chan struct{} // closed when result and err are set

	result pulled
	err    error
}

// pulled is a transfer's outcome.
type pulled struct {
	image *cri.Image
	took  time.Duration // without waiting for a slot
}

// A Pull describes a pull that runs or waits for its turn.
type Pull struct {
	Image   string
	Since   time.Time
	Waiters int // pods
}

// Pulls lists the pulls that run or wait for their turn, the oldest first.
func (m *Manager) Pulls() []Pull {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []Pull
	for _, p := range m.pulls {
		list = append(list, Pull{p.image, p.began, p.waiters})
	}
	slices.SortFunc(list, func(a, b Pull) int { return a.Since.Compare(b.Since) })
	return list
}

// shared joins the pull of the same image with the same credentials, or starts it.
func (m *Manager) shared(ctx context.Context, r request, auths []*cri.AuthConfig) (pulled, error) {
	key := r.spec.Image + "/" + fingerprint(auths)
	m.mu.Lock()
	p := m.pulls[key]
	if p == nil {
		// The pull outlives this pod if others have joined it.
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		p = &pull{image: r.spec.Image, began: time.Now(), cancel: cancel, done: make(chan struct{})}
		m.pulls[key] = p
		go func() {
			defer close(p.done)
			defer cancel()
			p.result, p.err = m.transfer(ctx, r, auths)
			m.forget(key, p)
		}()
	}
	p.waiters++
	m.mu.Unlock()

	select {
	case <-p.done:
		return p.result, p.err
	case <-ctx.Done():
	}
	m.mu.Lock()
	p.waiters--
	last := p.waiters == 0
	if last && m.pulls[key] == p {
		delete(m.pulls, key) // who comes now starts anew
	}
	m.mu.Unlock()
	if last {
		p.cancel()
		<-p.done
	}
	return pulled{}, context.Cause(ctx)
}

func (m *Manager) forget(key string, p *pull) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pulls[key] == p {
		delete(m.pulls, key)
	}
}

// transfer pulls with one credential after the other, in its turn.
func (m *Manager) transfer(ctx context.Context, r request, auths []*cri.AuthConfig) (pulled, error) {
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		return pulled{}, context.Cause(ctx)
	}
	began := time.Now()
	if len(auths) == 0 {
		auths = []*cri.AuthConfig{nil}
	}
	var errs []error
	for _, auth := range auths {
		ref, err := m.config.Runtime.PullImage(ctx, r.spec, auth, r.sandbox)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		took := time.Since(began)
		image, err := m.config.Runtime.ImageStatus(ctx, &cri.ImageSpec{Image: ref})
		if err == nil && image == nil {
			err = fmt.Errorf("image %s is gone right after it was pulled", ref)
		}
		m.config.Log.Info("image pulled", "image", r.name, "took", took, "bytes", image.GetSize())
		return pulled{image, took}, err
	}
	return pulled{}, joined(errs)
}

// joined is one error of several attempts, on one line, each text once, as the
// runtime put it: the image is named where the error is shown.
func joined(errs []error) error {
	var texts []string
	for _, err := range errs {
		if text := status.Convert(err).Message(); !slices.Contains(texts, text) {
			texts = append(texts, text)
		}
	}
	return errors.New(strings.Join(texts, "; "))
}
