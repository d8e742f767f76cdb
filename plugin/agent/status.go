// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"math"
	"sort"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
)

// Status is what one host tells of one domain. Times are in milliseconds.
type Status struct {
	Domain string       `json:"domain" yaml:"domain"`
	UUID   plugin.UUID  `json:"uuid" yaml:"uuid"`
	Host   string       `json:"host" yaml:"host"`
	Role   plugin.Role  `json:"role" yaml:"role"`
	State  pair.State   `json:"state" yaml:"state"`
	Reason pair.Reason  `json:"reason" yaml:"reason"`
	Epoch  plugin.Epoch `json:"epoch" yaml:"epoch"`
	Peer   string       `json:"peer,omitempty" yaml:"peer,omitempty"`
	// Mode is what the plugin in QEMU does; "none" without one.
	Mode string `json:"mode" yaml:"mode"`
	// Paused says why the copy here stands still, if it does: QEMU's word, such as
	// "io-error" for a disk that failed or is full and "paused" for what somebody
	// did by hand, or "stuck" for a QEMU that does not run.
	Paused string `json:"paused,omitempty" yaml:"paused,omitempty"`
	// Channel is how the logging channel of this host is secured: "tls", or
	// "plaintext".
	Channel string `json:"channel" yaml:"channel"`

	// Position is how far this host's copy is in the log of the epoch, in
	// bytes: logged on the primary, replayed on the backup.
	Position plugin.Position `json:"position" yaml:"position"`
	Acked    plugin.Position `json:"acked" yaml:"acked"`
	// Lag is how far the backup's execution is behind what it received of the
	// log, at the worst in the last tenth of a second. QEMU tells every 10 ms. On
	// the primary it is at least the age of the oldest log without an ack.
	Lag float64 `json:"lag_ms" yaml:"lag_ms"`
	// Slowed is the part of its time that the primary is made to pause, 0 to 1,
	// so that the backup keeps up.
	Slowed float64 `json:"slowed" yaml:"slowed"`
	// LogRate is in bytes per second.
	LogRate float64 `json:"log_rate" yaml:"log_rate"`
	// OutputDelay is how long packets waited for their acks on average,
	// OutputDelayMax is the longest wait of the last tenth of a second.
	OutputDelay    float64 `json:"output_delay_ms" yaml:"output_delay_ms"`
	OutputDelayMax float64 `json:"output_delay_max_ms" yaml:"output_delay_max_ms"`
	OutputQueue    uint64  `json:"output_queue" yaml:"output_queue"`
	OutputDropped  uint64  `json:"output_dropped" yaml:"output_dropped"`
	Instructions   uint64  `json:"instructions" yaml:"instructions"`
	// Compared is how often in this epoch both sides had the same registers at
	// the same event. A difference ends the pair.
	Compared uint64 `json:"compared" yaml:"compared"`

	ClonePhase       string  `json:"clone_phase,omitempty" yaml:"clone_phase,omitempty"`
	CloneTransferred int64   `json:"clone_transferred,omitempty" yaml:"clone_transferred,omitempty"`
	CloneRemaining   int64   `json:"clone_remaining,omitempty" yaml:"clone_remaining,omitempty"`
	ClonePause       float64 `json:"clone_pause_ms" yaml:"clone_pause_ms"`
	// CloneEqual is how much of the disks, in bytes, the newest clone did not have
	// to send, since an older copy there had it.
	CloneEqual int64 `json:"clone_equal" yaml:"clone_equal"`
	// Failure is why the last clone failed, Retry in how many seconds another
	// is tried.
	Failure string  `json:"failure,omitempty" yaml:"failure,omitempty"`
	Retry   float64 `json:"retry_s,omitempty" yaml:"retry_s,omitempty"`
	// AnnotationError is what is not understood of the domain's annotation.
	AnnotationError string `json:"annotation_error,omitempty" yaml:"annotation_error,omitempty"`
	// Definition is what is yet to be done so that libvirt's definition is right
	// here, and after a failover on the peer, DefinitionAge for how many seconds.
	// It is tried until it is done.
	Definition    string  `json:"definition,omitempty" yaml:"definition,omitempty"`
	DefinitionAge float64 `json:"definition_age_s,omitempty" yaml:"definition_age_s,omitempty"`
}

// phaseUndoing is the phase of a clone that failed and is not yet cleared away.
// Failure is known when it is over.
const phaseUndoing = "undoing"

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (d *domain) report() Status {
	s, v, p, b := d.snapshot()
	d.mu.Lock()
	st := Status{
		Domain: d.name, UUID: d.id, Host: d.a.cfg.Host, Role: s.Role, State: s.State, Reason: s.Reason, Epoch: s.Epoch,
		Peer: s.Peer, Mode: "none", Channel: d.a.channelSecurity(), Failure: d.failure, ClonePause: millis(d.progress.Pause),
		CloneEqual:      d.progress.Equal,
		AnnotationError: d.wrong,
	}
	switch {
	case d.clones > 0 && s.State == pair.Unprotected:
		st.ClonePhase = phaseUndoing
	case s.State == pair.Cloning:
		st.ClonePhase, st.CloneTransferred, st.CloneRemaining = d.progress.Phase, d.progress.Transferred, d.progress.Remaining
	}
	if !d.retryAt.IsZero() {
		st.Retry = max(0, math.Ceil(time.Until(d.retryAt).Seconds()))
	}
	var age time.Duration
	st.Definition, age = d.definitionStatus(s)
	st.DefinitionAge = math.Floor(age.Seconds())
	d.mu.Unlock()
	if v == nil {
		return st
	}
	r := v.reports()
	st.Mode, st.Instructions, st.Paused = r.Mode.String(), r.Icount, r.pause
	if v.silent.Load() {
		st.Paused = pair.Stuck.String()
	}
	if r.Mode == control.ModeLive && st.Role == plugin.RoleNone {
		st.Role = plugin.RolePrimary
	}
	now := time.Now()
	switch {
	case r.Mode == control.ModeRecord && p != nil:
		st.Position, st.Acked, st.Instructions = r.stats.Head, r.stats.Acked, r.stats.Icount
		st.OutputQueue, st.OutputDropped = r.stats.Queued, r.stats.Dropped
		if r.stats.Released > 0 {
			st.OutputDelay = millis(time.Duration(r.stats.DelayNS / r.stats.Released))
		}
		st.OutputDelayMax = millis(time.Duration(r.stats.DelayMaxNS))
		p.mu.Lock()
		lag := max(p.lag, p.timer.oldest(now))
		st.Lag, st.Slowed, st.LogRate, st.Compared = millis(lag), p.paced, p.rate.rate(now), p.compared
		p.mu.Unlock()
	case r.Mode == control.ModeReplay && b != nil && b.log() != nil:
		st.Position, st.Acked, st.Instructions = r.consumed.Pos, b.log().Replayable(), r.consumed.Icount
		b.mu.Lock()
		st.Lag, st.LogRate = millis(b.lag), b.rate.rate(now)
		b.mu.Unlock()
		st.Compared, _ = b.comparison.result()
	}
	return st
}

// relevant tells whether a domain has to do with ftvirt here.
func (s Status) relevant() bool {
	return s.Epoch != 0 || s.Mode != "none" || s.AnnotationError != "" || s.Failure != "" || s.Definition != ""
}

// Status tells about all domains of this host that have to do with ftvirt.
func (a *Agent) Status() []Status {
	list := []Status{}
	for _, d := range a.known() {
		if s := d.report(); s.relevant() {
			list = append(list, s)
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Domain < list[j].Domain })
	return list
}

// StatusOf tells about one domain, whatever it is.
func (a *Agent) StatusOf(ctx context.Context, name string) (Status, error) {
	for _, s := range a.Status() {
		if s.Domain == name || s.UUID.String() == name {
			return s, nil
		}
	}
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return Status{}, err
	}
	return Status{
		Domain: info.Name, UUID: info.UUID, Host: a.cfg.Host, Role: plugin.RoleNone, Reason: pair.NotEnabled, Mode: "none",
		Channel: a.channelSecurity(),
	}, nil
}
