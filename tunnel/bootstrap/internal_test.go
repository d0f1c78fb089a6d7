package bootstrap

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestValidateSite(t *testing.T) {
	tests := map[string]struct {
		name string
		ok   bool
	}{
		"a word":                {"barn", true},
		"digits and hyphens":    {"3-pump-7", true},
		"parts with dots":       {"pump-7.north.example", true},
		"63 characters":         {strings.Repeat("a", 63), true},
		"64 characters":         {strings.Repeat("a", 64), false},
		"nothing":               {"", false},
		"capitals":              {"Barn", false},
		"an underscore":         {"a_b", false},
		"a hyphen at the start": {"-a", false},
		"a hyphen at the end":   {"a-", false},
		"a hyphen before a dot": {"a-.b", false},
		"an empty part":         {"a..b", false},
		"a dot at the end":      {"a.", false},
		"a slash":               {"a/b", false},
		"letters that look so":  {"bаrn", false},
		"an escape":             {"a%61", false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if err := ValidateSite(tt.name); (err == nil) != tt.ok {
				t.Errorf("ValidateSite(%q) = %v, want ok %v", tt.name, err, tt.ok)
			}
		})
	}
}

func testCA(t testing.TB) *CA {
	t.Helper()
	ca, err := NewCA(time.Now(), 10*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func testKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustURL(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestSiteFromCertificate(t *testing.T) {
	ca := testCA(t)
	uri := func(texts ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, text := range texts {
				c.URIs = append(c.URIs, mustURL(t, text))
			}
		}
	}
	tests := map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"as issued":              {func(*x509.Certificate) {}, "site-a"},
		"two URIs":               {uri("spiffe://skerry.io/site/site-a", "spiffe://skerry.io/site/site-b"), ""},
		"the same URI twice":     {uri("spiffe://skerry.io/site/site-a", "spiffe://skerry.io/site/site-a"), ""},
		"no URI":                 {uri(), ""},
		"another site's URI":     {uri("spiffe://skerry.io/site/site-b"), ""},
		"another trust domain":   {uri("spiffe://skerry.com/site/site-a"), ""},
		"a longer path":          {uri("spiffe://skerry.io/site/site-a/"), ""},
		"a path with an escape":  {uri("spiffe://skerry.io/site/site-%61"), ""},
		"a URI in capitals":      {uri("spiffe://skerry.io/site/SITE-A"), ""},
		"a URI with a user":      {uri("spiffe://x@skerry.io/site/site-a"), ""},
		"a URI with a query":     {uri("spiffe://skerry.io/site/site-a?x"), ""},
		"a DNS name besides":     {func(c *x509.Certificate) { c.DNSNames = []string{"site-a"} }, ""},
		"an address besides":     {func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} }, ""},
		"another common name":    {func(c *x509.Certificate) { c.Subject.CommonName = "site-b" }, ""},
		"a common name in caps":  {func(c *x509.Certificate) { c.Subject.CommonName = "SITE-A" }, ""},
		"another organization":   {func(c *x509.Certificate) { c.Subject.Organization = []string{"system:masters"} }, ""},
		"a second organization":  {func(c *x509.Certificate) { c.Subject.Organization = append(c.Subject.Organization, "system:masters") }, ""},
		"a unit besides":         {func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"x"} }, ""},
		"a CA":                   {func(c *x509.Certificate) { c.IsCA = true }, ""},
		"a server's certificate": {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, ""},
		"for servers as well": {func(c *x509.Certificate) {
			c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		}, ""},
		"without usages": {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			template := siteTemplate("site-a")
			tt.change(template)
			cert, err := sign(template, ca.cert, testKey(t).Public(), ca.key)
			if err != nil {
				t.Fatal(err)
			}
			got, err := SiteFromCertificate(cert)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("SiteFromCertificate = %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

// siteTemplate is written out here once more, so that a change of what is issued
// does not pass unseen.
func siteTemplate(site string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(7),
		Subject:               pkix.Name{CommonName: site, Organization: []string{"skerry:sites"}},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: "skerry.io", Path: "/site/" + site}},
	}
}

// FuzzHostileCSR asks for everything that a site must not have: what is issued is
// the template in every field, with the key of the request.
func FuzzHostileCSR(f *testing.F) {
	f.Add("system:node:other", "system:masters", "kubernetes.default.svc", "spiffe://skerry.io/site/other", true, uint8(0))
	f.Add("site-a", "skerry:sites", "", "", false, uint8(1))
	f.Add("\x00", "O=a,CN=b", "*.", "file:///etc/shadow", true, uint8(255))
	ca := testCA(f)
	key := testKey(f)
	now := time.Now().Truncate(time.Second)
	record, err := Record{}.next("k", "", issue{now: now, life: time.Hour, end: ca.cert.NotAfter})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, cn, o, dns, uri string, isCA bool, usage uint8) {
		template := &x509.CertificateRequest{
			Subject:  pkix.Name{CommonName: cn, Organization: []string{o}, SerialNumber: dns},
			DNSNames: []string{dns}, EmailAddresses: []string{o}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, usage)},
			ExtraExtensions: []pkix.Extension{
				{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 0, usage}}, // key usage
				{Id: []int{2, 5, 29, 37}, Value: []byte(o)},                              // extended key usage
			},
		}
		if isCA {
			template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}})
		}
		if u, err := url.Parse(uri); err == nil {
			template.URIs = []*url.URL{u}
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
		if err != nil {
			t.Skip() // not even a request
		}
		csr, err := parseCSR(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})))
		if err != nil {
			return // refused is fine
		}
		cert, err := ca.IssueSite("site-a", record, csr.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		checkIssued(t, ca, cert, record, csr.PublicKey)
	})
}

func checkIssued(t *testing.T, ca *CA, cert *x509.Certificate, record Record, public any) {
	t.Helper()
	serial, err := parseSerial(record.Serial)
	if err != nil {
		t.Fatal(err)
	}
	want := siteTemplate("site-a")
	want.SerialNumber, want.NotBefore, want.NotAfter = serial, record.NotBefore, record.NotAfter
	der, err := x509.CreateCertificate(rand.Reader, want, ca.cert, public, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	if want, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	// Everything that is signed; signatures themselves are random.
	if !reflect.DeepEqual(cert.RawTBSCertificate, want.RawTBSCertificate) {
		t.Errorf("issued %+v, want %+v", cert, want)
	}
	if err := cert.CheckSignatureFrom(ca.cert); err != nil {
		t.Error(err)
	}
}

func FuzzParseCSR(f *testing.F) {
	good, err := newCSR("site-a", testKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good))
	f.Add("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n")
	f.Fuzz(func(t *testing.T, text string) {
		csr, err := parseCSR(text)
		if err == nil && (csr.CheckSignature() != nil || checkKey(csr.PublicKey) != nil) {
			t.Error("a request is accepted without proof of its key")
		}
	})
}

func TestRequestsThatProveNothing(t *testing.T) {
	key, other := testKey(t), testKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := x509.MarshalPKIXPublicKey(&other.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	own, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	stolen := []byte(strings.Replace(string(der), string(own), string(foreign), 1))
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	for name, text := range map[string]string{
		"somebody else's key": encode("CERTIFICATE REQUEST", stolen),
		"two requests":        encode("CERTIFICATE REQUEST", der) + encode("CERTIFICATE REQUEST", der),
		"another kind":        encode("CERTIFICATE", der),
		"nothing":             "",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parseCSR(text); err == nil {
				t.Error("parseCSR = nil, want an error")
			}
		})
	}
	if _, err := parseCSR(encode("CERTIFICATE REQUEST", der)); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

func TestRecord(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	terms := issue{now: now, life: 30 * 24 * time.Hour, end: now.AddDate(9, 0, 0)}
	first, err := Record{}.join("site-a", "k1", Grant{}, terms)
	if err != nil {
		t.Fatal(err)
	}
	serial := func(r Record) *big.Int {
		t.Helper()
		s, err := parseSerial(r.Serial)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	second, err := first.renew(serial(first), "k2", terms)
	if err != nil {
		t.Fatal(err)
	}
	if second.Previous != first.Serial || serial(second).Cmp(serial(first)) <= 0 {
		t.Errorf("renewed %+v after %+v: want a higher serial and its predecessor", second, first)
	}
	third, err := second.renew(serial(second), "k3", terms)
	if err != nil {
		t.Fatal(err)
	}
	newer := new(big.Int).Add(serial(third), big.NewInt(5))
	replace := Grant{Site: "site-a", Replace: true}
	usedBefore := Grant{Site: "site-a", Replace: true, UsedKey: "k9", UsedSite: "site-a", UsedAt: now.Add(-time.Hour)}
	tests := map[string]struct {
		try  func() (Record, error)
		want Code // "" if it succeeds
		same bool // no new certificate
	}{
		"joining again with the same key":     {func() (Record, error) { return first.join("site-a", "k1", Grant{}, terms) }, "", true},
		"joining with another key":            {func() (Record, error) { return first.join("site-a", "k9", Grant{}, terms) }, NameTaken, false},
		"replacing":                           {func() (Record, error) { return first.join("site-a", "k9", replace, terms) }, "", false},
		"replacing another site":              {func() (Record, error) { return first.join("site-b", "k9", replace, terms) }, NameTaken, false},
		"replacing back with a token used up": {func() (Record, error) { return first.join("site-a", "k9", usedBefore, terms) }, NameTaken, false},
		"renewing again after a lost answer":  {func() (Record, error) { return second.renew(serial(first), "k2", terms) }, "", true},
		"a copy renews with its own key":      {func() (Record, error) { return second.renew(serial(first), "k9", terms) }, Stale, false},
		"a copy of an older state":            {func() (Record, error) { return third.renew(serial(first), "k9", terms) }, Stale, false},
		"an older state with its pending key": {func() (Record, error) { return third.renew(serial(first), "k2", terms) }, Stale, false},
		"without a new key":                   {func() (Record, error) { return third.renew(serial(third), "k3", terms) }, Invalid, false},
		"a record from a backup":              {func() (Record, error) { return third.renew(newer, "k9", terms) }, "", false},
		"a site that was deleted":             {func() (Record, error) { return Record{}.renew(serial(first), "k9", terms) }, UnknownSite, false},
		"a revoked site renews":               {func() (Record, error) { r := first; r.Revoked = "x"; return r.renew(serial(first), "k2", terms) }, Revoked, false},
		"a revoked site joins":                {func() (Record, error) { r := first; r.Revoked = "x"; return r.join("site-a", "k2", replace, terms) }, Revoked, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			next, err := tt.try()
			if tt.want != "" {
				if !errors.Is(err, tt.want) {
					t.Errorf("error = %v, want %s", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if same := next == first || next == second; same != tt.same {
				t.Errorf("next = %+v, want the same certificate: %v", next, tt.same)
			}
			if !tt.same && serial(next).Cmp(serial(first)) <= 0 {
				t.Errorf("serial %s is not higher than %s", next.Serial, first.Serial)
			}
		})
	}
	later := terms
	later.now = now.AddDate(3, 0, 0)
	again, err := second.renew(serial(first), "k2", later)
	if err != nil || again.Serial == second.Serial || again.Previous != first.Serial || !again.NotAfter.After(later.now) {
		t.Errorf("the same request years later = %+v, %v, want a certificate that is good then", again, err)
	}
	late := terms
	late.now = terms.end.Add(-time.Hour)
	if last, err := third.renew(serial(third), "k9", late); err != nil || last.NotAfter.After(terms.end) {
		t.Errorf("shortly before the CA's end = %+v, %v, want it to end with the CA", last, err)
	}
}

func TestSerialsGrowWhateverTheClockSays(t *testing.T) {
	var last *big.Int
	for _, now := range []time.Time{time.Unix(1e9, 0), time.Unix(2e9, 0), time.Unix(0, 0), time.Unix(-5e9, 0), time.Unix(1e9, 0)} {
		next, err := newSerial(now, last)
		if err != nil {
			t.Fatal(err)
		}
		if last != nil && next.Cmp(last) <= 0 || next.Sign() <= 0 || next.BitLen() > 159 {
			t.Errorf("serial %x after %x", next, last)
		}
		last = next
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain":               "plain",
		"a\nb\x1b[31mc":       "a b [31mc",
		"\u202egnp.exe\u200b": "gnp.exe",
		"\x9b2J\xff":          "2J",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
	if got := printable(strings.Repeat("é", 1000)); len(got) > 310 {
		t.Errorf("printable of a long text has %d bytes", len(got))
	}
}

// Every flipped bit of the identity is found, and the copy stands in.
func TestDamagedIdentity(t *testing.T) {
	ca := testCA(t)
	key := testKey(t)
	record, err := Record{}.next("k", "", issue{now: time.Now(), life: time.Hour, end: ca.cert.NotAfter})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueSite("site-a", record, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f, err := openFiles(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	want := bundle{key: key, cert: cert, cas: ca.bundle}
	if err := f.store(want); err != nil {
		t.Fatal(err)
	}
	good, err := f.read(identityFile)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 7 {
		bad := []byte(string(good))
		bad[i] ^= 1 << (i % 8)
		if i%97 == 0 {
			bad = bad[:i] // torn
		}
		if err := os.WriteFile(dir+"/"+identityFile, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := f.load()
		if err != nil || !got.key.Equal(key) || !got.cert.Equal(cert) || len(got.cas) == 0 {
			t.Fatalf("with byte %d damaged: %v", i, err)
		}
	}
}

func TestServerCertificate(t *testing.T) {
	ca := testCA(t)
	for _, names := range [][]string{{""}, {"a b"}, {"https://x"}, {"x:443"}, {"-x"}} {
		if _, err := NewServerCertificate(ServerConfig{CA: ca, Names: names}); err == nil {
			t.Errorf("names %q are accepted", names)
		}
	}
	s, err := NewServerCertificate(ServerConfig{CA: ca, Names: []string{"Skerry.example.com", "192.0.2.1", "2001:db8::1", "*.sites.example.com"}})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := s.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ServerName, "skerry.example.com", "192.0.2.1", "2001:db8::1", "x.sites.example.com"} {
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("the provider's certificate is good for a client")
	}
}

func TestParseCA(t *testing.T) {
	ca, older := testCA(t), testCA(t)
	cert, key, err := ca.PEM()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ParseCA(cert, key, older.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	if parsed.Pin() != ca.Pin() || len(parsed.bundle) != 2 {
		t.Errorf("pin %s, %d CAs, want %s, 2", parsed.Pin(), len(parsed.bundle), ca.Pin())
	}
	if _, err := ParseCA(older.Bundle(), key, nil); err == nil {
		t.Error("a certificate with another's key is accepted")
	}
	if _, err := ParseCA(nil, key, nil); err == nil {
		t.Error("a key without a certificate is accepted")
	}
}
