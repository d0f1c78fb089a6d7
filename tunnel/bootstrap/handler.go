package bootstrap

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"
)

// Paths that [NewHandler] serves.
const (
	PathJoin  = "/v1/join"
	PathRenew = "/v1/renew"
	PathCA    = "/v1/ca"
	PathTime  = "/v1/time"
)

// Tokens keeps join tokens. Its errors are a [Code], or say that it cannot now.
type Tokens interface {
	// Check returns what token allows, used up or not: TokenUnknown if there is no
	// such token, TokenExpired if it has expired.
	Check(ctx context.Context, token string) (Grant, error)

	// Redeem uses token up for the key and site. Of any number of calls at once
	// for different keys or sites exactly one succeeds, the others get TokenUsed;
	// repeating the one that succeeded succeeds.
	Redeem(ctx context.Context, token, site, key string) error
}

// Authority keeps sites' records and lets people see and deny what is asked for.
type Authority interface {
	// Lookup returns the record of a site, zero if it never had a certificate;
	// NodeExists if the name belongs to something that is no site.
	Lookup(ctx context.Context, site string) (Record, error)

	// Approve has req approved: Denied if a person said no, Pending if one has yet
	// to say yes. It is called again for the same request.
	Approve(ctx context.Context, req Request) error

	// Commit replaces a site's record, but not Revoked, or returns ErrConflict if
	// it is not old any more.
	Commit(ctx context.Context, site string, old, next Record) error

	// Publish shows what has been issued for an approved request; chain is PEM.
	Publish(ctx context.Context, req Request, chain []byte) error
}

// A Request is a site's wish for a certificate, authenticated.
type Request struct {
	Site    string
	CSR     *x509.CertificateRequest // only its key counts
	Key     string                   // [KeyID] of its key
	Renewal bool                     // else the site joins
	Basis   string                   // what authenticated it: token ID, or serial of the old certificate
	Source  string                   // address of the sender
}

// An Outcome is one request's, for metrics and events.
type Outcome struct {
	Op     string // "join" or "renew"
	Site   string // as claimed; empty if the request did not get so far
	Source string
	Err    error // nil if a certificate was issued
}

// HandlerConfig configures the cloud side.
type HandlerConfig struct {
	CA        *CA       // required
	Tokens    Tokens    // required
	Authority Authority // required

	// Life of sites' certificates: default 30 days, at least 10 minutes. Sites
	// renew at two thirds of it.
	Life time.Duration

	// MaxOffline is for how long after its end a certificate still renews itself:
	// default 5 years; negative: not at all.
	MaxOffline time.Duration

	// PerSource and Overall bound requests per second: default 5 and 50. Four
	// seconds' worth may come at once. Many sites behind one address, such as a
	// load balancer that hides them, need a higher PerSource.
	PerSource, Overall float64

	Observe func(Outcome) // called after each join and renewal; may be nil
	Log     *slog.Logger  // default slog.Default()
}

const (
	maxBody     = 32 << 10         // bytes
	maxInFlight = 64               // requests at once
	timeLimit   = 30 * time.Second // of one request
	maxAttempts = 5                // to commit a record that others change too
)

// NewHandler returns the handler of the four paths. It needs no client
// certificate.
func NewHandler(config HandlerConfig) (http.Handler, error) {
	config.Life = cmp.Or(config.Life, 30*24*time.Hour)
	config.MaxOffline = cmp.Or(config.MaxOffline, 5*365*24*time.Hour)
	config.PerSource = cmp.Or(config.PerSource, 5)
	config.Overall = cmp.Or(config.Overall, 50)
	config.Log = cmp.Or(config.Log, slog.Default())
	var errs []error
	if config.CA == nil || config.Tokens == nil || config.Authority == nil {
		errs = append(errs, errors.New("CA, Tokens and Authority are required"))
	}
	if config.Life < 10*time.Minute {
		errs = append(errs, fmt.Errorf("life %v: must be at least 10m", config.Life))
	}
	if config.PerSource < 0 || config.Overall < 0 {
		errs = append(errs, errors.New("rates must not be negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("bootstrap handler: %w", err)
	}
	h := &handler{
		HandlerConfig: config,
		slots:         make(chan struct{}, maxInFlight),
		limit:         newLimiter(rate{config.PerSource, 4 * config.PerSource}, rate{config.Overall, 4 * config.Overall}),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+PathJoin, h.serve("join", h.join))
	mux.HandleFunc("POST "+PathRenew, h.serve("renew", h.renew))
	mux.HandleFunc("GET "+PathTime, h.serve("time", h.time))
	mux.HandleFunc("GET "+PathCA, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		w.Write(config.CA.Bundle())
	})
	return mux, nil
}

// A handler serves the cloud side; immutable but for the limits.
type handler struct {
	HandlerConfig
	slots chan struct{} // one for each request in flight
	limit *limiter
}

type joinRequest struct {
	Site string `json:"site"`
	CSR  string `json:"csr"` // PEM
}

type renewRequest struct {
	CSR         string `json:"csr"`         // PEM, of the new key
	Certificate string `json:"certificate"` // PEM, the old one
	Proof       []byte `json:"proof"`       // ASN.1 ECDSA signature by the old key, see proofMessage
}

type issuedAnswer struct {
	Certificate string    `json:"certificate"` // PEM
	CA          string    `json:"ca"`          // PEM, all that are trusted
	Time        time.Time `json:"time"`
}

type timeAnswer struct {
	Time      time.Time `json:"time"`
	Signature []byte    `json:"signature"` // ASN.1 ECDSA signature by the CA, see timeMessage
}

type refusedAnswer struct {
	Code   Code   `json:"code"`
	Detail string `json:"detail,omitempty"`
}

// serve wraps the handler of one operation with the limits and the encoding.
func (h *handler) serve(op string, f func(context.Context, *http.Request) (site string, answer any, err error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var site string
		var answer any
		err := h.enter(r)
		if err == nil {
			defer h.leave()
			ctx, cancel := context.WithTimeout(r.Context(), timeLimit)
			defer cancel()
			// Slow senders are cut off; not every connection can have a deadline.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(timeLimit))
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			site, answer, err = f(ctx, r)
		}
		if op != "time" {
			h.report(Outcome{Op: op, Site: printable(site), Source: r.RemoteAddr, Err: err})
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		if err != nil {
			refused := refuse(err)
			if refused.Code.passing() {
				w.Header().Set("Retry-After", "5")
			}
			w.WriteHeader(refused.Code.status())
			answer = refused
		}
		_ = json.NewEncoder(w).Encode(answer) // the peer may be gone; it will ask again
	}
}

// enter admits a request, or says that there are too many.
func (h *handler) enter(r *http.Request) error {
	if !h.limit.allow(r.RemoteAddr, time.Now()) {
		return TooMany
	}
	select {
	case h.slots <- struct{}{}:
		return nil
	default:
		return TooMany
	}
}

func (h *handler) leave() { <-h.slots }

func (h *handler) report(o Outcome) {
	log := h.Log.With("op", o.Op, "site", o.Site, "source", o.Source)
	switch code := refuse(o.Err).Code; {
	case o.Err == nil:
		log.Info("certificate issued")
	case code == Unavailable:
		log.Error("certificate not issued", "err", o.Err)
	case code == TooMany, code == Pending:
		log.Debug("certificate not issued", "err", o.Err)
	default:
		log.Warn("certificate refused", "err", code, "detail", refuse(o.Err).Detail)
	}
	if h.Observe != nil {
		h.Observe(o)
	}
}

// refuse is the only place that maps an error to what the peer is told. Errors
// without a code stay in our log.
func refuse(err error) refusedAnswer {
	code, ok := errors.AsType[Code](err)
	if !ok {
		return refusedAnswer{Code: Unavailable}
	}
	answer := refusedAnswer{Code: code}
	if e, ok := errors.AsType[*Error](err); ok {
		answer.Detail = printable(e.Detail)
	}
	return answer
}

func (h *handler) join(ctx context.Context, r *http.Request) (string, any, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return "", nil, TokenUnknown
	}
	// The token first: without one, nobody makes us parse anything.
	grant, err := h.Tokens.Check(ctx, token)
	if err != nil {
		return "", nil, err
	}
	var body joinRequest
	csr, err := readRequest(r, &body, func() string { return body.CSR })
	if err != nil {
		return "", nil, err
	}
	if err := ValidateSite(body.Site); err != nil {
		return "", nil, invalid(err)
	}
	site := body.Site
	key, err := KeyID(csr.PublicKey)
	switch {
	case err != nil:
		return site, nil, err
	case grant.Site != "" && grant.Site != site:
		return site, nil, TokenOther
	case grant.UsedKey != "" && (grant.UsedKey != key || grant.UsedSite != site):
		return site, nil, TokenUsed
	}
	decide := func(old Record) (Record, error) { return old.join(site, key, grant, h.terms()) }
	// A refusal must not cost the token.
	record, err := h.Authority.Lookup(ctx, site)
	if err != nil {
		return site, nil, err
	}
	if _, err := decide(record); err != nil {
		return site, nil, err
	}
	if err := h.Tokens.Redeem(ctx, token, site, key); err != nil {
		return site, nil, err
	}
	answer, err := h.issue(ctx, Request{Site: site, CSR: csr, Key: key, Basis: grant.ID, Source: r.RemoteAddr}, decide)
	return site, answer, err
}

func (h *handler) renew(ctx context.Context, r *http.Request) (string, any, error) {
	var body renewRequest
	csr, err := readRequest(r, &body, func() string { return body.CSR })
	if err != nil {
		return "", nil, err
	}
	certs, err := parseCertificates([]byte(body.Certificate))
	if err != nil {
		return "", nil, invalid(err)
	}
	old := certs[0]
	site, err := h.CA.verifySite(old)
	if err != nil {
		return "", nil, &Error{Code: NotOurs, Err: err}
	}
	public, ok := old.PublicKey.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(public, proofMessage(csr.Raw, old.Raw), body.Proof) {
		return site, nil, &Error{Code: Invalid, Detail: "the sender does not hold the key of the certificate"}
	}
	if offline := time.Since(old.NotAfter); offline > 0 && offline > h.MaxOffline {
		return site, nil, &Error{Code: TooOld, Detail: "it ended " + old.NotAfter.UTC().Format(time.DateOnly)}
	}
	key, err := KeyID(csr.PublicKey)
	if err != nil {
		return site, nil, err
	}
	answer, err := h.issue(ctx,
		Request{Site: site, CSR: csr, Key: key, Renewal: true, Basis: Serial(old), Source: r.RemoteAddr},
		func(record Record) (Record, error) { return record.renew(old.SerialNumber, key, h.terms()) })
	return site, answer, err
}

// issue has the record moved on as decide says, and then signs what it says: so
// no certificate exists that the record does not know, whatever happens.
func (h *handler) issue(ctx context.Context, req Request, decide func(Record) (Record, error)) (any, error) {
	for range maxAttempts {
		old, err := h.Authority.Lookup(ctx, req.Site)
		if err != nil {
			return nil, err
		}
		next, err := decide(old)
		if err != nil {
			return nil, err
		}
		if err := h.Authority.Approve(ctx, req); err != nil {
			return nil, err
		}
		if next.Serial != old.Serial {
			if err := h.Authority.Commit(ctx, req.Site, old, next); errors.Is(err, ErrConflict) {
				continue
			} else if err != nil {
				return nil, err
			}
		}
		cert, err := h.CA.IssueSite(req.Site, next, req.CSR.PublicKey)
		if err != nil {
			return nil, err
		}
		chain := certificatePEM(cert)
		if err := h.Authority.Publish(ctx, req, chain); err != nil {
			return nil, err
		}
		return issuedAnswer{Certificate: string(chain), CA: string(h.CA.Bundle()), Time: time.Now().UTC()}, nil
	}
	return nil, fmt.Errorf("issue certificate of %s: %w", req.Site, ErrConflict)
}

// terms are those of a certificate that is issued now.
func (h *handler) terms() issue {
	return issue{now: time.Now(), life: h.Life, end: h.CA.cert.NotAfter}
}

// time tells the time, signed, to machines that have none.
func (h *handler) time(_ context.Context, r *http.Request) (string, any, error) {
	nonce := r.URL.Query().Get("nonce")
	if raw, err := hex.DecodeString(nonce); err != nil || len(raw) != 16 {
		return "", nil, invalid(errors.New("nonce: must be 32 hexadecimal digits"))
	}
	now := time.Now().UTC()
	signature, err := h.CA.signTime(nonce, now)
	return "", timeAnswer{Time: now, Signature: signature}, err
}

// readRequest reads the body of r and the CSR in it.
func readRequest(r *http.Request, body any, csr func() string) (*x509.CertificateRequest, error) {
	if err := json.NewDecoder(r.Body).Decode(body); err != nil {
		return nil, invalid(fmt.Errorf("body: %w", err))
	}
	parsed, err := parseCSR(csr())
	if err != nil {
		return nil, invalid(err)
	}
	return parsed, nil
}

func invalid(err error) error { return &Error{Code: Invalid, Detail: err.Error(), Err: err} }
