//go:build e2e

package robustness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"
)

// edgeletMemory is what an edgelet may use while a log is read, in bytes.
const edgeletMemory = 64 << 20

// TestLogLineWithoutEnd lets a container write 1 GB without a newline and reads its
// log in all ways.
func TestLogLineWithoutEnd(t *testing.T) {
	needSites(t, 1)
	site := sites[0]
	ns := namespace(t)
	stop := watchMemory(t, site.Edgelet.PID())
	began := time.Now()
	apply(t, ns, strings.Replace(sleeper("loud", site.Name, "  restartPolicy: Never"), "trap exit TERM; while true; do sleep 3600 & wait $!; done",
		"head -c 1000000000 /dev/zero | tr \\\\0 x", 1))
	follow, followed := followLog(t, ns, "loud")
	defer follow()
	until(t, 4*time.Minute, "the container has written it all", func() error {
		phase, err := shared.Kubectl(t.Context(), "-n", ns, "get", "pod", "loud", "-o", "jsonpath={.status.phase}")
		if err == nil && phase != "Succeeded" {
			err = fmt.Errorf("it is %s", phase)
		}
		return err
	})
	t.Logf("written in %.0f s", time.Since(began).Seconds())
	n, err := followed()
	t.Logf("logs -f gave %d bytes, %v", n, err)
	for _, flags := range [][]string{{"--limit-bytes=1000"}, {"--limit-bytes=1000", "--timestamps"}, {"--tail=1", "--limit-bytes=1000"}, {"--tail=1"}, {}} {
		out, err := readLog(t.Context(), ns, "loud", flags...)
		t.Logf("logs %v: %d bytes", flags, out)
		limited := len(flags) > 0 && strings.HasPrefix(flags[len(flags)-1], "--limit") || len(flags) > 1
		switch {
		case err != nil:
			t.Errorf("logs %v: %v", flags, err)
		case limited && out != 1000:
			t.Errorf("logs %v: %d bytes, want 1000", flags, out)
		case !limited && (out < 8<<20 || out > 1000000000):
			t.Errorf("logs %v: %d bytes, want what rotation has kept of 1 GB", flags, out)
		}
	}
	most := stop()
	t.Logf("the edgelet's memory was %d MiB at most", most>>20)
	if most > edgeletMemory {
		t.Errorf("the edgelet's memory was %d MiB, at most %d are allowed", most>>20, edgeletMemory>>20)
	}
	if err := alive(site.Edgelet); err != nil {
		t.Error(err)
	}
}

// onlyX counts bytes, and fails at one that the container did not write.
type onlyX struct {
	n     int64
	stamp bool // time stamps are allowed
}

func (w *onlyX) Write(p []byte) (int, error) {
	if i := bytes.IndexFunc(p, func(r rune) bool { return r != 'x' && r != '\n' }); i >= 0 && !w.stamp {
		return 0, fmt.Errorf("byte %d is %q", w.n+int64(i), p[i])
	}
	w.n += int64(len(p))
	return len(p), nil
}

// readLog runs kubectl logs and returns how much it gave.
func readLog(ctx context.Context, ns, pod string, flags ...string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := shared.Command(ctx, append([]string{"-n", ns, "logs", pod}, flags...)...)
	count := &onlyX{stamp: strings.Contains(strings.Join(flags, " "), "--timestamps")}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = count, &stderr
	if err := cmd.Run(); err != nil {
		return count.n, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return count.n, nil
}

// followLog runs kubectl logs -f in the background.
func followLog(t *testing.T, ns, pod string) (cancel func(), wait func() (int64, error)) {
	t.Helper()
	until(t, time.Minute, "the log is there", func() error { _, err := readLog(t.Context(), ns, pod, "--limit-bytes=1"); return err })
	ctx, stop := context.WithCancel(t.Context())
	type result struct {
		n   int64
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := readLog(ctx, ns, pod, "-f")
		done <- result{n, err}
	}()
	return stop, func() (int64, error) { r := <-done; return r.n, r.err }
}

// TestLogPathsStayInTheLogs asks for logs by paths that lead elsewhere.
func TestLogPathsStayInTheLogs(t *testing.T) {
	needSites(t, 1)
	ns := namespace(t)
	apply(t, ns, sleeper("web", siteName(0), ""))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/web")
	node := "/api/v1/nodes/" + siteName(0) + "/proxy"
	up := strings.Repeat("../", 12)
	for _, path := range []string{
		"/logs/" + up + "etc/passwd", "/logs/" + url.PathEscape(up) + "etc/passwd", "/logs/" + strings.Repeat("%2e%2e%2f", 12) + "etc/passwd", "/logs//etc/passwd", "/logs/./" + up + "etc/passwd",
		"/containerLogs/" + ns + "/web/" + url.PathEscape(up+"etc/passwd"), "/containerLogs/" + ns + "/" + url.PathEscape(up) + "/main", "/containerLogs/" + url.PathEscape(up) + "/web/main",
		"/containerLogs/" + ns + "/web/main?query=/etc/passwd&tailLines=-1", "/logs/?query=" + url.QueryEscape(up+"etc/passwd"),
		"/logs/" + url.PathEscape("..\\..\\etc\\passwd"), "/logs/\x00",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, err := admin.CoreV1().RESTClient().Get().RequestURI(node + path).DoRaw(ctx)
		cancel()
		if bytes.Contains(out, []byte("root:")) {
			t.Errorf("%s gives %.100q", path, out)
		}
		if err == nil && len(out) > 0 && !strings.Contains(path, "?") {
			t.Errorf("%s: no error, but %.100q", path, out)
		}
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v, not an answer", path, err)
		}
	}
	if err := alive(sites[0].Edgelet); err != nil {
		t.Error(err)
	}
}

// TestSubPathsStayInTheirVolume gives pods subPaths that lead out of their volumes
// by symbolic links, which the API server can't know.
func TestSubPathsStayInTheirVolume(t *testing.T) {
	needSites(t, 1)
	ns := namespace(t)
	for name, link := range map[string]string{
		"absolute": "/", "relative": "../../../../../../../../..", "dir": "/etc", "proc": "/proc/self/root", "self": "escape",
	} {
		apply(t, ns, sleeper(name, siteName(0), `
      volumeMounts: [{name: shared, mountPath: /stolen, subPath: escape/etc}]
  initContainers:
    - name: linker
      image: skerry.test/busybox:1
      command: [ln, -s, "`+link+`", /shared/escape]
      volumeMounts: [{name: shared, mountPath: /shared}]
  volumes: [{name: shared, emptyDir: {}}]
`))
	}
	for _, name := range []string{"absolute", "relative", "dir", "proc", "self"} {
		path := "jsonpath={.status.containerStatuses[0].state.waiting.reason}: {.status.containerStatuses[0].state.waiting.message}"
		until(t, 60*time.Second, name+" is refused", func() error {
			out, err := shared.Kubectl(t.Context(), "-n", ns, "get", "pod", name, "-o", path)
			if err == nil && !strings.HasPrefix(out, "CreateContainerConfigError: ") {
				err = fmt.Errorf("it is %q", out)
			}
			return err
		})
		out := kubectl(t, "-n", ns, "get", "pod", name, "-o", path)
		t.Logf("%s: %s", name, out)
		if !strings.Contains(out, `"shared" of container "main"`) {
			t.Errorf("%s: the message does not say which mount: %s", name, out)
		}
	}
}
