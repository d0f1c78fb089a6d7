// Package bootstraptest provides an in-memory keeper of tokens and records for
// tests of package bootstrap's users, and the suite of checks that it and every
// other keeper must pass.
package bootstraptest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// A Memory keeps tokens and records as long as it lives. It is safe for
// concurrent use. Its zero value is empty.
type Memory struct {
	mu      sync.Mutex // guards what follows
	tokens  map[string]*token
	records map[string]bootstrap.Record
	taken   map[string]bool
	manual  bool
	answers map[string]error // to Approve, by key; nil: yes
	issued  int
}

type token struct {
	grant   bootstrap.Grant
	secret  string
	expires time.Time
}

// Token makes a join token for site, or for any if that is empty.
func (m *Memory) Token(site string, replace bool, life time.Duration) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tokens == nil {
		m.tokens = map[string]*token{}
	}
	id := fmt.Sprintf("t%05d", len(m.tokens))
	secret := fmt.Sprintf("%016d", len(m.tokens))
	m.tokens[id] = &token{
		grant:   bootstrap.Grant{ID: id, Site: site, Replace: replace},
		secret:  secret,
		expires: time.Now().Add(life),
	}
	return id + "." + secret
}

// Revoke cuts site off; an empty why lifts that.
func (m *Memory) Revoke(site, why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	record := m.records[site]
	record.Revoked = why
	m.put(site, record)
}

// Take makes name that of something that is no site.
func (m *Memory) Take(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.taken == nil {
		m.taken = map[string]bool{}
	}
	m.taken[name] = true
}

// Manual makes requests wait for [Memory.Answer].
func (m *Memory) Manual() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.manual, m.answers = true, map[string]error{}
}

// Answer approves all requests of site, or denies them.
func (m *Memory) Answer(site string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answers[site] = err
}

// Restore replaces the record of a site, as restoring a backup does.
func (m *Memory) Restore(site string, record bootstrap.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(site, record)
}

// Issued returns how many certificates have been published.
func (m *Memory) Issued() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.issued
}

func (m *Memory) put(site string, record bootstrap.Record) {
	if m.records == nil {
		m.records = map[string]bootstrap.Record{}
	}
	m.records[site] = record
}

// Check implements [bootstrap.Tokens].
func (m *Memory) Check(_ context.Context, text string) (bootstrap.Grant, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	id, secret, _ := strings.Cut(text, ".")
	switch t := m.tokens[id]; {
	case t == nil || t.secret != secret:
		return bootstrap.Grant{}, bootstrap.TokenUnknown
	case !time.Now().Before(t.expires):
		return bootstrap.Grant{}, bootstrap.TokenExpired
	default:
		return t.grant, nil
	}
}

// Redeem implements [bootstrap.Tokens].
func (m *Memory) Redeem(_ context.Context, text, site, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	id, _, _ := strings.Cut(text, ".")
	t := m.tokens[id]
	if t == nil {
		return bootstrap.TokenUnknown
	}
	if t.grant.UsedKey == "" {
		t.grant.UsedKey, t.grant.UsedSite, t.grant.UsedAt = key, site, time.Now()
	}
	if t.grant.UsedKey != key || t.grant.UsedSite != site {
		return bootstrap.TokenUsed
	}
	return nil
}

// Lookup implements [bootstrap.Authority].
func (m *Memory) Lookup(_ context.Context, site string) (bootstrap.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.taken[site] {
		return bootstrap.Record{}, bootstrap.NodeExists
	}
	return m.records[site], nil
}

// Approve implements [bootstrap.Authority].
func (m *Memory) Approve(_ context.Context, req bootstrap.Request) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.manual || req.Renewal {
		return nil
	}
	answer, ok := m.answers[req.Site]
	if !ok {
		return bootstrap.Pending
	}
	return answer
}

// Commit implements [bootstrap.Authority].
func (m *Memory) Commit(_ context.Context, site string, old, next bootstrap.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.records[site]
	if now.Serial != old.Serial {
		return bootstrap.ErrConflict
	}
	next.Revoked = now.Revoked
	m.put(site, next)
	return nil
}

// Publish implements [bootstrap.Authority].
func (m *Memory) Publish(context.Context, bootstrap.Request, []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.issued++
	return nil
}
