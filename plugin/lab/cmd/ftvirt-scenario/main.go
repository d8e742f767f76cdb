// SPDX-License-Identifier: Apache-2.0

// Command ftvirt-scenario runs 'make demo', 'make test-real', 'make test-security',
// 'make test-faults', 'make test-shared-dir', 'make chaos', 'make bench' and the soak runs, each in a lab of
// its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"time"

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

func selection(pattern string) (*regexp.Regexp, error) {
	if pattern == "" {
		return nil, nil
	}
	return regexp.Compile(pattern)
}

func app() *cli.App {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "the `LAB` to make", Value: lab.DefaultName},
		&cli.StringFlag{Name: "bin", Usage: "`DIRECTORY` of ftvirt, ftvirt-hook and ftvirt.so", Value: "bin"},
		&cli.StringFlag{Name: "guest", Usage: "`DIRECTORY` of the built guest", Value: "build/guest"},
		&cli.StringFlag{Name: "evidence", Usage: "`DIRECTORY` for logs of what failed", Value: "build/evidence"},
		&cli.BoolFlag{Name: "logs", Usage: "keep them even if nothing failed", EnvVars: []string{"LOGS"}},
		&cli.BoolFlag{Name: "keep", Usage: "leave the lab up", EnvVars: []string{"KEEP"}},
	}
	command := func(name, usage string, run func(context.Context, scenario.Options) error, own ...cli.Flag) *cli.Command {
		return &cli.Command{Name: name, Usage: usage, Flags: append(own, flags...), Action: func(c *cli.Context) error {
			only, err := selection(c.String("only"))
			if err != nil {
				return err
			}
			err = run(c.Context, scenario.Options{
				Name: c.String("name"), Bin: c.String("bin"), GuestDir: c.String("guest"), DebianDir: c.String("debian"), Evidence: c.String("evidence"),
				Logs: c.Bool("logs"), Keep: c.Bool("keep"), Rounds: c.Int("n"), Only: only, Seed: c.Uint64("seed"), Length: c.Duration("length"),
				Quick: c.Bool("quick"), Parts: c.StringSlice("part"), Sources: c.String("sources"), Report: c.String("report"), COLO: c.String("colo"), Out: c.App.Writer,
				SharedImages: c.Bool("shared-images"),
			})
			if err != nil {
				return fmt.Errorf("%w: %w", errReported, err)
			}
			return nil
		}}
	}
	rounds := func(n int) cli.Flag { return &cli.IntFlag{Name: "n", Usage: "how many `ROUNDS`", Value: n} }
	return &cli.App{
		Name: "ftvirt-scenario", Usage: "show ftvirt at work on this machine", HideVersion: true,
		Commands: []*cli.Command{
			command("demo", "protect a guest and kill its primary", scenario.Demo),
			command("test-security", "attack a protected guest", scenario.Security),
			command("test-faults", "take resources away from a protected guest's hosts, and damage their files", scenario.Faults,
				&cli.StringFlag{Name: "only", Usage: "the cases whose names match `REGEXP`"}),
			command("test-real", "fail a Debian server over again and again", scenario.Real, rounds(10),
				&cli.StringFlag{Name: "debian", Usage: "`DIRECTORY` of the built Debian guest", Value: "build/debian"}),
			command("soak-failover", "kill the primary again and again", scenario.SoakFailover, rounds(20)),
			command("soak-crash", "crash the primary's host again and again", scenario.SoakCrash, rounds(10)),
			command("soak-clone", "make and discard backups again and again", scenario.SoakClone, rounds(200)),
			command("test-shared-dir", "fail over while both hosts keep their disks in one directory", scenario.SharedDir, rounds(3)),
			command("chaos", "let things go wrong at random on three hosts", scenario.Chaos,
				&cli.Uint64Flag{Name: "seed", Usage: "the `NUMBER` that the faults follow from", Value: 1},
				&cli.DurationFlag{Name: "length", Usage: "how long `TIME` faults happen", Value: 5 * time.Minute},
				&cli.StringFlag{Name: "only", Usage: "the steps with a fault whose name matches `REGEXP`"},
				&cli.BoolFlag{Name: "shared-images", Usage: "all hosts keep disks and replicas in one directory all the time"}),
			command("bench", "measure what protection costs", scenario.Bench,
				&cli.BoolFlag{Name: "quick", Usage: "fewer works, configurations and rounds"},
				&cli.DurationFlag{Name: "length", Usage: "begin no round of works after this `TIME`"},
				&cli.StringSliceFlag{Name: "part", Usage: "only this `PART`"},
				&cli.StringFlag{Name: "sources", Usage: "`DIRECTORY` of the C files that the guest compiles", Value: "plugin/qemu"},
				&cli.StringFlag{Name: "debian", Usage: "`DIRECTORY` of the built Debian guest, for pgbench", Value: "build/debian"},
				&cli.StringFlag{Name: "colo", Usage: "`DIRECTORY` of a QEMU whose COLO works", Value: "build/tools/qemu-colo"},
				&cli.StringFlag{Name: "report", Usage: "`DIRECTORY` for tables, JSON and plots", Value: "build/bench"}),
		},
	}
}
