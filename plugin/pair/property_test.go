// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

// world is two hosts with a machine each, a model of the arbiter, and of what
// the agents and QEMUs do. Everything that takes time in reality is a pending
// operation here, which happens when chance picks it.
type world struct {
	rng   *rand.Rand
	host  [2]*hostModel
	ops   []op
	trace []entry // what led here, put into words only when it went wrong

	newest    plugin.Epoch
	owner     map[plugin.Epoch]int
	closed    map[plugin.Epoch]bool
	available bool

	// faults counts what can cost a pair its last copy.
	faults int
	seen   map[Transition]bool
	// probed are the epochs in which a host was told that the arbiter answers.
	probed [2]map[plugin.Epoch]bool
}

type hostModel struct {
	machine *Machine
	crashed bool
	// alive: a QEMU process of the domain exists. seen: what it outputs
	// leaves at once, that is, the world takes it for the domain.
	alive, seen bool
	stuck       bool // its plugin never finishes going live
	paused      bool // its QEMU is, until it is resumed
	// whole is the epoch to whose deliberate end this host replayed as its
	// backup, kept the one whose replicas it made the domain's.
	whole, kept plugin.Epoch
}

// entry is an event that was stepped, or the name of an operation.
type entry struct {
	side   int
	ev     Event
	status Status
	op     string
}

func (e entry) String() string {
	if e.op != "" {
		return "-- " + e.op
	}
	return fmt.Sprintf("%c <- %s epoch=%d: %s", 'A'+e.side, e.ev.Kind, e.ev.Epoch, e.status)
}

// op is something under way.
type op struct {
	what string
	do   func()
}

func newWorld(seed uint64, seen map[Transition]bool) *world {
	w := &world{
		rng:   rand.New(rand.NewPCG(seed, 0xf7)),
		owner: make(map[plugin.Epoch]int), closed: make(map[plugin.Epoch]bool),
		available: true, seen: seen,
	}
	for i := range w.host {
		w.host[i], w.probed[i] = &hostModel{}, make(map[plugin.Epoch]bool)
		w.newMachine(w.host[i])
	}
	w.host[0].alive, w.host[0].seen = true, true
	return w
}

// newMachine is what an agent begins with.
func (w *world) newMachine(h *hostModel) {
	m, err := New(Config{
		Hold: 6, Grace: 3, Stopping: 8, Away: 4, Adopt: 4, Stall: 20, Settle: 8, Plugin: 4, Promote: 30, Answer: 6, RetryMin: 1, RetryMax: 4, Resume: 2, Remove: 3, Claim: 6,
	})
	if err != nil {
		panic(err)
	}
	m.onTransition = func(t Transition) { w.seen[t] = true }
	h.machine = m
}

func (w *world) step(side int, ev Event) {
	h := w.host[side]
	if h.crashed {
		return
	}
	actions := h.machine.Step(ev)
	w.trace = append(w.trace, entry{side: side, ev: ev, status: h.machine.Status()})
	for _, a := range actions {
		w.execute(side, a)
	}
}

func (w *world) later(what string, do func()) { w.ops = append(w.ops, op{what, do}) }

func (w *world) execute(side int, a Action) {
	h, peer := w.host[side], 1-side
	local := func(what string, do func()) {
		w.later(fmt.Sprintf("%c %s", 'A'+side, what), func() {
			if !h.crashed {
				do()
			}
		})
	}
	current := func() bool { return h.machine.Status().Epoch == a.Epoch }
	switch a.Kind {
	case ActionAcquireArbiter:
		// The storage may take it in although the caller died meanwhile.
		w.later("arbiter", func() {
			kind := w.acquire(side, a.Epoch)
			local(kind.String(), func() { w.step(side, Event{Kind: kind, Epoch: a.Epoch, Winner: "x"}) })
		})
	case ActionProbeArbiter:
		local("probe", func() {
			kind := EventArbiterSilent
			if w.available {
				kind = EventArbiterAnswers
				w.probed[side][a.Epoch] = true
			}
			if w.rng.IntN(8) > 0 { // else the answer is lost
				w.step(side, Event{Kind: kind, Epoch: a.Epoch})
			}
		})
	case ActionCloseEpoch:
		w.later("close", func() {
			if w.available && w.acquire(side, a.Epoch) == EventArbiterWon {
				w.closed[a.Epoch] = true
			}
		})
	case ActionEmitEvent:
		if a.State == GoingLive && a.Reason == UserRequest && !w.probed[side][a.Epoch] {
			panic(fmt.Sprintf("%c: %s before the arbiter was probed", 'A'+side, a))
		}
	case ActionOpenGate:
		w.mustOwn(side, a)
		h.seen = h.alive
	case ActionPromote:
		w.mustOwn(side, a)
		w.promote(side, a)
	case ActionResume:
		local("resume", func() {
			if h.alive && h.paused && w.rng.IntN(3) > 0 {
				h.paused = false
				w.step(side, Event{Kind: EventLocalResumed})
			}
		})
	case ActionKeepReplicas:
		w.mustOwn(side, a)
		h.kept = a.Epoch
	case ActionKillLocalVM, ActionDiscardBackup, ActionEndBackup:
		if a.Kind == ActionKillLocalVM && a.Reason == UserRequest && !w.probed[side][a.Epoch] {
			panic(fmt.Sprintf("%c: %s before the arbiter was probed", 'A'+side, a))
		}
		local("kill", func() {
			if current() && h.machine.Status().Removing {
				h.alive, h.seen = false, false
				w.step(side, Event{Kind: EventQEMUDied})
			}
		})
	case ActionStartClone:
		local("start clone", func() {
			p := w.host[peer]
			if p.crashed || p.alive {
				w.step(side, Event{Kind: EventCloneFailed, Epoch: a.Epoch})
				return
			}
			w.step(peer, Event{Kind: EventPrepareBackup, Epoch: a.Epoch, Peer: "p"})
			if s := p.machine.Status(); s.Epoch == a.Epoch && s.State == Cloning {
				p.alive, p.seen, p.stuck, p.paused = true, false, false, false
			}
		})
		local("switch", func() {
			// The agent switches only for a clone that is still wanted.
			if s := h.machine.Status(); current() && s.State == Cloning && !h.machine.switched && h.alive {
				h.seen = false
				w.step(side, Event{Kind: EventSwitched, Epoch: a.Epoch})
			}
		})
		for _, kind := range []EventKind{EventCloneLoaded, EventBackupRunning} {
			w.later("backup "+kind.String(), func() { w.step(peer, Event{Kind: kind, Epoch: a.Epoch}) })
		}
	case ActionNotifyPeer:
		kind, ok := a.Notify.Event()
		if !ok {
			panic("no event for " + a.Notify.String())
		}
		w.later("deliver "+a.Notify.String(), func() {
			if w.rng.IntN(8) > 0 {
				w.step(peer, Event{Kind: kind, Epoch: a.Epoch, Reason: a.Reason})
			}
		})
	}
}

// promote lets a copy go live when it runs.
func (w *world) promote(side int, a Action) {
	h := w.host[side]
	w.later(fmt.Sprintf("%c go live", 'A'+side), func() {
		if s := h.machine.Status(); h.crashed || !h.alive || h.stuck || s.Epoch != a.Epoch || s.State != GoingLive {
			return
		}
		if h.paused {
			w.promote(side, a)
			return
		}
		h.seen = true
		w.step(side, Event{Kind: EventWentLive})
	})
}

// pause lets a copy be paused: in a pair it is none of the domain any more.
func (w *world) pause(side int) {
	h := w.host[side]
	s := h.machine.Status()
	if !h.alive || h.seen && s.Role == plugin.RoleBackup || s.Removing {
		return
	}
	reason := IOError
	if s.Role == plugin.RoleBackup && w.rng.IntN(2) == 0 {
		reason = Paused
	}
	h.paused = s.Role == plugin.RoleBackup
	w.step(side, Event{Kind: EventLocalPaused, Reason: reason})
}

// acquire is the model arbiter.
func (w *world) acquire(side int, epoch plugin.Epoch) EventKind {
	owner, decided := w.owner[epoch]
	switch {
	case !w.available:
		return EventArbiterUnavailable
	case epoch != w.newest, w.closed[epoch], decided && owner != side:
		return EventArbiterLost
	default:
		w.owner[epoch] = side
		return EventArbiterWon
	}
}

func (w *world) mustOwn(side int, a Action) {
	if owner, decided := w.owner[a.Epoch]; !decided || owner != side {
		panic(fmt.Sprintf("%c: %s without owning epoch %d", 'A'+side, a, a.Epoch))
	}
}

// verify is the judge: one domain, one live copy.
func (w *world) verify() error {
	a, b := w.host[0], w.host[1]
	if a.alive && a.seen && b.alive && b.seen && !a.crashed && !b.crashed {
		return errors.New("two copies are live")
	}
	sa, sb := a.machine.Status(), b.machine.Status()
	if sa.State == Live && sb.State == Live && sa.Epoch == sb.Epoch {
		return fmt.Errorf("both machines are live in epoch %d", sa.Epoch)
	}
	for _, h := range w.host {
		if err := h.machine.check(); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) runOp() {
	if len(w.ops) == 0 {
		return
	}
	i := w.rng.IntN(len(w.ops))
	o := w.ops[i]
	w.ops = slices.Delete(w.ops, i, i+1)
	w.trace = append(w.trace, entry{op: o.what})
	o.do()
}

// enable protects from the given side, if arbiter and domain allow it.
func (w *world) enable(side int) {
	owner, decided := w.owner[w.newest]
	h := w.host[side]
	mayOpen := w.newest == 0 || w.closed[w.newest] || decided && owner == side
	s := h.machine.Status().State
	if !mayOpen || !h.alive || !h.seen || s != Unprotected && s != Live && s != Failed {
		return
	}
	w.newest++
	w.step(side, Event{Kind: EventEnable, Epoch: w.newest, Peer: "p"})
}

// powerOff stops the primary whose backup is on the given side, and lets the
// backup hear of it at once.
func (w *world) powerOff(side int) {
	p := w.host[1-side]
	s := p.machine.Status()
	epoch := w.host[side].machine.Status().Epoch
	if p.alive && s.Role == plugin.RolePrimary && s.Epoch == epoch {
		w.faults++
		p.alive, p.seen = false, false
		w.step(1-side, Event{Kind: EventDomainStopped})
		behind := w.rng.IntN(4) == 0
		w.replayedEnd(side, Event{Kind: EventPeerPoweredOff, Epoch: epoch, Behind: behind})
	}
}

// replayedEnd lets a backup hear of a deliberate end, which it replayed unless it
// is behind.
func (w *world) replayedEnd(side int, ev Event) {
	h := w.host[side]
	s := h.machine.Status()
	counts := s.State == Cloning || s.State == Protected || s.State == GoingLive
	if h.machine.part == plugin.RoleBackup && h.machine.entitled() && counts && !ev.Behind {
		h.whole = s.Epoch
	}
	w.step(side, ev)
}

// powerOffAndDie lets the guest power off and the primary's host die before it
// can do anything about it. The backup replays the end before it asks the
// arbiter, meanwhile, or after it won.
func (w *world) powerOffAndDie(dead int) {
	p, b := w.host[dead], w.host[1-dead]
	s := b.machine.Status()
	if !p.alive || p.machine.Status().Role != plugin.RolePrimary || p.machine.Status().Epoch != s.Epoch ||
		b.machine.part != plugin.RoleBackup || s.State != Protected || !b.alive {
		return
	}
	w.faults++
	if w.rng.IntN(2) == 0 {
		w.step(1-dead, Event{Kind: EventPeerDead})
		for range w.rng.IntN(6) {
			w.runOp()
		}
	}
	if s = b.machine.Status(); b.alive && !b.seen && (s.State == Protected || s.State == GoingLive) {
		b.alive = false
		w.replayedEnd(1-dead, Event{Kind: EventDomainStopped})
		w.step(1-dead, Event{Kind: EventQEMUDied})
	}
}

// verifyDisks demands that a domain that was powered off can be started by a host
// that has its disks, and by no other: side is the one that lives.
func (w *world) verifyDisks(side int) error {
	h := w.host[side]
	owner, decided := w.owner[w.newest]
	s := h.machine.Status()
	switch {
	case s.Kept:
		return fmt.Errorf("host %c keeps replicas for ever: %s", 'A'+side, s)
	case h.whole != w.newest || w.newest == 0 || s.Epoch != w.newest:
		return nil
	case w.closed[w.newest]:
		return fmt.Errorf("epoch %d was closed although host %c replayed all of it", w.newest, 'A'+side)
	case !decided:
		return fmt.Errorf("no host may start the domain of epoch %d, of which host %c has the disks", w.newest, 'A'+side)
	case owner == side && h.kept != w.newest:
		return fmt.Errorf("host %c owns epoch %d and has removed its disks", 'A'+side, w.newest)
	case owner != side && h.kept == w.newest:
		return fmt.Errorf("host %c has the disks of epoch %d that is not its own", 'A'+side, w.newest)
	}
	return nil
}

// restart starts the domain again on the host that owns it.
func (w *world) restart(side int) {
	h := w.host[side]
	owner, decided := w.owner[w.newest]
	if s := h.machine.Status(); !h.alive && !s.Removing && decided && owner == side && !w.closed[w.newest] &&
		(s.State == Unprotected || s.State == Failed) {
		h.alive, h.seen = true, true
	}
}

// chance lets something happen that nobody ordered.
func (w *world) chance() {
	side := w.rng.IntN(2)
	h := w.host[side]
	local := func(kind EventKind) { w.step(side, Event{Kind: kind}) }
	remote := func(kind EventKind) { w.step(side, Event{Kind: kind, Epoch: h.machine.Status().Epoch}) }
	switch w.rng.IntN(37) {
	case 0, 1, 2:
		w.enable(side)
	case 3, 4:
		local(EventSessionLost)
	case 5, 6, 7:
		local(EventSessionRestored)
	case 8:
		local(EventPeerDead)
	case 9, 10:
		w.available = !w.available
	case 11:
		remote(EventPeerStopping)
	case 12:
		local(EventPluginLost)
		w.faults++
	case 13, 14, 15:
		local(EventPluginRestored)
	case 16:
		if h.alive {
			w.faults++
			h.alive, h.seen = false, false
			local(EventQEMUDied)
		}
	case 17:
		if s := h.machine.Status(); h.alive && s.Role == plugin.RolePrimary {
			w.faults++
			h.alive, h.seen = false, false
			local(EventDomainStopped)
		}
	case 18:
		if h.alive && h.machine.Status().Role == plugin.RoleBackup {
			w.faults++
			local(EventLocalDiverged)
		}
	case 19:
		w.faults++
		local(EventUserDisable)
	case 20:
		remote(EventCloneFailed)
	case 21:
		if h.alive && h.machine.Status().Role == plugin.RoleBackup {
			w.faults++
			remote(EventDiscard)
		}
	case 22:
		// A host that was away learns who owns its epoch.
		if owner, decided := w.owner[h.machine.Status().Epoch]; decided && owner != side {
			remote(EventArbiterLost)
		}
	case 23:
		h.stuck = true
		w.faults++
	case 24, 25:
		w.restart(side)
	case 27:
		// What a primary that stopped on purpose sends, late.
		if h.machine.Status().Role == plugin.RoleBackup {
			w.powerOff(side)
		}
	case 26:
		remote(EventCloneProgress)
	case 28:
		if s := h.machine.Status(); s.Role == plugin.RolePrimary && s.State == Protected {
			w.faults++ // it kills a copy, on purpose
			local(EventUserFailover)
		}
	case 29:
		w.restartAgent(side)
	case 30, 31:
		w.pause(side)
	default:
		local(EventTick)
	}
}

// restartAgent lets a host's agent lose all that it knew, and take up what it
// finds. It tells its peer before, or does not.
func (w *world) restartAgent(side int) {
	h, peer := w.host[side], w.host[1-side]
	old := h.machine
	s := old.Status()
	if s.State == Protected && w.rng.IntN(2) == 0 {
		w.step(1-side, Event{Kind: EventPeerStopping, Epoch: s.Epoch})
	}
	w.newMachine(h)
	w.trace = append(w.trace, entry{op: fmt.Sprintf("%c restarts its agent", 'A'+side)})
	if s.Kept {
		w.step(side, Event{Kind: EventAdopt, Epoch: s.Epoch, Peer: "p", Role: plugin.RoleBackup, Ended: true})
		return
	}
	if !h.alive {
		return
	}
	owner, decided := w.owner[s.Epoch]
	decided = decided || w.closed[s.Epoch] || s.Epoch != w.newest
	adopt := Event{Kind: EventAdopt, Epoch: s.Epoch, Peer: "p", Role: s.Role, Alone: decided}
	switch {
	case h.seen && s.Role != plugin.RoleBackup && s.State != Live:
		return // an ordinary domain
	case h.seen:
		// The arbiter says whose it is, for one that went live as well.
		adopt.Role, adopt.Alone = plugin.RolePrimary, true
	case s.Role == plugin.RoleBackup && (!old.entitled() || !old.running || decided && owner != side):
		w.faults++
		h.alive = false // nobody can feed it
		w.step(side, Event{Kind: EventQEMUDied})
		if ps := peer.machine.Status(); ps.Epoch == s.Epoch {
			w.later("refuse", func() { w.step(1-side, Event{Kind: EventPeerQEMUDied, Epoch: s.Epoch}) })
		}
		return
	}
	w.step(side, adopt)
}

func runWorld(t *testing.T, seed uint64, seen map[Transition]bool) {
	w := newWorld(seed, seen)
	fail := func(err error) {
		t.Helper()
		var tail strings.Builder
		for _, e := range w.trace[max(0, len(w.trace)-60):] {
			fmt.Fprintln(&tail, e)
		}
		t.Fatalf("seed %d: %v\n%s", seed, err, tail.String())
	}
	defer func() {
		if r := recover(); r != nil {
			fail(fmt.Errorf("panic: %v", r))
		}
	}()
	quiet := seed%3 == 0 // every third world sees only faults that cost no copy
	for range 150 {
		if w.rng.IntN(5) < 3 {
			w.runOp()
		} else if quiet {
			w.chanceWithoutLoss()
		} else {
			w.chance()
		}
		if err := w.verify(); err != nil {
			fail(err)
		}
	}
	// The end: the storage is well, the session is gone for good, and one
	// host may be dead.
	w.available = true
	dead := -1
	if !quiet && seed%2 == 0 {
		dead = w.rng.IntN(2)
		w.host[dead].crashed = true
		if w.rng.IntN(2) == 0 {
			w.powerOffAndDie(dead)
		}
	}
	for i := range w.host {
		w.step(i, Event{Kind: EventSessionLost})
		if dead >= 0 {
			w.step(i, Event{Kind: EventPeerDead})
		}
	}
	for range 100 {
		for range 4 {
			w.runOp()
		}
		for i := range w.host {
			w.step(i, Event{Kind: EventTick})
		}
		if err := w.verify(); err != nil {
			fail(err)
		}
	}
	up := false
	for i, h := range w.host {
		if h.crashed {
			continue
		}
		if err := w.verifyDisks(i); err != nil {
			fail(err)
		}
		s := h.machine.Status()
		if s.State != Live && s.State != Failed && s.State != Unprotected || s.Asking || s.Removing {
			fail(fmt.Errorf("host %c is stuck: %s", 'A'+i, s))
		}
		if s.State == Live && (!h.alive || !h.seen) {
			fail(fmt.Errorf("host %c says live, but nothing is seen of it", 'A'+i))
		}
		up = up || h.alive && h.seen
	}
	if w.faults == 0 && dead < 0 && !up {
		fail(fmt.Errorf("no copy died, and yet none is live"))
	}
}

// chanceWithoutLoss is chance for what must not cost the domain its life:
// broken sessions, wrong suspicion, an arbiter that comes and goes.
func (w *world) chanceWithoutLoss() {
	side := w.rng.IntN(2)
	switch w.rng.IntN(14) {
	case 0, 1:
		w.enable(side)
	case 2:
		w.step(side, Event{Kind: EventSessionLost})
	case 3, 4:
		w.step(side, Event{Kind: EventSessionRestored})
	case 5:
		w.step(side, Event{Kind: EventPeerDead})
	case 6:
		w.available = !w.available
	case 7:
		w.step(side, Event{Kind: EventCloneFailed, Epoch: w.host[side].machine.Status().Epoch})
	case 8:
		w.step(side, Event{Kind: EventUserDisable})
	case 9:
		w.pause(side)
	default:
		w.step(side, Event{Kind: EventTick})
	}
}

// TestPairNeverSplits runs many random worlds: never two live copies, never
// live without the arbiter, never stuck, and no copy given up needlessly. It
// also sees to it that Transitions lists exactly what happens.
func TestPairNeverSplits(t *testing.T) {
	worlds := uint64(2000)
	if testing.Short() {
		worlds = 600
	}
	seen := make(map[Transition]bool)
	for seed := range worlds {
		runWorld(t, seed, seen)
	}
	for _, tr := range Transitions() {
		tr.When = ""
		if !seen[tr] && !testing.Short() {
			t.Errorf("transition %+v never happened", tr)
		}
		delete(seen, tr)
	}
	for tr := range seen {
		t.Errorf("transition %s: %s -> %s is not listed", tr.Role, tr.From, tr.To)
	}
}
