package bootstrap

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// TestMain doubles as the process that is killed.
func TestMain(m *testing.M) {
	if os.Getenv("BOOTSTRAP_TEST_VICTIM") != "" {
		if err := victim(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// victim joins or renews, and kills itself before a given change to the disk.
func victim() error {
	last, err := strconv.Atoi(os.Getenv("BOOTSTRAP_TEST_STEP"))
	if err != nil {
		return err
	}
	step := func(string) {
		if last--; last == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	config := JoinConfig{
		Server: os.Getenv("BOOTSTRAP_TEST_SERVER"), CACertHash: os.Getenv("BOOTSTRAP_TEST_PIN"),
		Token: "abcdef.0123456789abcdef", Site: "site-a", Dir: os.Getenv("BOOTSTRAP_TEST_DIR"),
		Log: slog.New(slog.DiscardHandler), step: step,
	}
	if os.Getenv("BOOTSTRAP_TEST_VICTIM") == "join" {
		_, err := Join(context.Background(), config)
		return err
	}
	id, err := Load(config.Dir)
	if err != nil {
		return err
	}
	id.step = step
	r, err := NewRotator(RotatorConfig{Identity: id, Server: config.Server, Log: config.Log})
	if err != nil {
		return err
	}
	return r.Renew(context.Background())
}

// TestKilledAnywhere kills a real process with SIGKILL before each change that
// joining and renewing make to the disk, one after the other: the identity that
// is left is whole and admitted, and the next attempt succeeds.
func TestKilledAnywhere(t *testing.T) {
	for _, what := range []string{"join", "renew"} {
		t.Run(what, func(t *testing.T) {
			c := newCloudOverTCP(t)
			kills := 0
			for step := 1; ; step++ {
				dir := filepath.Join(t.TempDir(), "identity")
				config := c.joinConfig(t)
				config.Server, config.Dir, config.Dial = c.url, dir, nil
				c.mu.Lock()
				c.record = Record{} // a new site each time
				c.mu.Unlock()
				if what == "renew" {
					if _, err := Join(t.Context(), config); err != nil {
						t.Fatal(err)
					}
				}
				killed := runVictim(t, what, step, c, dir)
				// What is left: nothing yet, or an identity that works.
				id, err := Load(dir)
				switch {
				case err == nil:
					if _, err := c.get().Admits(id.Certificate().SerialNumber); err != nil {
						t.Errorf("killed at step %d: what is left is not admitted: %v", step, err)
					}
				case what == "join" && errors.Is(err, fs.ErrNotExist):
				default:
					t.Fatalf("killed at step %d: %v", step, err)
				}
				// And the next attempt succeeds.
				if what == "join" {
					if id, err = Join(t.Context(), config); err != nil {
						t.Fatalf("killed at step %d, joining again: %v", step, err)
					}
				}
				for range 2 {
					r, err := NewRotator(RotatorConfig{Identity: id, Server: c.url, Log: config.Log})
					if err != nil {
						t.Fatal(err)
					}
					if err := r.Renew(t.Context()); err != nil {
						t.Fatalf("killed at step %d, renewing: %v", step, err)
					}
				}
				c.good(t, id)
				if !killed {
					break
				}
				kills++
			}
			if kills < 15 {
				t.Errorf("killed at %d points only: the test does not reach the disk", kills)
			}
			t.Logf("killed at %d points", kills)
		})
	}
}

// runVictim reports whether the process was killed before it was done.
func runVictim(t *testing.T, what string, step int, c *tcpCloud, dir string) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(),
		"BOOTSTRAP_TEST_VICTIM="+what, "BOOTSTRAP_TEST_STEP="+strconv.Itoa(step), "BOOTSTRAP_TEST_DIR="+dir,
		"BOOTSTRAP_TEST_SERVER="+c.url, "BOOTSTRAP_TEST_PIN="+c.ca.Pin())
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGKILL {
			return true
		}
	}
	t.Fatalf("step %d: %v: %s", step, err, out)
	return false
}

// A tcpCloud is a cloud that other processes can reach.
type tcpCloud struct {
	*cloud
	url string
}

func newCloudOverTCP(t *testing.T) *tcpCloud {
	t.Helper()
	ca := testCA(t)
	cert, err := NewServerCertificate(ServerConfig{CA: ca, Names: []string{"127.0.0.1"}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{ca: ca, cert: cert}
	h, err := NewHandler(HandlerConfig{CA: ca, Tokens: c, Authority: c, PerSource: 1e6, Overall: 1e6, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cert.GetCertificate},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return &tcpCloud{cloud: c, url: "https://" + l.Addr().String()}
}
