// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"fmt"

	"ftvirt.org/ftvirt/plugin"
)

// Machine is the state of one domain on one host. It is not safe for
// concurrent use.
type Machine struct {
	cfg    Config
	state  State
	reason Reason

	epoch plugin.Epoch
	peer  string
	// part is the role played in epoch. It outlives the copy here, since
	// answers of the arbiter can come late.
	part plugin.Role
	// vm tells that a copy of the domain is or may be running here.
	vm bool

	// switched: the primary records, so the backup may be entitled.
	switched bool
	// loaded, primarySwitched, running: the backup's way to Protected.
	loaded, primarySwitched, running bool

	// unfit says why the backup's copy here is none, ReasonNone if it is one.
	unfit Reason
	// paused: its QEMU was paused before it was live. As long as that lasts while
	// it goes live, it is resumed after resumeAgain ticks.
	paused      bool
	resumeAgain int

	sessionLost bool
	// session is the newest that came back: what is told of one before is old.
	session uint64
	// spent counts the grace that losses took until a session held for a while,
	// which hold counts down: one that comes back again and again and carries
	// nothing is no session.
	spent, hold int
	// adopted: the peer may have missed what an earlier agent had to tell.
	adopted bool
	// grace counts down while a loss may heal; 0 means that none is pending.
	grace     int
	graceFor  Reason
	stopping  int // ticks for which the peer's absence was announced
	stall     int // of a clone that makes no progress
	settle    int // of a primary that switched, for its backup to run
	pluginOut int // of a plugin that is away

	// asking: an answer of the arbiter is wanted. It comes again after
	// askAgain ticks, and "unavailable" doubles the pause.
	asking            bool
	askAgain, backoff int
	// cause is why GoingLive was entered, whatever reason it shows since.
	cause Reason
	// won: the arbiter gave this host the epoch.
	won     bool
	promote int
	// disabling: forget the domain as soon as the epoch is won.
	disabling bool
	// ended: the backup replayed all of a domain that was powered off. Its
	// replicas are kept until the arbiter says whose disks are the ones to start
	// from; after claim it is asked.
	ended   bool
	claimIn int

	// request is what a user asked for, while the arbiter is probed for at most
	// that many ticks; 0 if nothing.
	request EventKind
	probing int

	// removing is the order to end QEMU that has not been confirmed, 0 if none.
	removing    ActionKind
	removeFor   Reason
	removeAgain int

	out []Action
	// onTransition lets tests see every transition.
	onTransition func(Transition)
}

// New gives the machine of a domain that is not protected.
func New(cfg Config) (*Machine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Machine{cfg: cfg, state: Unprotected, reason: NotEnabled, part: plugin.RoleNone}, nil
}

// Status tells where the machine stands.
func (m *Machine) Status() Status {
	s := Status{
		Role: m.part, State: m.state, Reason: m.reason, Epoch: m.epoch, Peer: m.peer,
		Asking: m.asking, Removing: m.removing != 0, Kept: m.ended,
	}
	if m.state == Unprotected && !m.vm && !m.ended {
		s.Role = plugin.RoleNone
	}
	return s
}

// Step lets one event happen and returns what is to be done about it, in
// order. An event that makes no sense where the machine stands is dropped with
// a line in the log: the peer may be late, wrong or hostile.
func (m *Machine) Step(ev Event) []Action {
	m.out = nil
	if ev.Epoch != m.epoch && (ev.Epoch != 0 || ev.Kind.fenced()) && ev.Kind != EventEnable && ev.Kind != EventPrepareBackup && ev.Kind != EventAdopt {
		m.logf("dropped %s of epoch %d: epoch is %d", ev.Kind, ev.Epoch, m.epoch)
		return m.out
	}
	if ev.Session < m.session && ev.Session != 0 {
		m.logf("dropped %s of session %d: session %d has come since", ev.Kind, ev.Session, m.session)
		return m.out
	}
	switch ev.Kind {
	case EventTick:
		m.tick()
	case EventEnable:
		m.enable(ev)
	case EventPrepareBackup:
		m.prepare(ev)
	case EventAdopt:
		m.adopt(ev)
	case EventArbiterWon:
		m.arbiterWon()
	case EventArbiterLost:
		m.arbiterLost(ev.Winner)
	case EventArbiterUnavailable:
		m.arbiterUnavailable()
	case EventUserDisable, EventUserFailover:
		m.userAsks(ev.Kind)
	case EventArbiterAnswers:
		m.probed(true)
	case EventArbiterSilent:
		m.probed(false)
	case EventCloneProgress:
		if m.stall > 0 {
			m.stall = m.cfg.Stall
		}
	case EventLocalResumed:
		m.resumed()
	case EventQEMUDied:
		if m.removing != 0 {
			m.removing, m.vm = 0, false
			m.logf("QEMU of epoch %d is gone", m.epoch)
			break
		}
		m.stepRole(ev)
	default:
		m.stepRole(ev)
	}
	return m.out
}

func (m *Machine) stepRole(ev Event) {
	if m.part == plugin.RoleBackup {
		m.stepBackup(ev)
	} else {
		m.stepPrimary(ev)
	}
}

// enable starts a protection. The domain runs here, alone.
func (m *Machine) enable(ev Event) {
	alone := m.state == Unprotected || m.state == Live || m.state == Failed
	if !alone || m.removing != 0 || m.ended || ev.Epoch <= m.epoch || ev.Peer == "" {
		m.logf("refused enable with peer %q in epoch %d: domain is %s", ev.Peer, ev.Epoch, m.Status())
		return
	}
	m.begin(plugin.RolePrimary, ev)
	m.do(Action{Kind: ActionStartClone})
}

// prepare lets this host become the backup. No copy of the domain runs here.
func (m *Machine) prepare(ev Event) {
	free := (m.state == Unprotected || m.state == Failed) && !m.vm && !m.ended
	if !free || m.removing != 0 || ev.Epoch <= m.epoch || ev.Peer == "" {
		m.logf("refused to be backup for host %q in epoch %d: domain is %s", ev.Peer, ev.Epoch, m.Status())
		m.out = append(m.out, Action{
			Kind: ActionNotifyPeer, Notify: NotifyCloneFailed, Epoch: ev.Epoch, Peer: ev.Peer, Reason: CloneFailed,
		})
		return
	}
	m.begin(plugin.RoleBackup, ev)
}

// begin forgets the epoch before and enters the new one.
func (m *Machine) begin(part plugin.Role, ev Event) {
	m.renew(part, ev)
	m.becomeCloning(Initialising)
}

func (m *Machine) renew(part plugin.Role, ev Event) {
	if m.request != 0 {
		m.answer(m.request, false)
	}
	*m = Machine{
		cfg: m.cfg, state: m.state, reason: m.reason, out: m.out, onTransition: m.onTransition,
		epoch: ev.Epoch, peer: ev.Peer, part: part, vm: true,
	}
}

// adopt takes up a copy that an earlier agent of this host left. Of a pair, each
// side is as it was but for the session; of one that is over only the arbiter
// knows who may go on.
func (m *Machine) adopt(ev Event) {
	if m.state != Unprotected || ev.Epoch <= m.epoch {
		m.logf("refused to adopt a copy of epoch %d: domain is %s", ev.Epoch, m.Status())
		return
	}
	m.renew(plugin.RolePrimary, ev)
	if ev.Ended {
		m.part, m.vm = plugin.RoleBackup, false
		m.becomeKept()
		return
	}
	if ev.Role == plugin.RoleBackup {
		m.part, m.loaded, m.primarySwitched, m.running = plugin.RoleBackup, true, true, true
	} else {
		m.switched = true
	}
	if ev.Alone {
		m.goLive(AgentRestarted)
		return
	}
	m.becomeProtected(AgentRestarted)
	m.sessionLost, m.adopted = true, true
	m.grace, m.graceFor = m.cfg.Adopt, LostConnection
}

func (m *Machine) tick() {
	if m.stopping > 0 {
		m.stopping--
	}
	if m.grace > 0 {
		m.spent++
	}
	if expired(&m.grace) {
		m.goLive(m.graceFor)
	}
	if expired(&m.hold) {
		m.spent = 0
	}
	if expired(&m.stall) {
		m.cloneStalled()
	}
	if expired(&m.settle) {
		m.goLive(CloneFailed)
	}
	if expired(&m.pluginOut) {
		m.pluginGone()
	}
	if m.asking && expired(&m.askAgain) {
		m.ask()
	}
	if expired(&m.probing) {
		m.probed(false)
	}
	if expired(&m.promote) {
		m.promoteStuck()
	}
	if m.paused && expired(&m.resumeAgain) {
		m.resumeAgain = m.cfg.Resume
		m.do(Action{Kind: ActionResume})
	}
	if expired(&m.claimIn) {
		m.claim()
	}
	if m.removing != 0 && expired(&m.removeAgain) {
		m.remove(m.removing, m.removeFor)
	}
}

// cloneStalled gives up a clone of which nothing was heard for too long: the
// word that it failed may have been lost. Neither side needs the arbiter, since
// a primary that switched counts on Settle instead.
func (m *Machine) cloneStalled() {
	if m.part == plugin.RoleBackup {
		m.failClone(CloneFailed)
	} else {
		m.abortClone(CloneFailed)
	}
}

// expired counts a limit down and tells whether it just ran out. A limit of 0
// is not running.
func expired(n *int) bool {
	if *n == 0 {
		return false
	}
	*n--
	return *n == 0
}

// lose notes that the peer cannot be reached, and lets the loss heal within
// the given number of ticks, less those that losses shortly before took. A grace
// that is running is not prolonged.
func (m *Machine) lose(reason Reason, ticks int) {
	m.hold = 0
	if m.grace == 0 {
		ticks -= m.spent
	}
	if ticks <= 0 {
		m.goLive(reason)
		return
	}
	if m.grace != 0 && m.grace <= ticks {
		return
	}
	m.grace, m.graceFor = ticks, reason
	if m.state == Protected {
		m.becomeProtected(reason)
	}
}

// goLive gives the pair up. What follows is the arbiter's to say.
func (m *Machine) goLive(cause Reason) {
	m.becomeGoingLive(cause)
	m.backoff = m.cfg.RetryMin
	m.ask()
	m.holdPaused()
}

// userAsks carries a user's request out. One that would end a copy of a pair
// that holds waits until it is known that the arbiter answers: what is left of
// the pair has to ask it, and would stand still.
func (m *Machine) userAsks(kind EventKind) {
	switch {
	case m.request == kind: // one answer is for both
	case m.request != 0:
		m.answer(kind, false)
	case m.endsPair(kind):
		m.request, m.probing = kind, m.cfg.Answer
		m.do(Action{Kind: ActionProbeArbiter, Request: kind})
	default:
		m.obey(kind)
	}
}

func (m *Machine) endsPair(kind EventKind) bool {
	if kind == EventUserFailover {
		return m.backupWell()
	}
	return m.part == rolePrimary && m.switched && (m.state == Cloning || m.state == Protected)
}

// probed takes the answer to a probe. What happened meanwhile counts, too.
func (m *Machine) probed(answers bool) {
	kind := m.request
	m.request, m.probing = 0, 0
	switch {
	case kind == 0:
		m.logf("nothing waits for the arbiter to be probed")
	case answers:
		m.obey(kind)
	default:
		m.logf("refused %s: the arbiter does not answer", kind)
		m.answer(kind, false)
	}
}

func (m *Machine) obey(kind EventKind) {
	done := true
	switch {
	case m.part == plugin.RoleBackup:
		done = kind == EventUserDisable
		m.stepBackup(Event{Kind: kind})
	case kind == EventUserDisable:
		m.disable()
	default:
		done = m.handOver()
	}
	m.answer(kind, done)
}

func (m *Machine) answer(kind EventKind, done bool) {
	m.do(Action{Kind: ActionAnswer, Request: kind, Refused: !done})
}

// claim acquires the epoch of a pair that is over while the domain runs on, or
// was stopped, here: this host has the only complete copy of its disks.
func (m *Machine) claim() {
	m.backoff = m.cfg.RetryMin
	m.ask()
}

func (m *Machine) ask() {
	m.asking, m.askAgain = true, m.cfg.Answer
	m.do(Action{Kind: ActionAcquireArbiter})
}

func (m *Machine) stopAsking() { m.asking, m.askAgain = false, 0 }

func (m *Machine) arbiterUnavailable() {
	if !m.asking {
		m.logf("arbiter is not available; nothing waits for it")
		return
	}
	m.askAgain, m.backoff = m.backoff, min(2*m.backoff, m.cfg.RetryMax)
	if m.state == GoingLive && m.reason != ArbiterUnavailable {
		m.becomeGoingLive(ArbiterUnavailable)
	}
}

func (m *Machine) arbiterWon() {
	asked := m.asking
	m.stopAsking()
	switch {
	case m.state == GoingLive && m.won:
		m.logf("won epoch %d once more", m.epoch)
	case m.ended:
		m.won = true
		m.keepReplicas()
	case m.state == GoingLive && m.part == plugin.RoleBackup:
		m.won, m.promote = true, m.cfg.Promote
		m.becomeGoingLive(m.cause)
		m.do(Action{Kind: ActionPromote})
		m.holdPaused()
	case m.state == GoingLive:
		m.won = true
		m.do(Action{Kind: ActionOpenGate})
		m.do(Action{Kind: ActionStopLogging})
		m.do(Action{Kind: ActionNotifyPeer, Notify: NotifyDiscard, Reason: m.cause})
		m.becomeLive(m.cause)
		if m.disabling {
			m.forget()
			m.becomeUnprotected(UserRequest)
		}
	case m.part == plugin.RoleBackup && (m.state == Failed || m.state == Unprotected):
		// The answer came after the copy here was lost. Closing the epoch
		// lets the other host start the domain, which has its disks.
		m.won = true
		m.logf("won epoch %d without a copy to go live with; closing it", m.epoch)
		m.do(Action{Kind: ActionCloseEpoch})
	case m.state == Unprotected && asked:
		m.won = true
		m.logf("this host owns epoch %d", m.epoch)
		if m.reason == PoweredOff {
			m.notify(NotifyDiscard) // the backup keeps its replicas until then
		}
		if m.disabling {
			m.forget()
		}
	default:
		m.logf("won epoch %d while %s", m.epoch, m.state)
	}
}

func (m *Machine) arbiterLost(winner string) {
	m.stopAsking()
	switch {
	case m.won:
		// The arbiter took nothing back: the answer is to an older question.
		m.logf("lost epoch %d to %q after having won it", m.epoch, winner)
	case m.ended:
		m.logf("host %q owns epoch %d, and has its newest disks", winner, m.epoch)
		m.ended, m.claimIn = false, 0
		m.discard(PoweredOff)
	case m.vm && m.removing == 0:
		m.logf("host %q owns epoch %d", winner, m.epoch)
		m.kill(ArbiterLost)
		m.becomeFailed(ArbiterLost)
	default:
		m.logf("host %q owns epoch %d; no copy runs here", winner, m.epoch)
	}
}

func (m *Machine) forget() {
	m.disabling = false
	m.do(Action{Kind: ActionForget})
}

func (m *Machine) kill(reason Reason)    { m.remove(ActionKillLocalVM, reason) }
func (m *Machine) discard(reason Reason) { m.remove(ActionDiscardBackup, reason) }

// remove orders the end of QEMU, and orders it again until that is confirmed.
func (m *Machine) remove(how ActionKind, reason Reason) {
	m.removing, m.removeFor, m.removeAgain = how, reason, m.cfg.Remove
	m.do(Action{Kind: how, Reason: reason})
}

func (m *Machine) notify(n Notify) {
	m.do(Action{Kind: ActionNotifyPeer, Notify: n, Reason: m.reason})
}

func (m *Machine) do(a Action) {
	a.Epoch, a.Peer = m.epoch, m.peer
	m.out = append(m.out, a)
}

func (m *Machine) logf(format string, args ...any) {
	m.do(Action{Kind: ActionLog, Line: fmt.Sprintf(format, args...)})
}

// ignore is for events that mean nothing where the machine stands.
func (m *Machine) ignore(ev Event) { m.logf("ignored %s while %s", ev.Kind, m.Status()) }

// The becomeX functions are the only ones that change the state.

func (m *Machine) becomeUnprotected(reason Reason) {
	m.calm()
	m.paused = false
	m.become(Unprotected, reason)
}

// becomeKept is a backup's end with its domain: the primary has the same disks,
// and is left the time to claim them.
func (m *Machine) becomeKept() {
	m.ended = true
	m.becomeUnprotected(PoweredOff)
	if !m.asking {
		m.claimIn = m.cfg.Claim
	}
}

func (m *Machine) becomeCloning(reason Reason) {
	m.stall = m.cfg.Stall
	m.become(Cloning, reason)
}

func (m *Machine) becomeProtected(reason Reason) {
	// Invariant: a protected backup is entitled, a protected primary switched.
	m.stall, m.settle = 0, 0
	m.become(Protected, reason)
}

func (m *Machine) becomeGoingLive(reason Reason) {
	if m.state != GoingLive {
		m.calm()
		m.cause = reason
	}
	m.become(GoingLive, reason)
}

func (m *Machine) becomeLive(reason Reason) {
	// Invariant: m.won. Nothing else makes a copy's outputs seen.
	m.calm()
	m.become(Live, reason)
}

func (m *Machine) becomeFailed(reason Reason) {
	m.calm()
	m.paused = false
	m.stopAsking()
	m.become(Failed, reason)
}

// calm stops the limits that belong to the state that is left.
func (m *Machine) calm() {
	m.grace, m.stall, m.settle, m.pluginOut, m.promote, m.stopping = 0, 0, 0, 0, 0, 0
	m.sessionLost = false
	m.spent, m.hold = 0, 0
}

func (m *Machine) become(to State, reason Reason) {
	from := m.state
	if from == to && m.reason == reason {
		return
	}
	m.state, m.reason = to, reason
	m.logf("%s: %s -> %s (%s) in epoch %d with %s", m.part, from, to, reason, m.epoch, m.peer)
	m.do(Action{Kind: ActionEmitEvent, State: to, Reason: reason})
	if from != to && m.onTransition != nil {
		m.onTransition(Transition{Role: m.part, From: from, To: to})
	}
}
