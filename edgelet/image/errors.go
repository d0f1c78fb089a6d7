package image

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Reasons why a container waits for its image.
const (
	ReasonPull        = "ErrImagePull"
	ReasonBackOff     = "ImagePullBackOff"
	ReasonNeverPull   = "ErrImageNeverPull"
	ReasonInvalidName = "InvalidImageName"
	ReasonInspect     = "ImageInspectError"
)

// An Error says why an image is not there. Its text is meant for the message of a
// waiting container.
type Error struct{ reason, message string }

// Error is the message, without the reason.
func (e *Error) Error() string { return e.message }

// Reason is the reason of a waiting container.
func (e *Error) Reason() string { return e.reason }

// maxMessage bounds what a registry may put into a status or event, in bytes.
const maxMessage = 2048

// clean makes a text of foreign origin safe to show on a terminal and to store:
// control and formatting characters, which can hide or reorder text, become '?'.
func clean(text string) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == utf8.RuneError || unicode.Is(unicode.C, r): // control, format, private use, surrogate
			return '?'
		}
		return r
	}, text)
	if len(text) <= maxMessage {
		return text
	}
	cut := maxMessage
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "…"
}
