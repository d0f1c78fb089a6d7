package store

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// childVar tells this test binary to be one of the programs below instead.
const childVar = "STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	var err error
	switch role, path, _ := strings.Cut(os.Getenv(childVar), " "); role {
	case "full-disk":
		signal.Ignore(syscall.SIGXFSZ)
		err = fullDisk(path)
	case "writer":
		err = writeForever(path)
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func childCommand(t *testing.T, role, path string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"="+role+" "+path)
	cmd.Stderr = os.Stderr
	return cmd
}

func child(t *testing.T, role, path string) string {
	t.Helper()
	out, err := childCommand(t, role, path).Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", role, err, out)
	}
	return string(out)
}

// writeForever changes two tables and a queue at once, from several goroutines, and
// prints what was acknowledged.
func writeForever(path string) error {
	d, err := Open(Options{Path: path, Key: testKey(1)})
	if err != nil {
		return err
	}
	if len(d.Damage()) > 0 {
		return fmt.Errorf("damage: %v", d.Damage())
	}
	plain, sealed, q := NewTable[int](d, "pods"), NewSealedTable[int](d, "desired/Secret"), NewQueue[int](d, "events", Limit{Items: 50})
	fmt.Println("ready")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			key := fmt.Sprint(w)
			n, _ := plain.Get(key)
			for {
				n++
				var seq uint64
				err := d.Update(func(tx *Tx) (err error) {
					if err := plain.PutTx(tx, key, n); err != nil {
						return err
					}
					if err := sealed.PutTx(tx, key, n); err != nil {
						return err
					}
					seq, err = q.PushTx(tx, n)
					return err
				})
				if err != nil {
					fmt.Println("error:", err)
					return
				}
				fmt.Println("ack", w, n, seq)
			}
		})
	}
	wg.Wait()
	return nil
}

func TestAcknowledgedWritesSurviveKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edge.db")
	acked, lastSeq, total := [4]int{}, uint64(0), 0
	for range 25 {
		for _, line := range runAndKill(t, path, time.Duration(rand.IntN(40))*time.Millisecond) {
			var w, n int
			var seq uint64
			if _, err := fmt.Sscanf(line, "ack %d %d %d", &w, &n, &seq); err != nil {
				t.Fatalf("child: %s", line)
			}
			acked[w], lastSeq = max(acked[w], n), max(lastSeq, seq)
			total++
		}
		d := openAt(t, path)
		if len(d.Damage()) > 0 {
			t.Fatal(d.Damage())
		}
		for w, want := range acked {
			a, _ := NewTable[int](d, "pods").Get(fmt.Sprint(w))
			b, _ := NewSealedTable[int](d, "desired/Secret").Get(fmt.Sprint(w))
			if a < want || a != b {
				t.Errorf("writer %d: %d and %d stored, %d acknowledged", w, a, b, want)
			}
			acked[w] = a
		}
		seq, err := NewQueue[int](d, "events", Limit{Items: 50}).Push(0)
		must(t, err)
		if seq <= lastSeq {
			t.Errorf("sequence number %d after %d", seq, lastSeq)
		}
		lastSeq = seq
		must(t, d.Close())
	}
	t.Logf("%d acknowledged changes", total)
	if total < 50 {
		t.Error("too few to say anything")
	}
}

// runAndKill runs the writer, kills it some time after it is ready, and returns the
// whole lines that it has printed since.
func runAndKill(t *testing.T, path string, after time.Duration) []string {
	t.Helper()
	cmd := childCommand(t, "writer", path)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("child: %q, %v", line, err)
	}
	timer := time.AfterFunc(after, func() { cmd.Process.Kill() })
	defer timer.Stop()
	var lines []string
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			break
		}
		lines = append(lines, line)
	}
	cmd.Wait() // killed
	return lines
}

func TestLockHolderIsFoundInProcLocks(t *testing.T) {
	text := "1: POSIX  ADVISORY  WRITE 11 fe:00:42 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 12 fe:00:42 0 EOF\n3: FLOCK  ADVISORY  WRITE 13 fe:00:142 0 EOF\n4: FLOCK  ADVISORY  WRITE 14 fe:00:42 0 EOF\n"
	for inode, want := range map[uint64]string{42: "14", 142: "13", 2: "", 7: ""} {
		if got := holder(bytes.NewBufferString(text), inode); got != want {
			t.Errorf("inode %d: %q, want %q", inode, got, want)
		}
	}
}
