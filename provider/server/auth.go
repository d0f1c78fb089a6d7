package server

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
)

// ErrUnauthenticated says that a credential is no good, or that there is none.
var ErrUnauthenticated = errors.New("unauthorized")

// An Authenticator tells who a bearer token belongs to, or ErrUnauthenticated. Any
// other error means that it cannot say now.
type Authenticator interface {
	Authenticate(ctx context.Context, token string) (User, error)
}

// An Authorizer tells whether a user has a permission. An error means that it cannot
// say now, and nothing is allowed.
type Authorizer interface {
	Authorize(ctx context.Context, user User, what Attributes) (bool, error)
}

// A User is who asks.
type User struct {
	Name   string
	UID    string
	Groups []string
	Extra  map[string][]string
}

// Attributes are a permission on the node of a site.
type Attributes struct {
	Verb        string // "" for methods that no permission covers
	Subresource string
	Site        string
}

// Limits and lifetimes of what is remembered of reviews.
const (
	maxToken       = 16 << 10 // bytes
	maxRemembered  = 4096     // entries of each cache
	maxReviews     = 32       // calls to the API server at once, of each kind
	reviewTimeout  = 10 * time.Second
	tokenLife      = 2 * time.Minute
	badTokenLife   = 10 * time.Second
	permissionLife = 5 * time.Minute
	refusalLife    = 30 * time.Second
)

// guard authenticates and authorizes requests. Its methods may be called at once.
type guard struct {
	clientCAs     func() *x509.CertPool
	authenticator Authenticator
	authorizer    Authorizer

	tokens    *cache[[sha256.Size]byte, User] // by hash, so that no token stays in memory
	badTokens *cache[[sha256.Size]byte, struct{}]
	allowed   *cache[string, bool]
	flights   singleflight.Group
	reviews   chan struct{} // holds a token for each call under way
}

func newGuard(c Config) *guard {
	return &guard{
		clientCAs: c.ClientCAs, authenticator: c.Authenticator, authorizer: c.Authorizer,
		tokens:    newCache[[sha256.Size]byte, User](maxRemembered),
		badTokens: newCache[[sha256.Size]byte, struct{}](maxRemembered),
		allowed:   newCache[string, bool](maxRemembered),
		reviews:   make(chan struct{}, maxReviews),
	}
}

// authenticate returns who sends r: the subject of a client certificate, or else the
// owner of a bearer token.
func (g *guard) authenticate(r *http.Request) (User, error) {
	if user, err := g.fromCertificate(r); err == nil {
		return user, nil
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimSpace(token)
	if !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return User{}, ErrUnauthenticated
	}
	return g.fromToken(r.Context(), token)
}

func (g *guard) fromCertificate(r *http.Request) (User, error) {
	pool := g.clientCAs()
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || pool == nil {
		return User{}, ErrUnauthenticated
	}
	leaf, rest := r.TLS.PeerCertificates[0], r.TLS.PeerCertificates[1:]
	options := x509.VerifyOptions{
		Roots: pool, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range rest {
		options.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(options); err != nil {
		return User{}, fmt.Errorf("%w: client certificate: %w", ErrUnauthenticated, err)
	}
	if leaf.Subject.CommonName == "" {
		return User{}, ErrUnauthenticated
	}
	return User{Name: leaf.Subject.CommonName, Groups: append(leaf.Subject.Organization, "system:authenticated")}, nil
}

func (g *guard) fromToken(ctx context.Context, token string) (User, error) {
	hash := sha256.Sum256([]byte(token))
	if user, ok := g.tokens.get(hash); ok {
		return user, nil
	}
	if _, ok := g.badTokens.get(hash); ok {
		return User{}, ErrUnauthenticated
	}
	v, err := g.review(ctx, "token "+string(hash[:]), func(ctx context.Context) (any, error) {
		user, err := g.authenticator.Authenticate(ctx, token)
		switch {
		case err == nil && user.Name == "":
			err = ErrUnauthenticated
			fallthrough
		case errors.Is(err, ErrUnauthenticated):
			g.badTokens.put(hash, struct{}{}, badTokenLife)
		case err == nil:
			g.tokens.put(hash, user, tokenLife)
		}
		return user, err
	})
	if err != nil {
		return User{}, err
	}
	return v.(User), nil
}

// authorize reports whether user has one of the permissions.
func (g *guard) authorize(ctx context.Context, user User, what []Attributes) (bool, error) {
	var errs []error
	for _, a := range what {
		ok, err := g.permits(ctx, user, a)
		if ok {
			return true, nil
		}
		errs = append(errs, err)
	}
	return false, errors.Join(errs...)
}

func (g *guard) permits(ctx context.Context, user User, what Attributes) (bool, error) {
	if what.Verb == "" {
		return false, nil
	}
	id, err := json.Marshal(struct {
		User
		Attributes
	}{user, what}) // maps are encoded in order
	if err != nil {
		return false, err
	}
	key := string(id)
	if ok, known := g.allowed.get(key); known {
		return ok, nil
	}
	v, err := g.review(ctx, "access "+key, func(ctx context.Context) (any, error) {
		ok, err := g.authorizer.Authorize(ctx, user, what)
		if err != nil {
			return false, err
		}
		life := refusalLife
		if ok {
			life = permissionLife
		}
		g.allowed.put(key, ok, life)
		return ok, nil
	})
	if err != nil {
		return false, err
	}
	return v.(bool), nil
}

// review calls fn, once for all who want the same at the same time, so that it does
// not end with the request of one of them.
func (g *guard) review(ctx context.Context, key string, fn func(context.Context) (any, error)) (any, error) {
	result := g.flights.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		select {
		case g.reviews <- struct{}{}:
			defer func() { <-g.reviews }()
			return fn(ctx)
		case <-ctx.Done():
			return nil, fmt.Errorf("too many reviews at once: %w", ctx.Err())
		}
	})
	select {
	case r := <-result:
		return r.Val, r.Err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
