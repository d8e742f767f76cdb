// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/arbiter/scsi"
	"ftvirt.org/ftvirt/plugin"
)

func lunConfig(path string) arbiter.LUNConfig {
	return arbiter.LUNConfig{Transport: login(path), Timeout: time.Minute}
}

func initLUN(t testing.TB, st simState) string {
	t.Helper()
	path := newSim(t, st)
	info, err := arbiter.InitLUN(t.Context(), lunConfig(path))
	if err != nil {
		t.Fatal(err)
	}
	if info.Reservation != st.NoCompare {
		t.Fatalf("InitLUN gives %+v", info)
	}
	return path
}

// lunBackendFor gives the backend on devices that are born as st.
func lunBackendFor(name string, st simState, crashPoints ...string) arbitertest.Backend {
	return arbitertest.Backend{
		Name:   name,
		Rounds: 40,
		New:    func(t testing.TB) string { return initLUN(t, st) },
		Connect: func(target string) (arbiter.Arbiter, error) {
			return arbiter.NewLUN(lunConfig(target))
		},
		Break:    hinder("away"),
		Slow:     hinder("slow"),
		ReadOnly: hinder("read-only"),
		Damage: map[string]func(testing.TB, string, plugin.UUID, plugin.Epoch){
			"zeroes":        damageRecord(func(raw []byte) { clear(raw) }),
			"cut":           damageRecord(func(raw []byte) { clear(raw[256:]) }),
			"bit flip":      damageRecord(func(raw []byte) { raw[7] ^= 3 }), // the other owner
			"newer version": damageRecord(func(raw []byte) { raw[4] = 2 }),
			"foreign":       damageRecord(func(raw []byte) { copy(raw, strings.Repeat("other data ", 50)) }),
		},
		CrashPoints: crashPoints,
		Crashing: func(target, point string) (arbiter.Arbiter, error) {
			s := login(target)
			s.intercept = crashAt(point)
			return arbiter.NewLUN(arbiter.LUNConfig{Transport: s})
		},
		Processes: true,
	}
}

var (
	lunBackend      = lunBackendFor("lun", simState{}, "before 89", "after 89")
	cachedBackend   = lunBackendFor("lun with a cache", simState{NoFUA: true}, "after 89", "before 91")
	reservedBackend = lunBackendFor("lun with reservations", simState{NoCompare: true},
		"before 5f", "after 5f", "before 8a", "after 8a")
)

func TestLUN(t *testing.T) { arbitertest.Run(t, lunBackend) }

func TestLUNWithCache(t *testing.T) { arbitertest.Run(t, cachedBackend) }

func TestLUNWithReservations(t *testing.T) { arbitertest.Run(t, reservedBackend) }

// blockOf gives the number of the block of a kind that is domain's.
func blockOf(t testing.TB, path string, domain plugin.UUID, kind byte) int64 {
	t.Helper()
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for lba := 0; lba < len(image)/simBlock; lba++ {
		raw := image[lba*simBlock:][:simBlock]
		if string(raw[:4]) == "FTVA" && raw[5] == kind && plugin.UUID(raw[8:24]) == domain {
			return int64(lba)
		}
	}
	t.Fatalf("no block of kind %d of domain %s", kind, domain)
	return 0
}

const (
	kindRecord = 2
	kindMark   = 3
)

func damageBlock(t testing.TB, path string, lba int64, change func([]byte)) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, simBlock)
	_, err = f.ReadAt(raw, lba*simBlock)
	if err == nil {
		change(raw)
		_, err = f.WriteAt(raw, lba*simBlock)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func damageRecord(change func([]byte)) func(testing.TB, string, plugin.UUID, plugin.Epoch) {
	return func(t testing.TB, path string, domain plugin.UUID, _ plugin.Epoch) {
		damageBlock(t, path, blockOf(t, path, domain, kindRecord), change)
	}
}

func newLUN(t *testing.T, cfg arbiter.LUNConfig) arbiter.Arbiter {
	t.Helper()
	a, err := arbiter.NewLUN(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestInitLUN(t *testing.T) {
	path := newSim(t, simState{})
	a := newLUN(t, lunConfig(path))
	if _, err := a.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrNotInitialised) || !errors.Is(err, arbiter.ErrUnavailable) {
		t.Fatalf("Lookup on a bare LUN: %v", err)
	}
	first, err := arbiter.InitLUN(t.Context(), lunConfig(path))
	if err != nil || first.Reservation || first.Domains != 64 || first.Device.Vendor != "ftvirt" || first.Device.Product != "simulated LUN" {
		t.Fatalf("InitLUN gives %+v, %v", first, err)
	}
	again, err := arbiter.InitLUN(t.Context(), lunConfig(path))
	if err != nil || again != first {
		t.Fatalf("%+v, then %+v, %v", first, again, err)
	}
	cfg := lunConfig(path)
	cfg.ID = "other"
	if _, err := arbiter.InitLUN(t.Context(), cfg); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("InitLUN with another identity: %v", err)
	}
	if _, err := newLUN(t, cfg).Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrUnavailable) || errors.Is(err, arbiter.ErrNoRecord) {
		t.Errorf("Lookup with another identity: %v", err)
	}
	for name, lba := range map[string]int64{"a partition table": 0, "something in the middle": 70} {
		path := newSim(t, simState{})
		damageBlock(t, path, lba, func(raw []byte) { raw[511] = 0xAA })
		if _, err := arbiter.InitLUN(t.Context(), lunConfig(path)); !errors.Is(err, arbiter.ErrInvalid) || !strings.Contains(err.Error(), "zeroes") {
			t.Errorf("InitLUN with %s: %v", name, err)
		}
	}
	if _, err := arbiter.InitLUN(t.Context(), lunConfig(newSim(t, simState{Blocks: 17}))); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("InitLUN of a tiny LUN: %v", err)
	}
	if _, err := arbiter.InitLUN(t.Context(), arbiter.LUNConfig{Device: "/dev/ftvirt-none"}); !errors.Is(err, arbiter.ErrUnavailable) {
		t.Errorf("InitLUN of no device: %v", err)
	}
	if _, err := arbiter.NewLUN(arbiter.LUNConfig{}); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("NewLUN of nothing: %v", err)
	}
}

// TestInitLUNTogether: all hosts that initialise at once get the same LUN.
func TestInitLUNTogether(t *testing.T) {
	for _, st := range []simState{{}, {NoCompare: true}} {
		path := newSim(t, st)
		var racers sync.WaitGroup
		ids := make([]string, 4)
		for i := range ids {
			racers.Go(func() {
				for {
					info, err := arbiter.InitLUN(t.Context(), lunConfig(path))
					if errors.Is(err, arbiter.ErrUnavailable) {
						continue
					}
					if err != nil {
						t.Error(err)
					}
					ids[i] = info.ID
					return
				}
			})
		}
		racers.Wait()
		for _, id := range ids {
			if id == "" || id != ids[0] {
				t.Errorf("identities %q", ids)
			}
		}
	}
}

// TestInitLUNFindsRaces: a target that compares and writes in two steps is not
// trusted with COMPARE AND WRITE.
func TestInitLUNFindsRaces(t *testing.T) {
	s := login(newSim(t, simState{}))
	s.racy = true
	info, err := arbiter.InitLUN(t.Context(), arbiter.LUNConfig{Transport: s})
	if err != nil || !info.Reservation || !strings.Contains(info.Why, "atomic") {
		t.Fatalf("InitLUN gives %+v, %v", info, err)
	}
	cfg := lunConfig(newSim(t, simState{}))
	cfg.Reservation = true
	if info, err := arbiter.InitLUN(t.Context(), cfg); err != nil || !info.Reservation {
		t.Fatalf("InitLUN with reservations gives %+v, %v", info, err)
	}
}

// TestLUNFlushes: what was reported is not in a cache, also if another host
// wrote it and died.
func TestLUNFlushes(t *testing.T) {
	path := initLUN(t, simState{NoFUA: true})
	dirty := func() bool {
		text, err := os.ReadFile(path + ".state")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), `"Dirty":true`)
	}
	a := newLUN(t, lunConfig(path))
	if _, err := a.Open(t.Context(), testDomain, "a", "b"); err != nil || dirty() {
		t.Fatalf("Open: %v, in the cache: %v", err, dirty())
	}
	s := login(path)
	died := errors.New("died")
	s.intercept = func(cdb []byte, after bool) error {
		if cdb[0] == 0x91 && !after {
			return died
		}
		return nil
	}
	if err := newLUN(t, arbiter.LUNConfig{Transport: s}).Acquire(t.Context(), testDomain, 1, "b"); !errors.Is(err, died) || !dirty() {
		t.Fatalf("Acquire: %v, in the cache: %v", err, dirty())
	}
	if err := a.Acquire(t.Context(), testDomain, 1, "a"); !errors.Is(err, arbiter.ErrLost) || dirty() {
		t.Fatalf("Acquire by the other: %v, in the cache: %v", err, dirty())
	}
	if _, err := arbiter.InitLUN(t.Context(), lunConfig(newSim(t, simState{NoFUA: true, NoCompare: true}))); !errors.Is(err, arbiter.ErrInvalid) || !strings.Contains(err.Error(), "cache") {
		t.Errorf("InitLUN with a cache under reservations: %v", err)
	}
}

// TestLUNFull: a domain without a slot has to wait, the others do not.
func TestLUNFull(t *testing.T) {
	path := initLUN(t, simState{Blocks: 2 + 2*8})
	a := newLUN(t, lunConfig(path))
	for i := range byte(8) {
		// All want the same slot at first.
		if _, err := a.Open(t.Context(), plugin.UUID{8: 1, 15: 8 * i}, "a", "b"); err != nil {
			t.Fatalf("domain %d: %v", i, err)
		}
	}
	if _, err := a.Open(t.Context(), testDomain, "a", "b"); !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(err.Error(), "8 slots") {
		t.Errorf("Open of one too many: %v", err)
	}
	for i := range byte(8) {
		if err := a.Acquire(t.Context(), plugin.UUID{8: 1, 15: 8 * i}, 1, "b"); err != nil {
			t.Errorf("domain %d: %v", i, err)
		}
	}
}

func TestLUNLongNames(t *testing.T) {
	a := newLUN(t, lunConfig(initLUN(t, simState{})))
	if _, err := a.Open(t.Context(), testDomain, strings.Repeat("a", 191), strings.Repeat("b", 191)); err != nil {
		t.Errorf("names of 382 bytes: %v", err)
	}
	if _, err := a.Open(t.Context(), plugin.UUID{1}, strings.Repeat("a", 192), strings.Repeat("b", 191)); !errors.Is(err, arbiter.ErrInvalid) {
		t.Errorf("names of 383 bytes: %v, want ErrInvalid", err)
	}
}

// TestLUNDoubt: with record and mark both lost, a domain whose they may have
// been is not taken for new; the others are not held up.
func TestLUNDoubt(t *testing.T) {
	path := initLUN(t, simState{})
	a := newLUN(t, lunConfig(path))
	neighbour := testDomain
	neighbour[15] ^= 64 // the same first slot
	for _, id := range []plugin.UUID{testDomain, neighbour} {
		if _, err := a.Open(t.Context(), id, "a", "b"); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []byte{kindRecord, kindMark} {
		damageBlock(t, path, blockOf(t, path, testDomain, kind), func(raw []byte) { raw[40] ^= 1 })
	}
	if _, err := a.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrCorrupt) {
		t.Errorf("Lookup: %v, want ErrCorrupt", err)
	}
	if err := a.Forget(t.Context(), testDomain); !errors.Is(err, arbiter.ErrCorrupt) {
		t.Errorf("Forget: %v, want ErrCorrupt", err)
	}
	if err := a.Acquire(t.Context(), neighbour, 1, "b"); err != nil {
		t.Errorf("Acquire of the neighbour: %v", err)
	}
}

// TestLUNDamagedHeader: nothing is read of a LUN whose header cannot be trusted.
func TestLUNDamagedHeader(t *testing.T) {
	path := initLUN(t, simState{})
	a := newLUN(t, lunConfig(path))
	damageBlock(t, path, 0, func(raw []byte) { raw[7] ^= 3 })
	if _, err := a.Lookup(t.Context(), testDomain); !errors.Is(err, arbiter.ErrCorrupt) || errors.Is(err, arbiter.ErrNoRecord) {
		t.Errorf("Lookup: %v, want ErrCorrupt", err)
	}
}

// TestLUNRepeatedCommand: the initiator repeats a COMPARE AND WRITE whose answer
// was lost, and is told that its own write is in the way.
func TestLUNRepeatedCommand(t *testing.T) {
	path := initLUN(t, simState{})
	s := login(path)
	repeat := false
	a := newLUN(t, arbiter.LUNConfig{Transport: repeater{s, &repeat}})
	repeat = true
	epoch, err := a.Open(t.Context(), testDomain, "a", "b")
	if err == nil {
		err = a.Acquire(t.Context(), testDomain, epoch, "a")
	}
	if err != nil || epoch != 1 {
		t.Fatalf("epoch %d, %v", epoch, err)
	}
}

// repeater sends each COMPARE AND WRITE twice.
type repeater struct {
	*simLUN
	on *bool
}

func (r repeater) Do(ctx context.Context, c scsi.Command) (scsi.Result, error) {
	if *r.on && c.CDB[0] == 0x89 {
		if res, err := r.simLUN.Do(ctx, c); err != nil {
			return res, err
		}
	}
	return r.simLUN.Do(ctx, c)
}

// TestPreemptedWriter: a host that was stopped between its look and its write
// finds its right to write gone, however long that was ago.
func TestPreemptedWriter(t *testing.T) {
	path := initLUN(t, simState{NoCompare: true})
	other := newLUN(t, lunConfig(path))
	epoch, err := other.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	s := login(path)
	stopped := false
	s.intercept = func(cdb []byte, after bool) error {
		if cdb[0] == 0x8A && !after && !stopped {
			stopped = true
			if err := other.Acquire(t.Context(), testDomain, epoch, "b"); err != nil {
				return err
			}
		}
		return nil
	}
	err = newLUN(t, arbiter.LUNConfig{Transport: s, Timeout: time.Minute}).Acquire(t.Context(), testDomain, epoch, "a")
	var lost *arbiter.LostError
	if !errors.As(err, &lost) || lost.Winner != "b" || !stopped {
		t.Fatalf("Acquire: %v, want ErrLost to b", err)
	}
}

// A write that the device took while its sender held the reservation is carried
// out whenever the device gets to it. It must not undo what another host has won
// since, on whatever device, and whatever its sender learnt of it.
func TestLateWrite(t *testing.T) {
	for name, st := range map[string]simState{
		"aborted":              {},
		"aborted, not told":    {NoTAS: true},
		"reset":                {NoAbort: true},
		"reset, not told":      {NoAbort: true, NoTAS: true},
		"abort but no reset":   {NoReset: true},
		"compare and abort it": {NoCompare: true},
	} {
		for _, deaf := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/deaf=%v", name, deaf), func(t *testing.T) { testLateWrite(t, st, deaf) })
		}
	}
}

func testLateWrite(t *testing.T, st simState, deaf bool) {
	path := newSim(t, st)
	cfg := lunConfig(path)
	cfg.Reservation = true
	info, err := arbiter.InitLUN(t.Context(), cfg)
	if err != nil || !info.Reservation || info.Resets != st.NoAbort {
		t.Fatalf("InitLUN gives %+v, %v", info, err)
	}
	sa, sb := login(path), login(path)
	a := newLUN(t, arbiter.LUNConfig{Transport: sa, Timeout: time.Minute})
	b := newLUN(t, arbiter.LUNConfig{Transport: sb, Timeout: time.Minute})
	epoch, err := a.Open(t.Context(), testDomain, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	tasks := newTaskSet(uint64(blockOf(t, path, testDomain, kindRecord)))
	tasks.deaf = deaf
	sa.tasks, sb.tasks = tasks, tasks
	answer := make(chan error, 1)
	go func() { answer <- a.Acquire(t.Context(), testDomain, epoch, "a") }()
	<-tasks.held
	errB := b.Acquire(t.Context(), testDomain, epoch, "b")
	close(tasks.done)
	errA := <-answer
	if errB != nil {
		t.Fatalf("host b, while a's write is late: %v", errB)
	}
	// It is told that it lost, or that it does not know.
	if !errors.Is(errA, arbiter.ErrLost) && !errors.Is(errA, arbiter.ErrUnavailable) {
		t.Errorf("host a: %v", errA)
	}
	wait := time.Now().Add(50 * time.Millisecond)
	for time.Now().Before(wait) { // for a write that was not aborted
		if rec, err := b.Lookup(t.Context(), testDomain); err != nil || rec.Owner != "b" {
			t.Fatalf("record %+v (%v), host b had won", rec, err)
		}
	}
	if err := a.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrLost) {
		t.Errorf("host a asks again: %v", err)
	}
}

// A host that asks again while its own write is late gets one answer.
func TestOwnLateWrite(t *testing.T) {
	for name, st := range map[string]simState{"aborts": {NoCompare: true}, "resets": {NoCompare: true, NoAbort: true}} {
		t.Run(name, func(t *testing.T) {
			path := initLUN(t, st)
			sa, sb := login(path), login(path)
			a, b := newLUN(t, arbiter.LUNConfig{Transport: sa, Timeout: time.Minute}), newLUN(t, arbiter.LUNConfig{Transport: sb, Timeout: time.Minute})
			epoch, err := a.Open(t.Context(), testDomain, "a", "b")
			if err != nil {
				t.Fatal(err)
			}
			tasks := newTaskSet(uint64(blockOf(t, path, testDomain, kindRecord)))
			tasks.deaf = true
			sa.tasks, sb.tasks = tasks, tasks
			if err := a.Acquire(t.Context(), testDomain, epoch, "a"); !errors.Is(err, arbiter.ErrUnavailable) {
				t.Fatalf("an answer that did not come: %v", err)
			}
			if st.NoAbort {
				if err := a.Acquire(t.Context(), testDomain, epoch, "a"); err != nil {
					t.Fatal(err)
				}
				if tasks.left() != 0 {
					t.Error("its write of before is still under way")
				}
			}
			errB := b.Acquire(t.Context(), testDomain, epoch, "b")
			if won := errB == nil; won == st.NoAbort || errB != nil && !errors.Is(errB, arbiter.ErrLost) {
				t.Errorf("host b: %v", errB)
			}
			if tasks.left() != 0 {
				t.Error("the write is still under way when host b has its answer")
			}
		})
	}
}

// A device that can neither abort nor be reset decides nothing under reservations.
func TestInitLUNNeedsAnAbort(t *testing.T) {
	_, err := arbiter.InitLUN(t.Context(), lunConfig(newSim(t, simState{NoCompare: true, NoAbort: true, NoReset: true})))
	if !errors.Is(err, arbiter.ErrInvalid) || !strings.Contains(err.Error(), "PREEMPT AND ABORT") {
		t.Errorf("InitLUN: %v", err)
	}
}

// TestForeignReservation: somebody else's reservation is not taken away.
func TestForeignReservation(t *testing.T) {
	path := initLUN(t, simState{NoCompare: true})
	out := make([]byte, 24)
	binary.BigEndian.PutUint64(out[8:], 0xF00)
	s := login(path)
	for _, c := range []scsi.Command{
		{CDB: []byte{0x5F, 6, 0, 0, 0, 0, 0, 0, 24, 0}, Out: out},
		{CDB: []byte{0x5F, 6, 0, 0, 0, 0, 0, 0, 24, 0}, Out: out}, // the first is told of the power-on
	} {
		if _, err := s.Do(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path + ".state")
	if err == nil {
		// Type 3, exclusive access.
		changed := strings.NewReplacer(`"Type":1`, `"Type":3`).Replace(string(text))
		err = os.WriteFile(path+".state", []byte(changed), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = newLUN(t, lunConfig(path)).Open(t.Context(), testDomain, "a", "b")
	if !errors.Is(err, arbiter.ErrUnavailable) || !strings.Contains(fmt.Sprint(err), "type 3") {
		t.Fatalf("Open: %v, want ErrUnavailable naming the reservation", err)
	}
}
