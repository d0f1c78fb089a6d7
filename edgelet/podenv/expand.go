package podenv

import "strings"

// Bounds of what references can grow to. A few bytes of $(VAR) can stand for
// many, and for more with each step, so that without a bound a small pod spec
// could take all memory. Linux refuses to execute anything larger.
const (
	MaxValue = 128 << 10 // bytes of one variable or argument (MAX_ARG_STRLEN)
	MaxTotal = 6 << 20   // bytes of an environment, and of a command line
)

// Expand replaces each $(NAME) in s by what lookup knows under NAME; a name that
// lookup does not know stays as it is written. $$ stands for $, so that $$(NAME)
// is the text $(NAME). A $ before anything else is itself. Values are not
// expanded again. The result may end early, but never before MaxValue bytes.
func Expand(s string, lookup func(name string) (value string, ok bool)) string {
	if strings.IndexByte(s, '$') < 0 {
		return s
	}
	var b strings.Builder
	for b.Len() <= MaxValue {
		i := strings.IndexByte(s, '$')
		if i < 0 || i+1 == len(s) {
			b.WriteString(s)
			break
		}
		b.WriteString(s[:i])
		s = s[i+1:]
		if s[0] == '$' {
			b.WriteByte('$')
			s = s[1:]
			continue
		}
		end := strings.IndexByte(s, ')')
		if s[0] != '(' || end < 0 {
			b.WriteByte('$')
			continue
		}
		if value, ok := lookup(s[1:end]); ok {
			b.WriteString(value)
		} else {
			b.WriteByte('$')
			b.WriteString(s[:end+1])
		}
		s = s[end+1:]
	}
	return b.String()
}
