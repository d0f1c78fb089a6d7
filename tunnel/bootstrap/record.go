package bootstrap

import (
	"math/big"
	"time"
)

// A Record is what the cloud remembers of a site's identity. The zero Record is
// that of a site that never had a certificate.
type Record struct {
	Serial    string    `json:"serial"`             // of the last certificate, as [Serial] writes it
	Key       string    `json:"key"`                // [KeyID] of its key
	NotBefore time.Time `json:"notBefore"`          // whole seconds
	NotAfter  time.Time `json:"notAfter"`           // whole seconds
	Previous  string    `json:"previous,omitempty"` // serial that Serial replaced; good until Serial has been used

	// Revoked says why the site is cut off; empty: it is not. A person sets and
	// lifts it; it is no part of the lineage.
	Revoked string `json:"-"`
}

// A Grant is what a join token allows.
type Grant struct {
	ID      string // the public part of the token
	Site    string // the only site that may join with it; empty: any that has no certificate
	Replace bool   // the site may have a certificate already, which is then good no more

	// UsedKey, UsedSite and UsedAt say for which key and site the token has been
	// redeemed, and when; zero: for none yet, or it may be used many times.
	UsedKey, UsedSite string
	UsedAt            time.Time
}

// join returns the record after site has joined with key under grant.
func (r Record) join(site, key string, grant Grant, life issue) (Record, error) {
	switch {
	case r.Revoked != "":
		return r, &Error{Code: Revoked, Detail: r.Revoked}
	case r.Serial == "":
		return r.next(key, "", life)
	case r.Key == key:
		return r.again(key, life)
	case grant.Replace && grant.Site == site && !(grant.UsedKey != "" && r.issued().After(grant.UsedAt)):
		return r.next(key, "", life)
	}
	return r, &Error{Code: NameTaken, Detail: "the site has a certificate"}
}

// renew returns the record after the holder of certificate old has renewed it
// with key.
func (r Record) renew(old *big.Int, key string, life issue) (Record, error) {
	if r.Revoked != "" {
		return r, &Error{Code: Revoked, Detail: r.Revoked}
	}
	if r.Serial == "" {
		return r, UnknownSite
	}
	last, err := parseSerial(r.Serial)
	if err != nil {
		return r, err
	}
	switch {
	case r.Key == key && r.Previous == old.Text(16):
		return r.again(key, life) // the answer was lost
	case r.Key == key:
		return r, &Error{Code: Invalid, Detail: "a renewal must bring a new key"}
	case last.Cmp(old) <= 0:
		// Older than the certificate, which our CA signed: the record has been
		// restored from a backup, and the site is the one who knows better.
		r.Serial = old.Text(16)
		return r.next(key, r.Serial, life)
	}
	return r, Stale
}

// Admits reports whether a session may use the certificate with serial: the last
// one of the site, or the one before it as long as the last has not been used.
// used says that the last one is in use, so that [Record.Confirmed] is due.
func (r Record) Admits(serial *big.Int) (used bool, err error) {
	if r.Revoked != "" {
		return false, &Error{Code: Revoked, Detail: r.Revoked}
	}
	if r.Serial == "" {
		return false, UnknownSite
	}
	last, err := parseSerial(r.Serial)
	if err != nil {
		return false, err
	}
	switch {
	case last.Cmp(serial) <= 0: // higher: the record has been restored from a backup
		return r.Previous != "" && last.Cmp(serial) == 0, nil
	case r.Previous == serial.Text(16):
		return false, nil
	}
	return false, Stale
}

// Confirmed returns the record once its last certificate has been used: the one
// before it is good no more.
func (r Record) Confirmed() Record {
	r.Previous = ""
	return r
}

// An issue is when and for how long a certificate is issued.
type issue struct {
	now  time.Time
	life time.Duration
	end  time.Time // of the CA: no certificate outlives it
}

// next returns the record of a new certificate for key.
func (r Record) next(key, previous string, is issue) (Record, error) {
	var last *big.Int
	if r.Serial != "" {
		var err error
		if last, err = parseSerial(r.Serial); err != nil {
			return r, err
		}
	}
	serial, err := newSerial(is.now, last)
	if err != nil {
		return r, err
	}
	return Record{
		Serial:    serial.Text(16),
		Key:       key,
		NotBefore: is.now.Add(-backdate).UTC().Truncate(time.Second),
		NotAfter:  earlier(is.now.Add(is.life), is.end).UTC().Truncate(time.Second),
		Previous:  previous,
		Revoked:   r.Revoked,
	}, nil
}

// again answers a request that was answered before: with the same certificate,
// or with a new one for the same key once that is due for renewal.
func (r Record) again(key string, is issue) (Record, error) {
	if is.now.Before(dueAt(r.issued(), r.NotAfter)) {
		return r, nil
	}
	return r.next(key, r.Previous, is)
}

// issued is when the last certificate was issued, in whole seconds.
func (r Record) issued() time.Time { return r.NotBefore.Add(backdate) }

// dueAt is when a certificate should be renewed: at two thirds of its life.
func dueAt(issued, end time.Time) time.Time {
	return issued.Add(end.Sub(issued) / 3 * 2)
}
