// Package tunnel provides the one connection between a site and the cloud.
//
// The edge runs a [Dialer], the cloud a [Server]. Each gets a [Session]: an
// http.RoundTripper towards the peer, which also serves an http.Handler to it,
// so that neither side needs to know who dialed. The package knows nothing of
// pods, devices or Kubernetes.
//
// A session is yamux inside TLS 1.3 with mutual authentication, over TCP, over
// a CONNECT proxy, or as one HTTP/2 stream through proxies that end TLS. What
// passes on the wire is specified in SPEC.md beside this file; what a hostile or
// absent peer can cost is bounded by package mux.
package tunnel

import (
	"errors"
	"time"
)

// ALPN is the protocol that the dialer asks for in TLS.
const ALPN = "skerry/1"

// Protocol is the newest revision of [ALPN] that this package speaks.
const Protocol = 1

// Path is where the server takes sessions over HTTP/2.
const Path = "/tunnel"

const (
	// handshakeTimeout bounds each of: a TLS handshake, the exchange of hellos.
	handshakeTimeout = 10 * time.Second

	// maxHeader bounds the header section of a request or response, in bytes.
	maxHeader = 64 << 10
)

var (
	// ErrDown is wrapped by every error that a session returns because it has ended.
	ErrDown = errors.New("tunnel is down")

	// ErrReplaced says that a newer session of the same site has taken over.
	ErrReplaced = errors.New("replaced by a newer session of the same site")
)

// A RefusedError means that the peer could be reached and has said no.
type RefusedError struct {
	Reason string // a sentence by the peer, printable
}

func (e *RefusedError) Error() string { return "refused by peer: " + e.Reason }
