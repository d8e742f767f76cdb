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

// pollInterval is between two looks at a clone.
const pollInterval = 200 * time.Millisecond

// errNotProtected: the clone did not come to its end.
var errNotProtected = errors.New("not protected")

func enableCommand() *cli.Command {
	return &cli.Command{
		Name:      "enable",
		Usage:     "protect a domain with a backup on another host",
		ArgsUsage: "DOMAIN --peer HOST",
		Description: "A running domain is cloned to the peer while it runs. The definition of a domain that is\n" +
			"not running is made ready for it, and it is cloned once it is started. So is, with --at-next-boot,\n" +
			"the definition of a running domain, which runs on as it is until it is shut down and started.\n" +
			"With --wait, a terminal shows a bar, and anything else a line for each tenth.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "peer", Usage: "the `HOST` to run the backup, as ftvirt.toml calls it"},
			&cli.BoolFlag{Name: "at-next-boot", Usage: "change only the definition, for when the domain is started next; a reboot is no start"},
			&cli.BoolFlag{Name: "wait", Usage: "return only when the domain is protected, or the clone failed"},
			&cli.DurationFlag{Name: "timeout", Usage: "the longest time to wait", Value: 5 * time.Minute},
			configFlag(), socketFlag(),
		},
		Action: enable,
	}
}

func enable(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	name, peer := c.Args().First(), c.String("peer")
	if peer == "" {
		return usagef("no host is named to run the backup; usage: %s %s", commandName(c), c.Command.ArgsUsage)
	}
	if c.Duration("timeout") <= 0 {
		return usagef("--timeout %s is not a time to wait; write it with a unit, such as 5m", c.Duration("timeout"))
	}
	next := c.Bool("at-next-boot")
	if next && c.Bool("wait") {
		return usagef("--wait has nothing to wait for with --at-next-boot; give one of them")
	}
	agt, err := connect(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	dom, err := agt.Domain(ctx, name)
	if err != nil {
		return err
	}
	// The UUID, so that a domain renamed or defined anew meanwhile is not
	// taken for this one.
	id := dom.UUID.String()
	if next {
		return prepareNext(ctx, c, agt, dom, peer)
	}
	if !dom.Running {
		return prepare(ctx, c, agt, dom, peer)
	}
	before, err := agt.StatusOf(ctx, id)
	if err != nil {
		return err
	}
	if err := agt.Enable(ctx, id, peer); err != nil {
		return err
	}
	if !c.Bool("wait") {
		_, err = fmt.Fprintf(c.App.Writer, "domain %s is being cloned to %s; 'ftvirt status %s' tells when it is protected\n",
			dom.Domain, peer, dom.Domain)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Duration("timeout"))
	defer cancel()
	bar := newProgress(c.App.ErrWriter)
	s, err := waitProtected(ctx, before, bar.show, func(ctx context.Context) (client.Status, error) {
		return agt.StatusOf(ctx, id)
	})
	bar.done()
	switch {
	case err == nil:
		_, err = fmt.Fprintf(c.App.Writer, "domain %s is protected: primary %s, backup %s, epoch %d; the guest paused %s\n",
			s.Domain, s.Host, s.Peer, s.Epoch, milliseconds(s.ClonePause))
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("domain %s is %w after %s: it is %s; the clone goes on, see 'ftvirt status %s'",
			dom.Domain, errNotProtected, c.Duration("timeout"), stateOf(s), dom.Domain)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted while domain %s is %s; the clone goes on, end it with 'ftvirt disable %s'", dom.Domain, stateOf(s), dom.Domain)
	}
	return err
}

func prepare(ctx context.Context, c *cli.Context, agt *client.Client, dom client.DomainInfo, peer string) error {
	if c.Bool("wait") {
		return fmt.Errorf("domain %s is not running, so there is nothing to wait for: leave --wait out to make its definition ready", dom.Domain)
	}
	if err := agt.Prepare(ctx, dom.UUID.String(), peer); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "domain %s is not running; its definition is ready for protection now.\n"+
		"It is cloned to %s once it is started; with protect.auto = false, by 'ftvirt enable' again.\n", dom.Domain, peer)
	return err
}

// prepareNext is for a domain that was not started ready, or is off.
func prepareNext(ctx context.Context, c *cli.Context, agt *client.Client, dom client.DomainInfo, peer string) error {
	if err := agt.PrepareNext(ctx, dom.UUID.String(), peer); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "the definition of domain %s is ready for protection now. What runs is left as it is, a reboot included:\n"+
		"shut it down and start it. Then it is cloned to %s; with protect.auto = false, by 'ftvirt enable' again.\n", dom.Domain, peer)
	return err
}

// waitProtected polls until the pair is complete, and fails with the reason
// once it is clear that it will not be. It returns the last status seen.
func waitProtected(ctx context.Context, before client.Status, show func(client.Status),
	ask func(context.Context) (client.Status, error),
) (client.Status, error) {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	last, begun := before, before.State == "cloning" || before.State == "protected"
	for {
		s, err := ask(ctx)
		if ctx.Err() != nil {
			return last, ctx.Err()
		}
		if err != nil {
			return last, err
		}
		last = s
		// The agent takes the wish up a moment after it answered.
		begun = begun || s.Epoch != before.Epoch || s.State != before.State
		switch {
		case !begun:
		case s.State == "protected":
			return s, nil
		case s.State == "cloning":
			show(s)
		case s.State == "going-live", s.ClonePhase == "undoing": // its end tells
		default:
			why := s.Failure
			if why == "" {
				why = "it is " + stateOf(s)
			}
			return s, fmt.Errorf("domain %s is %w: %s", s.Domain, errNotProtected, why)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return last, ctx.Err()
		}
	}
}
