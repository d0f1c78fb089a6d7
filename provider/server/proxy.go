package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
)

// Limits of what is passed between who asks and a site.
const (
	maxHeader   = 64 << 10 // bytes, of a request and of an answer
	maxUser     = 256      // bytes of a user's name that the site is told
	maxSentence = 1 << 10  // bytes of an error's text
)

// userHeader tells the site who asks, for its log.
const userHeader = "X-Remote-User"

// Headers that are passed on; Connection and Upgrade besides, when a connection is
// upgraded. Credentials and identities are not among them.
var (
	requestHeaders = headers("Accept", "Accept-Encoding", "Content-Type", "Range", "User-Agent", "X-Stream-Protocol-Version",
		"Sec-Websocket-Extensions", "Sec-Websocket-Key", "Sec-Websocket-Protocol", "Sec-Websocket-Version")
	answerHeaders = headers("Accept-Ranges", "Cache-Control", "Content-Encoding", "Content-Length", "Content-Range", "Content-Type",
		"Date", "Last-Modified", "Retry-After", "X-Stream-Protocol-Version",
		"Sec-Websocket-Accept", "Sec-Websocket-Extensions", "Sec-Websocket-Protocol")
	upgradeHeaders = headers("Connection", "Upgrade")
)

func headers(names ...string) map[string]bool {
	set := map[string]bool{}
	for _, n := range names {
		set[textproto.CanonicalMIMEHeaderKey(n)] = true
	}
	return set
}

// bearerProtocol is how browsers send a token with a WebSocket.
const bearerProtocol = "base64url.bearer.authorization.k8s.io."

// upgrades are the protocols that exec, attach and port-forward can speak.
var upgrades = []string{"websocket", "SPDY/3.1"}

// An errorSite is what a site has done wrong, or the tunnel to it.
type errorSite struct {
	site  string
	cause error
}

func (e *errorSite) Error() string { return fmt.Sprintf("site %s: %v", e.site, e.cause) }
func (e *errorSite) Unwrap() error { return e.cause }

// errorOffline is why there is no way to a site.
type errorOffline struct{ error }

func (e errorOffline) Unwrap() error { return e.error }

// A passage is a request that was found good, on its way to the site.
type passage struct {
	site    string
	route   route
	user    string
	upgrade string // the protocol that the connection shall become, "" for none
}

type passageKey struct{}

func passageOf(r *http.Request) passage {
	p, _ := r.Context().Value(passageKey{}).(passage)
	return p
}

// newProxy returns the handler that passes requests with a passage on to their sites.
func newProxy(s *Server) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { rewrite(r.Out) },
		Transport:     backend{s.sites},
		FlushInterval: -1, // logs are followed
		ErrorLog:      s.errorLog,
		ErrorHandler:  s.proxyFailed,
	}
}

// rewrite makes of a request the one that the site gets. All that it keeps is known.
func rewrite(out *http.Request) {
	p := passageOf(out)
	out.URL = &url.URL{Scheme: "http", Host: p.site, Path: p.route.path(), RawQuery: out.URL.RawQuery}
	out.Host = p.site
	out.Body, out.ContentLength, out.TransferEncoding = nil, 0, nil // the API takes none
	for name := range out.Header {
		if !requestHeaders[name] && (p.upgrade == "" || !upgradeHeaders[name]) {
			delete(out.Header, name)
		}
	}
	if p.upgrade == "" {
		out.Header.Del("Sec-Websocket-Key")
	}
	out.Header["Sec-Websocket-Protocol"] = withoutTokens(out.Header["Sec-Websocket-Protocol"])
	if len(out.Header["Sec-Websocket-Protocol"]) == 0 {
		delete(out.Header, "Sec-Websocket-Protocol")
	}
	out.Header.Set(userHeader, printable(p.user, maxUser))
}

// withoutTokens removes protocols that are bearer tokens.
func withoutTokens(values []string) []string {
	var kept []string
	for _, v := range values {
		for protocol := range strings.SplitSeq(v, ",") {
			if protocol = strings.TrimSpace(protocol); protocol != "" && !strings.HasPrefix(strings.ToLower(protocol), bearerProtocol) {
				kept = append(kept, protocol)
			}
		}
	}
	if len(kept) == 0 {
		return nil
	}
	return []string{strings.Join(kept, ", ")}
}

// A backend takes requests to their sites and checks what they answer.
type backend struct{ sites Sites }

// RoundTrip implements http.RoundTripper.
func (b backend) RoundTrip(req *http.Request) (*http.Response, error) {
	p := passageOf(req)
	transport, err := b.sites.Site(p.site)
	if err != nil {
		return nil, errorOffline{err}
	}
	// A context of its own, so that the trace with which ReverseProxy forwards
	// informational answers is not seen below. It ends with the request's, which the
	// server ends when its handler returns.
	ctx, cancel := context.WithCancelCause(context.Background())
	stop := context.AfterFunc(req.Context(), func() { cancel(context.Cause(req.Context())) })
	resp, err := transport.RoundTrip(req.WithContext(ctx))
	if err == nil {
		if err = check(resp, p.upgrade); err == nil {
			answer := *resp // without the trailers, which come later and into resp
			answer.Trailer = nil
			return &answer, nil
		}
		resp.Body.Close()
	}
	stop()
	cancel(nil)
	if _, offline := b.sites.Site(p.site); offline != nil && req.Context().Err() == nil {
		return nil, errorOffline{offline}
	}
	return nil, &errorSite{p.site, err}
}

// check refuses an answer that must not be passed on, and strips one that may.
func check(resp *http.Response, upgrade string) error {
	size := 0
	for name, values := range resp.Header {
		for _, v := range values {
			size += len(name) + len(v) + 4
		}
	}
	code := resp.StatusCode
	switch {
	case size > maxHeader:
		return fmt.Errorf("answer with a header of %d bytes", size)
	case code == http.StatusSwitchingProtocols:
		if got := resp.Header.Get("Upgrade"); upgrade == "" || !strings.EqualFold(got, upgrade) {
			return fmt.Errorf("answer changes the protocol to %q, asked for was %q", got, upgrade)
		}
	case code >= 300 && code < 400:
		return fmt.Errorf("answer is a redirect (%d), which is never followed", code)
	case code < 200 || code > 599:
		return fmt.Errorf("answer with status %d", code)
	}
	for name := range resp.Header {
		if !answerHeaders[name] && (code != http.StatusSwitchingProtocols || !upgradeHeaders[name]) {
			delete(resp.Header, name)
		}
	}
	resp.Header.Set("X-Content-Type-Options", "nosniff")
	return nil
}

// offlineStatus is what a request to a site without a session is answered. For
// logs the API server shows people the text of a 500, but replaces that of a 503
// by one that says nothing (GenericHttpResponseChecker).
func offlineStatus(r route) int {
	if r.class == "logs" {
		return http.StatusInternalServerError
	}
	return http.StatusServiceUnavailable
}

// proxyFailed answers a request that could not be passed on. It is the only place that
// maps such errors to HTTP.
func (s *Server) proxyFailed(w http.ResponseWriter, r *http.Request, err error) {
	p := passageOf(r)
	if offline, ok := errors.AsType[errorOffline](err); ok {
		refuse(w, offlineStatus(p.route), offline.Error())
		return
	}
	s.log.Debug("request to a site failed", "node", p.site, "class", p.route.class, "err", err)
	text := err.Error()
	if _, ok := errors.AsType[*errorSite](err); !ok {
		text = fmt.Sprintf("site %s: %s", p.site, text)
	}
	refuse(w, http.StatusBadGateway, text)
}

// refuse answers with a sentence.
func refuse(w http.ResponseWriter, code int, sentence string) {
	http.Error(w, printable(sentence, maxSentence), code)
}

// printable returns at most limit bytes of s, with everything that is not printable
// ASCII escaped: it comes from outside, and ends in headers, logs and terminals.
func printable(s string, limit int) string {
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < limit-3; i++ {
		if c := s[i]; c >= ' ' && c < 0x7f {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// upgradeOf returns the protocol that r asks to change to, "" for none.
func upgradeOf(r *http.Request) string {
	asks := slices.ContainsFunc(r.Header["Connection"], func(v string) bool {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return true
			}
		}
		return false
	})
	if !asks {
		return ""
	}
	return r.Header.Get("Upgrade")
}
