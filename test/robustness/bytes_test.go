//go:build e2e

package robustness

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skerry-io/skerry/tunnel"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// memoryGrowth is how much one hostile site, or anybody who reaches the port, may
// make the provider use, in bytes.
const memoryGrowth = 64 << 20

// A missile is what is thrown at a port: bytes, and how the thrower goes on.
type missile struct {
	name  string
	bytes []byte
	hold  bool // stay connected in silence, not reading either
}

func noise(random *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return b
}

// clientHello records what a TLS client says first.
func clientHello(t *testing.T) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	var work sync.WaitGroup
	work.Go(func() {
		tls.Client(near, &tls.Config{ServerName: bootstrap.ServerName, NextProtos: []string{tunnel.ALPN}}).HandshakeContext(t.Context())
		near.Close()
	})
	header := make([]byte, 5)
	if _, err := io.ReadFull(far, header); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(header[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	far.Close()
	work.Wait()
	return append(header, body...)
}

// early are missiles for a TLS port, before any handshake.
func early(hello []byte, random *rand.Rand) []missile {
	all := []missile{
		{"nothing", nil, true},
		{"one byte", []byte{22}, true},
		{"a record that claims the most", []byte{22, 3, 1, 0xff, 0xff}, true},
		{"a handshake message that claims 16 MiB", []byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, true},
		{"half a ClientHello", hello[:len(hello)/2], true},
		{"a ClientHello twice", append(bytes.Clone(hello), hello...), false},
		{"a ClientHello and noise", append(bytes.Clone(hello), noise(random, 1<<20)...), false},
		{"plain HTTP", []byte("GET /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n"), false},
		{"plain HTTP/2", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), false},
		{"8 MiB of noise", noise(random, 8<<20), false},
		{"8 MiB of a record's beginning", bytes.Repeat([]byte{22, 3, 1, 0, 1, 1}, 8<<20/6), false},
	}
	for range 40 {
		all = append(all, missile{"noise", noise(random, 1+random.IntN(4096)), random.IntN(4) == 0})
		flipped := bytes.Clone(hello)
		flipped[random.IntN(len(flipped))] ^= 1 << random.IntN(8)
		all = append(all, missile{"a ClientHello with one bit flipped", flipped, random.IntN(4) == 0})
	}
	return all
}

// frame is a yamux header with a body.
func frame(version, kind byte, flags uint16, stream, length uint32, body string) []byte {
	b := []byte{version, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	b = binary.BigEndian.AppendUint32(b, length)
	return append(b, body...)
}

// Kinds and flags of yamux frames.
const (
	data, window, ping, goAway = 0, 1, 2, 3
	syn, fin                   = 1, 4
)

// late are missiles for a tunnel, after the handshake. The dialer's streams are odd.
func late(random *rand.Rand) []missile {
	all := []missile{
		{"nothing", nil, true},
		{"half a header", frame(0, data, syn, 1, 0, "")[:7], true},
		{"another version of yamux", frame(9, data, syn, 1, 0, ""), false},
		{"an unknown kind", frame(0, 77, 0, 1, 0, ""), false},
		{"data that claims 4 GiB", frame(0, data, syn, 1, 0xffffffff, ""), true},
		{"data beyond the window", frame(0, data, syn, 1, 1<<24, strings.Repeat("x", 1<<24)), false},
		{"data of no stream", frame(0, data, 0, 99, 5, "hello"), false},
		{"a stream of the wrong side", frame(0, window, syn, 2, 0, ""), false},
		{"one stream twice", append(frame(0, window, syn, 1, 0, ""), frame(0, window, syn, 1, 0, "")...), false},
		{"a window that overflows", many(4, func(int) []byte { return frame(0, window, syn, 1, 0xffffffff, "") }), false},
		{"going away", frame(0, goAway, 0, 0, 0, ""), true},
		{"100,000 pings", many(100000, func(i int) []byte { return frame(0, ping, syn, 0, uint32(i), "") }), true},
		{"a hello that is none", hello("hello"), true},
		{"a hello of another world", hello(`{"protocol":-1,"site":"x"}`), true},
		{"a hello of 64 KiB", hello(strings.Repeat(" ", 64<<10)), true},
		{"a hello as another site", hello(`{"protocol":1,"site":"site-0","epoch":18446744073709551615}`), true},
		{"a hello with escapes", hello(`{"protocol":1,"version":"\u001b[2J\u0000"}`), true},
	}
	return append(all, noises(random)...)
}

func many(n int, each func(i int) []byte) (all []byte) {
	for i := range n {
		all = append(all, each(i)...)
	}
	return all
}

// hello is what a dialer says first in a tunnel, on a stream of its own.
func hello(text string) []byte {
	return append(frame(0, window, syn, 1, 0, ""), frame(0, data, fin, 1, uint32(len(text)), text)...)
}

// floods are missiles for a session that has begun.
func floods(random *rand.Rand) []missile {
	return []missile{
		{"50,000 streams", many(50000, func(i int) []byte { return frame(0, window, syn, uint32(3+2*i), 0, "") }), true},
		{"256 KiB on each of 256 streams", many(256, func(i int) []byte {
			const head = "POST /skerry/v1/report HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
			return frame(0, data, syn, uint32(3+2*i), 256<<10, head+strings.Repeat("x", 256<<10-len(head)))
		}), true},
		{"a header of 1 MiB", many(64, func(i int) []byte {
			flags := uint16(0)
			text := strings.Repeat("a", 16<<10)
			if i == 0 {
				flags, text = syn, "GET / HTTP/1.1\r\nX: "
			}
			return frame(0, data, flags, 3, uint32(len(text)), text)
		}), true},
		{"requests that are none", many(200, func(i int) []byte {
			text := string(noise(random, 200))
			return frame(0, data, syn|fin, uint32(3+2*i), 200, text)
		}), false},
		{"two lengths", func() []byte {
			text := "POST /skerry/v1/report HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
			return frame(0, data, syn, 3, uint32(len(text)), text)
		}(), true},
	}
}

func noises(random *rand.Rand) (all []missile) {
	for range 40 {
		all = append(all, missile{"noise", noise(random, 1+random.IntN(4096)), random.IntN(4) == 0})
	}
	return all
}

// begin says hello and waits for the answer.
func begin(conn net.Conn) error {
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write(hello(`{"protocol":1}`)); err != nil {
		return err
	}
	var head [12]byte
	for {
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return fmt.Errorf("no answer to hello: %w", err)
		}
		if head[1] == data {
			if n := binary.BigEndian.Uint32(head[8:]); n > 0 {
				_, err := io.CopyN(io.Discard, conn, int64(n))
				return err
			}
		}
	}
}

// throw sends a missile over conn, and waits a moment for what comes of it.
func throw(conn net.Conn, m missile, patience time.Duration) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	conn.Write(m.bytes) // the other side may well hang up before all is written
	if !m.hold {
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
		io.Copy(io.Discard, conn)
		return
	}
	time.Sleep(patience)
}

// bombard throws all missiles, atOnce at a time.
func bombard(ctx context.Context, atOnce int, missiles []missile, dial func(context.Context) (net.Conn, error)) (thrown int, err error) {
	var work sync.WaitGroup
	var mu sync.Mutex
	slots := make(chan struct{}, atOnce)
	for _, m := range missiles {
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
			defer cancel()
			conn, dialErr := dial(ctx)
			if dialErr == nil {
				throw(conn, m, 1500*time.Millisecond)
			}
			mu.Lock()
			defer mu.Unlock()
			if dialErr != nil {
				err = fmt.Errorf("%s: %w", m.name, dialErr)
				return
			}
			thrown++
		})
	}
	work.Wait()
	return thrown, err
}

// watchMemory samples the resident memory of a process until stop, and returns the
// most that it was.
func watchMemory(t *testing.T, pid int) (stop func() int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	most := memory(t, pid)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
			now, _ := resident(pid) // 0 if it has ended, which the test finds out
			most = max(most, now)
		}
	}()
	return func() int64 { cancel(); <-done; return most }
}

// TestBadBytesAtTheProvider throws what no site sends at the provider's port, before
// and, with a site's certificate, after the handshake.
func TestBadBytesAtTheProvider(t *testing.T) {
	needSites(t, 1)
	ns := namespace(t)
	apply(t, ns, sleeper("web", siteName(0), ""))
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/web")
	h := joinHostile(t, "thrower")
	random := rand.New(rand.NewPCG(*seed, 3))
	pid := shared.Provider.PID()
	before := memory(t, pid)
	stop := watchMemory(t, pid)

	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	var execs int
	var slowest time.Duration
	work.Go(func() { // others' sites are to notice nothing
		for ctx.Err() == nil {
			began := time.Now()
			if out, err := shared.Kubectl(t.Context(), "-n", ns, "exec", "web", "--", "echo", "here"); err != nil || out != "here\n" {
				t.Errorf("exec at another site: %q, %v", out, err)
			}
			execs, slowest = execs+1, max(slowest, time.Since(began))
		}
	})
	tcp := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", shared.ProviderAddress())
	}
	n, err := bombard(t.Context(), 24, early(clientHello(t), random), tcp)
	t.Logf("%d before the handshake: memory %d MiB, was %d", n, memory(t, pid)>>20, before>>20)
	if err != nil {
		t.Errorf("before the handshake: %v", err)
	}
	for _, protocol := range []string{tunnel.ALPN, "h2", "http/1.1", ""} {
		config := h.identity.TLSConfig(bootstrap.ServerName)
		if config.NextProtos = nil; protocol != "" {
			config.NextProtos = []string{protocol}
		}
		n, err := bombard(t.Context(), 24, late(random), func(ctx context.Context) (net.Conn, error) {
			return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", shared.ProviderAddress())
		})
		t.Logf("%d after the handshake as %q: memory %d MiB", n, protocol, memory(t, pid)>>20)
		if err != nil {
			t.Errorf("after the handshake as %q: %v", protocol, err)
		}
	}
	config := h.identity.TLSConfig(bootstrap.ServerName)
	config.NextProtos = []string{tunnel.ALPN}
	session := func(ctx context.Context) (net.Conn, error) {
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", shared.ProviderAddress())
		if err != nil {
			return nil, err
		}
		if err := begin(conn); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}
	for _, step := range []struct {
		name     string
		missiles []missile
		atOnce   int // a session ends the one before
	}{{"floods", floods(random), 1}, {"noise", noises(random), 4}} {
		n, err := bombard(t.Context(), step.atOnce, step.missiles, session)
		t.Logf("%d of %d %s in a session: memory %d MiB", n, len(step.missiles), step.name, memory(t, pid)>>20)
		if n < len(step.missiles)/step.atOnce {
			t.Errorf("%s: only %d sessions began: %v", step.name, n, err)
		}
	}
	cancel()
	work.Wait()
	most := stop()
	t.Logf("%d execs meanwhile, the slowest took %s; memory was %d MiB, at most %d", execs, slowest.Round(time.Millisecond), before>>20, most>>20)
	if grown := most - before; grown > memoryGrowth {
		t.Errorf("the provider's memory grew by %d MiB, at most %d are allowed", grown>>20, memoryGrowth>>20)
	}
	if err := alive(shared.Provider); err != nil {
		t.Error(err)
	}
	h.connect(t) // the same certificate, in good order
	h.report(t, "{}")
}
