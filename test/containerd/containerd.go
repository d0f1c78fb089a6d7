// Package containerd starts a private containerd for tests and demos: its own
// directories, socket, bridge and subnet, beside whatever else the machine runs.
// It needs root, containerd, ctr, runc and the CNI plugins, and no network.
//
// All that an instance makes lies in its directory or bears its name, so that
// [Cleanup] can remove it after a kill -9 too. What stays, since others may share it,
// is the sysctl net.ipv4.ip_forward, which the bridge plugin switches on, and the
// portmap plugin's common chains CNI-HOSTPORT-….
package containerd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/test/images"
)

// PauseImage is the reference of the sandbox image that every instance has.
const PauseImage = "skerry.test/pause:1"

// Options configure an instance. The zero value is usable.
type Options struct {
	Dir        string   // default a new directory, which Stop then removes; what an earlier instance left there is cleaned up
	Binary     string   // containerd to run, default the one in PATH
	Shim       string   // directory of the shim that belongs to Binary, default found in PATH
	PluginDir  string   // CNI plugins, default /usr/lib/cni or /opt/cni/bin
	Archives   []string // OCI archives to import at the start
	PauseFile  string   // OCI archive that has PauseImage, default built by the go command
	Log        io.Writer
	ExtraTOML  string // appended to the configuration
	PauseImage string // default PauseImage
}

// An Instance is a private containerd. Its methods are not safe for concurrent use,
// but for Import.
type Instance struct {
	Dir      string
	Endpoint string // unix:///…
	Network  Network

	options Options
	own     bool // Dir was made by Start
	claim   net.Listener
	process *exec.Cmd
	exited  chan struct{} // closed when process has ended
	conn    *grpc.ClientConn
}

// Start starts an instance and waits until it can run pods.
func Start(ctx context.Context, options Options) (_ *Instance, err error) {
	i := &Instance{Dir: options.Dir, options: options}
	if i.Dir == "" {
		if i.Dir, err = os.MkdirTemp("", "containerd"); err != nil {
			return nil, err
		}
		i.own = true
	} else if err = Cleanup(i.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err = os.MkdirAll(i.Dir, 0o711); err != nil {
		return nil, err
	}
	if i.Dir, err = filepath.EvalSymlinks(i.Dir); err != nil {
		return nil, err
	}
	if len(i.socket()) > 90 {
		return nil, fmt.Errorf("directory %s: path too long for sockets in it", i.Dir)
	}
	i.Endpoint = "unix://" + i.socket()
	if i.claim, i.Network, err = claimNetwork(); err != nil {
		return nil, err
	}
	if err = i.writeConfig(); err != nil {
		return nil, err
	}
	i.conn, err = grpc.NewClient(i.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	if err = i.Run(ctx); err != nil {
		return nil, err
	}
	return i, i.importAll(ctx)
}

// importAll brings in the sandbox image and those of the options.
func (i *Instance) importAll(ctx context.Context) error {
	pause := i.options.PauseFile
	if pause == "" {
		pause = filepath.Join(i.Dir, "pause.tar")
		image, err := images.Pause(ctx, i.pauseImage())
		if err != nil {
			return err
		}
		if err := images.Write(pause, image); err != nil {
			return err
		}
	}
	for _, archive := range append([]string{pause}, i.options.Archives...) {
		if err := i.Import(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// Run starts the daemon, again after Kill, and waits until it answers.
func (i *Instance) Run(ctx context.Context) error {
	log, err := os.OpenFile(i.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(cmp.Or(i.options.Binary, "containerd"), "--config", i.configFile())
	cmd.Stdout, cmd.Stderr = log, log
	if i.options.Log != nil {
		cmd.Stdout = io.MultiWriter(log, i.options.Log)
		cmd.Stderr = cmd.Stdout
	}
	cmd.Env = os.Environ()
	if i.options.Shim != "" {
		cmd.Env = append(cmd.Env, "PATH="+i.options.Shim+":"+os.Getenv("PATH"))
	}
	// A group of its own: Ctrl-C in a terminal is for the caller to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		cmd.Wait()
	}()
	i.process, i.exited = cmd, exited
	return i.awaitReady(ctx)
}

// awaitReady polls until runtime and network are ready.
func (i *Instance) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	i.conn.ResetConnectBackoff()
	client := cri.NewRuntimeServiceClient(i.conn)
	last := errors.New("no answer yet")
	for {
		call, done := context.WithTimeout(ctx, time.Second)
		status, err := client.Status(call, &cri.StatusRequest{})
		done()
		if last = err; err == nil {
			if last = ready(status.GetStatus()); last == nil {
				return nil
			}
		}
		select {
		case <-i.exited:
			return fmt.Errorf("containerd has ended at its start: %s", i.warnings())
		case <-ctx.Done():
			return fmt.Errorf("containerd is not ready: %w: %s", last, i.warnings())
		case <-time.After(20 * time.Millisecond):
			i.conn.ResetConnectBackoff()
		}
	}
}

// warnings is what the daemon's log says of problems, its last lines at most: the
// directory may be gone when somebody wants to look.
func (i *Instance) warnings() string {
	data, _ := os.ReadFile(i.LogFile())
	var lines []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, "level=info") || strings.Contains(line, "skip plugin") {
			continue
		}
		lines = append(lines, line)
	}
	return strings.Join(lines[max(0, len(lines)-5):], "")
}

func ready(status *cri.RuntimeStatus) error {
	for _, c := range status.GetConditions() {
		if !c.Status {
			return fmt.Errorf("%s: %s %s", c.Type, c.Reason, c.Message)
		}
	}
	return nil
}

// Import loads the images of an OCI archive and waits until CRI shows them.
func (i *Instance) Import(ctx context.Context, archive string) error {
	names, err := images.Names(archive)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "ctr", "--address", i.socket(), "--namespace", "k8s.io", "images", "import", archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w: %s", archive, err, out)
	}
	client := cri.NewImageServiceClient(i.conn)
	for _, name := range names {
		for {
			status, err := client.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
			if err != nil {
				return fmt.Errorf("import %s: image %s: %w", archive, name, err)
			}
			if status.Image != nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("import %s: image %s does not appear: %w", archive, name, ctx.Err())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

// Signal sends a signal to the daemon: SIGSTOP makes it hang, SIGCONT go on.
func (i *Instance) Signal(signal os.Signal) error { return i.process.Process.Signal(signal) }

// Kill ends the daemon at once, as kill -9 does. Containers go on. Run starts it again.
func (i *Instance) Kill() error {
	err := i.process.Process.Kill()
	<-i.exited
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Stop removes all pods, ends the daemon and removes what the instance has made,
// its directory too if Start has made it. It may be repeated.
func (i *Instance) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var errs []error
	if i.process != nil {
		i.process.Process.Signal(syscall.SIGCONT) // it may have been stopped
		// What this leaves, Cleanup removes: failure here is no failure to stop.
		_ = removePods(ctx, cri.NewRuntimeServiceClient(i.conn))
		i.process.Process.Signal(syscall.SIGTERM)
		select {
		case <-i.exited:
		case <-time.After(10 * time.Second):
			errs = append(errs, i.Kill())
		}
		i.process = nil
	}
	if i.conn != nil {
		errs = append(errs, i.conn.Close())
		i.conn = nil
	}
	errs = append(errs, Cleanup(i.Dir))
	if i.claim != nil {
		errs = append(errs, i.claim.Close())
		i.claim = nil
	}
	if i.own && errors.Join(errs...) == nil {
		errs = append(errs, os.RemoveAll(i.Dir))
	}
	return errors.Join(errs...)
}

// LogFile is where the daemon logs.
func (i *Instance) LogFile() string    { return filepath.Join(i.Dir, "containerd.log") }
func (i *Instance) socket() string     { return filepath.Join(i.Dir, socketName) }
func (i *Instance) configFile() string { return filepath.Join(i.Dir, configName) }
func (i *Instance) pauseImage() string { return cmp.Or(i.options.PauseImage, PauseImage) }
