// Package bootstrap provides both ends of a site's identity: how a machine with
// a join token becomes a site, and how a site keeps its certificate for years.
// It knows no Kubernetes; where tokens and records are kept is behind [Tokens]
// and [Authority].
//
// # What a site is
//
// A site is an ECDSA key that never leaves the machine, and a certificate for it
// from the provider's own CA. The certificate is built from a template in which
// only the public key comes from the site (see [CA.IssueSite]):
//
//	subject     O=skerry:sites, CN=<site>
//	SAN         exactly one: URI spiffe://skerry.io/site/<site>
//	usage       digitalSignature; clientAuth only; no CA
//	serial      64 bits of issue time in microseconds, 64 random bits
//
// Serials of one site grow, so of two certificates the one with the higher
// serial is the newer: that is the site's lineage.
//
// # Protocol
//
// HTTP/1.1 over TLS 1.3, ALPN http/1.1, without a client certificate; bodies are
// JSON of at most 32 KiB.
//
//	GET  /v1/ca     the CA bundle, PEM
//	GET  /v1/time   ?nonce=<32 hex digits>: the time, signed by the CA key
//	POST /v1/join   Authorization: Bearer <token>; [joinRequest]
//	POST /v1/renew  [renewRequest]: a CSR for the new key, the old certificate,
//	                and a signature of both by the old key
//
// 200 carries the certificate, 202 says that a person must approve the request
// (ask again, the same), everything else a [Code].
//
// A join or a renewal asked again for the same key is the same join: nothing is
// lost if an answer is lost, or if either end is killed at any point. A token or
// a certificate that has been used for one key is never good for another.
//
// # Trust
//
// The site pins the CA by the SHA-256 of its public key. [Join] first makes a TLS
// handshake that trusts nobody, which can only fail and sends nothing, looks for
// the pinned CA in the chain that it was shown, and only then connects again,
// trusting that CA alone.
//
// A renewal accepts a certificate that has expired, up to [HandlerConfig].MaxOffline
// ago, if it is the last of its lineage and the site is not revoked. So a machine
// that was in a drawer for a year comes back by itself; a copy of a disk, or of an
// older state of it, does not.
//
// # Clocks
//
// A machine without a battery-backed clock starts in 1970, when no certificate is
// valid yet. A site then asks for the time, signed by the CA key over a nonce of
// its own, and goes by that (see [Identity.Now]). It says so in the log.
package bootstrap
