// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"slices"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

// The tests below follow the paper sentence by sentence.

const epoch = plugin.Epoch(7)

// stepper is a machine whose events are in epoch 7 unless they say otherwise.
type stepper struct {
	*Machine
	t *testing.T
}

func (s stepper) on(kinds ...EventKind) []ActionKind {
	s.t.Helper()
	var done []ActionKind
	for _, kind := range kinds {
		for _, a := range s.Step(Event{Kind: kind, Epoch: epoch, Peer: "peer", Winner: "peer"}) {
			if a.Kind != ActionLog && a.Kind != ActionEmitEvent {
				done = append(done, a.Kind)
			}
		}
		if err := s.check(); err != nil {
			s.t.Fatalf("after %s: %v", kind, err)
		}
	}
	return done
}

func (s stepper) ticks(n int) []ActionKind {
	var done []ActionKind
	for range n {
		done = append(done, s.on(EventTick)...)
	}
	return done
}

func (s stepper) want(state State, reason Reason) {
	s.t.Helper()
	if got := s.Status(); got.State != state || got.Reason != reason {
		s.t.Fatalf("status is %s, want %s (%s)", got, state, reason)
	}
}

func (s stepper) wantActions(got []ActionKind, want ...ActionKind) {
	s.t.Helper()
	if !slices.Equal(got, want) {
		s.t.Fatalf("actions %v, want %v", got, want)
	}
}

func protectedPrimary(t *testing.T) stepper {
	t.Helper()
	s := newStepper(t)
	s.on(EventEnable, EventSwitched, EventBackupRunning)
	s.want(Protected, ReasonNone)
	return s
}

func protectedBackup(t *testing.T) stepper {
	t.Helper()
	s := newStepper(t)
	s.on(EventPrepareBackup, EventCloneLoaded, EventPrimarySwitched, EventBackupRunning)
	s.want(Protected, ReasonNone)
	return s
}

func newStepper(t *testing.T) stepper {
	t.Helper()
	m, err := New(DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	return stepper{m, t}
}

// FT paper, section 2.2: the primary may not send an output until the backup
// received and acknowledged the log entry of the operation producing it.
// The gate itself is the plugin's; here, nothing but a won epoch opens it.
func TestOutputRule(t *testing.T) {
	for kind := range numEvents {
		s := protectedPrimary(t)
		got := append(s.on(kind), s.ticks(2000)...)
		if slices.Contains(got, ActionOpenGate) {
			t.Errorf("%s opens the gate", kind)
		}
	}
}

// FT paper, section 2.3: if the backup fails, the primary goes live: it leaves
// recording mode and starts executing normally.
func TestBackupFails(t *testing.T) {
	for kind, reason := range map[EventKind]Reason{
		EventPeerQEMUDied: BackupLost,
		EventPeerDiverged: Divergence,
		EventPeerDead:     PeerAgentLost,
	} {
		s := protectedPrimary(t)
		s.wantActions(s.on(kind), ActionAcquireArbiter)
		s.want(GoingLive, reason)
		s.wantActions(s.on(EventArbiterWon), ActionOpenGate, ActionStopLogging, ActionNotifyPeer)
		s.want(Live, reason)
	}
}

// FT paper, section 2.3: the backup must continue replaying from the log
// entries until it consumed the last one; then it stops replaying and executes
// as a normal VM. It has been promoted and now lacks a backup. The MAC address
// of the new primary is advertised.
func TestPrimaryFails(t *testing.T) {
	s := protectedBackup(t)
	s.wantActions(s.on(EventPeerQEMUDied), ActionAcquireArbiter)
	s.wantActions(s.on(EventArbiterWon), ActionPromote)
	s.want(GoingLive, PrimaryLost)
	s.wantActions(s.ticks(50))
	s.want(GoingLive, PrimaryLost)
	s.wantActions(s.on(EventWentLive), ActionAnnounce)
	s.want(Live, PrimaryLost)
	if role := s.Status().Role; role != plugin.RolePrimary {
		t.Errorf("role %s", role)
	}
}

// FT paper, section 2.3: a failure is declared if heartbeating or logging
// traffic stopped for longer than a timeout. A session that breaks and comes
// back within it is none.
func TestFailureIsDeclaredAfterTimeout(t *testing.T) {
	for name, protected := range map[string]func(*testing.T) stepper{"primary": protectedPrimary, "backup": protectedBackup} {
		t.Run(name, func(t *testing.T) {
			grace := DefaultConfig().Grace
			s := protected(t)
			s.on(EventSessionLost)
			s.want(Protected, LostConnection)
			s.wantActions(s.ticks(grace - 1))
			s.on(EventSessionRestored)
			s.want(Protected, ReasonNone)
			s.wantActions(s.ticks(10 * grace))
			s.on(EventSessionLost)
			s.wantActions(s.ticks(grace), ActionAcquireArbiter)
			s.want(GoingLive, LostConnection)
		})
	}
}

// A loss that is certain needs no timeout.
func TestCertainLossIsDeclaredAtOnce(t *testing.T) {
	for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
		for _, kind := range []EventKind{EventPeerDead, EventPeerQEMUDied} {
			s := protected(t)
			s.on(EventSessionLost)
			s.wantActions(s.on(kind), ActionAcquireArbiter)
		}
	}
}

// FT paper, section 2.3: when either VM wants to go live, it executes an atomic
// test-and-set; if it succeeds, the VM is allowed to go live.
func TestOnlyTheArbiterLetsGoLive(t *testing.T) {
	for kind := range numEvents {
		if kind == EventArbiterWon {
			continue
		}
		for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
			s := protected(t)
			s.on(EventPeerDead)
			got := append(s.on(kind), s.ticks(100)...)
			if slices.Contains(got, ActionOpenGate) || slices.Contains(got, ActionPromote) || s.Status().State == Live {
				t.Errorf("%s goes live by %s", s.Status().Role, kind)
			}
		}
	}
	// Nor does a victory of another epoch.
	s := protectedBackup(t)
	s.on(EventPeerDead)
	for _, e := range []plugin.Epoch{0, epoch - 1, epoch + 1} {
		s.Step(Event{Kind: EventArbiterWon, Epoch: e})
		s.want(GoingLive, PeerAgentLost)
	}
}

// FT paper, section 2.3: if the operation fails, the other VM must have gone
// live already, so the current VM halts itself.
func TestLoserHaltsItself(t *testing.T) {
	for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
		s := protected(t)
		s.on(EventPeerDead)
		s.wantActions(s.on(EventArbiterLost), ActionKillLocalVM)
		s.want(Failed, ArbiterLost)
		// It is not over before QEMU is seen to be gone.
		s.wantActions(s.ticks(DefaultConfig().Remove), ActionKillLocalVM)
		s.wantActions(s.on(EventPrepareBackup), ActionNotifyPeer)
		s.on(EventQEMUDied)
		s.wantActions(s.ticks(1000))
		// Then its host can be the new backup.
		s.Step(Event{Kind: EventPrepareBackup, Epoch: epoch + 1, Peer: "peer"})
		s.want(Cloning, Initialising)
	}
}

// FT paper, section 2.3: if the VM cannot access the shared storage, it just
// waits until it can.
func TestWaitsForTheArbiter(t *testing.T) {
	for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
		s := protected(t)
		cfg := DefaultConfig()
		s.on(EventPeerDead)
		pause := cfg.RetryMin
		for range 20 {
			s.wantActions(s.on(EventArbiterUnavailable))
			s.want(GoingLive, ArbiterUnavailable)
			s.wantActions(s.ticks(pause), ActionAcquireArbiter)
			pause = min(2*pause, cfg.RetryMax)
		}
		// An answer that never comes is asked for again as well.
		s.wantActions(s.ticks(cfg.Answer), ActionAcquireArbiter)
		s.on(EventArbiterWon)
		if s.reason != PeerAgentLost {
			t.Errorf("reason %s is not that of the loss", s.reason)
		}
	}
}

// FT paper, section 2.3: once one of the VMs has gone live, redundancy is
// restored by starting a new backup.
func TestRedundancyIsRestored(t *testing.T) {
	for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
		s := protected(t)
		s.on(EventPeerDead, EventArbiterWon, EventWentLive)
		s.want(Live, PeerAgentLost)
		got := s.Step(Event{Kind: EventEnable, Epoch: epoch + 1, Peer: "third"})
		if !slices.ContainsFunc(got, func(a Action) bool {
			return a.Kind == ActionStartClone && a.Peer == "third" && a.Epoch == epoch+1
		}) {
			t.Fatalf("no clone in %v", got)
		}
		s.want(Cloning, Initialising)
	}
}

// FT paper, section 3.3: if the primary is powered off on purpose, the backup
// is stopped as well and does not try to go live.
func TestPowerOff(t *testing.T) {
	p := protectedPrimary(t)
	p.wantActions(p.on(EventDomainStopped), ActionNotifyPeer, ActionAcquireArbiter)
	p.want(Unprotected, PoweredOff)

	// Its disks are those of the domain until the primary has claimed its own.
	p.wantActions(p.on(EventArbiterWon), ActionNotifyPeer)
	b := protectedBackup(t)
	b.wantActions(b.on(EventPeerPoweredOff), ActionEndBackup)
	b.want(Unprotected, PoweredOff)
	b.on(EventQEMUDied)
	b.wantActions(b.on(EventSessionLost, EventPeerDead))
	b.wantActions(b.on(EventDiscard), ActionAcquireArbiter)
	b.wantActions(b.on(EventArbiterLost), ActionDiscardBackup)
	b.on(EventQEMUDied)
	b.wantActions(b.ticks(1000))
	for _, s := range []stepper{p, b} {
		if role := s.Status().Role; role != plugin.RoleNone {
			t.Errorf("role %s after power-off", role)
		}
	}

	// With the session broken the backup cannot be told. The arbiter tells.
	p = protectedPrimary(t)
	p.on(EventSessionLost)
	p.wantActions(p.on(EventDomainStopped), ActionNotifyPeer, ActionAcquireArbiter)
}

// The primary's host dies after the backup replayed a deliberate end. One of them
// has to be able to start the domain, with the disks of its end: who acquires.
func TestPowerOffAndDeath(t *testing.T) {
	b := protectedBackup(t)
	b.on(EventPeerPoweredOff, EventQEMUDied)
	b.wantActions(b.ticks(DefaultConfig().Claim), ActionAcquireArbiter)
	b.wantActions(b.on(EventArbiterWon), ActionKeepReplicas)

	// It came back before, and was started.
	b = protectedBackup(t)
	b.on(EventPeerPoweredOff, EventQEMUDied)
	b.wantActions(b.ticks(DefaultConfig().Claim), ActionAcquireArbiter)
	b.wantActions(b.on(EventArbiterLost), ActionDiscardBackup)

	// The backup was promoted, and what was left of the log is the guest's end.
	b = protectedBackup(t)
	b.on(EventPeerDead)
	b.wantActions(b.on(EventArbiterWon), ActionPromote)
	b.wantActions(b.on(EventDomainStopped), ActionEndBackup, ActionKeepReplicas)
	b.want(Unprotected, PoweredOff)
	b.wantActions(b.on(EventQEMUDied))
	b.wantActions(b.ticks(1000))
}

// A clone that fails before the switch costs nothing; one that fails after it
// goes through the arbiter, since the backup may be entitled.
func TestFailedClone(t *testing.T) {
	s := newStepper(t)
	s.wantActions(s.on(EventEnable), ActionStartClone)
	s.wantActions(s.on(EventCloneFailed), ActionAbortClone, ActionNotifyPeer, ActionAcquireArbiter)
	s.want(Unprotected, CloneFailed)
	if role := s.Status().Role; role != plugin.RolePrimary {
		t.Errorf("role %s: the domain runs on", role)
	}
	s.wantActions(s.on(EventArbiterWon))

	s = newStepper(t)
	s.on(EventEnable, EventSwitched)
	s.wantActions(s.on(EventCloneFailed), ActionAcquireArbiter)
	s.want(GoingLive, CloneFailed)
}

// A backup takes over only as an exact copy of a primary that records.
func TestUnentitledBackupIsDiscarded(t *testing.T) {
	for _, had := range [][]EventKind{
		{}, {EventCloneLoaded}, {EventPrimarySwitched}, {EventCloneLoaded, EventBackupRunning},
	} {
		for _, loss := range []EventKind{EventSessionLost, EventPeerDead, EventPeerQEMUDied} {
			s := newStepper(t)
			s.on(EventPrepareBackup)
			s.on(had...)
			s.wantActions(s.on(loss), ActionDiscardBackup, ActionNotifyPeer)
			s.wantActions(s.on(EventQEMUDied))
			s.wantActions(s.ticks(1000))
		}
	}
	s := newStepper(t)
	s.on(EventPrepareBackup, EventPrimarySwitched, EventCloneLoaded)
	s.wantActions(s.on(EventPeerDead), ActionAcquireArbiter)
}

// An agent that says that it stops may be restarting: its domain is not taken
// away from it at once, but is when its QEMU dies.
func TestPrimaryAgentRestarts(t *testing.T) {
	cfg := DefaultConfig()
	s := protectedBackup(t)
	s.on(EventPeerStopping, EventSessionLost, EventPeerDead)
	s.wantActions(s.ticks(cfg.Stopping - 1))
	s.on(EventSessionRestored)
	s.want(Protected, ReasonNone)

	s.on(EventPeerStopping, EventSessionLost)
	s.wantActions(s.on(EventPeerQEMUDied), ActionAcquireArbiter)
}

// A copy that died must not win for its host what the other one needs.
func TestDeadCopyDoesNotAsk(t *testing.T) {
	for _, protected := range []func(*testing.T) stepper{protectedPrimary, protectedBackup} {
		s := protected(t)
		s.on(EventPeerDead, EventArbiterUnavailable)
		s.wantActions(s.on(EventQEMUDied), ActionNotifyPeer)
		s.want(Failed, QEMUDied)
		s.wantActions(s.ticks(1000))
	}
}

// What a user asks for ends no copy of a pair before the arbiter is known to
// answer, and nothing at all if it does not.
func TestUsersWaitForTheArbiter(t *testing.T) {
	for _, kind := range []EventKind{EventUserDisable, EventUserFailover} {
		s := protectedPrimary(t)
		s.wantActions(s.on(kind), ActionProbeArbiter)
		s.wantActions(s.on(kind)) // one answer is for both
		s.wantActions(s.on(EventArbiterSilent), ActionAnswer)
		s.want(Protected, ReasonNone)

		s.wantActions(s.on(kind), ActionProbeArbiter)
		s.wantActions(s.ticks(DefaultConfig().Answer), ActionAnswer)
		s.want(Protected, ReasonNone)
		s.wantActions(s.on(EventArbiterAnswers)) // too late

		// What happens meanwhile counts: the backup may not be well any more.
		s.wantActions(s.on(kind), ActionProbeArbiter)
		s.on(EventPeerQEMUDied, EventArbiterAnswers)
		s.want(GoingLive, BackupLost)
	}

	s := protectedPrimary(t)
	s.on(EventUserFailover)
	s.wantActions(s.on(EventArbiterAnswers), ActionKillLocalVM, ActionNotifyPeer, ActionAnswer)
	s.want(Failed, UserRequest)

	// The backup is kept until the epoch is won.
	s = protectedPrimary(t)
	s.on(EventUserDisable)
	s.wantActions(s.on(EventArbiterAnswers), ActionAcquireArbiter, ActionAnswer)
	s.want(GoingLive, UserRequest)
	s.wantActions(s.on(EventArbiterWon), ActionOpenGate, ActionStopLogging, ActionNotifyPeer, ActionForget)
	s.want(Unprotected, UserRequest)
}
