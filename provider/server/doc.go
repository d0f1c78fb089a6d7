// Package server serves the kubelet API of all sites of a replica: what the API
// server, metrics-server and Prometheus ask of a node, authenticated, authorized and
// passed on through the site's session.
//
// # Listeners
//
// Every site has a TCP port of its own on the replica ([Server.Port]), because nothing
// in a request says which node it is for. The port is derived from the site's name, so
// that it is normally the same after a restart. All ports share one handler and one
// TLS configuration (TLS 1.3, HTTP/2 and HTTP/1.1; upgrades need the latter).
//
// # What is let through
//
//	path                                   methods    subresource of nodes
//	/containerLogs/<ns>/<pod>/<container>  GET        proxy
//	/exec/<ns>/<pod>[/<uid>]/<container>   GET POST   proxy, always with verb create
//	/attach/…                              GET POST   proxy, always with verb create
//	/portForward/<ns>/<pod>[/<uid>]        GET POST   proxy, always with verb create
//	/run/<ns>/<pod>[/<uid>]/<container>    POST       proxy
//	/checkpoint/<ns>/<pod>/<container>     POST       checkpoint
//	/pods, /runningpods                    GET        pods or proxy
//	/stats/summary                         GET        stats
//	/metrics[/resource|cadvisor|probes]    GET        metrics
//	/healthz[/log|ping|syncloop]           GET        healthz or proxy
//	/configz                               GET        configz or proxy
//	/logs/…                                GET        log
//
// HEAD counts as GET. All else is 404, above all the paths of the contract between
// provider and edgelet, and so is a pod that is not bound to the site. The request that
// reaches the site is built anew from what was parsed, with known headers only.
//
// A kubelet derives the verb from the method alone, so that a WebSocket, which begins
// with GET, runs commands for who may only "get" nodes/proxy. Here it does not.
//
// # Who asks
//
// A client certificate is verified against [Config.ClientCAs], a bearer token by
// [Config.Authenticator]; there is no anonymous access. What they may do is up to
// [Config.Authorizer]. Tokens are remembered for two minutes, permissions for five
// and refusals for thirty seconds, as a kubelet does. The site is told the user's
// name in the header X-Remote-User, for its log. For requests of kubectl that is the
// API server.
//
// # Sites are not trusted
//
// A site's answer must not harm who asked: a redirect, a change of protocol that was
// not asked for, an oversized header or an impossible status is a 502, informational
// answers are swallowed, and only known headers are passed on. A site that is offline
// is a 503 that says since when.
package server
