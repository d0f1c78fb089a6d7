package mux

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pair returns the two ends of a session over an in-memory connection.
func pair(t testing.TB, cfg Config) (client, server *Session) {
	a, b := net.Pipe()
	client, server = start(t, a, true, cfg), start(t, b, false, cfg)
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return client, server
}

func start(t testing.TB, c net.Conn, client bool, cfg Config) *Session {
	s, err := New(c, client, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bubble runs f under fake time. Collecting garbage twice empties yamux's pool
// of timers, which must not pass from one bubble to the next.
func bubble(t *testing.T, f func(t *testing.T)) {
	empty := func() { runtime.GC(); runtime.GC() }
	empty()
	defer empty()
	synctest.Test(t, f)
}

// streams returns the two ends of one stream, which the client opened.
func streams(t testing.TB, client, server *Session) (a, b *Stream) {
	a, err := client.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte{'.'}); err != nil {
		t.Fatal(err)
	}
	b, err = server.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestManyStreamsBothWaysKeepTheirBytes(t *testing.T) {
	client, server := pair(t, Config{})
	echo := func(s *Session) {
		for {
			st, err := s.Accept(t.Context())
			if err != nil {
				return
			}
			go func() {
				io.Copy(st, st)
				st.Close()
			}()
		}
	}
	go echo(client)
	go echo(server)
	var wg sync.WaitGroup
	for i := range 40 {
		s := []*Session{client, server}[i%2]
		wg.Go(func() {
			st, err := s.Open(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Close()
			sent, got := sha256.New(), sha256.New()
			wg.Go(func() {
				for range 100 {
					p := make([]byte, mrand.IntN(20_000))
					rand.Read(p)
					sent.Write(p)
					if _, err := st.Write(p); err != nil {
						t.Errorf("write: %v", err)
					}
				}
				if err := st.CloseWrite(); err != nil {
					t.Errorf("close write: %v", err)
				}
			})
			if _, err := io.Copy(got, st); err != nil {
				t.Errorf("read: %v", err)
			}
			if !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
				t.Error("echo differs from what was sent")
			}
		})
	}
	wg.Wait()
}

func TestClosing(t *testing.T) {
	tests := map[string]func(t *testing.T, a, b *Stream){
		"what was written before Close arrives, then end of file": func(t *testing.T, a, b *Stream) {
			a.Write([]byte("last words"))
			a.Close()
			if got, err := io.ReadAll(b); string(got) != "last words" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}
		},
		"half-close leaves the other direction open": func(t *testing.T, a, b *Stream) {
			a.CloseWrite()
			if _, err := b.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read: %v, want EOF", err)
			}
			go b.Write([]byte("x"))
			if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
				t.Errorf("read the other way: %v", err)
			}
			if _, err := a.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("write after CloseWrite: %v", err)
			}
		},
		"Close frees a peer that is blocked writing": func(t *testing.T, a, b *Stream) {
			done := make(chan error)
			go func() {
				_, err := b.Write(make([]byte, 1<<20))
				done <- err
			}()
			synctest.Wait()
			a.Close()
			began := time.Now()
			if err := <-done; !errors.Is(err, ErrReset) || time.Since(began) > time.Second {
				t.Errorf("write: %v after %v, want %v at once", err, time.Since(began), ErrReset)
			}
		},
		"Close frees a local reader and writer": func(t *testing.T, a, b *Stream) {
			done := make(chan error, 2)
			go func() { _, err := a.Write(make([]byte, 1<<20)); done <- err }()
			go func() { _, err := a.Read(make([]byte, 1)); done <- err }()
			synctest.Wait()
			a.Close()
			for range 2 {
				if err := <-done; !errors.Is(err, net.ErrClosed) {
					t.Errorf("%v, want %v", err, net.ErrClosed)
				}
			}
		},
		"deadlines end a Read and a Write, and can be lifted": func(t *testing.T, a, b *Stream) {
			a.SetDeadline(time.Now().Add(time.Second))
			if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read: %v", err)
			}
			n, err := a.Write(make([]byte, 1<<20))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("write: %v", err)
			}
			a.SetDeadline(time.Time{})
			go a.Write([]byte("on"))
			got := make([]byte, n+2)
			if _, err := io.ReadFull(b, got); err != nil || string(got[n:]) != "on" {
				t.Errorf("after the deadline was lifted: %q, %v", got[n:], err)
			}
		},
		"the end of a session ends its streams": func(t *testing.T, a, b *Stream) {
			done := make(chan error)
			go func() { _, err := b.Read(make([]byte, 1)); done <- err }()
			a.session.Close()
			if err := <-done; !errors.Is(err, ErrPeerClosed) {
				t.Errorf("read: %v, want %v", err, ErrPeerClosed)
			}
			if _, err := a.Write([]byte("x")); !errors.Is(err, ErrClosed) {
				t.Errorf("write: %v, want %v", err, ErrClosed)
			}
		},
	}
	for name, check := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				client, server := pair(t, Config{})
				a, b := streams(t, client, server)
				check(t, a, b)
				a.Close()
				b.Close()
				synctest.Wait()
				if n, m := client.Streams(), server.Streams(); n+m > 0 {
					t.Errorf("%d and %d streams left", n, m)
				}
			})
		})
	}
}

func TestStreamsAreCapped(t *testing.T) {
	bubble(t, func(t *testing.T) {
		client, server := pair(t, Config{MaxStreams: 3})
		var open []*Stream
		for range 3 {
			a, b := streams(t, client, server)
			open = append(open, a, b)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := client.Open(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a fourth stream: %v", err)
		}
		// A peer that does not keep to it is refused.
		<-client.slots
		st, err := client.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		st.Write([]byte("x"))
		if _, err := st.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
			t.Errorf("stream over the cap: %v, want %v", err, ErrReset)
		}
		st.Close()
		client.slots <- struct{}{}
		for _, st := range open {
			st.Close()
		}
		synctest.Wait()
		streams(t, client, server) // there is room again
	})
}

func TestUnreadStreamsStallNobodyAndStayBounded(t *testing.T) {
	client, server := pair(t, Config{})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 200 { // accepted, never read
		st, _ := streams(t, client, server)
		st.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		go st.Write(make([]byte, 1<<20))
	}
	a, b := streams(t, client, server)
	go io.Copy(b, b)
	for range 100 {
		a.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := a.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(a, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond) // all have written what they may
	runtime.GC()
	runtime.ReadMemStats(&after)
	held := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) >> 10
	if most := int64(2*4<<10 + 8<<10); held > most {
		t.Errorf("%d KiB held for unread streams, want at most %d", held, most)
	}
}

func TestBudgetEndsTheStreamThatIsReadLeast(t *testing.T) {
	bubble(t, func(t *testing.T) {
		client, server := pair(t, Config{Budget: 600 << 10})
		a, b := streams(t, client, server)
		c, d := streams(t, client, server)
		e, f := streams(t, client, server)
		for i, st := range []*Stream{a, c, e} {
			go st.Write(make([]byte, []int{150, 400, 200}[i]<<10))
		}
		synctest.Wait()
		if _, err := c.Write([]byte("x")); !errors.Is(err, ErrReset) {
			t.Errorf("writer of the worst stream: %v, want %v", err, ErrReset)
		}
		if _, err := io.ReadAll(d); !errors.Is(err, ErrUnread) {
			t.Errorf("reader of the worst stream: %v, want %v", err, ErrUnread)
		}
		for _, ok := range []struct {
			st *Stream
			n  int
		}{{b, 150 << 10}, {f, 200 << 10}} {
			if _, err := io.ReadFull(ok.st, make([]byte, ok.n)); err != nil {
				t.Errorf("another stream: %v", err)
			}
		}
		if server.unread != 0 {
			t.Errorf("%d bytes counted as unread when all was read", server.unread)
		}
		for _, st := range []*Stream{a, b, c, d, e, f} {
			st.Close()
		}
	})
}

func TestSilence(t *testing.T) {
	for name, cut := range map[string]func(a, b *stallable){
		"towards the server": func(a, b *stallable) { a.stall() },
		"towards the client": func(a, b *stallable) { b.stall() },
		"both ways":          func(a, b *stallable) { a.stall(); b.stall() },
	} {
		t.Run("both sides notice within 30 s that nothing passes "+name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				p, q := net.Pipe()
				a, b := newStallable(p), newStallable(q)
				client, server := start(t, a, true, Config{}), start(t, b, false, Config{})
				time.Sleep(time.Hour + 7*time.Second)
				if client.Err() != nil || server.Err() != nil {
					t.Fatalf("an idle session ended: %v, %v", client.Err(), server.Err())
				}
				cut(a, b)
				since := time.Now()
				<-client.Done()
				<-server.Done()
				if d := time.Since(since); d > 30*time.Second {
					t.Errorf("noticed after %v", d)
				}
				if c, s := client.Err(), server.Err(); !errors.Is(c, ErrTimeout) && !errors.Is(s, ErrTimeout) {
					t.Errorf("errors %v and %v", c, s)
				}
				client.Close()
				server.Close()
			})
		})
	}
	t.Run("the first round trip is known at once", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			var n atomic.Int32
			client, server := pair(t, Config{OnRTT: func(time.Duration) { n.Add(1) }})
			synctest.Wait()
			if client.RTT() == 0 || server.RTT() == 0 || n.Load() != 2 {
				t.Errorf("RTT %v and %v, reported %d times", client.RTT(), server.RTT(), n.Load())
			}
		})
	})
}

// stallable is a connection whose writes can be made to vanish, as on a half-open link.
type stallable struct {
	net.Conn
	gone chan struct{}
}

func newStallable(c net.Conn) *stallable { return &stallable{c, make(chan struct{})} }
func (s *stallable) stall()              { close(s.gone) }
func (s *stallable) Write(p []byte) (int, error) {
	select {
	case <-s.gone:
		return len(p), nil
	default:
		return s.Conn.Write(p)
	}
}

func TestBrokenProtocolEndsTheSession(t *testing.T) {
	data := func(flags uint16, id uint32, n int) []byte {
		return append(header{kind: typeData, flags: flags, id: id, length: uint32(n)}.appendTo(nil), make([]byte, min(n, 1<<17))...)
	}
	tests := map[string]struct {
		bytes []byte
		want  error
	}{
		"unknown version":            {[]byte("GET / HTTP/1.1\r\n"), ErrProtocol},
		"unknown type":               {header{kind: 9}.appendTo(nil), ErrProtocol},
		"stream 0":                   {data(flagSYN, 0, 1), ErrProtocol},
		"id of the wrong side":       {data(flagSYN, 2, 1), ErrProtocol},
		"id used twice":              {append(data(flagSYN, 1, 1), data(flagSYN, 1, 1)...), ErrProtocol},
		"stream never opened":        {data(0, 7, 1), ErrProtocol},
		"our stream, never opened":   {data(flagACK, 2, 1), ErrProtocol},
		"frame of 4 GiB":             {data(flagSYN, 1, 1<<32-1), ErrProtocol},
		"frame of 65 KiB":            {data(flagSYN, 1, 65<<10), ErrProtocol},
		"more than the window":       {slices.Concat(data(flagSYN, 1, 64<<10), bytes.Repeat(data(0, 1, 64<<10), 12)), ErrProtocol},
		"window of more than 4 GiB":  {header{kind: typeWindow, id: 1, length: 1<<32 - 1}.appendTo(manySYNs(1)), ErrProtocol},
		"peer reports an error":      {header{kind: typeGoAway, length: 1}.appendTo(nil), nil},
		"truncated in a header":      {data(flagSYN, 1, 1)[:7], nil},
		"truncated in a body":        {data(flagSYN, 1, 100)[:60], nil},
		"nothing":                    {nil, nil},
		"answers that nobody takes":  {bytes.Repeat(header{kind: typePing, flags: flagSYN}.appendTo(nil), 5000), ErrFlood},
		"refusals that nobody takes": {manySYNs(5000), ErrFlood},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				a, b := net.Pipe()
				s := start(t, b, false, Config{})
				defer s.Close()
				go func() {
					a.Write(tt.bytes)
					if !errors.Is(tt.want, ErrProtocol) {
						a.Close()
					}
				}()
				<-s.Done()
				a.Close()
				if err := s.Err(); err == nil || tt.want != nil && !errors.Is(err, tt.want) {
					t.Errorf("session ended with %v, want %v", err, tt.want)
				}
			})
		})
	}
}

func manySYNs(n int) (b []byte) {
	for i := range n {
		b = header{kind: typeWindow, flags: flagSYN, id: uint32(2*i + 1)}.appendTo(b)
	}
	return b
}

func FuzzSession(f *testing.F) {
	f.Add(manySYNs(3))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(append(header{kind: typeData, flags: flagSYN, id: 1, length: 5}.appendTo(nil), "hello"...))
	f.Add(header{kind: typeWindow, flags: flagFIN | flagRST, id: 1}.appendTo(manySYNs(1)))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := net.Pipe()
		s := start(t, b, false, Config{})
		go io.Copy(io.Discard, a)
		go func() {
			for { // ends with the session
				st, err := s.Accept(context.Background())
				if err != nil {
					return
				}
				io.CopyN(st, st, 10)
				st.Close()
			}
		}()
		a.SetWriteDeadline(time.Now().Add(5 * time.Second))
		a.Write(in)
		a.Close()
		select {
		case <-s.Done():
		case <-time.After(5 * time.Second):
			t.Fatal("the session outlives its connection")
		}
		s.Close()
	})
}

func BenchmarkThroughput(b *testing.B) {
	for _, size := range []int{512, 4 << 10, 32 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			p, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			q, err := l.Accept()
			if err != nil {
				b.Fatal(err)
			}
			client, server := start(b, p, true, Config{}), start(b, q, false, Config{})
			defer client.Close()
			defer server.Close()
			st, end := streams(b, client, server)
			go io.Copy(io.Discard, end)
			buf := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := st.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
