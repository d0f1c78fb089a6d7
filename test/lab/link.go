package lab

import (
	"io"
	"net"
	"sync"
)

// A Link carries TCP from its own address to another, and can be cut: everything
// on it breaks at once and nothing new gets through until it is healed.
type Link struct {
	Address string // host:port to dial

	listener net.Listener
	to       string
	wait     sync.WaitGroup

	mu    sync.Mutex // guards the following
	cut   bool
	conns map[net.Conn]bool
}

// NewLink listens on a free port of host and carries connections to the address to.
func NewLink(host, to string) (*Link, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	link := &Link{Address: l.Addr().String(), listener: l, to: to, conns: map[net.Conn]bool{}}
	link.wait.Go(link.accept)
	return link, nil
}

func (l *Link) accept() {
	for {
		conn, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.wait.Go(func() { l.carry(conn) })
	}
}

func (l *Link) carry(near net.Conn) {
	defer near.Close()
	if !l.add(near) {
		return
	}
	defer l.remove(near)
	far, err := net.Dial("tcp", l.to)
	if err != nil {
		return
	}
	defer far.Close()
	if !l.add(far) {
		return
	}
	defer l.remove(far)
	var both sync.WaitGroup
	both.Go(func() { io.Copy(far, near); far.(*net.TCPConn).CloseWrite() })
	both.Go(func() { io.Copy(near, far); near.(*net.TCPConn).CloseWrite() })
	both.Wait()
}

func (l *Link) add(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.cut {
		l.conns[conn] = true
	}
	return !l.cut
}

func (l *Link) remove(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, conn)
}

// Cut breaks the link until Heal.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	for conn := range l.conns {
		conn.Close()
	}
}

// Heal lets connections through again.
func (l *Link) Heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = false
}

// Close ends the link for good.
func (l *Link) Close() {
	l.listener.Close()
	l.Cut()
	l.wait.Wait()
}
