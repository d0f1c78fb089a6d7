package bootstrap

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"unicode"
)

// A Code is a reason why joining or renewing did not work. It is an error: both
// sides test for it with errors.Is, and it is what travels.
type Code string

// Codes that the provider answers with. Do not rename: sites in the field know them.
const (
	TokenUnknown Code = "token-unknown" // no such token, or a wrong secret
	TokenExpired Code = "token-expired" //
	TokenUsed    Code = "token-used"    // for another key
	TokenOther   Code = "token-other"   // bound to another site
	NameTaken    Code = "name-taken"    // by a site that has a certificate
	NodeExists   Code = "node-exists"   // a Node of this name is no site
	Denied       Code = "denied"        // by a person
	Revoked      Code = "revoked"       // the site is quarantined
	Stale        Code = "stale"         // the certificate is not the last of its lineage
	UnknownSite  Code = "unknown-site"  // no record: the site has been deleted
	TooOld       Code = "too-old"       // expired longer ago than the policy allows
	NotOurs      Code = "not-ours"      // the certificate is not of this CA
	Invalid      Code = "invalid"       // malformed
	TooMany      Code = "too-many"      // rate limited; try later
	Unavailable  Code = "unavailable"   // the provider could not do it now; try later
	Pending      Code = "pending"       // waiting for a person's approval; try again
)

// Codes that arise at the site.
const (
	WrongPin    Code = "wrong-pin"    // the provider's CA is not the pinned one
	WrongCA     Code = "wrong-ca"     // the provider's certificate is not of the CA that this site trusts
	WrongClock  Code = "wrong-clock"  // no time could be found at which the provider's certificate is valid
	Unreachable Code = "unreachable"  // no connection
	NotProvider Code = "not-provider" // something answers that is not a provider
	Joined      Code = "joined"       // the directory holds the identity of another site or cloud
)

// Error returns the code's name.
func (c Code) Error() string { return string(c) }

// status is the HTTP status that carries a code.
func (c Code) status() int {
	switch c {
	case TokenUnknown, TokenExpired, TokenUsed:
		return http.StatusUnauthorized
	case NameTaken, NodeExists:
		return http.StatusConflict
	case Invalid:
		return http.StatusBadRequest
	case TooMany:
		return http.StatusTooManyRequests
	case Unavailable:
		return http.StatusServiceUnavailable
	case Pending:
		return http.StatusAccepted
	}
	return http.StatusForbidden
}

// passing reports whether the same request may work later by itself.
func (c Code) passing() bool { return c == TooMany || c == Unavailable || c == Pending }

// ErrConflict is returned by [Authority.Commit] if the record has changed.
var ErrConflict = errors.New("the record has changed")

// An Error says why a site could not join or renew, and what to do next. Test
// for the reason with errors.Is and a [Code].
type Error struct {
	Code   Code
	Site   string
	Server string // URL of the provider
	Detail string // what else is known; may be empty
	Err    error  // cause; may be nil
}

// Unwrap returns the code and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Code}
	}
	return []error{e.Code, e.Err}
}

// Error returns a sentence: what happened, and what to do next.
func (e *Error) Error() string {
	return fmt.Sprintf(e.sentence(), e.Server, e.Site, e.because())
}

// because adds what is known of the cause, in brackets.
func (e *Error) because() string {
	why := e.Detail
	if why == "" && e.Err != nil {
		why = e.Err.Error()
	}
	if why == "" {
		return ""
	}
	return " (" + printable(why) + ")"
}

// sentence is a format of three arguments: server, site, cause.
func (e *Error) sentence() string {
	switch e.Code {
	case TokenUnknown:
		return `the provider at %[1]s does not know this token%[3]s: check that the line was copied whole, or make a new one with "skerry-provider token create"`
	case TokenExpired:
		return `the join token has expired%[3]s: make a new one with "skerry-provider token create"`
	case TokenUsed:
		return `the join token has been used already, by another machine or an earlier installation%[3]s: each token joins one machine; make a new one with "skerry-provider token create"`
	case TokenOther:
		return `the join token is for another site than %[2]q%[3]s: join under that name with --site, or make a token with "skerry-provider token create --site %[2]s"`
	case NameTaken:
		return `the name %[2]q is taken%[3]s: choose another with --site, or, if this machine replaces that site, make a token with "skerry-provider token create --site %[2]s --replace"`
	case NodeExists:
		return `a node named %[2]q exists in the cluster and is no Skerry site%[3]s: choose another name with --site`
	case Denied:
		return `the request of %[2]q to join was denied%[3]s: ask the cluster's operator, then join again with a new token`
	case Revoked:
		return `site %[2]q has been cut off by the cluster's operator%[3]s: if that was a mistake, let it in again with "skerry-provider site restore %[2]s"`
	case Stale:
		return `the certificate of site %[2]q has been replaced by a newer one%[3]s: another machine or a copy of this disk holds it; if this machine is the real one, join again with a token from "skerry-provider token create --site %[2]s --replace"`
	case UnknownSite:
		return `the provider at %[1]s has no site %[2]q any more%[3]s: join again with a token from "skerry-provider token create --site %[2]s"`
	case TooOld:
		return `the certificate of site %[2]q expired longer ago than the provider allows%[3]s: join again with a token from "skerry-provider token create --site %[2]s --replace"`
	case NotOurs:
		return `the provider at %[1]s did not issue the certificate of site %[2]q%[3]s: check the address; if the cluster was set up anew, join again with a token from "skerry-provider token create"`
	case Invalid:
		return `the provider at %[1]s refused the request as malformed%[3]s: check the site name %[2]q and that edgelet and provider are of versions that go together`
	case TooMany:
		return `the provider at %[1]s is busy with other sites%[3]s: try again in a minute`
	case Unavailable:
		return `the provider at %[1]s cannot do this now%[3]s: try again; if it lasts, see the provider's log`
	case Pending:
		return `the request of %[2]q to join waits for approval%[3]s: the cluster's operator approves it with "kubectl certificate approve", then join again with the same line`
	}
	return e.localSentence()
}

func (e *Error) localSentence() string {
	switch e.Code {
	case WrongPin:
		return `the provider at %[1]s does not have the CA that the join line names%[3]s; nothing was sent: either the line is of another cluster, or something in between intercepts TLS. Compare with a new line from "skerry-provider token create"`
	case WrongCA:
		return `the certificate of the provider at %[1]s is not of the CA that site %[2]q trusts%[3]s; nothing was sent: check the address and whether something in between intercepts TLS; if the cluster was set up anew, join again`
	case WrongClock:
		return `the certificate of the provider at %[1]s is not valid by this machine's clock, and the provider's own time does not settle it%[3]s: set this machine's clock ("timedatectl set-ntp true"), then try again`
	case Unreachable:
		return `cannot reach the provider at %[1]s%[3]s: check the address, this machine's network and DNS, whether a firewall lets TCP to that port out, and HTTPS_PROXY if there is a proxy`
	case NotProvider:
		return `what answers at %[1]s is not a Skerry provider%[3]s: check the address and port, and that provider and edgelet are of versions that go together`
	case Joined:
		return `this machine is joined already%[3]s: run "edgelet reset" first, or join with --replace`
	}
	return `the provider at %[1]s refused%[3]s: see the provider's log`
}

// printable makes foreign text fit for terminals and logs: one line, no control
// or formatting characters, at most 300 bytes.
func printable(s string) string {
	const most = 300
	s = strings.Map(func(r rune) rune {
		switch {
		case r == unicode.ReplacementChar || unicode.Is(unicode.Cf, r):
			return -1
		case unicode.IsControl(r) || unicode.IsSpace(r):
			return ' '
		}
		return r
	}, s)
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
