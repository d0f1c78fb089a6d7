package logs

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const podDir = "ns_web_u1"

// A site is a log root with one container's directory.
type site struct {
	t    testing.TB
	root string
	r    *Reader
}

func newSite(t testing.TB) *site {
	s := &site{t: t, root: t.TempDir()}
	s.r = NewReader(s.root, slog.New(slog.DiscardHandler))
	if err := os.MkdirAll(filepath.Join(s.root, podDir, "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.root, podDir, "c", name) }

// write makes a file; one whose name ends in .gz is compressed.
func (s *site) write(name, content string) {
	s.t.Helper()
	data := []byte(content)
	if strings.HasSuffix(name, ".gz") {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(data)
		z.Close()
		data = b.Bytes()
	}
	if err := os.WriteFile(s.path(name), data, 0o640); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) append(name, content string) {
	s.t.Helper()
	f, err := os.OpenFile(s.path(name), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o640)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(content); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) copy(req Request) (string, error) {
	var b strings.Builder
	req.Path = podDir + "/c/0.log"
	err := s.r.Copy(s.t.Context(), &b, req)
	return b.String(), err
}

func all() Request { return Request{Tail: -1, Limit: -1} }

func with(edit func(r *Request)) Request {
	r := all()
	edit(&r)
	return r
}

const sample = "2026-01-02T15:04:05.1Z stdout F one\n" +
	"2026-01-02T15:04:06.12Z stderr F two\n" +
	"2026-01-02T15:04:07.123456789+02:00 stdout P thr\n" +
	"2026-01-02T15:04:08Z stdout P e\n" +
	"2026-01-02T15:04:09Z stdout F e\n" +
	"this is no record\n" +
	"2026-01-02T15:04:10Z stdout F \n" +
	"2026-01-02T15:04:11Z stdout F:new:tags six\n"

func TestCopy(t *testing.T) {
	since := time.Date(2026, 1, 2, 15, 4, 6, 120000000, time.UTC)
	tests := map[string]struct {
		content string
		req     Request
		want    string
	}{
		"all of it, partial lines joined":      {sample, all(), "one\ntwo\nthree\n\nsix\n"},
		"timestamps once a line, nine digits":  {sample, with(func(r *Request) { r.Timestamps = true }), "2026-01-02T15:04:05.100000000Z one\n2026-01-02T15:04:06.120000000Z two\n2026-01-02T15:04:07.123456789+02:00 three\n2026-01-02T15:04:10.000000000Z \n2026-01-02T15:04:11.000000000Z six\n"},
		"since is not before":                  {sample, with(func(r *Request) { r.Since = since }), "two\nee\n\nsix\n"},
		"stdout alone":                         {sample, with(func(r *Request) { r.Stream = "stdout" }), "one\nthree\n\nsix\n"},
		"stderr alone":                         {sample, with(func(r *Request) { r.Stream = "stderr" }), "two\n"},
		"tail of none":                         {sample, with(func(r *Request) { r.Tail = 0 }), ""},
		"tail of one":                          {sample, with(func(r *Request) { r.Tail = 1 }), "six\n"},
		"tail counts a joined line as one":     {sample, with(func(r *Request) { r.Tail = 3 }), "three\n\nsix\n"},
		"tail of as many as there are":         {sample, with(func(r *Request) { r.Tail = 5 }), "one\ntwo\nthree\n\nsix\n"},
		"tail of more than there are":          {sample, with(func(r *Request) { r.Tail = 500 }), "one\ntwo\nthree\n\nsix\n"},
		"tail of one stream":                   {sample, with(func(r *Request) { r.Tail, r.Stream = 2, "stdout" }), "\nsix\n"},
		"a limit is a hard stop":               {sample, with(func(r *Request) { r.Limit = 6 }), "one\ntw"},
		"a limit counts timestamps":            {sample, with(func(r *Request) { r.Limit, r.Timestamps = 6, true }), "2026-0"},
		"a limit of the last lines":            {sample, with(func(r *Request) { r.Limit, r.Tail = 3, 1 }), "six"},
		"an empty log":                         {"", all(), ""},
		"the tail of an empty log":             {"", with(func(r *Request) { r.Tail = 3 }), ""},
		"a line that is still being written":   {"2026-01-02T15:04:05Z stdout F one\n2026-01-02T15:04:05Z stdout P tw", all(), "one\ntw"},
		"the tail of such a line":              {"2026-01-02T15:04:05Z stdout F one\n2026-01-02T15:04:05Z stdout P tw\n", with(func(r *Request) { r.Tail = 1 }), "tw"},
		"a header that is still being written": {"2026-01-02T15:04:05Z stdout F one\n2026-01-02T15:04:05Z std", all(), "one\n"},
		"rubbish that looks like a header":     {"0000-00000T\n2026-01-02T15:04:05Z stdout F one\n", with(func(r *Request) { r.Timestamps = true }), "2026-01-02T15:04:05.000000000Z one\n"},
		"nothing but rubbish":                  {"\n\n\x00\xff " + strings.Repeat("x", 300) + "\n \n2026-01-02T15:04:05Z stdin F no\n", all(), ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.write("0.log", tt.content)
			got, err := s.copy(tt.req)
			if err != nil || got != tt.want {
				t.Errorf("got %q, error %v, want %q", got, err, tt.want)
			}
		})
	}
}

// lines are n records with numbers from the first on.
func lines(first, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "2026-01-02T15:04:05.%09dZ stdout F line %d\n", first+i, first+i)
	}
	return b.String()
}

func texts(first, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "line %d\n", first+i)
	}
	return b.String()
}

// Every tail of a log that spans blocks and files is the right one.
func TestTailAcrossBlocksAndFiles(t *testing.T) {
	s := newSite(t)
	s.write("0.log.20260102-100000.gz", lines(0, 40))
	s.write("0.log.20260102-110000.gz", lines(40, 3000))
	s.write("0.log.20260102-120000", lines(3040, 3000))
	s.write("0.log.20260102-120000.gz", "what a crash has left: the plain file is still there")
	s.write("0.log.20260102-130000.tmp", "not a log")
	s.write("0.log", lines(6040, 3000))
	s.write("1.log", lines(9999, 1)) // of another attempt
	const total = 9040
	if got, err := s.copy(all()); err != nil || got != texts(0, total) {
		t.Errorf("all: %d bytes, error %v, want %d", len(got), err, len(texts(0, total)))
	}
	for _, n := range []int{1, 2, 999, 1000, 1001, 2999, 3000, 3001, 5999, 6000, 6001, 7000, 8999, 9000, 9001, 9039, 9040, 9041} {
		got, err := s.copy(with(func(r *Request) { r.Tail = int64(n) }))
		if want := texts(max(total-n, 0), min(n, total)); err != nil || got != want {
			t.Errorf("tail %d: %d lines, error %v, begins %.20q", n, strings.Count(got, "\n"), err, got)
		}
	}
}

// A text that looks like a record, at the very beginning of a block, is none.
func TestTailIsNotMisledByText(t *testing.T) {
	const header = "2026-01-02T15:04:05Z stdout F "
	s := newSite(t)
	text := header + strings.Repeat("y", bufferSize-maxHeader-len(header)-1)
	s.write("0.log", header+"x"+text+"\n")
	if got, err := s.copy(with(func(r *Request) { r.Tail = 1 })); err != nil || got != "x"+text+"\n" {
		t.Errorf("%d bytes, error %v, want %d", len(got), err, len(text)+2)
	}
}

// A line that continues in the next file is one line.
func TestPartialLineAcrossFiles(t *testing.T) {
	for name, old := range map[string]string{"plain": "0.log.20260102-100000", "compressed": "0.log.20260102-100000.gz"} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.write(old, "2026-01-02T15:04:05Z stdout F one\n2026-01-02T15:04:05Z stdout P tw\n")
			s.write("0.log", "2026-01-02T15:04:05Z stdout F o\n2026-01-02T15:04:05Z stdout F three\n")
			for n, want := range []string{"", "three\n", "two\nthree\n", "one\ntwo\nthree\n"} {
				if got, err := s.copy(with(func(r *Request) { r.Tail = int64(n) })); err != nil || got != want {
					t.Errorf("tail %d = %q, error %v, want %q", n, got, err, want)
				}
			}
		})
	}
}

func TestLogsOutsideTheRootAreOutOfReach(t *testing.T) {
	const secret = "2026-01-02T15:04:05Z stdout F root:canary\n"
	outside := filepath.Join(t.TempDir(), "shadow")
	if err := os.WriteFile(outside, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]func(s *site) (path string){
		"a log that is a link out of the root": func(s *site) string {
			os.Symlink(outside, s.path("0.log"))
			return podDir + "/c/0.log"
		},
		"a log that is a link to another pod's": func(s *site) string {
			os.WriteFile(filepath.Join(s.root, "other.log"), []byte(secret), 0o600)
			os.Symlink("../../other.log", s.path("0.log"))
			return podDir + "/c/0.log"
		},
		"a rotated log that is a link": func(s *site) string {
			s.write("0.log", "")
			os.Symlink(outside, s.path("0.log.20260102-100000"))
			return podDir + "/c/0.log"
		},
		"a container's directory that is a link": func(s *site) string {
			os.Symlink(filepath.Dir(outside), filepath.Join(s.root, podDir, "d"))
			return podDir + "/d/shadow"
		},
		"a path that leads upwards": func(s *site) string {
			rel, _ := filepath.Rel(s.root, outside)
			return rel
		},
		"a path that leads upwards later": func(s *site) string {
			rel, _ := filepath.Rel(filepath.Join(s.root, podDir, "c"), outside)
			return podDir + "/c/" + rel
		},
		"an absolute path":        func(s *site) string { return outside },
		"an empty path":           func(s *site) string { return "" },
		"a path with a NUL":       func(s *site) string { return podDir + "/c/0.log\x00" },
		"the container's own dir": func(s *site) string { return podDir + "/c" },
		"a FIFO": func(s *site) string {
			unix.Mkfifo(s.path("0.log"), 0o600)
			return podDir + "/c/0.log"
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			var b strings.Builder
			req := all()
			req.Path = prepare(s)
			err := s.r.Copy(t.Context(), &b, req)
			if err == nil || strings.Contains(b.String(), "canary") {
				t.Errorf("copied %q, error %v, want an error alone", b.String(), err)
			}
		})
	}
}

func TestAbsentLogIsNotExist(t *testing.T) {
	s := newSite(t)
	if _, err := s.copy(all()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v, want fs.ErrNotExist", err)
	}
	req := all()
	req.Path = "ns_other_u2/c/0.log"
	if err := s.r.Copy(t.Context(), io.Discard, req); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v, want fs.ErrNotExist", err)
	}
}

// A line without end takes no more memory than any other, however long it is.
func TestHugeLineTakesNoMemory(t *testing.T) {
	for name, tt := range map[string]struct {
		header string
		size   int64
		tail   int64
	}{
		"one record that is a hole":                   {"2026-01-02T15:04:05Z stdout F ", 1 << 28, -1},
		"the tail of one record of a hole":            {"2026-01-02T15:04:05Z stdout F ", 1 << 25, 1},
		"a hole that is no record":                    {"", 1 << 25, -1},
		"the tail of a hole that is no record":        {"", 1 << 25, 1},
		"a timestamp without end, and all filters on": {"2026-01-02T15:04:05.", 1 << 25, -1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.write("0.log", tt.header)
			if err := os.Truncate(s.path("0.log"), tt.size); err != nil {
				t.Fatal(err)
			}
			s.append("0.log", "\n")
			req := with(func(r *Request) {
				r.Path, r.Tail, r.Timestamps, r.Since = podDir+"/c/0.log", tt.tail, true, time.Unix(0, 0)
			})
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err := s.r.Copy(t.Context(), io.Discard, req); err != nil {
				t.Fatal(err)
			}
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
				t.Errorf("%d bytes allocated, want less than 1 MiB", n)
			}
		})
	}
}

func TestCopyEndsWithItsContext(t *testing.T) {
	s := newSite(t)
	s.write("0.log", lines(0, 1000))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req := with(func(r *Request) { r.Path = podDir + "/c/0.log" })
	if err := s.r.Copy(ctx, io.Discard, req); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
}

// FuzzRecords compares the fast parser, fed in pieces, with a plain one.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(sample), uint8(7), true)
	f.Add([]byte("2026-01-02T15:04:05Z stdout F one"), uint8(1), false)
	f.Add([]byte("\n\n2026-01-02T15:04:05.Z stderr P:x \n"), uint8(30), true)
	f.Fuzz(func(t *testing.T, data []byte, piece uint8, stamps bool) {
		if len(data) > 1<<16 {
			return
		}
		req := with(func(r *Request) { r.Timestamps = stamps })
		var b bytes.Buffer
		c := newCopier(t.Context(), &b, req)
		if _, err := c.drain(&pieces{data, int(piece%60) + 1}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.finish(), c.flush()); err != nil {
			t.Fatal(err)
		}
		if want := slow(data, stamps); b.String() != want {
			t.Errorf("copied %q\nwant   %q", b.String(), want)
		}
	})
}

// FuzzTail compares a file that is read backwards with one that cannot be.
func FuzzTail(f *testing.F) {
	f.Add([]byte(sample), uint8(2), "")
	f.Add([]byte(sample+"2026-01-02T15:04:05Z stdout P tw"), uint8(0), "")
	f.Add([]byte(sample+"2026-01-02T15:04:05Z stdout P tw"), uint8(1), "stdout")
	f.Fuzz(func(t *testing.T, data []byte, tail uint8, stream string) {
		req := with(func(r *Request) { r.Tail, r.Stream = int64(tail), stream })
		plain, compressed := newSite(t), newSite(t)
		plain.write("0.log", string(data))
		compressed.write("0.log.20260102-100000.gz", string(data))
		a, err := plain.copy(req)
		b, err2 := compressed.copy(req)
		if a != b || err != nil || err2 != nil {
			t.Errorf("backwards %q, %v\nforwards  %q, %v", a, err, b, err2)
		}
	})
}

// pieces reads data in pieces of a size.
type pieces struct {
	data []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.data) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), p.size)], p.data)
	p.data = p.data[n:]
	return n, nil
}

// slow is the text of a log, read the obvious way.
func slow(data []byte, stamps bool) string {
	var out strings.Builder
	newLine := true
	for record := range strings.SplitAfterSeq(string(data), "\n") {
		body := strings.TrimSuffix(record, "\n")
		h, verdict := parseHeader([]byte(record))
		if verdict != headerGood {
			continue
		}
		parts := strings.SplitN(body, " ", 4)
		text := parts[3]
		if parts[1] != "stdout" && parts[1] != "stderr" || len(body)-len(text) != h.size {
			panic("the parser sees another header than there is")
		}
		partial := strings.SplitN(parts[2], ":", 2)[0] == "P"
		if stamps && newLine {
			out.Write(append(appendStamp(nil, []byte(parts[0])), ' '))
		}
		out.WriteString(text)
		if !partial {
			out.WriteByte('\n')
		}
		newLine = !partial
	}
	return out.String()
}

func benchmarkFile(b *testing.B) (s *site, size int64) {
	s = newSite(b)
	record := "2026-01-02T15:04:05.123456789Z stdout F " + strings.Repeat("the quick brown fox ", 5) + "\n"
	s.write("0.log", strings.Repeat(record, 100<<20/len(record)))
	info, err := os.Stat(s.path("0.log"))
	if err != nil {
		b.Fatal(err)
	}
	return s, info.Size()
}

// BenchmarkCopy100MB reads a log of 100 MB, beside io.Copy of the same file as the floor.
func BenchmarkCopy100MB(b *testing.B) {
	s, size := benchmarkFile(b)
	for name, req := range map[string]Request{
		"plain":      all(),
		"timestamps": with(func(r *Request) { r.Timestamps = true }),
		"since":      with(func(r *Request) { r.Since = time.Unix(0, 0) }),
		"stderr":     with(func(r *Request) { r.Stream = "stderr" }),
		"tail1000":   with(func(r *Request) { r.Tail = 1000 }),
	} {
		req.Path = podDir + "/c/0.log"
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if err := s.r.Copy(b.Context(), struct{ io.Writer }{io.Discard}, req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("floor", func(b *testing.B) {
		b.SetBytes(size)
		buf := make([]byte, bufferSize)
		for b.Loop() {
			f, err := os.Open(s.path("0.log"))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf); err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
}
