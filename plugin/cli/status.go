// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strconv"
	"syscall"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
)

// stateOf is the state with its reason, if there is one worth telling.
func stateOf(s client.Status) string {
	text := withReason(s.State, s.Reason)
	if s.Paused != "" {
		text += ", paused: " + s.Paused
	}
	return text
}

func withReason(state, reason string) string {
	if reason == "" || reason == "none" {
		return state
	}
	return state + " (" + reason + ")"
}

// hostsOf tells which host plays which role now; "-" for none.
func hostsOf(s client.Status) (primary, backup string) {
	switch s.State {
	case "cloning", "protected", "going-live":
		if s.Role == plugin.RoleBackup {
			return dash(s.Peer), s.Host
		}
		return s.Host, dash(s.Peer)
	case "failed":
		return "-", "-" // the peer's own status tells whether it went on
	}
	if s.Role == plugin.RolePrimary {
		return s.Host, "-"
	}
	return "-", "-"
}

// percent is how much of a clone is done.
func percent(s client.Status) int {
	all := s.CloneTransferred + s.CloneRemaining
	if all <= 0 || s.CloneTransferred < 0 || s.CloneRemaining < 0 {
		return 0
	}
	return int(float64(s.CloneTransferred) / float64(all) * 100)
}

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:      "status",
		Usage:     "tell how this host's pairs are",
		ArgsUsage: "[DOMAIN]",
		Description: "A template of --format is one of Go's text/template; it is executed for each domain, with\n" +
			"the keys of -o json, as in --format '{{.domain}} {{.state}}'. With --watch the view is\n" +
			"drawn anew twice a second, with the last half minute of each figure, until Ctrl-C.",
		Flags: []cli.Flag{
			outputFlag(statusFormats...), templateFlag(),
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "a live view"}, configFlag(), socketFlag(),
		},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 0, 1); err != nil {
				return err
			}
			format, err := outputFormat(c, statusFormats...)
			if err != nil {
				return err
			}
			if c.Bool("watch") && (c.IsSet("output") || c.IsSet("format")) {
				return usagef("--watch has a view of its own: leave --output and --format out")
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			if c.Bool("watch") {
				ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
				defer stop()
				return newWatch(c.Args().First()).run(ctx, c.App.Writer, agt)
			}
			if text := c.String("format"); text != "" {
				return statusTemplate(c, agt, text)
			}
			if c.NArg() == 0 {
				list, err := agt.Status(c.Context)
				if err != nil {
					return err
				}
				warnPlaintext(c, list...)
				if format == formatCSV {
					return writeCSV(c.App.Writer, list)
				}
				return write(c.App.Writer, format, list, func(w io.Writer) error { return statusTable(w, list) })
			}
			s, err := agt.StatusOf(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			warnPlaintext(c, s)
			if format == formatCSV {
				return writeCSV(c.App.Writer, []client.Status{s})
			}
			return write(c.App.Writer, format, s, func(w io.Writer) error { return statusOf(w, s) })
		},
	}
}

var statusFormats = []string{formatTable, formatJSON, formatYAML, formatCSV}

func statusTemplate(c *cli.Context, agt *client.Client, text string) error {
	t, err := parseTemplate(text)
	if err != nil {
		return err
	}
	var list []client.Status
	if c.NArg() == 0 {
		list, err = agt.Status(c.Context)
	} else {
		list = make([]client.Status, 1)
		list[0], err = agt.StatusOf(c.Context, c.Args().First())
	}
	if err != nil {
		return err
	}
	for _, s := range list {
		if err := t.write(c.App.Writer, s); err != nil {
			return err
		}
	}
	return nil
}

// warnPlaintext says on standard error what must not be overlooked.
func warnPlaintext(c *cli.Context, list ...client.Status) {
	if slices.ContainsFunc(list, func(s client.Status) bool { return s.Channel == "plaintext" }) {
		_, _ = fmt.Fprintln(c.App.ErrWriter, "warning: the logging channel is in plaintext (plaintext = true in [channel]): "+
			"who reads its network sees the memory of guests, who writes to it controls them")
	}
}

// What stands in the table; the status of the domain tells more.
const (
	annotationWrong   = "annotation not understood"
	definitionPending = "definition pending"
)

func statusTable(w io.Writer, list []client.Status) error {
	t := newTable(w, "DOMAIN", "ROLE", "PRIMARY", "BACKUP", "STATE", "EPOCH", "LAG", "LOG RATE", "OUTPUT DELAY", "POSITION")
	for _, s := range list {
		primary, backup := hostsOf(s)
		state := stateOf(s)
		if s.State == "cloning" {
			state = fmt.Sprintf("cloning %d %%", percent(s))
		}
		if s.AnnotationError != "" {
			state += ", " + annotationWrong
		}
		if s.Definition != "" {
			state += ", " + definitionPending
		}
		t.row(s.Domain, string(s.Role), primary, backup, state, strconv.FormatUint(uint64(s.Epoch), 10),
			milliseconds(s.Lag), byteRate(s.LogRate), milliseconds(s.OutputDelay), strconv.FormatUint(uint64(s.Position), 10))
	}
	return t.flush()
}

func statusOf(w io.Writer, s client.Status) error {
	primary, backup := hostsOf(s)
	f := newFields(w)
	f.add("Domain", s.Domain)
	f.add("UUID", s.UUID.String())
	f.add("Host", s.Host)
	f.add("Role", string(s.Role))
	f.add("Primary", primary)
	f.add("Backup", backup)
	f.add("State", stateOf(s))
	if s.AnnotationError != "" {
		f.add("Annotation", s.AnnotationError+"; the domain is treated as before; correct it with 'virsh edit' or 'virsh metadata'")
	}
	if s.Definition != "" {
		f.add("Definition", fmt.Sprintf("%s; for %.0f s", s.Definition, s.DefinitionAge))
	}
	if s.Failure != "" {
		f.add("Failure", s.Failure)
	}
	if s.Retry > 0 {
		f.add("Next try", fmt.Sprintf("in %.0f s", s.Retry))
	}
	if s.State == "cloning" {
		f.add("Clone", fmt.Sprintf("%s, %d %%", s.ClonePhase, percent(s)))
	}
	f.add("Epoch", strconv.FormatUint(uint64(s.Epoch), 10))
	f.add("Plugin mode", s.Mode)
	f.add("Channel", dash(s.Channel))
	if s.Role == plugin.RoleNone {
		return f.flush()
	}
	f.add("Lag", milliseconds(s.Lag))
	if s.Slowed > 0 {
		f.add("Slowed", fmt.Sprintf("by %.0f %%, for the backup to keep up", 100*s.Slowed))
	}
	f.add("Log rate", byteRate(s.LogRate))
	f.add("Output delay", fmt.Sprintf("%s, at most %s", milliseconds(s.OutputDelay), milliseconds(s.OutputDelayMax)))
	f.add("Output queue", fmt.Sprintf("%d waiting, %d dropped", s.OutputQueue, s.OutputDropped))
	f.add("Position", fmt.Sprintf("%d, acknowledged %d", s.Position, s.Acked))
	f.add("Instructions", strconv.FormatUint(s.Instructions, 10))
	f.add("Compared", fmt.Sprintf("registers equal %d times", s.Compared))
	f.add("Clone pause", milliseconds(s.ClonePause))
	if s.CloneEqual > 0 {
		f.add("Disks not sent", size(s.CloneEqual))
	}
	return f.flush()
}
