// Package logs reads, follows and rotates the log files that a CRI runtime
// writes for containers.
//
// # Format
//
// A runtime writes one record per line, splitting what is longer than its buffer
// (16 KiB in containerd) into several:
//
//	2016-10-06T00:17:09.669794202Z stdout P the beginning of a long line
//	2016-10-06T00:17:09.669794203Z stdout F and its end
//
// A time in RFC 3339, the stream, tags separated by colons of which the first is
// P (partial: the line goes on) or F (full: it ends here), and the text. What is
// not of this form is skipped.
//
// # Files
//
// Beneath a root, normally /var/log/pods:
//
//	<namespace>_<pod>_<uid>/<container>/0.log                     being written
//	<namespace>_<pod>_<uid>/<container>/0.log.20260102-150405     rotated last, maybe still read
//	<namespace>_<pod>_<uid>/<container>/0.log.20260102-140000.gz  rotated before that
//
// The number is that of the container's restarts; times are UTC. [Reader] reads
// all files of a container as one log, and [Rotator] makes them. A name ending
// in .tmp is what a crash has left of a compression, and is removed.
//
// # Trust
//
// Containers may be able to write to the log root (a hostPath volume of /var/log
// suffices), so nothing there is believed: no symbolic link is followed beneath
// the root, nothing but regular files is opened, and of a record without end no
// more than a buffer is held.
package logs
