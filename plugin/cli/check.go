// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/agent/client"
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
			var changes []hooks.Problem
			if format == formatText {
				if changes, err = definitionChanges(c.Context, agt, c.Args().First()); err != nil {
					return err
				}
			}
			err = write(c.App.Writer, format, problems, func(w io.Writer) error {
				return errors.Join(writeProblems(w, c.Args().First(), problems), writeChanges(w, changes))
			})
			if err == nil && len(problems) > 0 {
				return errProblems
			}
			return err
		},
	}
}

// definitionChanges tells what of the guest's hardware 'ftvirt enable' changes.
func definitionChanges(ctx context.Context, agt *client.Client, name string) ([]hooks.Problem, error) {
	x, err := agt.XML(ctx, name)
	if err != nil {
		return nil, err
	}
	dom, err := hooks.Parse([]byte(x.XML))
	if err != nil {
		return nil, err
	}
	return hooks.Changes(dom), nil
}

func writeChanges(w io.Writer, changes []hooks.Problem) error {
	for i, p := range changes {
		if i == 0 {
			if _, err := io.WriteString(w, "its definition would change, until 'ftvirt disable':\n"); err != nil {
				return err
			}
		}
		place := p.Path
		if place == "" {
			place = p.Code
		}
		if _, err := fmt.Fprintf(w, "    %s: %s (%s)\n", printable(place), printable(p.Remedy), printable(p.Reason)); err != nil {
			return err
		}
	}
	return nil
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
