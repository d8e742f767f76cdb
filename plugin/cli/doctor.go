// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/doctor"
)

// errIll: the check was made, and found a problem.
var errIll = errors.New("something keeps domains from being protected")

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "check this host, or a pair of hosts, and say how to mend what is wrong",
		ArgsUsage: " ",
		Description: "It looks at QEMU, libvirt, the plugin, the hook, AppArmor, the disks' directory and the\n" +
			"arbiter's storage. With a peer, it has that host look at the same, compares the two, and\n" +
			"measures what is between them: the channel, heartbeats both ways, the round trip and\n" +
			"the clocks. Nothing is changed, and no domain is touched. Without an agent, it tells\n" +
			"what can be seen without. The exit code is 3 if there is a problem; warnings are none.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "peer", Usage: "the other `HOST` of a pair"},
			outputFlag(formatTable, formatJSON, formatYAML), configFlag(), socketFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 0, 0); err != nil {
				return err
			}
			format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
			if err != nil {
				return err
			}
			findings, err := examine(c)
			if err != nil {
				return err
			}
			err = write(c.App.Writer, format, findings, func(w io.Writer) error { return doctorTable(w, findings) })
			ill := slices.ContainsFunc(findings, func(f doctor.Finding) bool { return f.Level == doctor.Problem })
			if err == nil && ill {
				return errIll
			}
			return err
		},
	}
}

// examine asks the agent, and does without one if none runs.
func examine(c *cli.Context) ([]doctor.Finding, error) {
	agt, err := connect(c)
	if err != nil {
		// A configuration that cannot be read is a finding.
		return []doctor.Finding{{
			Host: "-", Check: "configuration", Level: doctor.Problem, Text: err.Error(), Remedy: "mend the file; 'ftvirt config check' checks it",
		}}, nil
	}
	findings, err := agt.Doctor(c.Context, c.String("peer"))
	noAnswer, ok := errors.AsType[*client.NoAnswerError](err)
	if !ok || !noAnswer.NotRunning() {
		return findings, err
	}
	cfg, cerr := load(c, true)
	if cerr != nil {
		cfg = config.Default()
	}
	findings = []doctor.Finding{{
		Host: cfg.Host, Check: "agent", Level: doctor.Problem, Text: noAnswer.Error(),
		Remedy: "systemctl enable --now ftvirt-agent; its log tells why it ended: journalctl -u ftvirt-agent",
	}}
	if err := cfg.Validate(); err != nil {
		findings = append(findings, doctor.Finding{
			Host: cfg.Host, Check: "configuration", Level: doctor.Problem, Text: err.Error(), Remedy: "edit " + c.String("config"),
		})
	}
	return append(findings, doctor.ThisMachine().Look(c.Context, cfg).Findings...), nil
}

func doctorTable(w io.Writer, findings []doctor.Finding) error {
	t := newTable(w, "HOST", "CHECK", "RESULT", "FINDING")
	for _, f := range findings {
		t.row(f.Host, f.Check, string(f.Level), f.Text)
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, f := range findings {
		if f.Level == doctor.OK {
			continue
		}
		if _, err := fmt.Fprintf(w, "\n%s: %s on %s: %s\n    remedy: %s\n", f.Level, f.Check, printable(f.Host), printable(f.Text), printable(f.Remedy)); err != nil {
			return err
		}
	}
	return nil
}
