//go:build !linux

package tunnel

import "net"

// tune does nothing but here: Skerry runs on Linux, its tests elsewhere too.
func tune(conn net.Conn) (setUnsent func(bytes int)) {
	if other, ok := conn.(interface{ SetUnsent(bytes int) }); ok {
		return other.SetUnsent
	}
	return func(int) {}
}
