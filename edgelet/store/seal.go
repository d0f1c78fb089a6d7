package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"
)

// KeySize is the length in bytes of the key of [Options].
const KeySize = 32

const (
	sealedPrefix = "sealed/" // of the buckets whose values are encrypted
	nonceSize    = 12
)

// A sealer encrypts values with the data key of a file. A nil sealer has none.
type sealer struct{ aead cipher.AEAD }

func newSealer(key []byte) (*sealer, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("%w: %d bytes instead of %d", ErrKey, len(key), KeySize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead}, nil
}

// seal encrypts text for this bucket and key, with a nonce of its own: at 12 random
// bytes each, 2^32 of them are safe under one key, more than flash bears writes.
func (s *sealer) seal(bucket, key string, text []byte) []byte {
	b := make([]byte, nonceSize, nonceSize+len(text)+s.aead.Overhead())
	rand.Read(b) // never fails
	return s.aead.Seal(b, b, text, []byte(bucket+"\x00"+key))
}

// open decrypts what seal made for this bucket and key.
func (s *sealer) open(bucket, key string, b []byte) ([]byte, error) {
	if len(b) < nonceSize {
		return nil, fmt.Errorf("%w: sealed value of %d bytes", ErrKey, len(b))
	}
	text, err := s.aead.Open(nil, b[:nonceSize], b[nonceSize:], []byte(bucket+"\x00"+key))
	if err != nil {
		return nil, fmt.Errorf("%w: value was sealed with another one", ErrKey)
	}
	return text, nil
}

// unlock makes the data key usable: it unwraps it with the key of the options, or
// makes the first one. A wrong key is not an error here; it leaves d without a
// sealer, and sealed tables say why.
func (d *DB) unlock(key []byte) error {
	if key == nil {
		d.keyErr = fmt.Errorf("%w: none given", ErrKey)
		return nil
	}
	wrap, err := newSealer(key)
	if err != nil {
		return fmt.Errorf("store %s: %w", d.path, err)
	}
	var wrapped []byte
	err = d.View(func(tx *Tx) error {
		_, b, err := tx.get(metaBucket, metaKey)
		wrapped = append(wrapped, b...)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return d.Reseal(key)
	}
	if err != nil {
		return err
	}
	data, err := wrap.open(metaBucket, metaKey, wrapped)
	if err != nil {
		d.keyErr = fmt.Errorf("%w: not the one that the store was made with", ErrKey)
		d.log.Error("sealed tables of the store are locked: wrong key", "path", d.path)
		return nil
	}
	d.sealer, err = newSealer(data)
	return err
}

// Reseal drops everything in sealed tables and begins with a new data key, wrapped
// with key. It is the way out when the old key is lost: the cloud sends Secrets and
// tokens again. It must not run beside other calls.
func (d *DB) Reseal(key []byte) error {
	wrap, err := newSealer(key)
	if err != nil {
		return fmt.Errorf("store %s: reseal: %w", d.path, err)
	}
	data := make([]byte, KeySize)
	rand.Read(data)
	s, err := newSealer(data)
	if err != nil {
		return err
	}
	dropped := 0
	err = d.Update(func(tx *Tx) error {
		dropped = 0
		var names [][]byte
		err := tx.tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if strings.HasPrefix(string(name), sealedPrefix) {
				dropped += b.Inspect().KeyN
				names = append(names, append([]byte(nil), name...))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := tx.tx.DeleteBucket(name); err != nil {
				return err
			}
		}
		return tx.put(metaBucket, metaKey, kindSealed, wrap.seal(metaBucket, metaKey, data))
	})
	if err != nil {
		return fmt.Errorf("store %s: reseal: %w", d.path, err)
	}
	if dropped > 0 {
		d.damage("%d sealed values without a key were dropped", dropped)
	}
	d.sealer, d.keyErr = s, nil
	return nil
}

// LoadKey reads the key file at path, and makes one with a random key, mode 0600,
// if there is none. Of several callers at once all get the same key.
func LoadKey(path string) ([]byte, error) {
	key, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, KeySize)
	rand.Read(key)
	if err := writeNew(path, key); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("key file: %w", err)
	}
	return readKey(path)
}

func readKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s: mode %v lets others read it; it must be a file of mode 0600", path, info.Mode())
	}
	key, err := io.ReadAll(io.LimitReader(f, KeySize+1))
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if len(key) != KeySize {
		return nil, fmt.Errorf("key file %s: %w: must be %d bytes long", path, ErrKey, KeySize)
	}
	return key, nil
}

// writeNew makes a file that is either whole and on disk or not there. It fails
// with fs.ErrExist if there is one already.
func writeNew(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	return syncDir(path)
}

// syncDir makes the directory entry of path durable.
func syncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
