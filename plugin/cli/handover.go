// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

// errStay is wrapped when a host could not be cleared.
var errStay = errors.New("not handed over")

func handoverCommand() *cli.Command {
	return &cli.Command{
		Name:  "handover",
		Usage: "hand all domains of this host over, before it is shut down",
		Description: "Each protected domain that runs here goes over to its backup, as with 'ftvirt failover',\n" +
			"and each backup here is given up, so that its primary goes on at once. The host takes no\n" +
			"part in new pairs until its agent is restarted. ftvirt-handover.service does this when the\n" +
			"host is shut down or rebooted.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "timeout", Usage: "the longest time to wait for all of it", Value: time.Minute},
			configFlag(), socketFlag(),
		},
		Action: handover,
	}
}

func handover(c *cli.Context) error {
	if err := arguments(c, 0, 0); err != nil {
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
	ctx, cancel := context.WithTimeout(ctx, c.Duration("timeout"))
	defer cancel()
	domains, err := untilHandedOver(ctx, agt, func(d client.HandoverDomain) {
		_, _ = fmt.Fprintf(c.App.Writer, "domain %s %s\n", d.Domain, d.Text)
	})
	if err != nil && len(domains) == 0 {
		return err
	}
	var left []string
	for _, d := range domains {
		if d.Open || d.Stays {
			left = append(left, fmt.Sprintf("domain %s %s", d.Domain, d.Text))
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("%w; what still runs here ends with the host: %s", errStay, strings.Join(left, "; "))
	}
	return err
}

// untilHandedOver asks until nothing is open any more, and returns the last answer.
// What is new of a domain is told once.
func untilHandedOver(ctx context.Context, agt *client.Client, tell func(client.HandoverDomain)) ([]client.HandoverDomain, error) {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	told := map[string]string{}
	var last []client.HandoverDomain
	for {
		domains, err := agt.Handover(ctx)
		if err != nil {
			return last, err
		}
		last = domains
		open := false
		for _, d := range domains {
			open = open || d.Open
			if id := d.UUID.String(); told[id] != d.Text {
				told[id] = d.Text
				tell(d)
			}
		}
		if !open {
			return last, nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return last, ctx.Err()
		}
	}
}
