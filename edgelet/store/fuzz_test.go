package store

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
)

// FuzzVerify changes a whole file at one place: bbolt must be able to read what
// verify lets pass.
func FuzzVerify(f *testing.F) {
	image := sample(f)
	f.Add(uint32(0), []byte{})
	f.Add(uint32(16), []byte{1, 2, 3})
	f.Add(uint32(2*pageSize+8), []byte{flagBranch, 0, 255, 255})
	f.Add(uint32(3*pageSize+pageHeader), bytes.Repeat([]byte{255}, 16))
	path := filepath.Join(f.TempDir(), "edge.db")
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		broken := bytes.Clone(image)
		copy(broken[int(at)%len(broken):], patch)
		found, err := verify(bytes.NewReader(broken), int64(len(broken)))
		if err != nil || found.bad >= 0 {
			return
		}
		must(t, os.WriteFile(path, broken, 0o600))
		b, err := bbolt.Open(path, 0o600, boltOptions())
		must(t, err)
		defer b.Close()
		must(t, b.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				t.Error(err)
			}
			return nil
		}))
	})
}

func FuzzValue(f *testing.F) {
	s, err := newSealer(testKey(1))
	must(f, err)
	f.Add("pods", "uid", []byte{})
	f.Add("pods", "uid", frame("pods", "uid", kindJSON, []byte(`{"name":"x"}`)))
	f.Add("sealed/s", "k", frame("sealed/s", "k", kindSealed, s.seal("sealed/s", "k", []byte(`"x"`))))
	f.Fuzz(func(t *testing.T, bucket, key string, b []byte) {
		kind, content, err := unframe(bucket, key, b)
		if err != nil {
			return
		}
		if !bytes.Equal(frame(bucket, key, kind, content), b) {
			t.Error("not what frame makes")
		}
		if text, err := s.open(bucket, key, content); err == nil && kind == kindSealed && !json.Valid(text) {
			t.Logf("sealed value is not JSON: %q", text)
		}
	})
}
