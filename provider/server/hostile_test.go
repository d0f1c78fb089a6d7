package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"
	"time"
)

// hostile makes berlin a site that answers every connection's first request with what
// answer writes, and returns how many connections are open.
func hostile(f *fixture, transport *http.Transport, answer func(conn net.Conn, request *http.Request)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(f.t, err)
	f.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if r, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					answer(conn, r)
				}
			}()
		}
	}()
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	}
	f.t.Cleanup(transport.CloseIdleConnections)
	f.sites.mu.Lock()
	defer f.sites.mu.Unlock()
	f.sites.sites["berlin"] = transport
}

func TestHostileAnswersDoNoHarm(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
	for name, test := range map[string]struct {
		answer  string
		plain   int    // status for who asked for pods
		body    string // of that answer, if it is 200
		upgrade int    // status for who asked to upgrade exec; 0: the same
	}{
		"a good one":                        {answer: ok, plain: 200, body: "good"},
		"a redirect":                        {answer: "HTTP/1.1 301 Moved\r\nLocation: https://evil/\r\nContent-Length: 0\r\n\r\n", plain: 502},
		"a redirect that keeps the method":  {answer: "HTTP/1.1 307 Moved\r\nLocation: /api/v1/secrets\r\nContent-Length: 0\r\n\r\n", plain: 502},
		"not modified":                      {answer: "HTTP/1.1 304 Not Modified\r\n\r\n", plain: 502},
		"an upgrade":                        {answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", plain: 502, upgrade: 101},
		"an upgrade, twice":                 {answer: strings.Repeat("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", 2), plain: 502, upgrade: 101},
		"an upgrade to something else":      {answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", plain: 502},
		"an upgrade to nothing":             {answer: "HTTP/1.1 101 Switching Protocols\r\n\r\n", plain: 502},
		"informational answers":             {answer: "HTTP/1.1 103 Early Hints\r\nLink: evil\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + ok, plain: 200, body: "good"},
		"informational answers for ever":    {answer: strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: evil\r\n\r\n", 100_000), plain: 502},
		"status 0":                          {answer: "HTTP/1.1 000 Nothing\r\nContent-Length: 0\r\n\r\n", plain: 502},
		"status 42":                         {answer: "HTTP/1.1 042 Early\r\nContent-Length: 0\r\n\r\n", plain: 502},
		"status 999":                        {answer: "HTTP/1.1 999 Late\r\nContent-Length: 0\r\n\r\n", plain: 502},
		"no HTTP":                           {answer: "SSH-2.0-OpenSSH\r\n\x1b[31mred\r\n\r\n", plain: 502},
		"nothing":                           {answer: "", plain: 502},
		"two lengths":                       {answer: "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\ngood!", plain: 502},
		"a length and chunks":               {answer: "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n", plain: 200, body: "good"},
		"a strange coding":                  {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n", plain: 502},
		"a second answer":                   {answer: ok + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", plain: 200, body: "good"},
		"trailing bytes":                    {answer: ok + "evil evil evil", plain: 200, body: "good"},
		"trailers":                          {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Set-Cookie\r\n\r\n4\r\ngood\r\n0\r\nSet-Cookie: evil\r\nX-Other: evil\r\n\r\n", plain: 200, body: "good"},
		"headers for a browser":             {answer: "HTTP/1.1 200 OK\r\nSet-Cookie: evil\r\nLocation: evil\r\nAlt-Svc: evil\r\nStrict-Transport-Security: evil\r\nX-Remote-User: evil\r\nContent-Length: 4\r\n\r\ngood", plain: 200, body: "good"},
		"a header of 100 KB":                {answer: "HTTP/1.1 200 OK\r\nCache-Control: " + strings.Repeat("a", 100_000) + "\r\nContent-Length: 4\r\n\r\ngood", plain: 502},
		"a failed upgrade with a long body": {answer: "HTTP/1.1 500 Error\r\nContent-Length: 4\r\n\r\nfail", plain: 500},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, nil)
			for kind, transport := range map[string]*http.Transport{
				"limited": {DisableCompression: true, MaxResponseHeaderBytes: maxHeader}, "careless": {DisableCompression: true},
			} {
				hostile(f, transport, func(conn net.Conn, r *http.Request) { io.WriteString(conn, test.answer) })
				trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
					t.Errorf("%s: an informational answer %d was passed on", kind, code)
					return nil
				}}
				req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), "GET", f.url("berlin", "/pods"), nil)
				must(t, err)
				resp, err := f.as(apiServer).Do(req)
				must(t, err)
				body, err := io.ReadAll(resp.Body)
				must(t, err)
				resp.Body.Close()
				if resp.StatusCode != test.plain || test.plain == 200 && string(body) != test.body {
					t.Errorf("%s: %d %q, want %d", kind, resp.StatusCode, body, test.plain)
				}
				if test.plain == 502 && (!strings.HasPrefix(string(body), "site berlin: ") || strings.ContainsRune(string(body), 0x1b)) {
					t.Errorf("%s: sentence %q", kind, body)
				}
				if dump := fmt.Sprint(resp.Header, resp.Trailer); strings.Contains(dump, "evil") {
					t.Errorf("%s: passed on: %s", kind, dump)
				}

				transport.CloseIdleConnections() // a POST is never repeated, and this site closes them
				_, r, resp := f.upgrade(apiServer, "POST", "berlin", "/exec/ns/web/main", "SPDY/3.1")
				want := test.upgrade
				if want == 0 {
					want = test.plain
				}
				if resp.StatusCode != want {
					t.Errorf("%s: exec: %d, want %d", kind, resp.StatusCode, want)
				}
				if want != 101 {
					rest, _ := io.ReadAll(resp.Body)
					if strings.Contains(string(rest), "evil") || r.Buffered() > 0 {
						t.Errorf("%s: exec: %q and %d bytes more", kind, rest, r.Buffered())
					}
				}
			}
			// The next request, of a good site on the same server, is as ever.
			hostile(f, &http.Transport{}, func(conn net.Conn, r *http.Request) { io.WriteString(conn, ok) })
			if code, body := f.get("berlin", "/pods"); code != 200 || body != "good" {
				t.Errorf("next: %d %q", code, body)
			}
		})
	}
}

// TestEndlessHeaderIsCutOff sends until nobody listens, up to 1 GiB.
func TestEndlessHeaderIsCutOff(t *testing.T) {
	f := newFixture(t, nil)
	sent := make(chan int, 1)
	hostile(f, &http.Transport{MaxResponseHeaderBytes: maxHeader}, func(conn net.Conn, r *http.Request) {
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nX-Long: ")
		block, n := []byte(strings.Repeat("a", 64<<10)), 0
		for n < 1<<30 {
			m, err := conn.Write(block)
			n += m
			if err != nil {
				break
			}
		}
		sent <- n
	})
	if code, body := f.get("berlin", "/pods"); code != 502 {
		t.Errorf("%d %q", code, body)
	}
	if n := <-sent; n > 32<<20 {
		t.Errorf("%d bytes were taken", n)
	}
}

// TestBodyThatBreaksOffIsNotTakenForWhole: who asked must see that it ended too soon.
func TestBodyThatBreaksOffIsNotTakenForWhole(t *testing.T) {
	for name, answer := range map[string]string{
		"by length": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
		"by chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
	} {
		f := newFixture(t, nil)
		hostile(f, &http.Transport{}, func(conn net.Conn, r *http.Request) { io.WriteString(conn, answer) })
		resp, err := f.as(apiServer).Get(f.url("berlin", "/pods"))
		must(t, err)
		if body, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("%s: %q was taken for whole", name, body)
		}
		resp.Body.Close()
	}
}

// TestSilentSiteIsLeftWhenWhoAsksGoes: there is no time limit, since an answer may be
// long in coming, but nothing stays behind.
func TestSilentSiteIsLeftWhenWhoAsksGoes(t *testing.T) {
	f := newFixture(t, nil)
	left := make(chan struct{})
	asked := make(chan struct{})
	hostile(f, &http.Transport{}, func(conn net.Conn, r *http.Request) {
		close(asked)
		conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == io.EOF {
			close(left)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", f.url("berlin", "/pods"), nil)
	must(t, err)
	go func() { <-asked; cancel() }()
	if resp, err := f.as(apiServer).Do(req); err == nil {
		resp.Body.Close()
		t.Error("answered")
	}
	select {
	case <-left:
	case <-time.After(20 * time.Second):
		t.Error("the site is still asked")
	}
}
