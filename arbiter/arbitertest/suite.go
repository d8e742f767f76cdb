// SPDX-License-Identifier: Apache-2.0

// Package arbitertest is the suite that every backend of the arbiter passes,
// and an arbiter in memory for tests of the arbiter's users.
package arbitertest

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
)

// Rounds is how often each race is run unless the backend says otherwise.
const Rounds = 200

// Backend tells the suite how to reach a kind of storage.
type Backend struct {
	// Name tells it from the other backends of the same test binary.
	Name string
	// Rounds is how often each race is run; 0 is the constant of that name.
	Rounds int
	// New prepares fresh storage and names it, so that other processes can
	// reach it too.
	New func(t testing.TB) (target string)
	// Connect makes a client of storage that New prepared.
	Connect func(target string) (arbiter.Arbiter, error)
	// Break makes the storage unreachable until mend is called.
	Break func(t testing.TB, target string) (mend func())
	// Slow makes each operation on the storage take at least SlowBy until mend
	// is called. ReadOnly makes it take no writes, and Full nothing new.
	Slow, ReadOnly, Full func(t testing.TB, target string) (mend func())
	// Damage spoils the record that says who owns the newest epoch, in
	// several ways; each is called on storage of its own.
	Damage map[string]func(t testing.TB, target string, domain plugin.UUID, epoch plugin.Epoch)
	// CrashPoints names the steps at which Crashing can end the process.
	CrashPoints []string
	// Crashing makes a client that ends its process at the named step.
	Crashing func(target, point string) (arbiter.Arbiter, error)
	// Processes tells that Connect works from other processes. The test
	// binary must call Main from its TestMain then.
	Processes bool
}

// SlowBy is the least time of an operation on storage that Slow slowed down.
const SlowBy = 200 * time.Millisecond

func (b Backend) rounds() int { return cmp.Or(b.Rounds, Rounds) }

const (
	hostA, hostB, hostC = "host-a", "host-b", "host-c"
)

var (
	domains atomic.Uint64
	process = rand.Uint64()
)

// newDomain gives a UUID that no other test uses, also not in another process on
// the same storage.
func newDomain() plugin.UUID {
	var u plugin.UUID
	binary.BigEndian.PutUint64(u[:], process)
	binary.BigEndian.PutUint64(u[8:], domains.Add(1))
	return u
}

// Run runs the whole suite.
func Run(t *testing.T, b Backend) {
	t.Run("lifecycle", func(t *testing.T) { testLifecycle(t, b) })
	t.Run("open is refused", func(t *testing.T) { testOpenRefused(t, b) })
	t.Run("stale epoch", func(t *testing.T) { testStale(t, b) })
	t.Run("outsiders", func(t *testing.T) { testOutsiders(t, b) })
	t.Run("close", func(t *testing.T) { testClose(t, b) })
	t.Run("forget", func(t *testing.T) { testForget(t, b) })
	t.Run("like the model", func(t *testing.T) { testModel(t, b) })
	t.Run("race of goroutines", func(t *testing.T) { testRace(t, b) })
	t.Run("race to open", func(t *testing.T) { testOpenRace(t, b) })
	t.Run("acquire against close", func(t *testing.T) { testAcquireClose(t, b) })
	t.Run("storage away and back", func(t *testing.T) { testAway(t, b) })
	t.Run("contexts", func(t *testing.T) { testContexts(t, b) })
	if b.Slow != nil {
		t.Run("slow storage", func(t *testing.T) { testSlow(t, b) })
	}
	if b.ReadOnly != nil {
		t.Run("read-only storage", func(t *testing.T) { testReadOnly(t, b) })
	}
	if b.Full != nil {
		t.Run("full storage", func(t *testing.T) { testFull(t, b) })
	}
	for name, damage := range b.Damage {
		t.Run("damage/"+name, func(t *testing.T) { testDamage(t, b, damage) })
	}
	if b.Processes {
		t.Run("race of processes", func(t *testing.T) { testProcessRace(t, b) })
		for _, point := range b.CrashPoints {
			t.Run("crash/"+point, func(t *testing.T) { testCrash(t, b, point) })
		}
	}
}

// storage is fresh storage with one client.
type storage struct {
	arbiter.Arbiter
	t      testing.TB
	b      Backend
	target string
	domain plugin.UUID
}

func fresh(t testing.TB, b Backend) *storage {
	t.Helper()
	target := b.New(t)
	s := &storage{t: t, b: b, target: target, domain: newDomain()}
	s.Arbiter = s.client()
	return s
}

func (s *storage) client() arbiter.Arbiter {
	s.t.Helper()
	a, err := s.b.Connect(s.target)
	if err != nil {
		s.t.Fatalf("connecting to %s: %v", s.target, err)
	}
	return a
}

func (s *storage) mustOpen(primary, backup string) plugin.Epoch {
	s.t.Helper()
	epoch, err := s.Open(s.t.Context(), s.domain, primary, backup)
	if err != nil {
		s.t.Fatalf("Open: %v", err)
	}
	return epoch
}

func (s *storage) mustAcquire(epoch plugin.Epoch, host string) {
	s.t.Helper()
	if err := s.Acquire(s.t.Context(), s.domain, epoch, host); err != nil {
		s.t.Fatalf("Acquire(%d, %s): %v", epoch, host, err)
	}
}

func (s *storage) mustLookup() arbiter.Record {
	s.t.Helper()
	rec, err := s.Lookup(s.t.Context(), s.domain)
	if err != nil {
		s.t.Fatalf("Lookup: %v", err)
	}
	return rec
}

func (s *storage) wantErr(err, want error) {
	s.t.Helper()
	if !errors.Is(err, want) {
		s.t.Fatalf("error is %v, want %v", err, want)
	}
}

func (s *storage) wantLost(err error, winner string, closed bool) {
	s.t.Helper()
	var lost *arbiter.LostError
	if !errors.As(err, &lost) || !errors.Is(err, arbiter.ErrLost) {
		s.t.Fatalf("error is %v, want a LostError", err)
	}
	if lost.Winner != winner || lost.Closed != closed || lost.Domain != s.domain {
		s.t.Fatalf("LostError %+v, want winner %s, closed %v", *lost, winner, closed)
	}
	if errors.Is(err, arbiter.ErrClosed) != closed {
		s.t.Fatalf("errors.Is(%v, ErrClosed) is not %v", err, closed)
	}
}

func testLifecycle(t *testing.T, b Backend) {
	s := fresh(t, b)
	_, err := s.Lookup(t.Context(), s.domain)
	s.wantErr(err, arbiter.ErrNoRecord)
	s.wantErr(s.Acquire(t.Context(), s.domain, 1, hostA), arbiter.ErrNoRecord)

	epoch := s.mustOpen(hostA, hostB)
	if rec := s.mustLookup(); rec.Epoch != epoch || rec.Domain != s.domain || rec.Primary != hostA || rec.Backup != hostB || !rec.Undecided() {
		t.Fatalf("after Open: %+v", rec)
	}
	before := s.mustLookup()
	if err := s.Probe(t.Context(), s.domain); err != nil || s.mustLookup() != before {
		t.Fatalf("Probe: %v; %+v became %+v", err, before, s.mustLookup())
	}
	s.mustAcquire(epoch, hostB)
	s.mustAcquire(epoch, hostB)
	s.wantLost(s.Acquire(t.Context(), s.domain, epoch, hostA), hostB, false)
	// Another client, that is another host, sees the same.
	other := s.client()
	s.wantLost(other.Acquire(t.Context(), s.domain, epoch, hostA), hostB, false)
	if rec := s.mustLookup(); rec.Owner != hostB || rec.Closed || rec.Undecided() {
		t.Fatalf("after Acquire: %+v", rec)
	}
	// Redundancy is restored by the new primary, again and again.
	for i := range 10 {
		next := s.mustOpen(hostB, hostA)
		if next <= epoch {
			t.Fatalf("epoch %d after %d", next, epoch)
		}
		epoch = next
		s.mustAcquire(epoch, hostB)
		if rec := s.mustLookup(); rec.Epoch != epoch || rec.Owner != hostB {
			t.Fatalf("round %d: %+v", i, rec)
		}
	}
}

func testOpenRefused(t *testing.T, b Backend) {
	s := fresh(t, b)
	for _, hosts := range [][2]string{{"", hostB}, {hostA, ""}, {hostA, hostA}} {
		_, err := s.Open(t.Context(), s.domain, hosts[0], hosts[1])
		s.wantErr(err, arbiter.ErrInvalid)
	}
	epoch := s.mustOpen(hostA, hostB)
	for _, primary := range []string{hostA, hostB} {
		_, err := s.Open(t.Context(), s.domain, primary, hostC)
		s.wantErr(err, arbiter.ErrUndecided)
		var refused *arbiter.RefusedError
		if !errors.As(err, &refused) || refused.Record.Epoch != epoch {
			t.Fatalf("error %v does not carry epoch %d", err, epoch)
		}
	}
	s.mustAcquire(epoch, hostA)
	_, err := s.Open(t.Context(), s.domain, hostB, hostC)
	s.wantErr(err, arbiter.ErrOwned)
	if next := s.mustOpen(hostA, hostC); next != epoch+1 {
		t.Fatalf("epoch %d after %d", next, epoch)
	}
}

func testStale(t *testing.T, b Backend) {
	s := fresh(t, b)
	old := s.mustOpen(hostA, hostB)
	s.mustAcquire(old, hostA)
	epoch := s.mustOpen(hostA, hostC)
	// Neither the loser nor the winner of an epoch that is over may use it.
	for _, host := range []string{hostA, hostB} {
		err := s.Acquire(t.Context(), s.domain, old, host)
		s.wantErr(err, arbiter.ErrStale)
		var stale *arbiter.StaleError
		if !errors.As(err, &stale) || stale.Newest != epoch {
			t.Fatalf("error %v does not name epoch %d", err, epoch)
		}
		s.wantErr(s.Close(t.Context(), s.domain, old, host), arbiter.ErrStale)
	}
	s.wantErr(s.Acquire(t.Context(), s.domain, epoch+1, hostA), arbiter.ErrNoRecord)
	if rec := s.mustLookup(); !rec.Undecided() {
		t.Fatalf("epoch %d was decided by a stale host: %+v", epoch, rec)
	}
}

func testOutsiders(t *testing.T, b Backend) {
	s := fresh(t, b)
	epoch := s.mustOpen(hostA, hostB)
	s.wantErr(s.Acquire(t.Context(), s.domain, epoch, hostC), arbiter.ErrNotMember)
	s.wantErr(s.Close(t.Context(), s.domain, epoch, hostC), arbiter.ErrNotMember)
	s.wantErr(s.Acquire(t.Context(), s.domain, epoch, ""), arbiter.ErrInvalid)
	// Domains do not see each other.
	s.wantErr(s.Acquire(t.Context(), newDomain(), epoch, hostA), arbiter.ErrNoRecord)
	if rec := s.mustLookup(); !rec.Undecided() {
		t.Fatalf("decided by an outsider: %+v", rec)
	}
}

func testClose(t *testing.T, b Backend) {
	s := fresh(t, b)
	// An undecided epoch is closed by the host that wins it.
	epoch := s.mustOpen(hostA, hostB)
	for range 2 {
		if err := s.Close(t.Context(), s.domain, epoch, hostA); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	if rec := s.mustLookup(); !rec.Closed || rec.Owner != hostA {
		t.Fatalf("after Close: %+v", rec)
	}
	// Both sides may report the same power-off.
	if err := s.Close(t.Context(), s.domain, epoch, hostB); err != nil {
		t.Fatalf("Close by the other host: %v", err)
	}
	// Nobody goes live in it, not even its owner.
	for _, host := range []string{hostA, hostB} {
		s.wantLost(s.Acquire(t.Context(), s.domain, epoch, host), hostA, true)
	}
	// Either host may protect the domain afresh.
	epoch = s.mustOpen(hostB, hostA)
	// The owner closes; the loser cannot.
	s.mustAcquire(epoch, hostB)
	s.wantLost(s.Close(t.Context(), s.domain, epoch, hostA), hostB, false)
	if rec := s.mustLookup(); rec.Closed {
		t.Fatalf("closed by the loser: %+v", rec)
	}
	if err := s.Close(t.Context(), s.domain, epoch, hostB); err != nil {
		t.Fatalf("Close by the owner: %v", err)
	}
}

func testForget(t *testing.T, b Backend) {
	s := fresh(t, b)
	if err := s.Forget(t.Context(), s.domain); err != nil {
		t.Fatalf("Forget of an unknown domain: %v", err)
	}
	old := s.mustOpen(hostA, hostB)
	for range 2 {
		if err := s.Forget(t.Context(), s.domain); err != nil {
			t.Fatalf("Forget: %v", err)
		}
		_, err := s.Lookup(t.Context(), s.domain)
		s.wantErr(err, arbiter.ErrNoRecord)
	}
	s.wantErr(s.Acquire(t.Context(), s.domain, old, hostB), arbiter.ErrStale)
	// A new life of the domain must not fulfil what a host of the old one
	// still waits for.
	epoch := s.mustOpen(hostC, hostA)
	if epoch <= old {
		t.Fatalf("epoch %d came again after Forget", epoch)
	}
	s.wantErr(s.Acquire(t.Context(), s.domain, old, hostB), arbiter.ErrStale)
	s.mustAcquire(epoch, hostA)
	if err := s.Forget(t.Context(), s.domain); err != nil {
		t.Fatalf("Forget: %v", err)
	}
	s.wantErr(s.Acquire(t.Context(), s.domain, epoch, hostA), arbiter.ErrStale)
}

// testModel does the same random things to the backend and to Memory, which
// must give the same answers.
func testModel(t *testing.T, b Backend) {
	s := fresh(t, b)
	model := NewMemory()
	rng := rand.New(rand.NewPCG(1, 2))
	ids := []plugin.UUID{newDomain(), newDomain()}
	hosts := []string{hostA, hostB, hostC}
	newest := make(map[plugin.UUID]plugin.Epoch)
	done := make(map[string]int)
	for step := range b.rounds() {
		id, host, peer := ids[rng.IntN(2)], hosts[rng.IntN(3)], hosts[rng.IntN(3)]
		epoch := newest[id] + plugin.Epoch(rng.IntN(12)/11)
		if epoch > 0 && rng.IntN(12) == 0 {
			epoch--
		}
		var call string
		var do func(arbiter.Arbiter) (any, error)
		switch n := rng.IntN(24); {
		case n < 7:
			call = fmt.Sprintf("Open(%s, %s)", host, peer)
			do = func(a arbiter.Arbiter) (any, error) {
				opened, err := a.Open(t.Context(), id, host, peer)
				if err == nil {
					newest[id] = opened
				}
				return opened, err
			}
		case n < 17:
			call = fmt.Sprintf("Acquire(%d, %s)", epoch, host)
			do = func(a arbiter.Arbiter) (any, error) { return nil, a.Acquire(t.Context(), id, epoch, host) }
		case n < 23:
			call = fmt.Sprintf("Close(%d, %s)", epoch, host)
			do = func(a arbiter.Arbiter) (any, error) { return nil, a.Close(t.Context(), id, epoch, host) }
		default:
			call = "Forget()"
			do = func(a arbiter.Arbiter) (any, error) { return nil, a.Forget(t.Context(), id) }
		}
		want, wantErr := do(model)
		got, err := do(s)
		if got != want || kindOf(err) != kindOf(wantErr) {
			t.Fatalf("step %d: %s gives %v, %v; the model %v, %v", step, call, got, err, want, wantErr)
		}
		done[strings.TrimSpace(strings.Split(call, "(")[0]+" "+kindOf(err))]++
		wantRec, wantErr := model.Lookup(t.Context(), id)
		rec, err := s.Lookup(t.Context(), id)
		// The model keeps no times.
		rec.OpenedAt, rec.DecidedAt, rec.ClosedAt = time.Time{}, time.Time{}, time.Time{}
		if rec != wantRec || kindOf(err) != kindOf(wantErr) {
			t.Fatalf("step %d: after %s: %+v, %v; the model %+v, %v", step, call, rec, err, wantRec, wantErr)
		}
	}
	t.Logf("done: %v", done)
}

// kindOf tells what kinds of error err is, with the winner if it has one.
func kindOf(err error) string {
	var kinds []string
	for _, kind := range []error{
		arbiter.ErrLost, arbiter.ErrClosed, arbiter.ErrStale, arbiter.ErrNoRecord, arbiter.ErrNotMember,
		arbiter.ErrUndecided, arbiter.ErrOwned, arbiter.ErrUnavailable, arbiter.ErrCorrupt, arbiter.ErrInvalid,
	} {
		if errors.Is(err, kind) {
			kinds = append(kinds, kind.Error())
		}
	}
	var lost *arbiter.LostError
	if errors.As(err, &lost) {
		kinds = append(kinds, lost.Winner)
	}
	if err != nil && kinds == nil {
		kinds = append(kinds, err.Error())
	}
	return strings.Join(kinds, ", ")
}

// referee collects the answers of a race for one epoch.
type referee struct {
	mu      sync.Mutex
	winners map[string]int // how many contenders of a host were told they won
	losers  map[string]int // how many were told that a host won
	errs    []error
}

func newReferee() *referee {
	return &referee{winners: make(map[string]int), losers: make(map[string]int)}
}

func (r *referee) answer(host string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var lost *arbiter.LostError
	switch {
	case err == nil:
		r.winners[host]++
	case errors.As(err, &lost):
		r.losers[lost.Winner]++
	default:
		r.errs = append(r.errs, err)
	}
}

// verdict checks that there was one winner and that everybody agrees on it.
func (r *referee) verdict(rec arbiter.Record, contenders int) error {
	if len(r.errs) > 0 {
		return errors.Join(r.errs...)
	}
	if len(r.winners) != 1 || r.winners[rec.Owner] == 0 {
		return fmt.Errorf("winners %v, the record says %q", r.winners, rec.Owner)
	}
	if len(r.losers) > 1 || r.winners[rec.Owner]+r.losers[rec.Owner] != contenders {
		return fmt.Errorf("winners %v, told to losers %v, of %d contenders", r.winners, r.losers, contenders)
	}
	return nil
}

func testRace(t *testing.T, b Backend) {
	s := fresh(t, b)
	const contenders = 6
	clients := []arbiter.Arbiter{s.client(), s.client()}
	won := make(map[string]int)
	for round := range b.rounds() {
		primary, backup := hostA, hostB
		if rec, err := s.Lookup(t.Context(), s.domain); err == nil && rec.Owner == hostB {
			primary, backup = hostB, hostA
		}
		epoch := s.mustOpen(primary, backup)
		ref := newReferee()
		start := make(chan struct{})
		var racers sync.WaitGroup
		for i := range contenders {
			racers.Go(func() {
				host := []string{hostA, hostB}[i%2]
				<-start
				ref.answer(host, clients[i%2].Acquire(t.Context(), s.domain, epoch, host))
			})
		}
		close(start)
		racers.Wait()
		rec := s.mustLookup()
		if err := ref.verdict(rec, contenders); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		won[rec.Owner]++
	}
	t.Logf("won: %v", won)
}

func testOpenRace(t *testing.T, b Backend) {
	for round := range b.rounds() / 10 {
		s := fresh(t, b)
		var racers sync.WaitGroup
		start := make(chan struct{})
		var opened atomic.Int32
		for i := range 6 {
			client := s.client()
			racers.Go(func() {
				<-start
				_, err := client.Open(t.Context(), s.domain, fmt.Sprintf("host-%d", i), "other")
				switch {
				case err == nil:
					opened.Add(1)
				case !errors.Is(err, arbiter.ErrUndecided):
					t.Errorf("Open: %v, want ErrUndecided", err)
				}
			})
		}
		close(start)
		racers.Wait()
		if n := opened.Load(); n != 1 {
			t.Fatalf("round %d: %d hosts opened the first epoch", round, n)
		}
	}
}

// testAcquireClose races the deliberate power-off against a failover.
func testAcquireClose(t *testing.T, b Backend) {
	s := fresh(t, b)
	for round := range b.rounds() / 4 {
		if err := s.Forget(t.Context(), s.domain); err != nil {
			t.Fatal(err)
		}
		epoch := s.mustOpen(hostA, hostB)
		var racers sync.WaitGroup
		var acquired, closed error
		racers.Go(func() { acquired = s.Acquire(t.Context(), s.domain, epoch, hostB) })
		racers.Go(func() { closed = s.Close(t.Context(), s.domain, epoch, hostA) })
		racers.Wait()
		switch rec := s.mustLookup(); {
		case acquired == nil && errors.Is(closed, arbiter.ErrLost) && rec.Owner == hostB && !rec.Closed:
		case closed == nil && errors.Is(acquired, arbiter.ErrLost) && rec.Owner == hostA && rec.Closed:
		default:
			t.Fatalf("round %d: acquire gave %v, close gave %v, record %+v", round, acquired, closed, rec)
		}
	}
}

func testAway(t *testing.T, b Backend) {
	s := fresh(t, b)
	epoch := s.mustOpen(hostA, hostB)
	mend := b.Break(t, s.target)
	_, err := s.Open(t.Context(), s.domain, hostA, hostB)
	s.wantErr(err, arbiter.ErrUnavailable)
	_, err = s.Lookup(t.Context(), s.domain)
	s.wantErr(err, arbiter.ErrUnavailable)
	if errors.Is(err, arbiter.ErrNoRecord) {
		t.Fatal("unreachable storage says that there is no record")
	}
	for name, err := range map[string]error{
		"Acquire": s.Acquire(t.Context(), s.domain, epoch, hostA),
		"Close":   s.Close(t.Context(), s.domain, epoch, hostA),
		"Probe":   s.Probe(t.Context(), s.domain),
		"Forget":  s.Forget(t.Context(), s.domain),
	} {
		if !errors.Is(err, arbiter.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
	// The host that waits wins once the storage is back.
	var once sync.Once
	err = arbiter.AcquireRetry(t.Context(), s, s.domain, epoch, hostA, arbiter.Retry{
		Min: time.Millisecond, Max: 5 * time.Millisecond,
		Notify: func(attempt int, err error, _ time.Duration) {
			if attempt == 3 {
				once.Do(mend)
			}
		},
	})
	if err != nil {
		t.Fatalf("AcquireRetry: %v", err)
	}
	if rec := s.mustLookup(); rec.Owner != hostA {
		t.Fatalf("record %+v", rec)
	}
}

// testSlow: a host that gives up too early has not won, and those that wait get
// one outcome.
func testSlow(t *testing.T, b Backend) {
	s := fresh(t, b)
	epoch := s.mustOpen(hostA, hostB)
	mend := b.Slow(t, s.target)
	defer mend()
	ctx, cancel := context.WithTimeout(t.Context(), SlowBy/4)
	defer cancel()
	start := time.Now()
	err := s.Acquire(ctx, s.domain, epoch, hostA)
	s.wantErr(err, arbiter.ErrUnavailable)
	s.wantErr(err, context.DeadlineExceeded)
	if took := time.Since(start); took > 10*SlowBy {
		t.Errorf("the call took %v, its time was %v", took, SlowBy/4)
	}
	ref := newReferee()
	var racers sync.WaitGroup
	for _, host := range []string{hostA, hostB} {
		client := s.client()
		racers.Go(func() {
			ref.answer(host, arbiter.AcquireRetry(t.Context(), client, s.domain, epoch, host, arbiter.Retry{Attempt: 20 * SlowBy}))
		})
	}
	racers.Wait()
	mend()
	if err := ref.verdict(s.mustLookup(), 2); err != nil {
		t.Fatal(err)
	}
}

// testReadOnly: what is decided can be read, the rest has to wait.
func testReadOnly(t *testing.T, b Backend) {
	s := fresh(t, b)
	decided := s.mustOpen(hostA, hostB)
	s.mustAcquire(decided, hostA)
	other := &storage{Arbiter: s.Arbiter, t: t, b: b, target: s.target, domain: newDomain()}
	undecided := other.mustOpen(hostA, hostB)

	mend := b.ReadOnly(t, s.target)
	s.mustAcquire(decided, hostA)
	s.wantLost(s.Acquire(t.Context(), s.domain, decided, hostB), hostA, false)
	for _, host := range []string{hostA, hostB} {
		s.wantErr(other.Acquire(t.Context(), other.domain, undecided, host), arbiter.ErrUnavailable)
		s.wantErr(other.Close(t.Context(), other.domain, undecided, host), arbiter.ErrUnavailable)
	}
	if rec := other.mustLookup(); !rec.Undecided() {
		t.Fatalf("decided on read-only storage: %+v", rec)
	}
	_, err := s.Open(t.Context(), s.domain, hostA, hostC)
	s.wantErr(err, arbiter.ErrUnavailable)
	s.wantErr(s.Probe(t.Context(), s.domain), arbiter.ErrUnavailable)
	mend()
	other.mustAcquire(undecided, hostB)
	s.mustOpen(hostA, hostC)
}

// testFull: a domain that has no place yet gets none, and takes none from the
// others.
func testFull(t *testing.T, b Backend) {
	s := fresh(t, b)
	decided := s.mustOpen(hostA, hostB)
	s.mustAcquire(decided, hostB)
	mend := b.Full(t, s.target)
	other := &storage{Arbiter: s.Arbiter, t: t, b: b, target: s.target, domain: newDomain()}
	_, err := other.Open(t.Context(), other.domain, hostA, hostB)
	s.wantErr(err, arbiter.ErrUnavailable)
	s.mustAcquire(decided, hostB)
	s.wantLost(s.Acquire(t.Context(), s.domain, decided, hostA), hostB, false)
	mend()
	other.mustAcquire(other.mustOpen(hostA, hostB), hostA)
}

func testContexts(t *testing.T, b Backend) {
	s := fresh(t, b)
	epoch := s.mustOpen(hostA, hostB)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Acquire(ctx, s.domain, epoch, hostA)
	s.wantErr(err, context.Canceled)
	s.wantErr(err, arbiter.ErrUnavailable)
	if rec := s.mustLookup(); !rec.Undecided() {
		t.Fatalf("a call without time decided: %+v", rec)
	}
	mend := b.Break(t, s.target)
	defer mend()
	ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	err = arbiter.AcquireRetry(ctx, s, s.domain, epoch, hostA, arbiter.Retry{Min: time.Millisecond})
	s.wantErr(err, context.DeadlineExceeded)
	s.wantErr(err, arbiter.ErrUnavailable)
}

func testDamage(t *testing.T, b Backend, damage func(testing.TB, string, plugin.UUID, plugin.Epoch)) {
	s := fresh(t, b)
	epoch := s.mustOpen(hostA, hostB)
	s.mustAcquire(epoch, hostA)
	damage(t, s.target, s.domain, epoch)
	// Damage is nobody's victory, and no freedom to start over.
	for _, host := range []string{hostA, hostB} {
		s.wantErr(s.Acquire(t.Context(), s.domain, epoch, host), arbiter.ErrCorrupt)
		s.wantErr(s.Close(t.Context(), s.domain, epoch, host), arbiter.ErrCorrupt)
		_, err := s.Open(t.Context(), s.domain, host, hostC)
		s.wantErr(err, arbiter.ErrCorrupt)
	}
	_, err := s.Lookup(t.Context(), s.domain)
	s.wantErr(err, arbiter.ErrCorrupt)
	var corrupt *arbiter.CorruptError
	if !errors.As(err, &corrupt) || corrupt.Path == "" || corrupt.Reason == "" {
		t.Fatalf("error %v does not say what is corrupt", err)
	}
	// The administrator's way out.
	if err := s.Forget(t.Context(), s.domain); err != nil {
		t.Fatalf("Forget: %v", err)
	}
	if next := s.mustOpen(hostA, hostB); next <= epoch {
		t.Fatalf("epoch %d after %d", next, epoch)
	}
}
