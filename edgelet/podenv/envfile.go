package podenv

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
)

// maxEnvFile bounds what is read of an environment file, in bytes.
const maxEnvFile = 1 << 20

// readEnvFile returns the value of key in a file of lines NAME='value', the
// format of fileKeyRef: a value is quoted and literal, and may span lines; blank
// lines and lines that begin with # count for nothing, nor does what follows
// a # after the closing quote. Space between = and the quote makes the value
// empty, as in a shell. The file is read up to the first line of that name, and
// anything else before it is an error.
func readEnvFile(r io.Reader, key string) (value string, ok bool, err error) {
	lines := &lineReader{in: bufio.NewReader(io.LimitReader(r, maxEnvFile))}
	for {
		line, err := lines.next()
		if errors.Is(err, io.EOF) {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
		line = strings.TrimLeft(line, " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		number := lines.number
		name, value, err := assignment(line, lines)
		if err != nil {
			return "", false, fmt.Errorf("line %d: %w", number, err)
		}
		if name == key {
			return value, true, nil
		}
	}
}

// assignment reads NAME='value' that begins in line and may go on in lines.
func assignment(line string, lines *lineReader) (name, value string, err error) {
	name, rest, ok := strings.Cut(line, "=")
	switch {
	case !ok:
		return "", "", errors.New("missing '='")
	case name == "":
		return "", "", errors.New("empty variable name")
	case strings.TrimRight(name, " \t") != name:
		return "", "", errors.New("whitespace before '=' is not allowed")
	case strings.TrimLeft(rest, " \t") != rest:
		return name, "", nil
	case !strings.HasPrefix(rest, "'"):
		return "", "", errors.New("value must be enclosed in single quotes")
	}
	rest = rest[1:]
	var b strings.Builder
	for {
		text, after, closed := strings.Cut(rest, "'")
		b.WriteString(text)
		if closed {
			if after = strings.TrimLeft(after, " \t"); after != "" && after[0] != '#' {
				return "", "", errors.New("unexpected content after closing quote")
			}
			return name, b.String(), nil
		}
		b.WriteByte('\n')
		if rest, err = lines.next(); errors.Is(err, io.EOF) {
			return "", "", errors.New("unclosed single quote")
		} else if err != nil {
			return "", "", err
		}
	}
}

// A lineReader reads lines of any length and counts them.
type lineReader struct {
	in     *bufio.Reader
	number int
}

// next returns the next line without its end, or io.EOF.
func (l *lineReader) next() (string, error) {
	line, err := l.in.ReadString('\n')
	if errors.Is(err, io.EOF) && line != "" {
		err = nil
	}
	if err != nil {
		return "", err
	}
	l.number++
	return strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r"), nil
}
