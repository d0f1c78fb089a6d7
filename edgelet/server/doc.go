// Package server serves a site's part of the kubelet API: to the provider through
// the tunnel, and to commands at the site over a unix socket.
//
//	GET       /containerLogs/{namespace}/{pod}/{container}   follow, previous, timestamps, sinceSeconds,
//	                                                         sinceTime, tailLines, limitBytes, stream
//	GET POST  /exec/{namespace}/{pod}[/{uid}]/{container}    command, input, output, error, tty; Upgrade
//	GET POST  /attach/{namespace}/{pod}[/{uid}]/{container}  input, output, error; Upgrade
//	GET POST  /portForward/{namespace}/{pod}[/{uid}]         port, for WebSocket; Upgrade
//	POST      /run/{namespace}/{pod}[/{uid}]/{container}     cmd
//	GET       /pods, /runningpods/                           PodList
//	GET       /stats/summary                                 only_cpu_and_memory
//	GET       /metrics, /metrics/resource, /metrics/cadvisor, /metrics/probes
//	GET       /healthz, /healthz/{ping,log,syncloop}         verbose
//	GET       /configz
//	GET       /logs/…                                        what is beneath /var/log
//	POST      /checkpoint/{namespace}/{pod}/{container}      not implemented, and says so
//
// Requests have been authenticated and authorized by whoever passes them on.
// Errors have the status and the text of a kubelet's, so that kubectl explains
// them to people as it always does. No answer is ever a redirect.
//
// # Streams
//
// Exec, attach and port-forward are served by the runtime's own streaming server.
// The runtime is asked for a URL, and from then on bytes are copied, SPDY and
// WebSocket alike. The URL is only believed if it names this machine.
package server
