// SPDX-License-Identifier: Apache-2.0

package pair

import "ftvirt.org/ftvirt/plugin"

// EventKind is what happened.
type EventKind uint8

const (
	// EventTick: one tick of time went by. All limits in Config count ticks.
	EventTick EventKind = iota

	// EventEnable: make the domain, which runs here alone, the primary of a
	// pair with Peer. Epoch is fresh from the arbiter.
	EventEnable
	// EventUserDisable: take the protection away; the domain runs on. What a
	// user asks for is answered by an ActionAnswer.
	EventUserDisable
	// EventUserFailover: let the backup take over from the domain here.
	EventUserFailover
	// EventAdopt: an earlier agent of this host left a copy of Epoch, which
	// runs on: one that records, or that went live, as the primary, or with
	// Role one that replays. Alone tells that the epoch is no longer
	// undecided, so that nothing is to be waited for. Or, with Ended, it left
	// the replicas of a domain that was powered off.
	EventAdopt
	// EventPrepareBackup: the primary on host Peer asks this host to become
	// the backup of Epoch.
	EventPrepareBackup

	// EventCloneProgress: bytes of the clone went by. The agents of both sides
	// step it now and then, more often than Config.Stall.
	EventCloneProgress
	// EventCloneFailed: the clone cannot be completed, seen on either side.
	EventCloneFailed
	// EventSwitched: the primary records from the clone point on, gate shut.
	EventSwitched
	// EventPrimarySwitched: the primary told so.
	EventPrimarySwitched
	// EventCloneLoaded: all RAM and device state is in the backup's QEMU.
	EventCloneLoaded
	// EventBackupRunning: the backup replays. On the backup its own plugin
	// says so, on the primary the peer does.
	EventBackupRunning

	// EventPluginLost: the control connection to the plugin in QEMU broke.
	EventPluginLost
	// EventPluginRestored: the plugin connected again.
	EventPluginRestored
	// EventQEMUDied: the QEMU process here is gone, unasked or as ordered.
	EventQEMUDied
	// EventDomainStopped: the domain ended on purpose: its guest powered off, or
	// an operator ended it. On a backup: it replayed the guest's end.
	EventDomainStopped
	// EventLocalDiverged: the backup here left the primary's execution.
	EventLocalDiverged
	// EventLocalUnfit: the copy here is no exact copy any more, or does not run,
	// for Reason.
	EventLocalUnfit
	// EventLocalPaused: it is unfit, since its QEMU was paused.
	EventLocalPaused
	// EventLocalResumed: its QEMU runs again.
	EventLocalResumed
	// EventWentLive: the plugin consumed the log and runs the domain itself.
	EventWentLive

	// EventSessionLost: the logging channel to the peer broke.
	EventSessionLost
	// EventSessionRestored: it is back, and goes on from the acked position.
	EventSessionRestored
	// EventPeerDead: heartbeats and log have both been silent for too long.
	EventPeerDead
	// EventPeerQEMUDied: the peer told that its QEMU died.
	EventPeerQEMUDied
	// EventPeerDiverged: the backup told that it diverged.
	EventPeerDiverged
	// EventPeerUnfit: the backup told that it is unfit, for Reason.
	EventPeerUnfit
	// EventPeerStopping: the peer's host or agent is about to stop.
	EventPeerStopping
	// EventPeerPoweredOff: the domain was stopped on purpose on the primary.
	EventPeerPoweredOff
	// EventDiscard: the backup is not wanted any more. Where a powered-off
	// domain's replicas are kept: the primary has acquired the epoch.
	EventDiscard

	// EventArbiterWon: this host owns the epoch.
	EventArbiterWon
	// EventArbiterLost: it cannot own the epoch any more; Winner may be known.
	EventArbiterLost
	// EventArbiterUnavailable: the arbiter could not be asked.
	EventArbiterUnavailable
	// EventArbiterAnswers: the arbiter could decide now, for all who may have
	// to ask it: the good answer to ActionProbeArbiter.
	EventArbiterAnswers
	// EventArbiterSilent: it could not.
	EventArbiterSilent
	numEvents
)

var eventNames = [numEvents]string{
	"tick",
	"enable", "user-disable", "user-failover", "adopt", "prepare-backup",
	"clone-progress", "clone-failed", "switched", "primary-switched", "clone-loaded", "backup-running",
	"plugin-lost", "plugin-restored", "qemu-died", "domain-stopped", "local-diverged",
	"local-unfit", "local-paused", "local-resumed", "went-live",
	"session-lost", "session-restored", "peer-dead", "peer-qemu-died", "peer-diverged", "peer-unfit", "peer-stopping",
	"peer-powered-off", "discard",
	"arbiter-won", "arbiter-lost", "arbiter-unavailable", "arbiter-answers", "arbiter-silent",
}

func (k EventKind) String() string { return name(eventNames[:], k) }

// fenced tells whether events of this kind count only with their epoch: they
// come from elsewhere and may be old.
func (k EventKind) fenced() bool {
	switch k {
	case EventCloneProgress, EventCloneFailed, EventSwitched, EventPrimarySwitched, EventCloneLoaded,
		EventBackupRunning, EventPeerQEMUDied, EventPeerDiverged, EventPeerUnfit, EventPeerStopping, EventPeerPoweredOff,
		EventDiscard, EventArbiterWon, EventArbiterLost, EventArbiterUnavailable,
		EventArbiterAnswers, EventArbiterSilent:
		return true
	default:
		return false
	}
}

// Event is something that happened, as data.
type Event struct {
	Kind EventKind
	// Epoch is required for what comes from the peer, the clone or the
	// arbiter. Events of another epoch than the machine's are dropped. On
	// local events 0 stands for the machine's own.
	Epoch plugin.Epoch
	// Session is that of the epoch which the event is about, counted from 1:
	// EventSessionLost, EventSessionRestored and EventPeerDead, of which those
	// of an older one than the newest that came back are dropped.
	Session uint64
	// Peer is the other host: EventEnable, EventPrepareBackup, EventAdopt.
	Peer string
	// Role is what the copy was: EventAdopt.
	Role plugin.Role
	// Alone: EventAdopt.
	Alone bool
	// Ended: EventAdopt of replicas that were kept at ActionEndBackup. No copy
	// runs.
	Ended bool
	// Behind: EventPeerPoweredOff came to a backup that has not replayed all of
	// the log, and will not.
	Behind bool
	// Reason may refine EventCloneFailed and EventDiscard.
	// EventLocalUnfit, EventLocalPaused and EventPeerUnfit have one.
	Reason Reason
	// Winner is the host that owns the epoch: EventArbiterLost.
	Winner string
}
