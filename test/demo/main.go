// Command demo shows the whole of Skerry on one machine: a real control plane, a
// provider, and a site whose edgelet runs pods on a containerd of its own. It
// needs root, and removes all that it made.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/skerry-io/skerry/test/lab"
)

const siteName = "shop-1"

// deployment has an httpd that serves its pod's name, and says so in its log.
const deployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {skerry.io/site: ` + siteName + `}
      terminationGracePeriodSeconds: 5
      containers:
        - name: httpd
          image: ` + lab.Busybox + `
          command: [sh, -c, 'mkdir /www; hostname > /www/index.html; echo "serving as $(hostname)"; trap exit TERM; httpd -f -p 8080 -h /www & wait $!']
          ports: [{containerPort: 8080}]
          readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 2}
`

func main() {
	once := flag.Bool("once", false, "exit after the last step, with 0 only if every step did what it should")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *once); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// A demo is the state that its steps share.
type demo struct {
	lab  *lab.Lab
	site *lab.Site
	pod  string // one of the deployment's
}

func run(ctx context.Context, once bool) (err error) {
	d := &demo{}
	start := time.Now()
	defer func() {
		if d.lab == nil {
			return
		}
		fmt.Println("\nRemoving everything…")
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		err = errors.Join(err, d.lab.Close(cleanup))
	}()
	steps := []struct {
		title string
		do    func(context.Context) error
	}{
		{"Start a control plane: etcd, kube-apiserver, controller manager, scheduler", d.cluster},
		{"Start the provider, which makes edge sites nodes of the cluster", d.provider},
		{"Join a site: containerd, one token, one edgelet that dials out", d.join},
		{"Schedule a Deployment onto it with a nodeSelector", d.deploy},
		{"kubectl logs", d.logs},
		{"kubectl exec", d.exec},
		{"kubectl port-forward", d.portForward},
		{"Cut the link and kill a container: the site carries on alone", d.offline},
		{"Heal the link: the cluster sees what happened meanwhile", d.heal},
	}
	for i, step := range steps {
		fmt.Printf("\n[%d/%d] %s\n", i+1, len(steps), step.title)
		began := time.Now()
		if err := step.do(ctx); err != nil {
			if ctx.Err() != nil {
				return nil // Ctrl-C
			}
			return fmt.Errorf("step %d: %w%s", i+1, err, d.diagnosis())
		}
		fmt.Printf("      %.1f s\n", time.Since(began).Seconds())
	}
	fmt.Printf("\nEvery step did what it should, in %.0f s.\n", time.Since(start).Seconds())
	if once {
		return nil
	}
	fmt.Printf(`
It stays up until Ctrl-C. In another terminal:

  alias k='%s --kubeconfig=%s'
  k get nodes,pods -o wide
  k logs -f deployment/web
  k exec -it deployment/web -- sh
  k port-forward deployment/web 8080:8080
`, d.lab.Cluster.Kubectl, d.lab.Cluster.Kubeconfig)
	<-ctx.Done()
	return nil
}

// diagnosis is what the parts have last said, for a failed step.
func (d *demo) diagnosis() string {
	var b strings.Builder
	if d.lab != nil && d.lab.Provider != nil {
		fmt.Fprintf(&b, "\n--- provider:\n%s", d.lab.Provider.Tail())
	}
	if d.site != nil && d.site.Edgelet != nil {
		fmt.Fprintf(&b, "\n--- edgelet:\n%s", d.site.Edgelet.Tail())
	}
	return b.String()
}

// kubectl shows a command line and what it prints.
func (d *demo) kubectl(ctx context.Context, args ...string) (string, error) {
	fmt.Println("      $ kubectl", strings.Join(args, " "))
	out, err := d.lab.Kubectl(ctx, args...)
	for line := range strings.Lines(strings.TrimRight(out, "\n")) {
		fmt.Println("      " + strings.TrimRight(line, "\n"))
	}
	return out, err
}

func (d *demo) cluster(ctx context.Context) (err error) {
	d.lab, err = lab.Start(ctx, lab.Options{Net: 8, Out: os.Stdout})
	return err
}

func (d *demo) provider(ctx context.Context) error { return d.lab.StartProvider(ctx) }

func (d *demo) join(ctx context.Context) (err error) {
	if d.site, err = d.lab.AddSite(ctx, siteName); err != nil {
		return err
	}
	if _, err := d.lab.Kubectl(ctx, "wait", "--for=create", "--timeout=60s", "node/"+siteName); err != nil {
		return err
	}
	if _, err := d.lab.Kubectl(ctx, "wait", "--for=condition=Ready", "--timeout=60s", "node/"+siteName); err != nil {
		return err
	}
	_, err = d.kubectl(ctx, "get", "nodes", "-o", "wide")
	return err
}

func (d *demo) deploy(ctx context.Context) error {
	if _, err := d.lab.KubectlInput(ctx, deployment, "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := d.lab.Kubectl(ctx, "rollout", "status", "deployment/web", "--timeout=90s"); err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, "get", "pods", "-o", "wide"); err != nil {
		return err
	}
	names, err := d.lab.Kubectl(ctx, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}")
	d.pod = names
	return err
}

func (d *demo) logs(ctx context.Context) error {
	return expect(d.kubectl(ctx, "logs", d.pod))("serving as " + d.pod)
}

func (d *demo) exec(ctx context.Context) error {
	return expect(d.kubectl(ctx, "exec", d.pod, "--", "hostname"))(d.pod)
}

// expect checks the output of a command.
func expect(out string, err error) func(want string) error {
	return func(want string) error {
		if err == nil && !strings.Contains(out, want) {
			return fmt.Errorf("printed %q, want %q", out, want)
		}
		return err
	}
}

func (d *demo) portForward(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	const port = "18080"
	fmt.Println("      $ kubectl port-forward", d.pod, port+":8080")
	cmd := d.lab.Command(ctx, "port-forward", d.pod, port+":8080")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Wait()
	defer cancel()
	err := d.lab.Until(ctx, 10*time.Second, "the forwarded port answers", func() error {
		resp, err := http.Get("http://127.0.0.1:" + port)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		fmt.Printf("      $ curl http://127.0.0.1:%s\n      %s", port, body)
		return expect(string(body), err)(d.pod)
	})
	return err
}

func (d *demo) offline(ctx context.Context) error {
	d.site.Link.Cut()
	fmt.Println("      the link is cut; killing the container's process at the site")
	kill := d.site.Command(ctx, "exec", "-n", "default", d.pod, "--", "sh", "-c", "kill -9 $(pidof httpd)")
	if out, err := kill.CombinedOutput(); err != nil && ctx.Err() == nil {
		fmt.Printf("      (%v: %s)\n", err, out) // a command that is killed with its container may fail
	}
	fmt.Println("      $ edgelet ps")
	return d.lab.Until(ctx, 30*time.Second, "the container runs again", func() error {
		out, err := d.site.Command(ctx, "ps").Output()
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) > 4 && f[1] == d.pod && f[2] == "1/1" && f[4] == "1" {
				for line := range strings.Lines(string(out)) {
					fmt.Print("      " + line)
				}
				return nil
			}
		}
		return fmt.Errorf("edgelet ps:\n%s", out)
	})
}

func (d *demo) heal(ctx context.Context) error {
	d.site.Link.Heal()
	err := d.lab.Until(ctx, 30*time.Second, "kubectl sees the restart", func() error {
		return expect(d.lab.Kubectl(ctx, "get", "pod", d.pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"))("1")
	})
	if err != nil {
		return err
	}
	_, err = d.kubectl(ctx, "get", "nodes,pods")
	return err
}
