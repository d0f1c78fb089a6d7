package tunnel

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// A webServer is an http.Server for connections that something else has accepted.
type webServer struct {
	srv     *http.Server
	handed  chan net.Conn
	ctx     context.Context
	running sync.WaitGroup

	mu    sync.Mutex
	lower map[net.Conn]lowerConn // what is below a connection
}

func (v *serving) newWebServer(h http.Handler, protocols ...string) *webServer {
	w := &webServer{handed: make(chan net.Conn), ctx: v.ctx, lower: map[net.Conn]lowerConn{}}
	w.srv = &http.Server{
		Handler:     h,
		Protocols:   new(http.Protocols),
		BaseContext: func(net.Listener) context.Context { return v.ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			w.mu.Lock()
			defer w.mu.Unlock()
			return context.WithValue(ctx, lowerKey{}, w.lower[c])
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed || state == http.StateHijacked {
				w.forget(c)
			}
		},
		ReadHeaderTimeout: handshakeTimeout,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 100},
		ErrorLog:          slog.NewLogLogger(v.log().Handler(), slog.LevelDebug),
	}
	for _, p := range protocols {
		switch p {
		case "http1":
			w.srv.Protocols.SetHTTP1(true)
		case "http2":
			w.srv.Protocols.SetHTTP2(true)
		case "h2c":
			w.srv.Protocols.SetUnencryptedHTTP2(true)
		}
	}
	w.running.Go(func() { w.srv.Serve(w) })
	return w
}

// give hands a connection to the server, which closes it.
func (w *webServer) give(conn net.Conn, lower lowerConn) {
	w.mu.Lock()
	w.lower[conn] = lower
	w.mu.Unlock()
	select {
	case w.handed <- conn:
	case <-w.ctx.Done():
		w.forget(conn)
		conn.Close()
	}
}

func (w *webServer) forget(c net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.lower, c)
}

func (w *webServer) close() {
	w.srv.Close()
	w.running.Wait()
}

// Accept, Close and Addr make it the listener of its own server.
func (w *webServer) Accept() (net.Conn, error) {
	select {
	case conn := <-w.handed:
		return conn, nil
	case <-w.ctx.Done():
		return nil, http.ErrServerClosed
	}
}

func (w *webServer) Close() error   { return nil }
func (w *webServer) Addr() net.Addr { return peerAddr("tunnel") }

// timed bounds how long h may take to read a request and to answer it. The
// server's own limits would end tunnels too.
func timed(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		now := time.Now()
		control.SetReadDeadline(now.Add(webTimeout))
		control.SetWriteDeadline(now.Add(2 * webTimeout))
		h.ServeHTTP(w, r)
	})
}
