package store

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// lockHolder says which process has f locked, "" if that cannot be found out.
func lockHolder(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer locks.Close()
	if pid := holder(locks, stat.Ino); pid != "" {
		return " (process " + pid + ")"
	}
	return ""
}

// holder finds the process that has an flock on an inode in the text of /proc/locks:
//
//	1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
func holder(r io.Reader, inode uint64) string {
	lines := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 8 && fields[1] == "FLOCK" && strings.HasSuffix(fields[5], fmt.Sprintf(":%d", inode)) {
			return fields[4]
		}
	}
	return ""
}
