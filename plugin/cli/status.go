// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strconv"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/plugin"
)

// status is agent.Status as it comes over the socket. States and reasons are
// plain text here, so that a newer agent's can be shown as well.
type status struct {
	Domain           string          `json:"domain"`
	UUID             plugin.UUID     `json:"uuid"`
	Host             string          `json:"host"`
	Role             plugin.Role     `json:"role"`
	State            string          `json:"state"`
	Reason           string          `json:"reason"`
	Epoch            plugin.Epoch    `json:"epoch"`
	Peer             string          `json:"peer,omitempty"`
	Mode             string          `json:"mode"`
	Position         plugin.Position `json:"position"`
	Acked            plugin.Position `json:"acked"`
	Lag              float64         `json:"lag_ms"`
	LogRate          float64         `json:"log_rate"`
	OutputDelay      float64         `json:"output_delay_ms"`
	OutputDelayMax   float64         `json:"output_delay_max_ms"`
	OutputQueue      uint64          `json:"output_queue"`
	OutputDropped    uint64          `json:"output_dropped"`
	Instructions     uint64          `json:"instructions"`
	ClonePhase       string          `json:"clone_phase,omitempty"`
	CloneTransferred int64           `json:"clone_transferred,omitempty"`
	CloneRemaining   int64           `json:"clone_remaining,omitempty"`
	ClonePause       float64         `json:"clone_pause_ms"`
	Failure          string          `json:"failure,omitempty"`
}

// state is the state with its reason, if there is one worth telling.
func (s status) state() string { return withReason(s.State, s.Reason) }

func withReason(state, reason string) string {
	if reason == "" || reason == "none" {
		return state
	}
	return state + " (" + reason + ")"
}

// hosts tells which host plays which role now; "-" for none.
func (s status) hosts() (primary, backup string) {
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
func (s status) percent() int {
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
		Flags:     []cli.Flag{outputFlag(formatTable, formatJSON, formatYAML), configFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if err := arguments(c, 0, 1); err != nil {
				return err
			}
			format, err := outputFormat(c, formatTable, formatJSON, formatYAML)
			if err != nil {
				return err
			}
			agt, err := connect(c)
			if err != nil {
				return err
			}
			if c.NArg() == 0 {
				list := []status{}
				if err := agt.get(c.Context, "/v1/status", &list); err != nil {
					return err
				}
				return write(c.App.Writer, format, list, func(w io.Writer) error { return statusTable(w, list) })
			}
			var s status
			if err := agt.get(c.Context, domainPath("/v1/status/", c.Args().First()), &s); err != nil {
				return err
			}
			return write(c.App.Writer, format, s, func(w io.Writer) error { return statusOf(w, s) })
		},
	}
}

func statusTable(w io.Writer, list []status) error {
	t := newTable(w, "DOMAIN", "ROLE", "PRIMARY", "BACKUP", "STATE", "EPOCH", "LAG", "LOG RATE", "OUTPUT DELAY", "POSITION")
	for _, s := range list {
		primary, backup := s.hosts()
		state := s.state()
		if s.State == "cloning" {
			state = fmt.Sprintf("cloning %d %%", s.percent())
		}
		t.row(s.Domain, string(s.Role), primary, backup, state, strconv.FormatUint(uint64(s.Epoch), 10),
			milliseconds(s.Lag), byteRate(s.LogRate), milliseconds(s.OutputDelay), strconv.FormatUint(uint64(s.Position), 10))
	}
	return t.flush()
}

func statusOf(w io.Writer, s status) error {
	primary, backup := s.hosts()
	f := newFields(w)
	f.add("Domain", s.Domain)
	f.add("UUID", s.UUID.String())
	f.add("Host", s.Host)
	f.add("Role", string(s.Role))
	f.add("Primary", primary)
	f.add("Backup", backup)
	f.add("State", s.state())
	if s.Failure != "" {
		f.add("Failure", s.Failure)
	}
	if s.State == "cloning" {
		f.add("Clone", fmt.Sprintf("%s, %d %%", s.ClonePhase, s.percent()))
	}
	f.add("Epoch", strconv.FormatUint(uint64(s.Epoch), 10))
	f.add("Plugin mode", s.Mode)
	if s.Role == plugin.RoleNone {
		return f.flush()
	}
	f.add("Lag", milliseconds(s.Lag))
	f.add("Log rate", byteRate(s.LogRate))
	f.add("Output delay", fmt.Sprintf("%s, at most %s", milliseconds(s.OutputDelay), milliseconds(s.OutputDelayMax)))
	f.add("Output queue", fmt.Sprintf("%d waiting, %d dropped", s.OutputQueue, s.OutputDropped))
	f.add("Position", fmt.Sprintf("%d, acknowledged %d", s.Position, s.Acked))
	f.add("Instructions", strconv.FormatUint(s.Instructions, 10))
	f.add("Clone pause", milliseconds(s.ClonePause))
	return f.flush()
}
