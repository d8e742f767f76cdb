// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"fmt"

	"ftvirt.org/ftvirt/plugin"
)

// ActionKind is what is to be done.
type ActionKind uint8

const (
	// ActionLog: write Line to the agent's log.
	ActionLog ActionKind = iota
	// ActionEmitEvent: tell subscribers of State and Reason.
	ActionEmitEvent
	// ActionStartClone: clone the domain to host Peer.
	ActionStartClone
	// ActionAbortClone: stop the clone; the domain here must go on running.
	ActionAbortClone
	// ActionAcquireArbiter: test-and-set for Epoch; answer with an event.
	ActionAcquireArbiter
	// ActionCloseEpoch: mark the deliberate end of Epoch at the arbiter.
	ActionCloseEpoch
	// ActionForget: remove the domain from the arbiter.
	ActionForget
	// ActionPromote: the backup feeds the rest of the acked log and goes live,
	// being started first if it was not yet.
	ActionPromote
	// ActionOpenGate: let the primary's outputs leave without acks.
	ActionOpenGate
	// ActionStopLogging: take the primary out of recording.
	ActionStopLogging
	// ActionKillLocalVM: end QEMU here at once, before anything leaves it.
	ActionKillLocalVM
	// ActionDiscardBackup: end the backup's QEMU and remove what it left.
	ActionDiscardBackup
	// ActionEndBackup: end the backup's QEMU, but keep its replicas and its
	// description, over a restart of the agent as well. ActionKeepReplicas or
	// ActionDiscardBackup follows.
	ActionEndBackup
	// ActionKeepReplicas: the domain is this host's, with the replicas that
	// ActionEndBackup kept: define it with them.
	ActionKeepReplicas
	// ActionNotifyPeer: send Notify to the peer, if it can be reached.
	ActionNotifyPeer
	// ActionAnnounce: announce the domain's MAC addresses from here.
	ActionAnnounce
	// ActionCollectDiagnosis: keep log and state of a diverged backup. Comes
	// before the action that ends it.
	ActionCollectDiagnosis
	// ActionProbeArbiter: find out whether the arbiter could decide now, for
	// whoever has to ask it once Request is carried out: this host, and for
	// EventUserFailover the peer. Answer with an event.
	ActionProbeArbiter
	// ActionAnswer: tell the user that Request was carried out or Refused.
	ActionAnswer
	// ActionResume: let the copy here, which is paused, go on if it can.
	ActionResume
	numActions
)

var actionNames = [numActions]string{
	"log", "emit-event", "start-clone", "abort-clone", "acquire-arbiter", "close-epoch", "forget", "promote",
	"open-gate", "stop-logging", "kill-local-vm", "discard-backup", "end-backup", "keep-replicas", "notify-peer", "announce", "collect-diagnosis",
	"probe-arbiter", "answer",
	"resume",
}

func (k ActionKind) String() string { return name(actionNames[:], k) }

// Notify is what one side tells the other.
type Notify uint8

const (
	NotifyNone Notify = iota
	// NotifySwitched: the primary records; entitles a loaded backup.
	NotifySwitched
	// NotifyRunning: the backup replays.
	NotifyRunning
	// NotifyCloneFailed: the backup could not be made.
	NotifyCloneFailed
	// NotifyQEMUDied: the copy here is dead or as good as dead.
	NotifyQEMUDied
	// NotifyDiverged: the backup diverged and is gone.
	NotifyDiverged
	// NotifyUnfit: the backup does not run, or is no exact copy any more. It is
	// there until it is discarded.
	NotifyUnfit
	// NotifyStopping: the agent here stops. Sent by the agent on its own.
	NotifyStopping
	// NotifyPoweredOff: the domain was stopped on purpose.
	NotifyPoweredOff
	// NotifyDiscard: the backup is not wanted, or its replicas are not any more.
	NotifyDiscard
	// NotifyDisable: the user asked on the backup's host to end protection.
	NotifyDisable
	numNotifies
)

var notifyNames = [numNotifies]string{
	"none", "switched", "running", "clone-failed", "qemu-died", "diverged", "unfit", "stopping", "powered-off", "discard", "disable",
}

func (n Notify) String() string { return name(notifyNames[:], n) }

// Event gives the event that the peer's machine is to step when it receives n.
// It is false for a value that this version does not know.
func (n Notify) Event() (EventKind, bool) {
	switch n {
	case NotifySwitched:
		return EventPrimarySwitched, true
	case NotifyRunning:
		return EventBackupRunning, true
	case NotifyCloneFailed:
		return EventCloneFailed, true
	case NotifyQEMUDied:
		return EventPeerQEMUDied, true
	case NotifyDiverged:
		return EventPeerDiverged, true
	case NotifyUnfit:
		return EventPeerUnfit, true
	case NotifyStopping:
		return EventPeerStopping, true
	case NotifyPoweredOff:
		return EventPeerPoweredOff, true
	case NotifyDiscard:
		return EventDiscard, true
	case NotifyDisable:
		return EventUserDisable, true
	default:
		return 0, false
	}
}

// Action is something to be done, as data.
type Action struct {
	Kind  ActionKind
	Epoch plugin.Epoch
	// Peer is the other host of Epoch.
	Peer   string
	State  State  // ActionEmitEvent
	Reason Reason // ActionEmitEvent, ActionKillLocalVM, ActionDiscardBackup, ActionEndBackup, ActionNotifyPeer
	Notify Notify // ActionNotifyPeer
	Line   string // ActionLog
	// Request is what a user asked for: ActionProbeArbiter, ActionAnswer.
	Request EventKind
	Refused bool // ActionAnswer
}

func (a Action) String() string {
	switch a.Kind {
	case ActionLog:
		return "log " + a.Line
	case ActionEmitEvent:
		return fmt.Sprintf("%s %s %s", a.Kind, a.State, a.Reason)
	case ActionKillLocalVM, ActionDiscardBackup, ActionEndBackup:
		return fmt.Sprintf("%s %s", a.Kind, a.Reason)
	case ActionNotifyPeer:
		return fmt.Sprintf("%s %s epoch=%d", a.Kind, a.Notify, a.Epoch)
	case ActionAcquireArbiter, ActionCloseEpoch:
		return fmt.Sprintf("%s epoch=%d", a.Kind, a.Epoch)
	case ActionProbeArbiter:
		return fmt.Sprintf("%s for %s", a.Kind, a.Request)
	case ActionAnswer:
		if a.Refused {
			return fmt.Sprintf("%s %s refused", a.Kind, a.Request)
		}
		return fmt.Sprintf("%s %s carried out", a.Kind, a.Request)
	case ActionStartClone:
		return fmt.Sprintf("%s peer=%s epoch=%d", a.Kind, a.Peer, a.Epoch)
	default:
		return a.Kind.String()
	}
}
