// SPDX-License-Identifier: Apache-2.0

package pair

import "ftvirt.org/ftvirt/plugin"

const rolePrimary = plugin.RolePrimary

// entitled tells whether the backup is an exact copy of a primary that cannot
// go on without the arbiter. Only then may it try to go live.
func (m *Machine) entitled() bool { return m.loaded && m.primarySwitched }

// stepBackup lets an event happen on the host where the domain replays, or
// where its replay has just ended.
func (m *Machine) stepBackup(ev Event) {
	if ev.Kind == EventUserDisable && m.state != Failed && m.state != Unprotected {
		m.notify(NotifyDisable)
		return
	}
	switch m.state {
	case Unprotected:
		if ev.Kind == EventDiscard && m.ended && !m.asking {
			// The primary claimed the epoch; the arbiter knows.
			m.claimIn = 0
			m.claim()
			return
		}
		m.ignore(ev)
	case Cloning, Protected:
		m.stepReplaying(ev)
	case GoingLive:
		m.stepPromoting(ev)
	case Failed:
		if ev.Kind == EventUserDisable {
			m.becomeUnprotected(UserRequest)
			return
		}
		m.ignore(ev)
	default:
		m.ignore(ev)
	}
}

func (m *Machine) stepReplaying(ev Event) {
	switch ev.Kind {
	case EventCloneLoaded:
		m.loaded = true
		m.settleIn()
	case EventPrimarySwitched:
		m.primarySwitched = true
		m.settleIn()
	case EventBackupRunning:
		m.running = true
		m.settleIn()
	case EventCloneFailed:
		if m.state != Cloning {
			m.ignore(ev)
			return
		}
		m.failClone(refine(CloneFailed, ev.Reason))
	case EventSessionLost:
		m.sessionLost = true
		m.primaryAway(LostConnection, max(m.cfg.Grace, m.stopping))
	case EventSessionRestored:
		m.heal(ev)
	case EventPeerDead:
		m.primaryAway(PeerAgentLost, m.stopping)
	case EventPeerQEMUDied:
		m.primaryAway(PrimaryLost, 0)
	case EventPeerStopping:
		// The primary's agent may be restarting; its QEMU runs on, or its
		// end will be reported.
		m.stopping = m.cfg.Stopping
	case EventPeerPoweredOff, EventDomainStopped:
		m.poweredOff(ev)
	case EventDiscard:
		m.discard(refine(UserRequest, ev.Reason))
		m.notify(NotifyQEMUDied)
		m.becomeUnprotected(refine(UserRequest, ev.Reason))
	case EventQEMUDied:
		m.vm = false
		m.notify(NotifyQEMUDied)
		m.becomeFailed(QEMUDied)
	case EventLocalDiverged:
		m.diverged()
		m.notify(NotifyDiverged)
	case EventLocalUnfit, EventLocalPaused:
		m.becomeUnfit(ev)
	case EventPluginLost:
		m.pluginOut = m.cfg.Plugin
	case EventPluginRestored:
		m.pluginOut = 0
	case EventWentLive:
		m.unfenced()
	default:
		m.ignore(ev)
	}
}

// becomeUnfit: the copy here is no backup. It is left to the primary to discard
// it: should that be dead, this copy is all that there is, and may go on yet.
func (m *Machine) becomeUnfit(ev Event) {
	m.note(ev)
	if !m.entitled() {
		m.failClone(m.unfit)
		return
	}
	if m.state == Protected {
		m.becomeProtected(m.graceReason())
	}
	m.tellUnfit()
}

func (m *Machine) note(ev Event) {
	if m.unfit == ReasonNone || ev.Reason == IOError {
		m.unfit = ev.Reason
	}
	m.paused = m.paused || ev.Kind == EventLocalPaused
}

func (m *Machine) tellUnfit() {
	m.do(Action{Kind: ActionNotifyPeer, Notify: NotifyUnfit, Reason: m.unfit})
}

// holdPaused keeps a copy that is to go live and is paused, as by a full disk,
// until it runs: nothing else of the domain may be left.
func (m *Machine) holdPaused() {
	if m.state == GoingLive && m.paused {
		m.becomeGoingLive(m.unfit)
		m.promote, m.resumeAgain = 0, 1
	}
}

// resumed: the QEMU here runs again. One that was paused by hand has missed
// nothing.
func (m *Machine) resumed() {
	if !m.paused {
		return
	}
	m.paused, m.resumeAgain = false, 0
	if m.unfit == Paused {
		m.unfit = ReasonNone
	}
	switch m.state {
	case Protected:
		m.becomeProtected(m.graceReason())
	case GoingLive:
		m.becomeGoingLive(m.cause)
		if m.won {
			m.promote = m.cfg.Promote
		}
	}
}

// settleIn enters Protected once everything that it takes has come, in
// whatever order.
func (m *Machine) settleIn() {
	if m.state == Cloning && m.entitled() && m.running {
		m.becomeProtected(m.graceReason())
		m.notify(NotifyRunning)
	}
}

// primaryAway: the primary was lost, for good after the given number of ticks.
func (m *Machine) primaryAway(reason Reason, ticks int) {
	switch {
	case !m.entitled():
		// The primary, if it lives, runs on without us, and may have been
		// seen by others since.
		m.failClone(reason)
	case ticks > 0:
		m.lose(reason, ticks)
	default:
		m.goLive(reason)
	}
}

// failClone leaves no trace of a backup that did not come about.
func (m *Machine) failClone(reason Reason) {
	m.discard(reason)
	m.notify(NotifyCloneFailed)
	m.becomeUnprotected(reason)
}

// stepPromoting: the arbiter was asked, or gave the epoch to this side and the
// rest of the log is being consumed.
func (m *Machine) stepPromoting(ev Event) {
	switch ev.Kind {
	case EventWentLive:
		if !m.won {
			m.unfenced()
			return
		}
		m.becomeLive(m.cause)
		m.part = rolePrimary
		m.do(Action{Kind: ActionAnnounce})
	case EventPeerPoweredOff, EventDomainStopped:
		m.poweredOff(ev)
	case EventQEMUDied:
		m.vm = false
		m.notify(NotifyQEMUDied)
		m.lostPromotion(QEMUDied)
	case EventLocalUnfit:
		m.note(ev)
	case EventLocalPaused:
		m.note(ev)
		m.holdPaused()
	case EventLocalDiverged:
		m.diverged()
		if m.won {
			m.do(Action{Kind: ActionCloseEpoch})
		}
	default:
		// A discard among others: the arbiter was asked and may have given
		// us the epoch, in which case the primary is as good as dead.
		m.ignore(ev)
	}
}

// lostPromotion: the copy that was to go live is gone. If the epoch is ours,
// closing it is all that helps: either host may start the domain afresh.
func (m *Machine) lostPromotion(reason Reason) {
	if m.won {
		m.do(Action{Kind: ActionCloseEpoch})
	}
	m.becomeFailed(reason)
}

func (m *Machine) promoteStuck() {
	m.do(Action{Kind: ActionCollectDiagnosis})
	m.kill(NeedsRestart)
	m.lostPromotion(NeedsRestart)
}

func (m *Machine) diverged() {
	// What left the log after an error of its disk did so for that.
	reason := refine(Divergence, m.unfit)
	m.do(Action{Kind: ActionCollectDiagnosis})
	m.discard(reason)
	m.becomeFailed(reason)
}

// poweredOff ends the pair on the backup's side. Both hosts have the disks to
// start from. Who acquires the epoch keeps them: the primary, which does so at
// once, or this side, if it won before or the primary is gone.
func (m *Machine) poweredOff(ev Event) {
	won := m.won
	if ev.Behind && !won || !m.entitled() {
		// The primary's disks are the only ones.
		m.stopAsking()
		m.discard(PoweredOff)
		m.becomeUnprotected(PoweredOff)
		return
	}
	m.remove(ActionEndBackup, PoweredOff)
	m.becomeKept()
	if won {
		m.keepReplicas()
	}
}

// keepReplicas: the epoch is this host's, and with it the domain.
func (m *Machine) keepReplicas() {
	m.ended, m.claimIn, m.part = false, 0, rolePrimary
	m.logf("this host owns epoch %d, and its replicas are the domain's disks", m.epoch)
	m.do(Action{Kind: ActionKeepReplicas})
}

// unfenced: the plugin went live by itself. There may be two now.
func (m *Machine) unfenced() {
	m.kill(Unfenced)
	m.becomeFailed(Unfenced)
}
