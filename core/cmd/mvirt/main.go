// Command mvirt is the command line of mvirt: see core/internal/cli.
package main

import (
	"context"
	"os"

	"github.com/mvirt/mvirt/core/internal/cli"
)

func main() {
	os.Exit(cli.Main(context.Background(), os.Args[1:], cli.OSStd()))
}
