package bootstrap

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Files of a site's directory. Everything that belongs together is one file, so
// that one rename replaces it.
const (
	identityFile = "identity.pem"     // key, certificate, CAs; the truth
	backupFile   = "identity.bak.pem" // a copy, for when flash loses the first
	pendingFile  = "pending.key"      // a key whose certificate has been asked for
	maxFile      = 64 << 10           // bytes
)

// files is a directory in which each write is all or nothing, and durable when
// it returns.
type files struct {
	root *os.Root
	step func(what string) // called before each change to the disk; nil but in tests
}

// openFiles opens dir, which it makes if create is set.
func openFiles(dir string, create bool) (*files, error) {
	if create {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &files{root: root}, nil
}

func (f *files) close() { f.root.Close() }

func (f *files) before(what string) {
	if f.step != nil {
		f.step(what)
	}
}

// write replaces the file name by data, readable by its owner only.
func (f *files) write(name string, data []byte) error {
	temp := name + ".tmp"
	f.before("create " + temp)
	// One of an earlier run is not reused: it may be a link, or open to others.
	if err := f.root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := f.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	f.before("write " + temp)
	_, err = file.Write(data)
	f.before("sync " + temp)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	f.before("rename " + name)
	if err := f.root.Rename(temp, name); err != nil {
		return err
	}
	return f.sync("sync directory of " + name)
}

// remove removes a file that may not exist.
func (f *files) remove(name string) error {
	f.before("remove " + name)
	if err := f.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.sync("sync directory without " + name)
}

func (f *files) sync(what string) error {
	f.before(what)
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func (f *files) read(name string) ([]byte, error) {
	file, err := f.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s: more than %d bytes", name, maxFile)
	}
	return data, err
}

// pendingKey returns the key that a certificate is being asked for: that of an
// earlier attempt, so that its certificate is not lost if only the answer was, or
// a new one. It is durable when this returns.
func (f *files) pendingKey() (*ecdsa.PrivateKey, error) {
	if data, err := f.read(pendingFile); err == nil {
		if key, err := parseKey(data); err == nil {
			return key, nil
		}
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("new key: %w", err)
	}
	data, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	if err := f.write(pendingFile, data); err != nil {
		return nil, fmt.Errorf("store new key: %w", err)
	}
	return key, nil
}

// A bundle is the content of an identity file.
type bundle struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	cas  []*x509.Certificate
}

// store makes b the identity. The pending key goes last: until then, either file
// has what is needed to ask again.
func (f *files) store(b bundle) error {
	data, err := keyPEM(b.key)
	if err != nil {
		return err
	}
	data = append(data, certificatePEM(b.cert)...)
	data = append(data, certificatePEM(b.cas...)...)
	for _, name := range []string{identityFile, backupFile} {
		if err := f.write(name, data); err != nil {
			return fmt.Errorf("store identity: %w", err)
		}
	}
	if err := f.remove(pendingFile); err != nil {
		return fmt.Errorf("store identity: %w", err)
	}
	return nil
}

// load reads the identity, from its copy if need be, and tidies up after an end
// in the middle of [files.store]. It is fs.ErrNotExist if there is none.
func (f *files) load() (bundle, error) {
	b, err := f.loadFile(identityFile)
	if err != nil {
		copied, copyErr := f.loadFile(backupFile)
		if copyErr != nil {
			return bundle{}, err
		}
		b = copied
	}
	if data, err := f.read(pendingFile); err == nil {
		if pending, err := parseKey(data); err == nil && pending.Equal(b.key) {
			if err := f.store(b); err != nil {
				return bundle{}, err
			}
		}
	}
	return b, nil
}

// loadFile reads one identity file and checks that its parts belong together.
func (f *files) loadFile(name string) (bundle, error) {
	data, err := f.read(name)
	if err != nil {
		return bundle{}, err
	}
	key, err := parseKey(data)
	if err != nil {
		return bundle{}, fmt.Errorf("%s: %w", name, err)
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return bundle{}, fmt.Errorf("%s: %w", name, err)
	}
	b := bundle{key: key, cert: certs[0], cas: certs[1:]}
	if _, err := b.check(b.cas); err != nil {
		return bundle{}, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// check verifies that the certificate is one of a site, for the key, under one of
// cas, and returns the site.
func (b bundle) check(cas []*x509.Certificate) (string, error) {
	if !b.key.PublicKey.Equal(b.cert.PublicKey) {
		return "", errors.New("the certificate is not for the key")
	}
	_, err := b.cert.Verify(x509.VerifyOptions{
		Roots:       poolOf(cas),
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: b.cert.NotBefore.Add(backdate), // whether it has expired is not the question
	})
	if err != nil {
		return "", err
	}
	return SiteFromCertificate(b.cert)
}

// tls returns the certificate as TLS wants it.
func (b bundle) tls() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{b.cert.Raw}, PrivateKey: b.key, Leaf: b.cert}
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// parseKey reads the first private key of a PEM text.
func parseKey(text []byte) (*ecdsa.PrivateKey, error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, errors.New("no private key")
		}
		if block.Type != "PRIVATE KEY" {
			continue
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("private key: %w", err)
		}
		if key, ok := key.(*ecdsa.PrivateKey); ok {
			return key, nil
		}
		return nil, errors.New("private key: not ECDSA")
	}
}
