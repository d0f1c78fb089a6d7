package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of what is taken from a container, in bytes.
const (
	maxOutput  = 10 << 10 // of a command's output or a response's body
	maxMessage = 1 << 10  // of an event
)

// Attempts at an answer that cannot be had, as a kubelet makes them.
const maxAttempts = 3

// A job is one execution of a probe: what to ask and whom.
type job struct {
	probe     *corev1.Probe
	pod       *corev1.Pod
	container *corev1.Container
	id        string // of the container
	ip        string // of the pod, "" if it has none yet
}

// A checker executes probes. It has no state but connections' settings.
type checker struct {
	exec    func(ctx context.Context, containerID string, cmd []string, timeout time.Duration) ([]byte, int, error)
	agent   string // user agent of probes
	http    *http.Client
	http2   *http.Client // in clear text, for probes that ask for it
	version string
}

func newChecker(cfg Config) checker {
	return checker{
		exec:    cfg.Exec,
		agent:   "kube-probe/" + cfg.Version,
		http:    newHTTPClient(false),
		http2:   newHTTPClient(true),
		version: cfg.Version,
	}
}

// run executes a probe once and returns its answer and what there is to say of
// it. It does not take longer than the probe's timeout allows, but for a command
// that the runtime does not end in time, which gets a little longer.
func (c *checker) run(ctx context.Context, job job) (answer, string) {
	for n := 1; ; n++ {
		got, output, err := c.attempt(ctx, job)
		switch {
		case err == nil:
			return got, output
		case n == maxAttempts || ctx.Err() != nil:
			return unknown, err.Error()
		}
	}
}

// attempt is one try at an answer. An error means that there is none.
func (c *checker) attempt(ctx context.Context, job job) (answer, string, error) {
	limit := timeout(job.probe)
	switch {
	case job.probe.Exec != nil:
		return c.command(ctx, job, limit)
	case job.probe.HTTPGet != nil:
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return c.get(ctx, job)
	case job.probe.TCPSocket != nil:
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return c.connect(ctx, job)
	case job.probe.GRPC != nil:
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return c.health(ctx, job, limit)
	}
	return unknown, "", fmt.Errorf("missing probe handler for %s/%s:%s", job.pod.Namespace, job.pod.Name, job.container.Name)
}

// command runs a command in the container. The runtime ends it in time; that it
// might fail to is why ctx gets a limit too.
func (c *checker) command(ctx context.Context, job job, limit time.Duration) (answer, string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit+2*time.Second)
	defer cancel()
	cmd := expand(job.probe.Exec.Command, job.container.Env)
	output, exit, err := c.exec(ctx, job.id, cmd, limit)
	switch {
	case timedOut(err):
		return failure, fmt.Sprintf("command timed out: %q timed out after %s", strings.Join(cmd, " "), limit), nil
	case err != nil:
		return unknown, "", err
	case exit != 0:
		return failure, string(output[:min(len(output), maxOutput)]), nil
	}
	return success, "", nil
}

func timedOut(err error) bool {
	return err != nil && (errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded)
}

// get asks an HTTP server. Any answer from 200 to 399 is a good one.
func (c *checker) get(ctx context.Context, job job) (answer, string, error) {
	action := job.probe.HTTPGet
	req, err := newRequest(ctx, action, job.container, job.ip, c.agent)
	if err != nil {
		return unknown, "", err
	}
	client := c.http
	if action.Protocol != nil && *action.Protocol == corev1.HTTPProtocolHTTP2 && req.URL.Scheme == "http" {
		client = c.http2
	}
	resp, err := client.Do(req)
	if err != nil {
		return failure, err.Error(), nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxOutput))
	if err != nil {
		return failure, fmt.Sprintf("body of the response: %v", err), nil
	}
	switch {
	case resp.StatusCode < 200 || resp.StatusCode >= 400:
		// The body is not repeated: it may hold what not everyone who reads events may see.
		return failure, fmt.Sprintf("HTTP probe failed with statuscode: %d", resp.StatusCode), nil
	case resp.StatusCode >= 300:
		return warning, "Probe terminated redirects, Response body: " + string(body), nil
	}
	return success, "", nil
}

// connect opens a TCP connection and closes it again.
func (c *checker) connect(ctx context.Context, job job) (answer, string, error) {
	action := job.probe.TCPSocket
	addr, err := address(action.Host, job.ip, action.Port, job.container)
	if err != nil {
		return unknown, "", err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return failure, err.Error(), nil
	}
	conn.Close()
	return success, "", nil
}

// address is host, or else the pod's address, with a port of the container.
func address(host, ip string, port intstr.IntOrString, container *corev1.Container) (string, error) {
	if host == "" {
		host = ip
	}
	if host == "" {
		return "", errors.New("the pod has no IP address yet") // an empty host would be this machine
	}
	n, err := resolve(port, container)
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(host, strconv.Itoa(n)), nil
}

// resolve is the number of a port that may be given by name.
func resolve(port intstr.IntOrString, container *corev1.Container) (int, error) {
	n := int(port.IntVal)
	if port.Type == intstr.String {
		n = -1
		for _, p := range container.Ports {
			if p.Name == port.StrVal {
				n = int(p.ContainerPort)
			}
		}
		if n < 0 {
			return 0, fmt.Errorf("port %q not found", port.StrVal)
		}
	}
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("invalid port number: %d", n)
	}
	return n, nil
}

// expand replaces $(NAME) in a command by what the container's declaration gives
// NAME literally; $$ is $, and what is not known stays as it is.
func expand(cmd []string, env []corev1.EnvVar) []string {
	expanded := make([]string, len(cmd))
	for i, word := range cmd {
		expanded[i] = expandWord(word, env)
	}
	return expanded
}

func expandWord(word string, env []corev1.EnvVar) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(word, '$')
		if i < 0 || i+1 == len(word) {
			return b.String() + word
		}
		b.WriteString(word[:i])
		rest := word[i+1:]
		name, after, closed := strings.Cut(rest, ")")
		switch {
		case rest[0] == '$':
			b.WriteByte('$')
			word = rest[1:]
		case rest[0] == '(' && closed:
			b.WriteString(literal(name[1:], env))
			word = after
		default:
			b.WriteByte('$')
			word = rest
		}
	}
}

// literal is the value of an environment variable, the last of its name.
func literal(name string, env []corev1.EnvVar) string {
	for i := len(env) - 1; i >= 0; i-- {
		if env[i].Name == name {
			return env[i].Value
		}
	}
	return "$(" + name + ")"
}

// clip shortens s to at most limit bytes of valid UTF-8.
func clip(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.ToValidUTF8(s, "")
}
