// SPDX-License-Identifier: Apache-2.0

// Command ftvirt is the agent of a host and the command line to it.
package main

import (
	"context"
	"os"

	"ftvirt.org/ftvirt/plugin/cli"
)

func main() { os.Exit(cli.Run(context.Background(), cli.App(), os.Args)) }
