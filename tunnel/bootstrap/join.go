package bootstrap

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/skerry-io/skerry/internal/backoff"
)

// JoinConfig says how a machine becomes a site.
type JoinConfig struct {
	Server     string // https://HOST:PORT of the provider; the port defaults to 443
	Token      string // join token, as "skerry-provider token create" prints it
	CACertHash string // sha256: and the hex SHA-256 of the CA's public key
	Site       string // name of the site, see [ValidateSite]
	Dir        string // where the identity is kept; made if absent

	// Replace asks for a new identity even if Dir holds one.
	Replace bool

	Dial DialFunc     // default: TCP
	Log  *slog.Logger // progress; default slog.Default()

	clock *clock       // nil but in tests
	step  func(string) // nil but in tests
}

const (
	approvalPoll = 5 * time.Second // between questions whether a person has approved
	joinAttempts = 5               // once the provider has been reached
)

// Join makes this machine a site: it checks that the provider has the pinned CA,
// makes a key, gets a certificate for it, and stores both in Dir. Joining again
// with the same line is harmless at any point: it goes on where it was, and if
// the machine has joined, it returns the identity. A request that needs approval
// is waited for until ctx is done. What goes wrong is an [*Error].
func Join(ctx context.Context, config JoinConfig) (*Identity, error) {
	remote, err := config.check()
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	f, err := openFiles(config.Dir, true)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	defer f.close()
	f.step = config.step
	if id, err := config.joined(f, remote); id != nil || err != nil {
		return id, err
	}
	if err := remote.pin(ctx, config.CACertHash); err != nil {
		return nil, err
	}
	b, err := config.request(ctx, f, remote)
	if err != nil {
		return nil, err
	}
	if err := f.store(b); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	remote.log.Info("joined", "site", config.Site, "server", remote.server, "until", b.cert.NotAfter.UTC().Format(time.RFC3339))
	return newIdentity(config.Dir, b, remote.clock)
}

// check reports all that is wrong with the configuration at once.
func (c *JoinConfig) check() (*remote, error) {
	var errs []error
	r, err := newRemote(c.Server, c.Dial, c.Log)
	errs = append(errs, err, ValidateSite(c.Site))
	c.CACertHash = strings.ToLower(c.CACertHash)
	digits, ok := strings.CutPrefix(c.CACertHash, pinPrefix)
	if raw, err := hex.DecodeString(digits); !ok || err != nil || len(raw) != 32 {
		errs = append(errs, fmt.Errorf("ca-cert-hash %.80q: must be %s and 64 hexadecimal digits; copy the join line whole", c.CACertHash, pinPrefix))
	}
	if !ValidToken(c.Token) {
		// Not printed: it may be nearly right.
		errs = append(errs, errors.New("token: must be six and sixteen lower-case letters or digits with a dot between; copy the join line whole"))
	}
	if c.Dir == "" {
		errs = append(errs, errors.New("dir: is required"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if r.site, r.clock = c.Site, c.clock; r.clock == nil {
		r.clock = newClock()
	}
	return r, nil
}

// ValidToken reports whether token has the form of a join token.
func ValidToken(token string) bool {
	id, secret, ok := strings.Cut(token, ".")
	return ok && len(id) == 6 && len(secret) == 16 &&
		strings.Trim(id+secret, "abcdefghijklmnopqrstuvwxyz0123456789") == ""
}

// joined returns the identity that is there already, if it is the wanted one.
func (c *JoinConfig) joined(f *files, r *remote) (*Identity, error) {
	if c.Replace {
		return nil, nil
	}
	b, err := f.load()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, r.fail(Joined, "what is in "+c.Dir+" cannot be read: "+err.Error(), err)
	}
	id, err := newIdentity(c.Dir, b, r.clock)
	if err != nil {
		return nil, r.fail(Joined, "", err)
	}
	if id.site != c.Site {
		return nil, r.fail(Joined, "as site "+id.site, nil)
	}
	for _, ca := range b.cas {
		if pinOf(ca) == c.CACertHash {
			r.log.Info("this machine has joined already", "site", id.site)
			return id, nil
		}
	}
	return nil, r.fail(Joined, "to a provider with another CA", nil)
}

// request gets a certificate, with patience for everything that passes.
func (c *JoinConfig) request(ctx context.Context, f *files, r *remote) (bundle, error) {
	key, err := f.pendingKey()
	if err != nil {
		return bundle{}, fmt.Errorf("join: %w", err)
	}
	csr, err := newCSR(c.Site, key)
	if err != nil {
		return bundle{}, fmt.Errorf("join: %w", err)
	}
	var pending error // once a person's approval is waited for
	for failures := 0; ; {
		var answer issuedAnswer
		err := r.post(ctx, PathJoin, c.Token, joinRequest{Site: c.Site, CSR: string(csr)}, &answer)
		if err == nil {
			return c.accept(r, bundle{key: key}, answer)
		}
		wait := approvalPoll
		if errors.Is(err, Pending) {
			if pending == nil {
				r.log.Info("waiting for approval by the cluster's operator", "why", err)
			}
			pending, failures = err, 0
		} else if failures++; ctx.Err() == nil && (!passing(err) || failures >= joinAttempts) {
			return bundle{}, err
		} else {
			wait = time.Second + backoff.Delay(failures, time.Second, 10*time.Second)
			r.log.Info("trying again", "in", wait.Round(time.Second), "err", err)
		}
		if backoff.Sleep(ctx, wait) != nil {
			return bundle{}, errors.Join(cmp.Or(pending, err), context.Cause(ctx))
		}
	}
}

// accept checks the answer to the request for b's key.
func (c *JoinConfig) accept(r *remote, b bundle, answer issuedAnswer) (bundle, error) {
	r.setClock(answer.Time)
	b, err := accept(c.Site, b, answer)
	if err == nil && !slices.ContainsFunc(b.cas, r.trust[0].Equal) {
		err = errors.New("the CA bundle lacks the pinned CA")
	}
	if err != nil {
		return bundle{}, r.fail(NotProvider, "its answer does not fit: "+err.Error(), err)
	}
	return b, nil
}

// passing reports whether the same request may work later by itself.
func passing(err error) bool {
	code, ok := errors.AsType[Code](err)
	return ok && (code.passing() || code == Unreachable)
}
