package fake

import (
	"context"
	"io"

	"github.com/mvirt/mvirt/sdk/service"
)

// base is what services of all kinds have.
type base struct{}

// Health finds nothing wrong.
func (base) Health(context.Context) (service.Health, error) { return service.Health{}, nil }

// Shutdown does nothing.
func (base) Shutdown(context.Context) error { return nil }

// Backup writes nothing.
func (base) Backup(context.Context, io.Writer) error { return nil }

// Restore reads nothing.
func (base) Restore(context.Context, io.Reader) error { return nil }
