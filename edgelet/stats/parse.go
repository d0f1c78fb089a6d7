package stats

import (
	"errors"
	"strconv"
	"strings"
	"unicode"
)

// Memory is the state of a machine's memory, in bytes.
type Memory struct {
	Total, Free, InactiveFile, Anonymous uint64
	SwapTotal, SwapFree                  uint64
}

// WorkingSet is what is used and cannot be taken back at once, which is how a
// kubelet counts.
func (m Memory) WorkingSet() uint64 { return sub(m.Total, m.Free+m.InactiveFile) }

// Available is what pods could still get.
func (m Memory) Available() uint64 { return sub(m.Total, m.WorkingSet()) }

// sub is a-b, at least 0: counters are not all read at one moment.
func sub(a, b uint64) uint64 { return a - min(a, b) }

// parseMeminfo reads /proc/meminfo.
func parseMeminfo(text string) (Memory, error) {
	var m Memory
	fields := map[string]*uint64{
		"MemTotal": &m.Total, "MemFree": &m.Free, "Inactive(file)": &m.InactiveFile,
		"AnonPages": &m.Anonymous, "SwapTotal": &m.SwapTotal, "SwapFree": &m.SwapFree,
	}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(line, ":")
		field := fields[name]
		if field == nil {
			continue
		}
		number := strings.TrimSuffix(strings.TrimSpace(rest), " kB")
		kib, err := strconv.ParseUint(number, 10, 50)
		if err != nil {
			return Memory{}, errors.New("meminfo: " + printable(name) + " is not a number of kB")
		}
		*field = kib << 10
	}
	if m.Total == 0 {
		return Memory{}, errors.New("meminfo: no MemTotal")
	}
	return m, nil
}

// tick is the unit of /proc/stat, in nanoseconds: USER_HZ is 100 on every
// architecture that Go runs on.
const tick = 10_000_000

// parseCPU reads from /proc/stat how long all processors have been busy, in
// nanoseconds.
func parseCPU(text string) (uint64, error) {
	first, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(first)
	if len(fields) < 5 || fields[0] != "cpu" {
		return 0, errors.New("stat: no line cpu")
	}
	var busy uint64
	// user nice system idle iowait irq softirq steal; guest is part of user.
	for i, field := range fields[1:min(len(fields), 9)] {
		n, err := strconv.ParseUint(field, 10, 56)
		if err != nil {
			return 0, errors.New("stat: cpu: not a number")
		}
		if i != 3 && i != 4 {
			busy += n
		}
	}
	return busy * tick, nil
}

// parseCPUList counts a list such as 0-3,8; 0 if it is none.
func parseCPUList(text string) int64 {
	var count int64
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err1 := strconv.ParseUint(from, 10, 16)
		last, err2 := strconv.ParseUint(to, 10, 16)
		if err1 != nil || err2 != nil || last < first {
			return 0
		}
		count += int64(last-first) + 1
	}
	return count
}

// parseLoadavg reads the number of processes and threads; 0 if it cannot.
func parseLoadavg(text string) uint64 {
	fields := strings.Fields(text)
	if len(fields) < 4 {
		return 0
	}
	_, total, _ := strings.Cut(fields[3], "/")
	n, _ := strconv.ParseUint(total, 10, 32)
	return n
}

// parseVmstat reads page faults, all and those that needed the disk.
func parseVmstat(text string) (faults, major uint64) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.ParseUint(value, 10, 64)
		switch {
		case err != nil:
		case name == "pgfault":
			faults = n
		case name == "pgmajfault":
			major = n
		}
	}
	return faults, major
}

// maxInterfaces bounds how many interfaces are told of.
const maxInterfaces = 32

// An Interface is a network interface's counters.
type Interface struct {
	Name                                 string
	RxBytes, RxErrors, TxBytes, TxErrors uint64
}

// parseNetDev reads /proc/net/dev, without loopback and the ends of pods' pairs.
func parseNetDev(text string) []Interface {
	var list []Interface
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(line, ":")
		name = strings.TrimSpace(name)
		fields := strings.Fields(rest)
		if !ok || len(fields) < 11 || name == "lo" || strings.HasPrefix(name, "veth") || len(list) == maxInterfaces {
			continue
		}
		number := func(i int) uint64 { n, _ := strconv.ParseUint(fields[i], 10, 64); return n }
		list = append(list, Interface{printable(name), number(0), number(2), number(8), number(10)})
	}
	return list
}

// parseRoute finds the interface of the default route in /proc/net/route.
func parseRoute(text string) string {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) > 7 && fields[1] == "00000000" && fields[7] == "00000000" {
			return printable(fields[0])
		}
	}
	return ""
}

// parseOSRelease finds the name for people in /etc/os-release.
func parseOSRelease(text string) string {
	for line := range strings.Lines(text) {
		value, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME=")
		if !ok {
			continue
		}
		if quoted, err := strconv.Unquote(value); err == nil {
			value = quoted
		}
		return printable(strings.Trim(value, `"'`))
	}
	return "Linux"
}

// maxText bounds a fact about the machine, in bytes.
const maxText = 256

// printable drops from a text what does not belong into a Node or a terminal.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	return strings.ToValidUTF8(text[:min(len(text), maxText)], "")
}
