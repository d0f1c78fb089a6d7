package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/coder/websocket"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var errConnRefused error = syscall.ECONNREFUSED

// Channels of v4.channel.k8s.io, the first byte of each message.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelError
	channelResize
)

// An exitError carries the exit code of a remote command to main.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("command ended with exit code %d", e.code) }

func exitCode(err error) int {
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	return 1
}

func execCommand() *cobra.Command {
	var l local
	var namespace, container string
	var stdin, tty bool
	cmd := &cobra.Command{
		Use:     "exec POD -- COMMAND [ARG...]",
		Short:   "Run a command in a container",
		Example: "  edgelet exec -n default web-7d4b9 -it -- sh",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			container, err := l.container(cmd.Context(), namespace, args[0], container)
			if err != nil {
				return err
			}
			query := url.Values{"command": args[1:], "output": {"1"}}
			if stdin {
				query.Set("input", "1")
			}
			if tty {
				query.Set("tty", "1")
			} else {
				query.Set("error", "1")
			}
			u := url.URL{Scheme: "ws", Host: "edgelet", Path: "/exec/" + namespace + "/" + args[0] + "/" + container, RawQuery: query.Encode()}
			return l.stream(cmd.Context(), u.String(), stdin, tty)
		},
	}
	l.flag(cmd)
	f := cmd.Flags()
	f.StringVarP(&namespace, "namespace", "n", "default", "namespace of the pod")
	f.StringVarP(&container, "container", "c", "", "container; default the first")
	f.BoolVarP(&stdin, "stdin", "i", false, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	return cmd
}

// stream connects this process' standard streams to the command at u and returns
// its end, as an *exitError if that was not 0.
func (l *local) stream(ctx context.Context, u string, stdin, tty bool) error {
	conn, _, err := websocket.Dial(ctx, u, &websocket.DialOptions{HTTPClient: l.client(), Subprotocols: []string{"v4.channel.k8s.io"}})
	if err != nil {
		return l.explain(err)
	}
	defer conn.CloseNow()
	conn.SetReadLimit(1 << 20)
	if tty && term.IsTerminal(int(os.Stdin.Fd())) {
		restore, err := l.terminal(ctx, conn)
		if err != nil {
			return err
		}
		defer restore()
	}
	if stdin {
		go send(ctx, conn, os.Stdin) // ends with the process: a blocked read can't be woken
	}
	return receive(ctx, conn)
}

// terminal makes the local terminal raw and passes its size on, now and whenever
// it changes.
func (l *local) terminal(ctx context.Context, conn *websocket.Conn) (restore func(), err error) {
	fd := int(os.Stdin.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if width, height, err := term.GetSize(fd); err == nil {
				size := fmt.Appendf([]byte{channelResize}, `{"Width":%d,"Height":%d}`, width, height)
				conn.Write(ctx, websocket.MessageBinary, size)
			}
			select {
			case <-ctx.Done():
				return
			case <-resized:
			}
		}
	}()
	return func() {
		signal.Stop(resized)
		cancel()
		<-done
		term.Restore(fd, old)
	}, nil
}

func send(ctx context.Context, conn *websocket.Conn, in io.Reader) {
	buf := make([]byte, 32<<10)
	buf[0] = channelStdin
	for {
		n, err := in.Read(buf[1:])
		if n > 0 && conn.Write(ctx, websocket.MessageBinary, buf[:n+1]) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

func receive(ctx context.Context, conn *websocket.Conn) error {
	for {
		_, message, err := conn.Read(ctx)
		if err != nil {
			if websocket.CloseStatus(err) == websocket.StatusNormalClosure {
				return nil
			}
			return fmt.Errorf("the connection broke: %w", err)
		}
		if len(message) == 0 {
			continue
		}
		switch data := message[1:]; message[0] {
		case channelStdout:
			os.Stdout.Write(data)
		case channelStderr:
			os.Stderr.Write(data)
		case channelError:
			return ended(data)
		}
	}
}

// ended reads the status that ends a command.
func ended(data []byte) error {
	var status metav1.Status
	if err := json.Unmarshal(data, &status); err != nil {
		return fmt.Errorf("unreadable end of the command: %q", data)
	}
	if status.Status == metav1.StatusSuccess {
		return nil
	}
	if status.Details != nil {
		for _, cause := range status.Details.Causes {
			if code, err := strconv.Atoi(cause.Message); err == nil && cause.Type == "ExitCode" {
				return &exitError{code}
			}
		}
	}
	return errors.New(status.Message)
}
