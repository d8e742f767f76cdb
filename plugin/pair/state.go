// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"fmt"
	"slices"

	"ftvirt.org/ftvirt/plugin"
)

// State is where a domain stands on one host.
type State uint8

const (
	// Unprotected: the domain runs here alone, outside of any pair, or does
	// not run here at all. Outputs leave at once; nothing is logged.
	Unprotected State = iota
	// Cloning: the pair is being made. On the primary the domain runs, and
	// records from the switch on; on the backup it is being loaded.
	Cloning
	// Protected: the primary records, the backup replays. The primary's
	// outputs leave when the backup acked the log up to them. This holds too
	// while a broken session has its grace to come back.
	Protected
	// GoingLive: the pair is broken for this side, and it waits for the
	// arbiter; then, on the backup, for the end of the log. No output leaves.
	GoingLive
	// Live: this side won the epoch and the domain runs here alone. It is the
	// primary now and lacks a backup.
	Live
	// Failed: the domain's copy here is dead or being killed.
	Failed
	numStates
)

// States lists all of them.
func States() []State { return []State{Unprotected, Cloning, Protected, GoingLive, Live, Failed} }

var stateNames = [numStates]string{"unprotected", "cloning", "protected", "going-live", "live", "failed"}

func (s State) String() string { return name(stateNames[:], s) }

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Reason says why a state is what it is.
type Reason uint8

const (
	// ReasonNone: all is as it should be.
	ReasonNone Reason = iota
	// NotEnabled: nobody asked for protection.
	NotEnabled
	// Initialising: the clone is under way.
	Initialising
	// BackupLost: the backup's copy died or left.
	BackupLost
	// PrimaryLost: the primary's copy died.
	PrimaryLost
	// LostConnection: the session with the peer broke.
	LostConnection
	// PeerAgentLost: the peer went silent altogether, as when its host died.
	PeerAgentLost
	// ArbiterLost: the other host won the epoch.
	ArbiterLost
	// ArbiterUnavailable: the arbiter cannot be asked; the domain is held.
	ArbiterUnavailable
	// Divergence: the backup's execution left that of the primary.
	Divergence
	// CloneFailed: the pair did not come about.
	CloneFailed
	// UserRequest: protection was taken away on purpose.
	UserRequest
	// PoweredOff: the domain was stopped on purpose.
	PoweredOff
	// QEMUDied: the QEMU process of this copy ended unasked.
	QEMUDied
	// PluginLost: the plugin in QEMU could not be reached for too long.
	PluginLost
	// PeerStopping: the peer's host or agent announced that it stops.
	PeerStopping
	// NeedsRestart: going live did not come to its end; the domain must be
	// started afresh.
	NeedsRestart
	// AgentRestarted: an agent that was restarted took the copy up.
	AgentRestarted
	// Unfenced: the copy went live without the arbiter and was killed for it.
	Unfenced
	// IOError: a disk of one copy failed or is full. That copy was paused for it,
	// or its guest was told: the other one is no copy of it any more.
	IOError
	// Paused: the backup's QEMU was paused, by hand or by its guest.
	Paused
	// Stuck: the backup's QEMU does not run, though its process is there.
	Stuck
	// HostStopping: this host is being shut down.
	HostStopping
	numReasons
)

var reasonNames = [numReasons]string{
	"none", "not-enabled", "initialising", "backup-lost", "primary-lost", "lost-connection",
	"peer-agent-lost", "arbiter-lost", "arbiter-unavailable", "divergence", "clone-failed",
	"user-request", "powered-off", "qemu-died", "plugin-lost", "peer-stopping", "needs-restart", "agent-restarted", "unfenced",
	"io-error", "paused", "stuck", "host-stopping",
}

func (r Reason) String() string { return name(reasonNames[:], r) }

// ParseReason gives the reason of that name; false if this version has none.
func ParseReason(name string) (Reason, bool) {
	n := slices.Index(reasonNames[:], name)
	return Reason(max(n, 0)), n >= 0
}

// MarshalText implements encoding.TextMarshaler.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func name[T ~uint8](names []string, v T) string {
	if int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("%T(%d)", v, v)
}

// Status is what a machine tells of itself.
type Status struct {
	// Role is RoleNone while no copy of the domain belongs here.
	Role   plugin.Role
	State  State
	Reason Reason
	// Epoch is the newest epoch that this side took part in, 0 if none.
	Epoch plugin.Epoch
	Peer  string
	// Asking tells that an answer of the arbiter is awaited.
	Asking bool
	// Removing tells that the copy here was ordered to be killed or discarded
	// and the end of its QEMU has not been seen yet.
	Removing bool
	// Kept tells that the domain was powered off and its replicas are here until
	// it is known which host has the newest disks.
	Kept bool
}

func (s Status) String() string {
	text := fmt.Sprintf("%s %s reason=%s epoch=%d", s.Role, s.State, s.Reason, s.Epoch)
	if s.Peer != "" {
		text += " peer=" + s.Peer
	}
	if s.Asking {
		text += " asking"
	}
	if s.Removing {
		text += " removing"
	}
	if s.Kept {
		text += " kept"
	}
	return text
}

// Transition is one way from state to state, in the role that the host has
// when it takes it.
type Transition struct {
	Role     plugin.Role
	From, To State
	// When says what causes it, for the state diagram.
	When string
}

// Transitions lists every transition that a machine can take, without those
// from a state to itself. The state diagram is generated from it, and a test
// checks that it is what the code does: no more and no less.
func Transitions() []Transition {
	const p, b = plugin.RolePrimary, plugin.RoleBackup
	return []Transition{
		{p, Unprotected, Cloning, "enable"},
		{p, Unprotected, Protected, "taken up by an agent that was restarted"},
		{p, Unprotected, GoingLive, "taken up by an agent that was restarted, alone"},
		{p, Unprotected, Failed, "QEMU died, or the other host owns the epoch"},
		{p, Cloning, Unprotected, "clone failed or stopped before the switch, or power-off"},
		{p, Cloning, Protected, "backup runs"},
		{p, Cloning, GoingLive, "pair broken after the switch"},
		{p, Cloning, Failed, "QEMU died, or the other host owns the epoch"},
		{p, Protected, GoingLive, "backup lost, or protection taken away"},
		{p, Protected, Unprotected, "power-off"},
		{p, Protected, Failed, "QEMU or plugin died, failover asked for, or the other host owns the epoch"},
		{p, GoingLive, Live, "arbiter won"},
		{p, GoingLive, Unprotected, "power-off"},
		{p, GoingLive, Failed, "arbiter lost, or QEMU died"},
		{p, Live, Cloning, "enabled again, to restore redundancy"},
		{p, Live, Unprotected, "power-off, or protection taken away"},
		{p, Live, Failed, "QEMU died"},
		{p, Failed, Cloning, "restarted and enabled"},
		{p, Failed, Unprotected, "protection taken away"},

		{b, Unprotected, Cloning, "asked to be the backup"},
		{b, Unprotected, Protected, "taken up by an agent that was restarted"},
		{b, Unprotected, GoingLive, "taken up by an agent that was restarted, having won"},
		{b, Cloning, Unprotected, "discarded, since the clone failed or the primary was lost too early"},
		{b, Cloning, Protected, "loaded, primary switched, backup runs"},
		{b, Cloning, GoingLive, "primary lost after the switch"},
		{b, Cloning, Failed, "QEMU died or diverged, or the other host owns the epoch"},
		{b, Protected, GoingLive, "primary lost"},
		{b, Protected, Unprotected, "discarded, or the pair was powered off"},
		{b, Protected, Failed, "QEMU died or diverged, or the other host owns the epoch"},
		{b, GoingLive, Live, "arbiter won, log consumed"},
		{b, GoingLive, Unprotected, "the pair was powered off"},
		{b, GoingLive, Failed, "arbiter lost, QEMU died or diverged, or no end of the log"},
		{b, Failed, Cloning, "asked to be the backup"},
		{b, Failed, Unprotected, "protection taken away"},
	}
}
