// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

// operation is a command that asks the agent for one thing about one domain and
// says what follows.
func operation(name, usage, description string, do func(context.Context, *client.Client, string) error, done string) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage, ArgsUsage: "DOMAIN", Description: description,
		Flags: []cli.Flag{configFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 1, 1); err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			domain := c.Args().First()
			if err := do(c.Context, agt, domain); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.App.Writer, done+"\n", domain)
			return err
		},
	}
}

func suspendCommand() *cli.Command {
	return operation("suspend", "take protection away for a while",
		"The backup is discarded, and the domain goes on without one until 'ftvirt resume'. The\n"+
			"annotation keeps the other settings. Nothing changes if the arbiter does not answer.",
		func(ctx context.Context, agt *client.Client, domain string) error { return agt.Suspend(ctx, domain) },
		"protection of domain %s is suspended")
}

func resumeCommand() *cli.Command {
	return operation("resume", "protect a domain again after 'ftvirt suspend'", "",
		func(ctx context.Context, agt *client.Client, domain string) error { return agt.Resume(ctx, domain) },
		"protection of domain %[1]s is resumed; 'ftvirt status %[1]s' tells when it has its backup")
}

func restartBackupCommand() *cli.Command {
	return operation("restart-backup", "discard a domain's backup and make another on the same host",
		"The domain has no backup until it is cloned anew. Nothing changes if the arbiter does not\n"+
			"answer.",
		func(ctx context.Context, agt *client.Client, domain string) error {
			return agt.RestartBackup(ctx, domain, "")
		},
		"domain %[1]s is being cloned anew; 'ftvirt status %[1]s' tells when it is protected")
}

func migrateBackupCommand() *cli.Command {
	return &cli.Command{
		Name:      "migrate-backup",
		Usage:     "discard a domain's backup and make another on HOST",
		ArgsUsage: "DOMAIN HOST",
		Description: "The host is asked first whether it can take the backup. The domain has none until it is\n" +
			"cloned anew. The annotation names the host from then on. Nothing changes if the arbiter\n" +
			"does not answer.",
		Flags: []cli.Flag{configFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 2, 2); err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			domain, host := c.Args().Get(0), c.Args().Get(1)
			if err := agt.RestartBackup(c.Context, domain, host); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.App.Writer, "domain %s is being cloned to %s; 'ftvirt status %s' tells when it is protected\n",
				domain, host, domain)
			return err
		},
	}
}

func failoverCommand() *cli.Command {
	return &cli.Command{
		Name:      "failover",
		Usage:     "hand a domain of this host over to its backup",
		ArgsUsage: "DOMAIN",
		Description: "The copy here is killed as a failure would, and the backup goes live. Connections stay\n" +
			"open. With protect.auto this host gets the next backup, if it can take one. Nothing\n" +
			"changes unless the arbiter answers both hosts.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "test", Usage: "wait until this host has the domain's next backup, and tell how long that took"},
			&cli.DurationFlag{Name: "timeout", Usage: "the longest time to wait with --test", Value: time.Minute},
			configFlag(), socketFlag(),
		},
		Action: failover,
	}
}

func failover(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	if c.Duration("timeout") <= 0 {
		return usagef("--timeout %s is not a time to wait; write it with a unit, such as 1m", c.Duration("timeout"))
	}
	agt, err := connect(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	before, err := agt.StatusOf(ctx, c.Args().First())
	if err != nil {
		return err
	}
	id, start := before.UUID.String(), time.Now()
	if err := agt.Failover(ctx, id); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c.App.Writer, "domain %s is handed over to %s\n", before.Domain, before.Peer); err != nil || !c.Bool("test") {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Duration("timeout"))
	defer cancel()
	s, err := waitStatus(ctx, agt, id, func(s client.Status) bool { return s.Epoch > before.Epoch && s.State == "protected" })
	if err != nil {
		return fmt.Errorf("this host does not have the next backup of domain %s: it is %s: %w", before.Domain, stateOf(s), err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "domain %s runs on %s and has its backup here again, in epoch %d, after %s\n",
		before.Domain, s.Peer, s.Epoch, time.Since(start).Round(100*time.Millisecond))
	return err
}

// waitStatus polls until the status is as wanted, and returns the last one seen.
// An agent that does not know the domain for a moment is asked again.
func waitStatus(ctx context.Context, agt *client.Client, id string, wanted func(client.Status) bool) (client.Status, error) {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	var last client.Status
	for {
		s, err := agt.StatusOf(ctx, id)
		switch {
		case err == nil:
			last = s
			if wanted(s) {
				return s, nil
			}
		case !errors.Is(err, client.ErrNoDomain) && ctx.Err() == nil:
			return last, err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return last, ctx.Err()
		}
	}
}
