// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

// errDiffers makes the exit code; what differs was the output.
var errDiffers = errors.New("the backup differs")

// readRate is a guess at what both hosts read and hash in a second, in bytes.
const readRate = 300 << 20

func verifyCommand() *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "compare memory, registers and disks of a domain and its backup",
		ArgsUsage: "DOMAIN",
		Description: "Run it where the domain runs. The domain stands still while both sides are read, where\n" +
			"both are at the same instruction; for how long about is told before. Afterwards it goes\n" +
			"on, whatever was found. A backup that differs is discarded, with a diagnosis on its host,\n" +
			"and the domain is cloned anew.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "timeout", Usage: "the longest time for which the domain may stand still", Value: 30 * time.Second},
			&cli.BoolFlag{Name: "keep", Usage: "do not discard a backup that differs"},
			outputFlag(formatTable, formatJSON, formatYAML), configFlag(), socketFlag(),
		},
		Action: verify,
	}
}

func verify(c *cli.Context) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
	if err != nil {
		return err
	}
	limit := c.Duration("timeout")
	if limit < time.Millisecond {
		return usagef("--timeout %s is not a time to wait; write it with a unit, such as 1m", limit)
	}
	agt, err := connect(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	plan, err := agt.VerifyPlan(ctx, c.Args().First())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.ErrWriter, "domain %s stands still while %s of memory and %s of disks are read, for about %s and at most %s\n",
		plan.Domain, size(plan.Memory), size(plan.Disks), guess(plan), limit)
	if err != nil {
		return err
	}
	v, err := agt.Verify(ctx, plan.Domain, limit, c.Bool("keep"))
	if err != nil {
		return err
	}
	if err := write(c.App.Writer, format, v, func(w io.Writer) error { return verification(w, v) }); err != nil {
		return err
	}
	if !v.Equal {
		return errDiffers
	}
	return nil
}

func guess(p client.VerifyPlan) time.Duration {
	d := time.Duration(float64(p.Memory+p.Disks) / readRate * float64(time.Second))
	return max(d.Round(100*time.Millisecond), 100*time.Millisecond)
}

func verification(w io.Writer, v client.Verification) error {
	t := newTable(w, "PART", "NAME", "SIZE", "RESULT", "WHERE")
	for _, p := range v.Parts {
		result, where := "equal", ""
		if !p.Equal {
			result = "differs"
			where = strings.Join(p.Detail, "; ")
			for i, r := range p.Ranges {
				if i == 4 {
					where += ", ..."
					break
				}
				if i > 0 {
					where += ", "
				}
				where += fmt.Sprintf("%#x to %#x", r.Start, r.Start+r.Length)
			}
		}
		t.row(p.Kind, p.Name, size(p.Size), result, where)
	}
	if err := t.flush(); err != nil {
		return err
	}
	result := fmt.Sprintf("both sides are equal at instruction %d", v.Instructions)
	switch {
	case v.Discarded:
		result = fmt.Sprintf("the backup on %s differs at instruction %d, and is discarded; 'ftvirt status %s' tells when there is another",
			v.Backup, v.Instructions, v.Domain)
	case !v.Equal:
		result = fmt.Sprintf("the backup on %s differs at instruction %d, and is kept", v.Backup, v.Instructions)
	}
	_, err := fmt.Fprintf(w, "%s; domain %s stood still for %s\n", result, printable(v.Domain), milliseconds(v.Pause))
	return err
}

func size(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 10<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}
