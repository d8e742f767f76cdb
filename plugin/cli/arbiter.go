// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
)

// arbiterTimeout bounds each command: a dead NFS server blocks for ever.
const arbiterTimeout = 30 * time.Second

func arbiterCommand() *cli.Command {
	return &cli.Command{
		Name:  "arbiter",
		Usage: "look after the shared directory that decides who goes live",
		Subcommands: []*cli.Command{
			{
				Name:        "init",
				Usage:       "make a shared directory the arbiter's, once for all hosts, and print its id",
				ArgsUsage:   "[DIRECTORY]",
				Description: "The default is the configured directory. It must exist, on storage that all hosts share.\nRepeating it, from any host, changes nothing and prints the same id.",
				Flags:       []cli.Flag{configFlag()},
				Action:      initArbiter,
			},
			{
				Name:      "show",
				Usage:     "tell who owns a domain",
				ArgsUsage: "UUID",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "path", Usage: "the shared `DIRECTORY`; the default is the configured one"},
					outputFlag(formatTable, formatJSON, formatYAML), configFlag(),
				},
				Action: showArbiter,
			},
			{
				Name:      "forget",
				Usage:     "give up what is known of a domain",
				ArgsUsage: "UUID",
				Description: "Any host may start its copy of the domain afterwards, however old its disks.\n" +
					"It is for domains whose owner is gone for good, or that ftvirt is done with.",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "path", Usage: "the shared `DIRECTORY`; the default is the configured one"}, configFlag(),
				},
				Action: forgetArbiter,
			},
		},
	}
}

// arbiterPath is the directory named, or else the configured one.
func arbiterPath(c *cli.Context, named string) (string, error) {
	if named != "" {
		return named, nil
	}
	cfg, err := load(c, false)
	return cfg.Arbiter.Path, err
}

// arbiterOf gives the directory and the domain that a command is about.
func arbiterOf(c *cli.Context) (*arbiter.Dir, plugin.UUID, error) {
	id, err := plugin.ParseUUID(c.Args().First())
	if err != nil {
		return nil, id, usagef("%w; 'virsh domuuid DOMAIN' tells a domain's", err)
	}
	path, err := arbiterPath(c, c.String("path"))
	if err != nil {
		return nil, id, err
	}
	dir, err := arbiter.NewDir(arbiter.DirConfig{Path: path, Timeout: arbiterTimeout})
	return dir, id, err
}

func initArbiter(c *cli.Context) error {
	if err := arguments(c, 0, 1); err != nil {
		return err
	}
	path, err := arbiterPath(c, c.Args().First())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	id, err := arbiter.InitDir(ctx, arbiter.DirConfig{Path: path, Timeout: arbiterTimeout})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w; make the directory on the shared storage first, and mount it here", err)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.App.Writer, id)
	return err
}

func showArbiter(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
	if err != nil {
		return err
	}
	dir, id, err := arbiterOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	rec, err := dir.Lookup(ctx, id)
	if errors.Is(err, arbiter.ErrNoRecord) {
		return fmt.Errorf("%w: the domain was never protected, or was forgotten", err)
	}
	if err != nil {
		return err
	}
	return write(c.App.Writer, format, rec, func(w io.Writer) error { return arbiterRecord(w, rec) })
}

func arbiterRecord(w io.Writer, r arbiter.Record) error {
	owner := r.Owner
	if r.Undecided() {
		owner = "undecided"
	}
	f := newFields(w)
	f.add("Domain", r.Domain.String())
	f.add("Epoch", strconv.FormatUint(uint64(r.Epoch), 10))
	f.add("Primary", r.Primary)
	f.add("Backup", r.Backup)
	f.add("Owner", owner)
	f.add("Closed", strconv.FormatBool(r.Closed))
	for _, t := range []struct {
		name string
		at   time.Time
	}{{"Opened", r.OpenedAt}, {"Decided", r.DecidedAt}, {"Ended", r.ClosedAt}} {
		if !t.at.IsZero() {
			f.add(t.name, t.at.Format(time.RFC3339))
		}
	}
	return f.flush()
}

func forgetArbiter(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	dir, id, err := arbiterOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	return dir.Forget(ctx, id)
}
