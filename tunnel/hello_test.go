package tunnel

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseHello(t *testing.T) {
	tests := map[string]struct {
		text string
		want Hello
		err  string // part of it; "" for none
	}{
		"the least there is":            {`{"protocol":1}`, Hello{Protocol: 1}, ""},
		"unknown members are ignored":   {`{"protocol":2,"new":{"x":[1]}}`, Hello{Protocol: 2}, ""},
		"all members":                   {`{"protocol":1,"version":"0.2.0","features":["twin"],"site":"harbor-7","epoch":41,"time":"2026-11-23T06:14:25Z"}`, Hello{1, "0.2.0", []string{"twin"}, "harbor-7", 41, time.Date(2026, 11, 23, 6, 14, 25, 0, time.UTC)}, ""},
		"nothing":                       {``, Hello{}, "hello"},
		"no protocol":                   {`{"site":"x"}`, Hello{}, "protocol 0"},
		"negative protocol":             {`{"protocol":-1}`, Hello{}, "protocol -1"},
		"not an object":                 {`[1]`, Hello{}, "hello"},
		"more after the object":         {`{"protocol":1}{"protocol":1}`, Hello{}, "hello"},
		"too large":                     {`{"protocol":1,"version":"` + strings.Repeat("x", maxHello) + `"}`, Hello{}, "more than"},
		"too many features":             {`{"protocol":1,"features":[` + strings.Repeat(`"f",`, maxFeatures) + `"f"]}`, Hello{}, "features"},
		"a site that rings the bell":    {`{"protocol":1,"site":"a\u0007"}`, Hello{}, "not a name"},
		"a version that moves a cursor": {`{"protocol":1,"version":"1\u001b[2J\u202e"}`, Hello{Protocol: 1, Version: "1[2J"}, ""},
		"a refusal":                     {`{"refused":"site x is in\u001b quarantine"}`, Hello{}, "refused by peer: site x is in quarantine"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseHello([]byte(tt.text))
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func FuzzParseHello(f *testing.F) {
	f.Add([]byte(`{"protocol":1,"version":"0.2.0","features":["twin"],"site":"harbor-7","epoch":41,"time":"2026-11-23T06:14:25Z"}`))
	f.Add([]byte(`{"refused":"no"}`))
	f.Add([]byte(`{"protocol":1,"site":"\u0000"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := parseHello(data)
		if refused, ok := errors.AsType[*RefusedError](err); ok && printable(refused.Reason) != refused.Reason {
			t.Errorf("refusal %q is not printable", refused.Reason)
		}
		if err != nil {
			return
		}
		if h.Protocol < 1 || len(h.Site) > maxText || printable(h.Site+h.Version) != h.Site+h.Version && len(h.Site+h.Version) <= maxText {
			t.Errorf("accepted %+v", h)
		}
		// What we accept we can say ourselves, and mean the same.
		again, err := json.Marshal(message{Hello: h})
		if err != nil {
			return // a year above 9999
		}
		if h2, err := parseHello(again); len(again) <= maxHello && (err != nil || !h2.Time.Equal(h.Time) || h2.Site != h.Site || h2.Epoch != h.Epoch) {
			t.Errorf("%+v said again is %+v, %v", h, h2, err)
		}
	})
}

func TestParseServer(t *testing.T) {
	tests := map[string]struct {
		text string
		want address
		ok   bool
	}{
		"a host":                    {"cloud.example", address{"cloud.example", "443", ""}, true},
		"host and port":             {"cloud.example:8443", address{"cloud.example", "8443", ""}, true},
		"an IPv6 address":           {"[2001:db8::1]:8443", address{"2001:db8::1", "8443", ""}, true},
		"a URL":                     {"https://cloud.example/", address{"cloud.example", "443", ""}, true},
		"a URL with a path":         {"https://cloud.example:1/a/b", address{"cloud.example", "1", "/a/b"}, true},
		"nothing":                   {"", address{}, false},
		"a port alone":              {":443", address{}, false},
		"clear text":                {"http://cloud.example", address{}, false},
		"a user":                    {"https://user@cloud.example", address{}, false},
		"a port that is not number": {"cloud.example:https", address{}, false},
		"a query":                   {"https://cloud.example/?x", address{}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseServer(tt.text)
			if (err == nil) != tt.ok || got != tt.want {
				t.Errorf("parseServer(%q) = %+v, %v", tt.text, got, err)
			}
		})
	}
}
