package volume

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func FuzzCheckItem(f *testing.F) {
	for _, s := range []string{"a", "a/b", "", ".", "..", "../a", "a/../b", "a/..", "/a", "./..data", "..data", "...", "a//b", "a/./b/", "a\x00", strings.Repeat("a", 256), strings.Repeat("a/", 2048)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		clean, err := checkItem(s)
		if err != nil {
			return
		}
		if !filepath.IsLocal(clean) || filepath.Clean(clean) != clean || clean == "." || strings.HasPrefix(clean, "..") || strings.ContainsRune(clean, 0) {
			t.Errorf("checkItem(%q) = %q", s, clean)
		}
		if filepath.Join("/v", s) != "/v/"+clean {
			t.Errorf("checkItem(%q) = %q, which is another file", s, clean)
		}
		for e := range strings.SplitSeq(clean, "/") {
			if checkElement(e) != nil {
				t.Errorf("checkItem(%q) lets through the element %q", s, e)
			}
		}
		if again, err := checkItem(clean); again != clean || err != nil {
			t.Errorf("checkItem(%q) = %q, %v", clean, again, err)
		}
	})
}

func FuzzCheckSubPath(f *testing.F) {
	for _, s := range []string{"a", "a/../b", "/a", "a/..", "..a", ".", "", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkSubPath(s) == nil && (s != "" && !filepath.IsLocal(s) || strings.ContainsRune(s, 0)) {
			t.Errorf("checkSubPath lets through %q", s)
		}
	})
}

func FuzzParseMountInfo(f *testing.F) {
	if real, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(string(real), "/dev")
	}
	f.Add("36 35 98:0 / /pods/u/a\\040b rw - tmpfs tmpfs rw\n37 35 98:0 / /podsx rw - t t rw\n", "/pods")
	f.Add("36 35 98:0 / /pods/", "/pods")
	f.Fuzz(func(t *testing.T, s, dir string) {
		below, err := parseMountInfo(strings.NewReader(s), dir)
		if err == nil && slices.Contains(below, "") {
			t.Errorf("parseMountInfo(%q, %q) = %q", s, dir, below)
		}
	})
}

func TestParseMountInfo(t *testing.T) {
	info := `36 35 98:0 / /pods/u/a\040b\134c rw,noatime shared:1 - tmpfs tmpfs rw` + "\n" +
		`37 35 98:0 / /pods rw - ext4 /dev/sda rw` + "\n" + `38 35 98:0 / /podsx/u rw - ext4 /dev/sda rw` + "\n" + `39 36 98:0 / /pods/u\011 rw - t t rw` + "\n"
	got, err := parseMountInfo(strings.NewReader(info), "/pods")
	if want := []string{`u/a b\c`, "u\t"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("parseMountInfo = %q, %v, want %q", got, err, want)
	}
	if _, err := parseMountInfo(strings.NewReader(strings.Repeat("x", 2*maxMountLine)), "/pods"); err == nil {
		t.Error("a line without end was accepted")
	}
}
