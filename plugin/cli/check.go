// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
)

// errProblems: the check was made, and found something.
var errProblems = errors.New("the domain cannot be protected")

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:        "check",
		Usage:       "tell what keeps a domain from being protected",
		ArgsUsage:   "DOMAIN",
		Description: "It changes nothing. With a peer, it asks that host's agent as well. The exit code is 3 if\nthere are problems.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "peer", Usage: "the `HOST` to run the backup"},
			outputFlag(formatText, formatJSON, formatYAML), configFlag(), socketFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 1, 1); err != nil {
				return err
			}
			format, err := outputFormat(c, formatText, formatJSON, formatYAML)
			if err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			problems, err := agt.Check(c.Context, c.Args().First(), c.String("peer"))
			if err != nil {
				return err
			}
			problems = slices.DeleteFunc(problems, func(p hooks.Problem) bool {
				// Who names no peer asks about the domain alone.
				return p.Code == "missing-peer" && c.String("peer") == ""
			})
			if problems == nil {
				problems = []hooks.Problem{} // null: none
			}
			err = write(c.App.Writer, format, problems, func(w io.Writer) error { return writeProblems(w, c.Args().First(), problems) })
			if err == nil && len(problems) > 0 {
				return errProblems
			}
			return err
		},
	}
}

func writeProblems(w io.Writer, name string, problems []hooks.Problem) error {
	if len(problems) == 0 {
		_, err := fmt.Fprintf(w, "domain %s can be protected\n", name)
		return err
	}
	for _, p := range problems {
		place := p.Path
		if place == "" {
			place = "domain"
		}
		if _, err := fmt.Fprintf(w, "%s: %s\n    remedy: %s\n", printable(place), printable(p.Reason), printable(p.Remedy)); err != nil {
			return err
		}
	}
	return nil
}
