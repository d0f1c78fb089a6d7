package cri

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// An Error is the failure of one call. Its text is "op object: what the runtime
// said", without gRPC's decoration; status.Code reads its code.
type Error struct {
	Op, Object string
	Status     *status.Status
}

// Error implements error.
func (e *Error) Error() string {
	text := e.Op
	if e.Object != "" {
		text += " " + e.Object
	}
	return text + ": " + e.Status.Message()
}

// GRPCStatus lets status.Code and status.FromError see through the error.
func (e *Error) GRPCStatus() *status.Status { return e.Status }

// Is makes an ended context recognizable by its own errors.
func (e *Error) Is(target error) bool {
	switch target {
	case context.Canceled:
		return e.Status.Code() == codes.Canceled
	case context.DeadlineExceeded:
		return e.Status.Code() == codes.DeadlineExceeded
	}
	return false
}

func wrap(op, object string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Object: object, Status: status.Convert(err)}
}

// gone makes the success of stopping and removing what is not there: CRI wants
// these calls idempotent, and runtimes differ.
func gone(err error) error {
	if status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}
