package podenv

import (
	"strings"
	"testing"
)

func FuzzExpand(f *testing.F) {
	for _, s := range []string{"", "$", "$$", "$$$", "$(A)", "$$(A)", "$$$(A)", "$(", "$()", "$(A", "a$b", "$(B)$(A)c", "$\xff(A)", "$($(A))", "$(A))"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		none := func(string) (string, bool) { return "", false }
		if !strings.Contains(s, "$$") && len(s) < MaxValue {
			if got := Expand(s, none); got != s {
				t.Errorf("Expand(%q) without any variable = %q", s, got)
			}
		}
		if !strings.Contains(s, "$") {
			return
		}
		// Escaping every $ takes all meaning from it.
		if got := Expand(strings.ReplaceAll(s, "$", "$$"), none); got != s && len(s) < MaxValue {
			t.Errorf("escaped %q expands to %q", s, got)
		}
		// A value is not expanded again, and the result is bounded.
		all := func(string) (string, bool) { return "$(A)", true }
		if got := Expand(s, all); len(got) > MaxValue+len(s)+4 {
			t.Errorf("Expand(%q) has %d bytes", s, len(got))
		}
		plain := func(string) (string, bool) { return "v", true }
		if a, b := Expand(s, all), Expand(s, plain); strings.Count(b, "$") > strings.Count(a, "$") {
			t.Errorf("Expand(%q) = %q, with other values %q", s, a, b)
		}
	})
}

func FuzzSplitSubscript(f *testing.F) {
	for _, s := range []string{"metadata.labels['a']", "metadata.labels['']", "['a']", "metadata.labels['a[b]c']", "a['b']['c']", "metadata.name", "']"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		base, key, ok := splitSubscript(s)
		if ok && (base+"['"+key+"']" != s || base == "") {
			t.Errorf("splitSubscript(%q) = %q, %q", s, base, key)
		}
		resolver(held()).Field(web(), s)
	})
}

func FuzzParseResolvConf(f *testing.F) {
	for _, s := range []string{"nameserver 1.2.3.4\n", "search a b. .\noptions a:1 a:2 b", "nameserver", "#", "domain x\nsearch y", strings.Repeat("nameserver 1.1.1.1\n", 9)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		config, err := parseResolvConf(strings.NewReader(s))
		if err != nil {
			return
		}
		limitDNS(config)
		if len(config.Servers) > maxNameservers || len(config.Searches) > maxSearches || len(strings.Join(config.Searches, " ")) > maxSearchesBytes {
			t.Errorf("%q gives more than a resolver takes: %v", s, config)
		}
		for _, w := range append(append(config.Servers, config.Searches...), config.Options...) {
			if len(strings.Fields(w)) != 1 {
				t.Errorf("%q gives the entry %q", s, w)
			}
		}
	})
}

func FuzzReadEnvFile(f *testing.F) {
	f.Add("A='1'\nB='2\n3' # c\n", "B")
	f.Add("A= 'x'", "A")
	f.Add("A='", "A")
	f.Fuzz(func(t *testing.T, s, key string) {
		value, ok, err := readEnvFile(strings.NewReader(s), key)
		if ok && (err != nil || strings.Contains(value, "'") || !strings.Contains(s, key+"=")) {
			t.Errorf("readEnvFile(%q, %q) = %q, %v", s, key, value, err)
		}
	})
}
