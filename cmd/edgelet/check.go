package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/skerry-io/skerry/edgelet"
	"github.com/skerry-io/skerry/edgelet/cri"
	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// A finding is one line of edgelet check.
type finding struct {
	what string
	ok   bool
	says string // the fact, or what to do
}

func checkCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for what would keep this site from working",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			bad := 0
			for _, f := range findings(cmd.Context(), config) {
				mark := "ok"
				if !f.ok {
					mark = "FAIL"
					bad++
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", mark, f.what, f.says)
			}
			if err := w.Flush(); err != nil {
				return err
			}
			if bad > 0 {
				return fmt.Errorf("%d of the checks failed", bad)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", defaultConfig, "configuration file that edgelet join has written")
	return cmd
}

func findings(ctx context.Context, path string) []finding {
	c, err := readConfig(path)
	if err == nil {
		c, err = c.WithDefaults()
	}
	list := []finding{found("configuration", path, err)}
	if err != nil {
		return list
	}
	identity, err := bootstrap.Load(edgelet.IdentityDir(c))
	if err == nil {
		until := identity.Certificate().NotAfter
		list = append(list, finding{"certificate", true, "site " + identity.Site() + ", until " + until.Local().Format(time.DateTime)})
		if year := time.Now().Year(); year < identity.Certificate().NotBefore.Year() {
			list = append(list, finding{"clock", false, fmt.Sprintf("it is %d here, before the certificate was issued: set the clock, or install chrony", year)})
		}
	} else {
		list = append(list, found("certificate", "", err))
	}
	list = append(list, checkRuntime(ctx, c), checkLink(ctx, c, identity))
	for _, dir := range []string{c.DataDir, c.LogDir} {
		list = append(list, found("directory "+dir, "writable", writable(dir)))
	}
	return list
}

func found(what, says string, err error) finding {
	if err != nil {
		says = err.Error()
	}
	return finding{what, err == nil, says}
}

func checkRuntime(ctx context.Context, c edgelet.Config) finding {
	client, err := cri.Dial(cri.Config{Endpoint: c.RuntimeEndpoint})
	if err != nil {
		return found("runtime", "", err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	v, err := client.Version(ctx)
	if err != nil {
		return found("runtime", "", fmt.Errorf("%s does not answer: %w", client.Endpoint(), err))
	}
	status, err := client.Status(ctx)
	if err != nil {
		return found("runtime", "", err)
	}
	var problems []string
	for _, condition := range status.GetStatus().GetConditions() {
		if !condition.Status {
			problems = append(problems, condition.Type+": "+condition.Message)
		}
	}
	if len(problems) > 0 {
		return finding{"runtime", false, strings.Join(problems, "; ")}
	}
	return finding{"runtime", true, v.RuntimeName + " " + v.RuntimeVersion}
}

func checkLink(ctx context.Context, c edgelet.Config, identity *bootstrap.Identity) finding {
	if identity == nil {
		return finding{"link", false, "needs the certificate"}
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	dialer := &tunnel.Dialer{Server: c.Server, Transport: c.Transport}
	conn, err := dialer.DialContext(ctx, "tcp", "")
	if err != nil {
		return found("link", "", fmt.Errorf("%s cannot be reached: %w", c.Server, err))
	}
	conn.Close()
	return finding{"link", true, c.Server + " answers"}
}

func writable(dir string) error {
	f, err := os.CreateTemp(dir, ".edgelet-check-")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
