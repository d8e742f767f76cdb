// SPDX-License-Identifier: Apache-2.0

// Command ftguest-build builds the lab's guest into a directory, so that tests
// and the demo find it there; with -debian, the Debian guest.
package main

import (
	"context"
	"flag"
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
	debian := flag.Bool("debian", false, "build the Debian guest")
	flag.Parse()
	if flag.NArg() != 1 {
		return fmt.Errorf("usage: ftguest-build [-debian] DIRECTORY")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if *debian {
		_, err := guest.BuildDebian(ctx, flag.Arg(0))
		return err
	}
	_, err := guest.Build(ctx, flag.Arg(0))
	return err
}
