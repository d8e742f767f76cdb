// SPDX-License-Identifier: Apache-2.0

// Command ftvirt-scenario runs what 'make demo', 'make test-security',
// 'make soak-failover' and 'make soak-clone' show, each in a lab of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// errReported is returned for what the RESULT line, which is the last line of
// all, has told already.
var errReported = errors.New("scenario failed")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if err := app().RunContext(ctx, os.Args); err != nil {
		if !errors.Is(err, errReported) {
			fmt.Fprintf(os.Stderr, "error: %v\n", err)
		}
		stop()
		os.Exit(1)
	}
}

func app() *cli.App {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "the `LAB` to make", Value: lab.DefaultName},
		&cli.StringFlag{Name: "bin", Usage: "`DIRECTORY` of ftvirt, ftvirt-hook and ftvirt.so", Value: "bin"},
		&cli.StringFlag{Name: "guest", Usage: "`DIRECTORY` of the built guest", Value: "build/guest"},
		&cli.StringFlag{Name: "evidence", Usage: "`DIRECTORY` for logs of what failed", Value: "build/evidence"},
		&cli.BoolFlag{Name: "keep", Usage: "leave the lab up", EnvVars: []string{"KEEP"}},
	}
	command := func(name, usage string, rounds int, run func(context.Context, scenario.Options) error) *cli.Command {
		own := flags
		if rounds > 0 {
			own = append([]cli.Flag{&cli.IntFlag{Name: "n", Usage: "how many `ROUNDS`", Value: rounds}}, flags...)
		}
		return &cli.Command{Name: name, Usage: usage, Flags: own, Action: func(c *cli.Context) error {
			err := run(c.Context, scenario.Options{
				Name: c.String("name"), Bin: c.String("bin"), GuestDir: c.String("guest"), Evidence: c.String("evidence"),
				Keep: c.Bool("keep"), Rounds: c.Int("n"), Out: c.App.Writer,
			})
			if err != nil {
				return fmt.Errorf("%w: %w", errReported, err)
			}
			return nil
		}}
	}
	return &cli.App{
		Name: "ftvirt-scenario", Usage: "show ftvirt at work on this machine", HideVersion: true,
		Commands: []*cli.Command{
			command("demo", "protect a guest and kill its primary", 0, scenario.Demo),
			command("test-security", "attack a protected guest", 0, scenario.Security),
			command("soak-failover", "kill the primary again and again", 20, scenario.SoakFailover),
			command("soak-clone", "make and discard backups again and again", 200, scenario.SoakClone),
		},
	}
}
