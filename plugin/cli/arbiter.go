// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

// arbiterTimeout bounds each command: a dead NFS server blocks for ever.
const arbiterTimeout = 30 * time.Second

func arbiterCommand() *cli.Command {
	pathFlag := &cli.StringFlag{Name: "path", Usage: "the arbiter's directory or LUN, as a `PATH`; the default is the configured arbiter"}
	return &cli.Command{
		Name:  "arbiter",
		Usage: "look after what decides who goes live",
		Subcommands: []*cli.Command{
			{
				Name:      "init",
				Usage:     "make a directory or a LUN the arbiter's, once for all hosts, or ask each witness",
				ArgsUsage: "[PATH]",
				Description: "The default is the configured arbiter. A directory must exist, on storage that all hosts\n" +
					"share; a LUN must hold zeroes only. What is printed includes its id. Repeating it, from any\n" +
					"host, changes nothing and prints the same id. Of a majority, each witness is asked whether\n" +
					"it votes.",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "reservation", Usage: "let a LUN decide under reservations even if it has COMPARE AND WRITE"},
					configFlag(),
				},
				Action: initArbiter,
			},
			{
				Name:      "show",
				Usage:     "tell who owns a domain",
				ArgsUsage: "UUID",
				Flags:     []cli.Flag{pathFlag, outputFlag(formatTable, formatJSON, formatYAML), configFlag()},
				Action:    showArbiter,
			},
			{
				Name:      "forget",
				Usage:     "give up what is known of a domain",
				ArgsUsage: "UUID",
				Description: "Any host may start its copy of the domain afterwards, however old its disks.\n" +
					"It is for domains whose owner is gone for good, or that ftvirt is done with.",
				Flags:  []cli.Flag{pathFlag, configFlag()},
				Action: forgetArbiter,
			},
			{
				Name:  "accept",
				Usage: "let this host believe an arbiter that is not as it was",
				Description: "A host remembers its arbiter's identity and how far each domain was there, in state_dir. An\n" +
					"arbiter that is another, or that knows less, is refused: storage that is not mounted, or an\n" +
					"old copy of it, could let two hosts run a domain. This forgets what the host saw, for one\n" +
					"that was replaced or restored on purpose. Run it on each host. Before that, make sure that\n" +
					"no domain runs twice, and which host's disks are the newest.",
				Flags:  []cli.Flag{configFlag()},
				Action: acceptArbiter,
			},
		},
	}
}

// arbiterConfig is that of the storage named, or else the configured one.
func arbiterConfig(c *cli.Context, named string) (config.Arbiter, error) {
	if named != "" {
		return backend.At(named)
	}
	cfg, err := load(c, false)
	return cfg.Arbiter, err
}

// arbiterOf gives the arbiter and the domain that a command is about.
func arbiterOf(c *cli.Context) (arbiter.Arbiter, plugin.UUID, error) {
	id, err := plugin.ParseUUID(c.Args().First())
	if err != nil {
		return nil, id, usagef("%w; 'virsh domuuid DOMAIN' tells a domain's", err)
	}
	cfg, err := arbiterConfig(c, c.String("path"))
	if err != nil {
		return nil, id, err
	}
	a, err := backend.New(cfg, arbiterTimeout)
	return a, id, err
}

func initArbiter(c *cli.Context) error {
	if err := arguments(c, 0, 1); err != nil {
		return err
	}
	cfg, err := arbiterConfig(c, c.Args().First())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	info, err := backend.Init(ctx, cfg, c.Bool("reservation"), arbiterTimeout)
	if err != nil && !errors.Is(err, backend.ErrWitnesses) {
		return err
	}
	return errors.Join(err, initialised(c.App.Writer, info))
}

// initialised tells what the arbiter is now.
func initialised(w io.Writer, info backend.Info) error {
	f := newFields(w)
	switch {
	case info.LUN != nil:
		l, by := info.LUN, "COMPARE AND WRITE"
		if l.Reservation {
			by = "persistent reservations, with PREEMPT AND ABORT"
		}
		if l.Resets {
			by = "persistent reservations, with resets of the device, which has no PREEMPT AND ABORT"
		}
		if l.Why != "" {
			by += "; " + l.Why
		}
		f.add("Id", l.ID)
		f.add("Device", fmt.Sprintf("%s %s %s", l.Device.Vendor, l.Device.Product, l.Device.Revision))
		f.add("Decides by", by)
		f.add("Domains", fmt.Sprintf("up to %d", l.Domains))
	case info.Witnesses != nil:
		for _, v := range info.Witnesses {
			answer := "votes"
			if v.Err != nil {
				answer = "does not vote"
			}
			f.add(v.Address.String(), answer)
		}
	default:
		_, err := fmt.Fprintln(w, info.ID)
		return err
	}
	return f.flush()
}

func showArbiter(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
	if err != nil {
		return err
	}
	a, id, err := arbiterOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	rec, err := a.Lookup(ctx, id)
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

func acceptArbiter(c *cli.Context) error {
	if err := arguments(c, 0, 0); err != nil {
		return err
	}
	cfg, err := load(c, false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	now, before, err := backend.Accept(ctx, cfg, arbiterTimeout)
	if err != nil {
		return err
	}
	f := newFields(c.App.Writer)
	f.add("Accepted", now)
	f.add("Before", dash(before))
	return f.flush()
}

func forgetArbiter(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	a, id, err := arbiterOf(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, arbiterTimeout)
	defer cancel()
	return a.Forget(ctx, id)
}
