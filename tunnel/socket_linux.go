package tunnel

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// unsent is what may wait in the kernel before the link's rate is known, in
	// bytes; what is there already, no typed character can overtake.
	unsent = 16 << 10

	// userTimeout ends a connection whose data is not acknowledged, should the
	// session's own watch fail.
	userTimeout = 40 * time.Second
)

// tune prepares a TCP connection for a session, and returns what sets the most
// that may wait unsent in the kernel. For other connections it does nothing
// unless they have a method SetUnsent(bytes int).
func tune(conn net.Conn) (setUnsent func(bytes int)) {
	if other, ok := conn.(interface{ SetUnsent(bytes int) }); ok {
		other.SetUnsent(unsent)
		return other.SetUnsent
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return func(int) {}
	}
	// The session pings; the kernel's probes would double that.
	tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: false})
	raw, err := tcp.SyscallConn()
	if err != nil {
		return func(int) {}
	}
	set := func(option, value int) {
		// A kernel that lacks the option works too, only slower to react.
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, option, value) })
	}
	set(unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
	set(unix.TCP_NOTSENT_LOWAT, unsent)
	return func(bytes int) { set(unix.TCP_NOTSENT_LOWAT, bytes) }
}
