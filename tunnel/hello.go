package tunnel

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"github.com/skerry-io/skerry/tunnel/mux"
)

// Bounds of a hello: the whole in bytes, and its parts in bytes or number.
const (
	maxHello    = 16 << 10
	maxText     = 256
	maxFeatures = 64
)

// Hello is what each side says of itself before anything else.
type Hello struct {
	Protocol int       `json:"protocol"`           // newest revision spoken; filled in
	Version  string    `json:"version,omitempty"`  // of the software, for people
	Features []string  `json:"features,omitempty"` // optional abilities
	Site     string    `json:"site,omitempty"`     // the edge's name; the cloud repeats it
	Epoch    uint64    `json:"epoch,omitempty"`    // set by the cloud: fencing epoch of the session
	Time     time.Time `json:"time,omitzero"`      // sender's clock; filled in
}

// A message is a Hello, or a refusal to say one.
type message struct {
	Hello
	Refused string `json:"refused,omitempty"`
}

// parseHello reads what a peer has said. What is meant for people comes back printable.
func parseHello(data []byte) (Hello, error) {
	var m message
	if len(data) > maxHello {
		return Hello{}, fmt.Errorf("hello of more than %d bytes", maxHello)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return Hello{}, fmt.Errorf("hello: %w", err)
	}
	if m.Refused != "" {
		return Hello{}, &RefusedError{printable(m.Refused)}
	}
	if m.Protocol < 1 {
		return Hello{}, fmt.Errorf("hello: protocol %d", m.Protocol)
	}
	if len(m.Features) > maxFeatures {
		return Hello{}, fmt.Errorf("hello: %d features", len(m.Features))
	}
	for _, text := range append(m.Features, m.Site) {
		if len(text) > maxText || text != printable(text) {
			return Hello{}, fmt.Errorf("hello: %.40q is not a name", text)
		}
	}
	m.Version = printable(m.Version)
	return m.Hello, nil
}

// printable returns text without what could disturb a terminal or a log, and not too long.
func printable(text string) string {
	text = text[:min(len(text), maxText)]
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) && r != unicode.ReplacementChar {
			return r
		}
		return -1
	}, strings.ToValidUTF8(text, ""))
}

// say sends a hello, or a refusal, as all there is on a stream.
func say(st *mux.Stream, m message) error {
	if m.Protocol == 0 {
		m.Protocol = Protocol
	}
	if m.Time.IsZero() {
		m.Time = time.Now().UTC().Truncate(time.Millisecond)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	if len(data) > maxHello {
		return fmt.Errorf("say hello: %d bytes, at most %d are allowed", len(data), maxHello)
	}
	if _, err := st.Write(data); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	return st.CloseWrite()
}

// listen reads the peer's hello.
func listen(st *mux.Stream) (Hello, error) {
	data, err := io.ReadAll(io.LimitReader(st, maxHello+1))
	if err != nil {
		return Hello{}, fmt.Errorf("read hello: %w", err)
	}
	return parseHello(data)
}

// greet exchanges hellos for the side that dialed.
func greet(ctx context.Context, m *mux.Session, own Hello) (Hello, error) {
	st, err := m.Open(ctx)
	if err != nil {
		return Hello{}, err
	}
	defer st.Close()
	st.SetDeadline(time.Now().Add(handshakeTimeout))
	if err := say(st, message{Hello: own}); err != nil {
		return Hello{}, err
	}
	return listen(st)
}

// welcome exchanges hellos for the side that listens. accept returns the answer.
func welcome(ctx context.Context, m *mux.Session, accept func(Hello) (Hello, error)) (Hello, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	st, err := m.Accept(ctx)
	if err != nil {
		return Hello{}, fmt.Errorf("no hello: %w", err)
	}
	defer st.Close()
	st.SetDeadline(time.Now().Add(handshakeTimeout))
	peer, err := listen(st)
	if err != nil {
		return Hello{}, err
	}
	answer, err := accept(peer)
	st.SetWriteDeadline(time.Now().Add(handshakeTimeout))
	if err != nil {
		say(st, message{Refused: err.Error()})
		timer := time.NewTimer(time.Second)
		defer timer.Stop()
		select {
		case <-m.Done(): // the peer has read it
		case <-timer.C:
		}
		return Hello{}, fmt.Errorf("refused: %w", err)
	}
	return peer, say(st, message{Hello: answer})
}
