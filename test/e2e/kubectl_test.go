//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLogs(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: talker}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: $IMAGE
      command: [sh, -c, 'for i in 1 2 3 4 5; do echo line $i; done; echo oops >&2; test -e /tmp/again/x && sleep 3600; touch /tmp/again/x; exit 3']
      volumeMounts: [{name: again, mountPath: /tmp/again}]
  volumes: [{name: again, emptyDir: {}}]
`)
	awaitPath(t, ns, "pod/talker", ".status.containerStatuses[0].restartCount", "1")
	awaitPath(t, ns, "pod/talker", ".status.containerStatuses[0].ready", "true")
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"all":              {nil, "line 1\nline 2\nline 3\nline 4\nline 5\noops\n"},
		"tail":             {[]string{"--tail=2"}, "line 5\noops\n"},
		"limited":          {[]string{"--limit-bytes=6"}, "line 1"},
		"previous":         {[]string{"--previous", "--tail=1"}, "oops\n"},
		"since the future": {[]string{"--since-time=2999-01-01T00:00:00Z"}, ""},
		"since an hour":    {[]string{"--since=1h", "--tail=1"}, "oops\n"},
		"with a prefix":    {[]string{"--prefix", "--tail=1"}, "[pod/talker/main] oops\n"},
		"all containers":   {[]string{"--all-containers", "--tail=1"}, "oops\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := kubectl(t, append([]string{"-n", ns, "logs", "talker"}, tt.args...)...); got != tt.want {
				t.Errorf("printed %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("timestamps", func(t *testing.T) {
		line := kubectl(t, "-n", ns, "logs", "talker", "--timestamps", "--tail=1")
		stamp, rest, _ := strings.Cut(line, " ")
		if at, err := time.Parse(time.RFC3339Nano, stamp); err != nil || time.Since(at) > time.Hour || rest != "oops\n" {
			t.Errorf("printed %q: %v", line, err)
		}
	})
	t.Run("a container that does not exist is an error that says so", func(t *testing.T) {
		_, err := shared.Kubectl(t.Context(), "-n", ns, "logs", "talker", "-c", "nobody")
		if err == nil || !strings.Contains(err.Error(), "nobody") {
			t.Errorf("error: %v", err)
		}
	})
}

func TestLogsFollow(t *testing.T) {
	ns := startSleeper(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := shared.Command(ctx, "-n", ns, "logs", "-f", "sleeper")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	read := func(want string) {
		t.Helper()
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(out, buf); err != nil || string(buf) != want {
			t.Fatalf("followed %q, %v; want %q", buf, err, want)
		}
	}
	read("started\n")
	kubectl(t, "-n", ns, "exec", "sleeper", "--", "sh", "-c", "echo later > /proc/1/fd/1")
	read("later\n")
	kubectl(t, "-n", ns, "delete", "pod", "sleeper")
	if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
}

func TestExec(t *testing.T) {
	ns := startSleeper(t)
	run := func(stdin string, args ...string) (stdout, stderr string, code int) {
		t.Helper()
		cmd := shared.Command(t.Context(), append([]string{"-n", ns, "exec"}, args...)...)
		var out, errout bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errout
		err := cmd.Run()
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		return out.String(), errout.String(), code
	}
	t.Run("output", func(t *testing.T) {
		if out, errout, code := run("", "sleeper", "--", "echo", "hello"); out != "hello\n" || errout != "" || code != 0 {
			t.Errorf("%q, %q, %d", out, errout, code)
		}
	})
	t.Run("standard error is separate", func(t *testing.T) {
		if out, errout, _ := run("", "sleeper", "--", "sh", "-c", "echo out; echo err >&2"); out != "out\n" || errout != "err\n" {
			t.Errorf("%q, %q", out, errout)
		}
	})
	t.Run("exit codes", func(t *testing.T) {
		for _, want := range []int{0, 1, 42, 137} {
			if _, _, code := run("", "sleeper", "--", "sh", "-c", fmt.Sprintf("exit %d", want)); code != want {
				t.Errorf("exit %d came back as %d", want, code)
			}
		}
	})
	t.Run("standard input to its end", func(t *testing.T) {
		if out, _, code := run("a\nb\nc\n", "-i", "sleeper", "--", "wc", "-l"); strings.TrimSpace(out) != "3" || code != 0 {
			t.Errorf("%q, %d", out, code)
		}
	})
	t.Run("a terminal, with its size", func(t *testing.T) {
		// script gives kubectl a terminal of its own.
		size := `'until stty size | grep -q "33 77"; do sleep 0.1; done; echo it is right'`
		line := strings.Join(shared.Command(t.Context(), "-n", ns, "exec", "-it", "sleeper", "--", "sh", "-c", size).Args, " ")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "script", "-qec", "stty rows 33 cols 77; "+line, "/dev/null")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "it is right") {
			t.Errorf("%v: %q", err, out)
		}
	})
	t.Run("a command that does not exist", func(t *testing.T) {
		if _, errout, code := run("", "sleeper", "--", "no-such-command"); code == 0 || !strings.Contains(errout, "no-such-command") {
			t.Errorf("%d, %q", code, errout)
		}
	})
}

// TestExecOften does what makes KubeEdge's agent die about every 18th time.
func TestExecOften(t *testing.T) {
	ns := startSleeper(t)
	one := func(i int) error {
		want := fmt.Sprintf("call %d\n", i)
		out, err := shared.Kubectl(t.Context(), "-n", ns, "exec", "sleeper", "--", "echo", strings.TrimSpace(want))
		if err == nil && out != want {
			err = fmt.Errorf("call %d printed %q", i, out)
		}
		return err
	}
	t.Run("1000 in a row", func(t *testing.T) {
		for i := range 1000 {
			if err := one(i); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("50 at once", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 50 {
			all.Go(func() {
				if err := one(i); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	})
}

func TestAttach(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: echo}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 1
  containers:
    - {name: main, image: $IMAGE, stdin: true, command: [cat]}
`)
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/echo")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := shared.Command(ctx, "-n", ns, "attach", "-i", "echo")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	for _, line := range []string{"ping\n", "pong\n"} {
		if _, err := io.WriteString(in, line); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(line))
		if _, err := io.ReadFull(out, buf); err != nil || string(buf) != line {
			t.Fatalf("attached: %q, %v; want %q", buf, err, line)
		}
	}
}

func TestCopy(t *testing.T) {
	ns := startSleeper(t)
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	f, err := os.Create(there)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, h), rand.Reader, 200<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	want := fmt.Sprintf("%x", h.Sum(nil))
	kubectl(t, "-n", ns, "cp", there, "sleeper:/data")
	if out := kubectl(t, "-n", ns, "exec", "sleeper", "--", "sha256sum", "/data"); !strings.HasPrefix(out, want) {
		t.Errorf("copied there: %s, want %s", out, want)
	}
	kubectl(t, "-n", ns, "cp", "sleeper:/data", back)
	data, err := os.ReadFile(back)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(data)); got != want {
		t.Errorf("copied back: %s, want %s", got, want)
	}
}

func TestPortForward(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: $IMAGE
      command: [sh, -c, 'mkdir /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www']
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`)
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/web")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := shared.Command(ctx, "-n", ns, "port-forward", "web", ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	var port int
	if _, err := fmt.Fscanf(out, "Forwarding from 127.0.0.1:%d -> 8080\n", &port); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, out)
	for range 20 {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "hello\n" {
			t.Fatalf("%q, %v", body, err)
		}
	}
}

func TestDebug(t *testing.T) {
	ns := startSleeper(t)
	kubectl(t, "-n", ns, "debug", "sleeper", "--image="+expand("$IMAGE"), "--target=main", "--container=debugger", "--", "sh", "-c", "ps; sleep 3600")
	until(t, time.Minute, "the debugger sees the target's processes", func() error {
		out, err := shared.Kubectl(t.Context(), "-n", ns, "logs", "sleeper", "-c", "debugger")
		if err == nil && !strings.Contains(out, "echo started") {
			err = fmt.Errorf("its log: %q", out)
		}
		return err
	})
}

func TestNodeProxy(t *testing.T) {
	ns := startSleeper(t)
	raw := func(path string) string { return kubectl(t, "get", "--raw", "/api/v1/nodes/"+siteName+"/proxy/"+path) }
	for path, want := range map[string][]string{
		"pods":             {`"sleeper"`},
		"stats/summary":    {`"sleeper"`, `"workingSetBytes"`, `"nodeName":"` + siteName + `"`},
		"healthz":          {"ok"},
		"metrics/resource": {"node_cpu_usage_seconds_total", "node_memory_working_set_bytes", `container_cpu_usage_seconds_total{container="main",namespace="` + ns + `",pod="sleeper"}`, "container_memory_working_set_bytes", "pod_memory_working_set_bytes", "container_start_time_seconds"},
	} {
		t.Run(path, func(t *testing.T) {
			until(t, 20*time.Second, path+" is complete", func() error {
				out := strings.ReplaceAll(raw(path), `": `, `":`)
				for _, part := range want {
					if !strings.Contains(out, part) {
						return fmt.Errorf("no %s in:\n%.3000s", part, out)
					}
				}
				return nil
			})
		})
	}
	t.Run("the internal contract is not reachable", func(t *testing.T) {
		if out, err := shared.Kubectl(t.Context(), "get", "--raw", "/api/v1/nodes/"+siteName+"/proxy/skerry/v1/inventory"); err == nil {
			t.Errorf("inventory was served: %s", out)
		}
	})
}

func TestDescribe(t *testing.T) {
	ns := startSleeper(t)
	until(t, 15*time.Second, "describe shows a kubelet's events", func() error {
		out := kubectl(t, "-n", ns, "describe", "pod", "sleeper")
		for _, part := range []string{"Scheduled", "Pulled", "Created", "Started", "containerd://", "edgelet"} {
			if !strings.Contains(out, part) {
				return fmt.Errorf("no %q in:\n%s", part, out)
			}
		}
		return nil
	})
	out := kubectl(t, "describe", "node", siteName)
	for _, part := range []string{"EdgeConnected", "MemoryPressure", "containerd://", "cpu:", "skerry.io/site=" + siteName, "skerry://" + siteName} {
		if !strings.Contains(out, part) {
			t.Errorf("describe node: no %q in:\n%s", part, out)
		}
	}
}
