package critest

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// A Behaviour is what a container does after its start: it writes its output and
// runs, until it ends by itself or is stopped.
type Behaviour struct {
	Output []string `json:"output,omitempty"` // lines on stdout

	Exits     bool          `json:"exits,omitempty"`     // by itself
	ExitAfter time.Duration `json:"exitAfter,omitempty"` // if Exits
	ExitCode  int32         `json:"exitCode,omitempty"`  // if Exits

	IgnoreTerm bool          `json:"ignoreTerm,omitempty"` // only SIGKILL ends it
	TermAfter  time.Duration `json:"termAfter,omitempty"`  // how long it takes to end on SIGTERM
	TermCode   int32         `json:"termCode,omitempty"`   // exit code on SIGTERM

	StartError string `json:"-"` // StartContainer fails with this, a fake's only
}

// Command is a command line that behaves so. A busybox shell executes it and a
// fake reads it: the behaviour itself is passed as the script's name, $0.
func Command(b Behaviour) []string {
	var script strings.Builder
	switch {
	case b.IgnoreTerm:
		script.WriteString("trap '' TERM\n")
	case b.TermAfter > 0:
		fmt.Fprintf(&script, "trap 'sleep %v; exit %d' TERM\n", b.TermAfter.Seconds(), b.TermCode)
	default:
		fmt.Fprintf(&script, "trap 'exit %d' TERM\n", b.TermCode)
	}
	for _, line := range b.Output {
		fmt.Fprintf(&script, "echo '%s'\n", strings.ReplaceAll(line, "'", `'\''`))
	}
	// A shell handles signals only between commands, but waiting it leaves at once.
	if b.Exits {
		fmt.Fprintf(&script, "sleep %v & wait $!\nexit %d\n", b.ExitAfter.Seconds(), b.ExitCode)
	} else {
		script.WriteString("sleep 1000000 & wait $!\n")
	}
	name, _ := json.Marshal(b) // plain fields cannot fail
	return []string{"/bin/sh", "-c", script.String(), string(name)}
}

// parseCommand inverts Command. Other commands run until they are stopped.
func parseCommand(command []string) (b Behaviour) {
	if len(command) == 4 {
		_ = json.Unmarshal([]byte(command[3]), &b)
	}
	return b
}
