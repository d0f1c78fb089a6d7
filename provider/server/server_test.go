package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestAuthMatrix(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	const none, metrics, stats, logs, pods, exec, admin = 0, 1, 2, 4, 8, 16, 31
	for who, may := range map[string]int{
		"nobody": -1, "t-unknown": -1, "a certificate of another CA": -1, "a serving certificate": -1, "an expired certificate": -1, "a certificate without a name": -1,
		"t-none": none, "t-get-proxy": logs | pods, "t-metrics": metrics | stats, "t-admin": admin, apiServer: admin,
	} {
		for _, request := range []struct {
			method, path, upgrade string
			needs                 int
		}{
			{"GET", "/exec/ns/web/main?command=id", "websocket", exec},
			{"POST", "/exec/ns/web/main?command=id", "SPDY/3.1", exec},
			{"GET", "/attach/ns/web/main", "websocket", exec},
			{"POST", "/attach/ns/web/uid/main", "SPDY/3.1", exec},
			{"GET", "/portForward/ns/web", "websocket", exec},
			{"POST", "/portForward/ns/web/uid", "SPDY/3.1", exec},
			{"POST", "/run/ns/web/main?cmd=id", "", exec},
			{"POST", "/checkpoint/ns/web/main", "", exec},
			{"GET", "/containerLogs/ns/web/main", "", logs},
			{"GET", "/pods", "", pods},
			{"GET", "/runningpods/", "", pods},
			{"GET", "/healthz", "", pods},
			{"GET", "/configz", "", pods},
			{"GET", "/logs/syslog", "", exec},
			{"GET", "/stats/summary", "", stats},
			{"GET", "/metrics", "", metrics},
			{"GET", "/metrics/resource", "", metrics},
			{"GET", "/metrics/cadvisor", "", metrics},
			{"GET", "/metrics/probes", "", metrics},
			{"GET", "/skerry/v1/inventory", "", logs}, // no such path, for those who may ask at all
		} {
			_, _, resp := f.upgrade(who, request.method, "berlin", request.path, request.upgrade)
			want := http.StatusOK
			switch {
			case may < 0:
				want = http.StatusUnauthorized
			case may&request.needs == 0:
				want = http.StatusForbidden
			case request.upgrade != "":
				want = http.StatusSwitchingProtocols
			case strings.HasPrefix(request.path, "/skerry"):
				want = http.StatusNotFound
			}
			if resp.StatusCode != want {
				t.Errorf("%s: %s %s: %d, want %d", who, request.method, request.path, resp.StatusCode, want)
			}
		}
	}
	for _, asked := range f.reviews.asked {
		if !strings.HasSuffix(asked, " berlin") {
			t.Errorf("authorized for another node: %s", asked)
		}
	}
}

func TestNothingButTheKubeletAPIReachesASite(t *testing.T) {
	var reached atomic.Int32
	f := newFixture(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { reached.Add(1) }))
	for _, path := range []string{
		"/skerry/v1/inventory", "/skerry/v1/changes", "/skerry/", "/skerry", "//skerry/v1/inventory", "/./skerry/v1/inventory",
		"/pods/../skerry/v1/inventory", "/logs/../skerry/v1/inventory", "/logs/%2e%2e/skerry/v1/inventory", "/logs/..%2fskerry", "/logs//skerry",
		"/logs/a%5c..%5cb", "/logs/a%00b", "/%73kerry/v1/inventory", "/pods%2f..%2fskerry", "/healthz/..", "/metrics/../skerry",
		"/exec/ns/../../skerry/v1", "/containerLogs/ns/web/..", "/containerLogs/ns/web/a%2fb", "/containerLogs/ns/web", "/containerLogs/ns/web/main/x",
		"/", "/debug/pprof/", "/debug/flags/v", "/metrics/other", "/stats", "/stats/container", "/pods/x", "/healthz/etcd", "/configz/x",
		"/spec/", "/exec", "/exec/ns/web", "/portForward/ns", "/cri/exec/token", "/flagz", "/statusz", "/containerLogs/NS/web/main",
		"/logs/" + strings.Repeat("a/", 17) + "b",
	} {
		config := &tls.Config{RootCAs: f.ca.pool(), Certificates: []tls.Certificate{*f.clients[apiServer]}, ServerName: "127.0.0.1"}
		port, _ := f.server.Port("berlin")
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), config) // raw: clients clean paths
		must(t, err)
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		must(t, err)
		conn.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests have reached the site", n)
	}
	for _, method := range []string{"PUT", "DELETE", "PATCH", "OPTIONS", "POST", "BREW"} {
		req, err := http.NewRequest(method, f.url("berlin", "/pods"), nil)
		must(t, err)
		resp, err := f.as(apiServer).Do(req)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed && resp.StatusCode != http.StatusForbidden || reached.Load() > 0 {
			t.Errorf("%s /pods: %d", method, resp.StatusCode)
		}
	}
	if code, _ := f.get("berlin", "/logs/dir/file.log"); code != 200 || reached.Load() != 1 {
		t.Errorf("control: %d, %d", code, reached.Load())
	}
}

func TestPodsOfOtherSitesAreNotFound(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	for path, want := range map[string]int{
		"/containerLogs/ns/web/main": 200, "/containerLogs/ns/db/main": 404, "/containerLogs/other/web/main": 404, "/containerLogs/ns/none/main": 404,
	} {
		if code, body := f.get("berlin", path); code != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if code, body := f.get("oslo", "/containerLogs/ns/db/main"); code != 200 || !strings.Contains(body, "/containerLogs/ns/db/main") {
		t.Errorf("its own: %d %s", code, body)
	}
	_, _, resp := f.upgrade(apiServer, "POST", "berlin", "/exec/ns/db/main", "SPDY/3.1")
	if resp.StatusCode != 404 {
		t.Errorf("exec: %d", resp.StatusCode)
	}
}

func TestOfflineSiteIsUnavailableWithASentence(t *testing.T) {
	f := newFixture(t, nil)
	code, body := f.get("berlin", "/pods")
	if code != 503 || strings.TrimSpace(body) != "site berlin is disconnected since noon" {
		t.Errorf("%d %s", code, body)
	}
	_, _, resp := f.upgrade(apiServer, "POST", "berlin", "/exec/ns/web/main", "SPDY/3.1")
	if text, _ := io.ReadAll(resp.Body); resp.StatusCode != 503 || !strings.Contains(string(text), "since noon") {
		t.Errorf("exec: %d %s", resp.StatusCode, text)
	}
	// A session that ends with the request is the same to who asks.
	f.sites.mu.Lock()
	f.sites.sites["berlin"] = roundTripper(func(*http.Request) (*http.Response, error) {
		f.sites.mu.Lock()
		delete(f.sites.sites, "berlin")
		f.sites.mu.Unlock()
		return nil, errors.New("session is down")
	})
	f.sites.mu.Unlock()
	if code, body := f.get("berlin", "/pods"); code != 503 || !strings.Contains(body, "since noon") {
		t.Errorf("session lost: %d %s", code, body)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestStreamsAreCopiedBothWaysUntilEitherEnds(t *testing.T) {
	ended := make(chan struct{}, 8)
	f := newFixture(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		echo(w, r)
		ended <- struct{}{}
	}))
	conn, r, resp := f.upgrade(apiServer, "POST", "berlin", "/exec/ns/web/main?command=cat", "SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io")
	if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "SPDY/3.1" || resp.Header.Get("X-Stream-Protocol-Version") == "" || resp.Header.Get("Set-Cookie") != "" {
		t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	go conn.Write(sent)
	got := make([]byte, len(sent))
	_, err := io.ReadFull(r, got)
	must(t, err)
	if !bytes.Equal(got, sent) {
		t.Error("came back changed")
	}
	if n := f.gauge("skerry_kubelet_open_streams"); n != 1 {
		t.Errorf("%v open streams", n)
	}
	conn.Close()
	<-ended // the site hears that the client has gone

	conn, _, _ = f.upgrade(apiServer, "POST", "berlin", "/exec/ns/web/main?command=cat", "SPDY/3.1")
	f.server.Close("berlin")
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the stream outlives the port")
	}
	<-ended
	for range 100 {
		if f.gauge("skerry_kubelet_open_streams") == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("streams are counted as open for ever")
}

func (f *fixture) gauge(name string) (sum float64) {
	families, err := f.metrics.Gather()
	must(f.t, err)
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.Metric {
			sum += m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return sum
}

func TestUpgradesThatCannotBeAreRefused(t *testing.T) {
	var reached atomic.Int32
	f := newFixture(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { reached.Add(1) }))
	if code, _ := f.get("berlin", "/exec/ns/web/main"); code != 400 {
		t.Errorf("no upgrade: %d", code)
	}
	for name, header := range map[string][]string{
		"h2c": nil, "": nil, "websocket": {"Content-Length: 3"}, "SPDY/3.1": {"Transfer-Encoding: chunked"},
	} {
		if _, _, resp := f.upgrade(apiServer, "POST", "berlin", "/exec/ns/web/main", name, header...); resp.StatusCode != 400 {
			t.Errorf("%q %v: %d", name, header, resp.StatusCode)
		}
	}
	if reached.Load() > 0 {
		t.Error("they have reached the site")
	}
	if _, _, resp := f.upgrade(apiServer, "GET", "berlin", "/pods", "websocket"); resp.StatusCode != 200 {
		t.Errorf("a path that is never upgraded: %d", resp.StatusCode)
	}
}

func TestBodiesAreNotWaitedFor(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	for who, want := range map[string]int{"nobody": 401, apiServer: 200} {
		for _, length := range []string{"Content-Length: 1000", "Transfer-Encoding: chunked"} {
			if _, _, resp := f.upgrade(who, "POST", "berlin", "/run/ns/web/main", "", length); resp.StatusCode != want || !resp.Close {
				t.Errorf("%s, %s: %d, close %v", who, length, resp.StatusCode, resp.Close)
			}
		}
	}
}

func TestSiteSeesOnlyKnownHeadersAndWhoAsks(t *testing.T) {
	seen := make(chan *http.Request, 1)
	f := newFixture(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			w.WriteHeader(400)
		}
		seen <- r
	}))
	f.reviews.tokens["odd"] = User{Name: "söme\none"}
	f.reviews.allowed["söme\none *"] = true
	for who, want := range map[string]string{apiServer: "apiserver", "odd": "s%C3%B6me%0Aone"} {
		f.upgrade(who, "POST", "berlin", "/exec/ns/web/main?command=a%20b&command=c", "websocket",
			"X-Remote-User: root", "X-Remote-Group: system:masters", "X-Remote-Extra-Scopes: x", "Impersonate-User: root", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Uri: /x",
			"Forwarded: for=1.2.3.4", "Cookie: a=b", "Proxy-Authorization: Basic eA==", "X-Unknown: 1", "Accept: text/plain", "User-Agent: kubectl", "Te: trailers", "Expect: 100-continue",
			"Sec-WebSocket-Protocol: v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.c2VjcmV0", "Sec-WebSocket-Key: eA==")
		r := <-seen
		for header, value := range map[string]string{userHeader: want, "Accept": "text/plain", "User-Agent": "kubectl", "Connection": "Upgrade", "Upgrade": "websocket",
			"Sec-Websocket-Protocol": "v4.channel.k8s.io", "Sec-Websocket-Key": "eA=="} {
			if got := r.Header[header]; len(got) != 1 || got[0] != value {
				t.Errorf("%s: %q, want %q", header, got, value)
			}
			delete(r.Header, header)
		}
		delete(r.Header, "Content-Length") // 0, of a POST
		if len(r.Header) > 0 {
			t.Errorf("the site sees %v", r.Header)
		}
		if r.Host != "berlin" || r.URL.String() != "/exec/ns/web/main?command=a%20b&command=c" || r.ContentLength != 0 {
			t.Errorf("host %s, URL %s, length %d", r.Host, r.URL, r.ContentLength)
		}
	}
}

func TestFollowedLogsArriveAtOnce(t *testing.T) {
	more := make(chan struct{})
	f := newFixture(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintln(w, "line", i)
			http.NewResponseController(w).Flush()
			<-more
		}
		<-r.Context().Done()
		close(more)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", f.url("berlin", "/containerLogs/ns/web/main?follow=true"), nil)
	must(t, err)
	resp, err := f.as(apiServer).Do(req)
	must(t, err)
	if resp.ProtoMajor != 2 {
		t.Errorf("spoken: %s", resp.Proto)
	}
	r := bufio.NewReader(resp.Body)
	for i := range 3 {
		line, err := r.ReadString('\n')
		must(t, err)
		if line != fmt.Sprintln("line", i) {
			t.Errorf("%q", line)
		}
		more <- struct{}{}
	}
	cancel()
	<-more // the site hears that nobody listens
	resp.Body.Close()
}

func TestSitesHavePortsOfTheirOwnThatStay(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	seen := map[int32]string{}
	for i := range 50 {
		site := fmt.Sprintf("site-%d", i)
		port, err := f.server.Port(site)
		must(t, err)
		if other := seen[port]; other != "" || port < 21000 || port > 21999 {
			t.Errorf("%s has port %d, %q too", site, port, other)
		}
		seen[port] = site
		if again, err := f.server.Port(site); again != port || err != nil {
			t.Errorf("second call: %d, %v", again, err)
		}
	}
	for port, site := range seen {
		f.server.Close(site)
		if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			conn.Close()
			t.Errorf("port of %s is still open", site)
		}
		if again, err := f.server.Port(site); again != port || err != nil {
			t.Errorf("%s had port %d and has %d, %v", site, port, again, err)
		}
	}
	f.server.Close("unknown")
}

func TestClosingAPortEndsIdleConnections(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	conn, r, resp := f.upgrade(apiServer, "GET", "berlin", "/pods", "")
	_, err := io.Copy(io.Discard, resp.Body)
	must(t, err)
	other, _, _ := f.upgrade(apiServer, "GET", "oslo", "/pods", "")
	f.server.Close("berlin")
	if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("connection of a closed port: %v", err)
	}
	if _, err := io.WriteString(other, "GET /pods HTTP/1.1\r\nHost: node\r\n\r\n"); err != nil {
		t.Errorf("connection of another port: %v", err)
	}
	conn.Close()
}

func TestPortsRunOut(t *testing.T) {
	f := newFixture(t, nil)
	f.server.first, f.server.last = 22000, 22002
	ports := 0
	for i := range 4 {
		if _, err := f.server.Port(fmt.Sprint(i)); err == nil {
			ports++
		} else if i < 3 || !strings.Contains(err.Error(), "in use") {
			t.Errorf("site %d: %v", i, err)
		}
	}
	if ports != 3 {
		t.Errorf("%d ports", ports)
	}
	f.server.Close("0")
	if _, err := f.server.Port("3"); err != nil {
		t.Errorf("after one was closed: %v", err)
	}
}

func TestConnectionsOfASiteAreBounded(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	port, err := f.server.Port("berlin")
	must(t, err)
	var conns []net.Conn
	for range maxConnections + 10 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		must(t, err)
		conns = append(conns, conn)
	}
	closed := 0
	for _, conn := range conns[maxConnections:] {
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, io.EOF) || strings.Contains(fmt.Sprint(err), "reset") {
			closed++
		}
	}
	if closed != 10 || f.gauge("skerry_kubelet_refused_connections_total") != 10 {
		t.Errorf("%d of 10 were closed", closed)
	}
	if code, _ := f.get("oslo", "/pods"); code != 200 {
		t.Errorf("another site: %d", code)
	}
	for _, conn := range conns {
		conn.Close()
	}
	for range 100 {
		if resp, err := f.as(apiServer).Get(f.url("berlin", "/pods")); err == nil {
			resp.Body.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("no connection after all were closed")
}

func TestRequestsAreCounted(t *testing.T) {
	f := newFixture(t, http.HandlerFunc(echo))
	f.get("berlin", "/pods")
	f.get("berlin", "/skerry")
	f.upgrade("nobody", "GET", "berlin", "/pods", "")
	families, err := f.metrics.Gather()
	must(t, err)
	got := map[string]float64{}
	for _, family := range families {
		for _, m := range family.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetValue())
			}
			got[family.GetName()+" "+strings.Join(labels, " ")] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for key, want := range map[string]float64{
		"skerry_kubelet_requests_total pods 200": 1, "skerry_kubelet_requests_total pods 401": 1, "skerry_kubelet_requests_total other 404": 1,
		"skerry_kubelet_answer_seconds pods": 2,
	} {
		if got[key] != want {
			t.Errorf("%s: %v, want %v", key, got[key], want)
		}
	}
}

func TestConfigThatLacksSomethingSaysAll(t *testing.T) {
	_, err := New(Config{FirstPort: 5, LastPort: 4})
	for _, want := range []string{"Sites", "Certificate", "ClientCAs", "Authenticator", "Authorizer", "5 to 4"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not in: %v", want, err)
		}
	}
}
