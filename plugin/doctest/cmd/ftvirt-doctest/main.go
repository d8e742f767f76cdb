// SPDX-License-Identifier: Apache-2.0

// Command ftvirt-doctest runs the commands of documents on hosts that are bare at
// the start. 'make test-docs' starts it as process 1 of namespaces of its own, so
// that nothing of it is left when it ends, however it ends.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/doctest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if err := app().RunContext(ctx, os.Args); err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		stop()
		os.Exit(1)
	}
}

func app() *cli.App {
	return &cli.App{
		Name: "ftvirt-doctest", Usage: "run the commands of documents", ArgsUsage: "DOCUMENT...", HideVersion: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "packages", Usage: "`DIRECTORY` of the packages", Value: "build/deb"},
			&cli.StringFlag{Name: "newer", Usage: "`DIRECTORY` of those to upgrade to", Value: "build/deb/newer"},
			&cli.StringFlag{Name: "tree", Usage: "`DIRECTORY` of the repository", Value: "."},
			&cli.StringFlag{Name: "guest", Usage: "`DIRECTORY` of the built guest", Value: "build/guest"},
			&cli.StringFlag{Name: "suite", Usage: "`NAME` of the hosts' Debian", Value: "trixie", EnvVars: []string{"SUITE"}},
			&cli.StringFlag{Name: "mirror", Usage: "`URL` of a mirror of it", Value: "http://deb.debian.org/debian", EnvVars: []string{"MIRROR"}},
			&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` to make the hosts in", Value: "build/doctest"},
			&cli.StringFlag{Name: "evidence", Usage: "`DIRECTORY` for logs of what failed", Value: "build/evidence"},
		},
		Action: func(c *cli.Context) error {
			return doctest.Run(c.Context, doctest.Options{
				Documents: c.Args().Slice(), Packages: c.String("packages"), Newer: c.String("newer"), Tree: c.String("tree"), GuestDir: c.String("guest"),
				Suite: c.String("suite"), Mirror: c.String("mirror"), Dir: c.String("dir"), Evidence: c.String("evidence"), Out: c.App.Writer,
			})
		},
	}
}
