package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/skerry-io/skerry/edgelet"
)

// A local is a client of the edgelet's own socket.
type local struct{ socket string }

// flag adds --socket to cmd.
func (l *local) flag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.socket, "socket", defaultSocket, "local socket of the edgelet")
}

func (l *local) client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", l.socket)
		},
	}}
}

// do sends a request and returns the answer if it is 200; the caller closes the body.
func (l *local) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "edgelet", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := l.client().Do(req)
	if err != nil {
		return nil, l.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return nil, errors.New(strings.TrimSpace(string(text)))
	}
	return resp, nil
}

// explain says what to do about a socket that nobody answers on.
func (l *local) explain(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, errConnRefused):
		return fmt.Errorf("no edgelet is running here (%s): start it with systemctl start edgelet, or give --socket", l.socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s is for root only: use sudo", l.socket)
	}
	return err
}

func (l *local) get(ctx context.Context, path string, value any) error {
	resp, err := l.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(value)
}

func statusCommand() *cobra.Command {
	var l local
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the link, the runtime and the store of this site",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s edgelet.Status
			if err := l.get(cmd.Context(), edgelet.StatusPath, &s); err != nil {
				return err
			}
			if asJSON {
				encoder := json.NewEncoder(cmd.OutOrStdout())
				encoder.SetIndent("", "  ")
				return encoder.Encode(s)
			}
			return printStatus(cmd.OutOrStdout(), s, time.Now())
		},
	}
	l.flag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printStatus(out io.Writer, s edgelet.Status, now time.Time) error {
	link := "never connected to " + s.Server
	switch {
	case s.Connected:
		link = fmt.Sprintf("connected to %s for %s, round trip %s", s.Server, age(now, s.Since), s.RTT.Round(100*time.Microsecond))
	case !s.Since.IsZero():
		link = fmt.Sprintf("disconnected from %s for %s: %s", s.Server, age(now, s.Since), s.LastError)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "Site:\t%s\n", s.Site)
	fmt.Fprintf(w, "Link:\t%s\n", link)
	fmt.Fprintf(w, "Runtime:\t%s\n", s.Runtime)
	fmt.Fprintf(w, "Pods:\t%d running, %d in all\n", s.Running, s.Pods)
	fmt.Fprintf(w, "Certificate:\tuntil %s\n", s.CertificateExpires.Local().Format("2006-01-02"))
	fmt.Fprintf(w, "Store:\t%d KiB, %d KiB written in %s\n", s.StoreBytes>>10, s.StoreWritten>>10, age(now, s.Started))
	fmt.Fprintf(w, "Version:\t%s\n", s.Version)
	return w.Flush()
}

func psCommand() *cobra.Command {
	var l local
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List the pods of this site",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var pods corev1.PodList
			if err := l.get(cmd.Context(), "/pods", &pods); err != nil {
				return err
			}
			return printPods(cmd.OutOrStdout(), pods.Items, time.Now())
		},
	}
	l.flag(cmd)
	return cmd
}

func printPods(out io.Writer, pods []corev1.Pod, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tNAME\tREADY\tSTATUS\tRESTARTS\tIP\tAGE")
	for _, p := range pods {
		ready, restarts := 0, int32(0)
		status := string(p.Status.Phase)
		for _, c := range p.Status.ContainerStatuses {
			restarts += c.RestartCount
			if c.Ready {
				ready++
			}
			if c.State.Waiting != nil && c.State.Waiting.Reason != "" {
				status = c.State.Waiting.Reason
			}
		}
		if p.DeletionTimestamp != nil {
			status = "Terminating"
		}
		fmt.Fprintf(w, "%s\t%s\t%d/%d\t%s\t%d\t%s\t%s\n", p.Namespace, p.Name, ready, len(p.Spec.Containers), status, restarts, p.Status.PodIP, age(now, p.CreationTimestamp.Time))
	}
	return w.Flush()
}

func age(now, since time.Time) string { return duration.HumanDuration(now.Sub(since)) }

func logsCommand() *cobra.Command {
	var l local
	var namespace, container, since string
	var follow, previous, timestamps bool
	var tail int
	cmd := &cobra.Command{
		Use:     "logs POD",
		Short:   "Print the log of a container",
		Example: "  edgelet logs -n default web-7d4b9 -c app --tail 20 -f",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			container, err := l.container(cmd.Context(), namespace, args[0], container)
			if err != nil {
				return err
			}
			query := url.Values{}
			for name, on := range map[string]bool{"follow": follow, "previous": previous, "timestamps": timestamps} {
				if on {
					query.Set(name, "true")
				}
			}
			if tail >= 0 {
				query.Set("tailLines", fmt.Sprint(tail))
			}
			if since != "" {
				d, err := time.ParseDuration(since)
				if err != nil {
					return fmt.Errorf("--since: %w", err)
				}
				query.Set("sinceSeconds", fmt.Sprint(int(d.Seconds())))
			}
			resp, err := l.do(cmd.Context(), http.MethodGet, "/containerLogs/"+namespace+"/"+args[0]+"/"+container, query)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, err = io.Copy(cmd.OutOrStdout(), resp.Body)
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is how following ends
			}
			return err
		},
	}
	l.flag(cmd)
	f := cmd.Flags()
	f.StringVarP(&namespace, "namespace", "n", "default", "namespace of the pod")
	f.StringVarP(&container, "container", "c", "", "container; default the first")
	f.BoolVarP(&follow, "follow", "f", false, "go on as the log grows")
	f.BoolVarP(&previous, "previous", "p", false, "of the container's previous run")
	f.BoolVar(&timestamps, "timestamps", false, "begin each line with its time")
	f.IntVar(&tail, "tail", -1, "last lines only; -1 for all")
	f.StringVar(&since, "since", "", "newer than a duration, as 5m")
	return cmd
}

// container is the named container of a pod, or its first.
func (l *local) container(ctx context.Context, namespace, pod, name string) (string, error) {
	if name != "" {
		return name, nil
	}
	var pods corev1.PodList
	if err := l.get(ctx, "/pods", &pods); err != nil {
		return "", err
	}
	for _, p := range pods.Items {
		if p.Namespace == namespace && p.Name == pod {
			return p.Spec.Containers[0].Name, nil
		}
	}
	return "", fmt.Errorf("no pod %s in namespace %s here; edgelet ps lists the pods", pod, namespace)
}
