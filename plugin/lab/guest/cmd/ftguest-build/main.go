// SPDX-License-Identifier: Apache-2.0

// Command ftguest-build builds the lab's guest into a directory, so that tests
// and the demo find it there.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: ftguest-build DIRECTORY")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	_, err := guest.Build(ctx, os.Args[1])
	return err
}
