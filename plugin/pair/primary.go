// SPDX-License-Identifier: Apache-2.0

package pair

// stepPrimary lets an event happen on the host where the domain runs and is
// seen, also before it was ever protected.
func (m *Machine) stepPrimary(ev Event) {
	switch ev.Kind {
	case EventQEMUDied:
		m.primaryDied()
		return
	case EventDomainStopped:
		m.primaryStopped()
		return
	}
	switch m.state {
	case Cloning, Protected:
		if m.switched {
			m.stepRecording(ev)
		} else {
			m.stepCloning(ev)
		}
	default:
		// Once the pair is broken, only the arbiter counts: what the peer
		// says cannot make it whole again.
		m.ignore(ev)
	}
}

// stepCloning: the primary does not record yet, the backup is not entitled.
func (m *Machine) stepCloning(ev Event) {
	switch ev.Kind {
	case EventSwitched:
		m.switched, m.stall, m.settle = true, 0, m.cfg.Settle
		m.notify(NotifySwitched)
		m.logf("recording from the clone point of epoch %d on", m.epoch)
	case EventCloneFailed:
		m.abortClone(refine(CloneFailed, ev.Reason))
	case EventSessionLost:
		m.abortClone(LostConnection)
	case EventPeerDead:
		m.abortClone(PeerAgentLost)
	case EventPeerQEMUDied, EventPeerDiverged, EventPeerStopping:
		m.abortClone(CloneFailed)
	case EventLocalUnfit, EventLocalPaused, EventPeerUnfit:
		m.abortClone(ev.Reason)
	case EventPluginLost:
		m.abortClone(PluginLost)
	default:
		m.ignore(ev)
	}
}

// abortClone lets the domain run on alone. The backup was never entitled, so
// nothing has to be waited for; but the epoch is claimed, lest it stay
// undecided and keep the next one from being opened.
func (m *Machine) abortClone(reason Reason) {
	m.do(Action{Kind: ActionAbortClone})
	m.notify(NotifyDiscard)
	m.becomeUnprotected(reason)
	m.claim()
}

// stepRecording: the primary records, so the backup may be entitled, and every
// way out but a power-off leads through the arbiter.
func (m *Machine) stepRecording(ev Event) {
	switch ev.Kind {
	case EventBackupRunning:
		if m.state == Cloning {
			m.becomeProtected(m.graceReason())
		}
	case EventCloneFailed:
		if m.state == Cloning {
			m.goLive(refine(CloneFailed, ev.Reason))
		} else {
			m.ignore(ev)
		}
	case EventSessionLost:
		m.sessionLost = true
		if m.stopping > 0 {
			m.lose(PeerStopping, max(m.cfg.Grace, m.stopping))
			return
		}
		m.lose(LostConnection, m.cfg.Grace)
	case EventSessionRestored:
		m.heal(ev)
	case EventPeerDead:
		if m.stopping > 0 {
			m.lose(PeerAgentLost, m.stopping)
			return
		}
		m.goLive(PeerAgentLost)
	case EventPeerQEMUDied:
		m.goLive(BackupLost)
	case EventPeerDiverged:
		m.goLive(Divergence)
	case EventLocalUnfit, EventLocalPaused, EventPeerUnfit:
		// A disk request that failed here and not there, or there and not here:
		// from then on only one of the two can go on, and the one here is seen.
		m.goLive(ev.Reason)
	case EventPeerStopping:
		// The backup's agent may be restarting. Outputs wait for it, so not
		// for long.
		m.stopping = m.cfg.Away
	case EventPluginLost:
		m.pluginOut = m.cfg.Plugin
	case EventPluginRestored:
		m.pluginOut = 0
	default:
		m.ignore(ev)
	}
}

// handOver leaves the field to a backup that is known to be well, as if the
// copy here had died. This side needs no arbiter: the backup asks for itself.
func (m *Machine) handOver() bool {
	if !m.backupWell() {
		m.ignore(Event{Kind: EventUserFailover})
		return false
	}
	m.kill(UserRequest)
	m.notify(NotifyQEMUDied)
	m.becomeFailed(UserRequest)
	return true
}

// backupWell tells whether this is a primary that knows nothing bad of its backup.
func (m *Machine) backupWell() bool {
	return m.part == rolePrimary && m.state == Protected && !m.sessionLost && m.grace == 0
}

// heal ends the grace of a session that came back. What it took is not given back
// until the session has held, except where an agent was restarted.
func (m *Machine) heal(ev Event) {
	m.session = ev.Session
	switch {
	case m.adopted || m.stopping > 0:
		m.spent = 0
	case m.sessionLost:
		m.spent++
	}
	m.hold = m.cfg.Hold
	m.sessionLost, m.grace, m.stopping = false, 0, 0
	if m.state == Protected {
		m.becomeProtected(m.unfit)
	}
	if m.unfit != ReasonNone {
		m.tellUnfit() // the word of before may be lost
	}
	if m.adopted && m.part == rolePrimary {
		// Whether its backup was told is not known any more.
		m.notify(NotifySwitched)
	}
	m.adopted = false
}

func (m *Machine) graceReason() Reason {
	if m.grace > 0 {
		return m.graceFor
	}
	return m.unfit
}

// primaryDied: the backup is to go live. This side does not ask the arbiter,
// or it could win for a dead copy.
func (m *Machine) primaryDied() {
	m.vm = false
	m.pluginOut = 0
	switch m.state {
	case Cloning:
		if !m.switched {
			m.do(Action{Kind: ActionAbortClone})
		}
		m.notify(NotifyQEMUDied)
	case Protected, GoingLive:
		m.notify(NotifyQEMUDied)
	case Failed:
		return
	case Unprotected:
		if m.reason == PoweredOff || m.epoch == 0 {
			return
		}
	}
	preSwitch := m.state == Cloning && !m.switched
	m.becomeFailed(QEMUDied)
	if preSwitch {
		m.claim()
	}
}

// primaryStopped: a deliberate end is no failure, and the backup must not take
// it for one.
func (m *Machine) primaryStopped() {
	m.vm = false
	switch m.state {
	case Protected, Cloning, GoingLive:
		if m.state == Cloning && !m.switched {
			m.do(Action{Kind: ActionAbortClone})
		}
		m.notify(NotifyPoweredOff)
		m.becomeUnprotected(PoweredOff)
		// The backup's replicas go with it, so this host's disks are the ones
		// to start from.
		m.claim()
	case Unprotected, Live:
		// This host keeps what it owns: the other's disks are behind.
		m.becomeUnprotected(PoweredOff)
	default:
		m.logf("domain stopped while %s", m.Status())
	}
}

func (m *Machine) disable() {
	switch m.state {
	case Cloning:
		m.disabling = true
		if m.switched {
			m.goLive(UserRequest)
		} else {
			m.abortClone(UserRequest)
		}
	case Protected:
		// The backup is discarded once the epoch is won, and not before: until
		// then it is all that is left should this host die.
		m.disabling = true
		m.goLive(UserRequest)
	case GoingLive:
		m.disabling = true
	case Unprotected:
		if m.asking {
			m.disabling = true
		} else if m.epoch != 0 {
			m.forget()
		}
		m.becomeUnprotected(UserRequest)
	case Live:
		m.forget()
		m.becomeUnprotected(UserRequest)
	case Failed:
		// Whoever owns the epoch keeps it; only the wish ends here.
		m.becomeUnprotected(UserRequest)
	}
}

// pluginGone: the plugin did not come back. Its gate is shut, so the copy in
// its hands is of no use to anybody.
func (m *Machine) pluginGone() {
	switch {
	case m.part == rolePrimary && m.state == Protected && !m.sessionLost:
		// The backup is known to be well. Leaving the field to it needs no
		// arbiter; it will ask for itself.
		m.kill(PluginLost)
		m.notify(NotifyQEMUDied)
		m.becomeFailed(PluginLost)
	case m.part == rolePrimary && m.state == Cloning:
		m.goLive(PluginLost)
	case m.part == rolePrimary:
		// The session is in its grace; that decides.
		m.pluginOut = m.cfg.Plugin
	default:
		m.discard(PluginLost)
		m.notify(NotifyQEMUDied)
		m.becomeFailed(PluginLost)
	}
}

func refine(reason, by Reason) Reason {
	if by != ReasonNone {
		return by
	}
	return reason
}
