// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/arbiter/paxos"
	"ftvirt.org/ftvirt/plugin"
)

var errKilled = errors.New("killed")

var crashDomain = plugin.UUID{7}

// death ends a process at the n-th step on the storage, counting from 0: before
// it, after it, or in the middle of a write. Nothing that the process tries from
// then on happens.
type death struct {
	at    int
	after bool
	torn  bool

	steps []Op
	dead  bool
}

func (d *death) fault(f Fault) error {
	switch {
	case d.dead:
		return errKilled
	case f.After:
		d.dead = d.after && len(d.steps)-1 == d.at
	default:
		d.steps = append(d.steps, f.Op)
		if len(d.steps)-1 == d.at && !d.after {
			d.dead = true
			if d.torn && f.Op == OpWrite {
				_ = os.WriteFile(f.Path, []byte(`{"version":1,"kind":"own`), 0o644)
			}
		}
	}
	if d.dead {
		return errKilled
	}
	return nil
}

// deaths are all ways to die on the way of which the steps are known.
func deaths(steps []Op) []*death {
	var list []*death
	for i, op := range steps {
		list = append(list, &death{at: i}, &death{at: i, after: true})
		if op == OpWrite {
			list = append(list, &death{at: i, torn: true})
		}
	}
	return list
}

func (d *death) String() string {
	when := "before"
	if d.after {
		when = "after"
	}
	if d.torn {
		when = "within"
	}
	return fmt.Sprintf("killed %s step %d, %s", when, d.at, d.steps[min(d.at, len(d.steps)-1)])
}

// unharmed reaches every step and dies at none.
func unharmed() *death { return &death{at: -1} }

// TestDirKilledAtEachStep: a host dies at each step of each operation, of which
// there are as many as the operation takes. Others see the state of before or
// that of after, and nothing else; the operation can be repeated; and whoever wins
// an epoch is its only winner.
func TestDirKilledAtEachStep(t *testing.T) {
	t.Parallel()
	open := func(t *testing.T, d *Dir) error { _, err := d.Open(t.Context(), crashDomain, "a", "b"); return err }
	acquire := func(t *testing.T, d *Dir) error { return d.Acquire(t.Context(), crashDomain, 1, "a") }
	end := func(t *testing.T, d *Dir) error { return d.Close(t.Context(), crashDomain, 1, "a") }
	forget := func(t *testing.T, d *Dir) error { return d.Forget(t.Context(), crashDomain) }
	type operation = func(*testing.T, *Dir) error
	many := func(t *testing.T, d *Dir) error {
		for epoch := plugin.Epoch(1); epoch <= keepEpochs+2; epoch++ {
			if err := errors.Join(open(t, d), d.Acquire(t.Context(), crashDomain, epoch, "a")); err != nil {
				return err
			}
		}
		return nil
	}
	for _, c := range []struct {
		name   string
		before []operation
		do     operation
	}{
		{"open the first epoch", nil, open},
		{"open the next epoch", []operation{open, acquire}, open},
		{"open an epoch and tidy up", []operation{many}, open},
		{"acquire", []operation{open}, acquire},
		{"acquire again", []operation{open, acquire}, acquire},
		{"close", []operation{open, acquire}, end},
		{"close what nobody acquired", []operation{open}, end},
		{"forget", []operation{open, acquire, end, open}, forget},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			// It takes as many steps as one that nothing happens to.
			sound := unharmed()
			template, before := prepared(t, c.before)
			_, after := play(t, sound, template, c.do)
			if len(sound.steps) < 3 {
				t.Fatalf("only the steps %v", sound.steps)
			}
			for _, how := range deaths(sound.steps) {
				path, _ := play(t, how, template, c.do)
				d, err := NewDir(DirConfig{Path: path})
				if err != nil {
					t.Fatal(err)
				}
				now := look(t, d)
				// What nobody had is acquired before it is closed.
				between := after
				between.Closed = between.Closed && c.name != "close what nobody acquired"
				if !same(now, before) && !same(now, after) && !same(now, between) {
					t.Fatalf("%s: %+v, neither %+v nor %+v", how, now, before, after)
				}
				judgeWinner(t, how, d, now)
				// Who asked meanwhile may have won.
				if err := c.do(t, d); err != nil && !errors.Is(err, ErrLost) && !errors.Is(err, ErrOwned) && !errors.Is(err, ErrStale) && !errors.Is(err, ErrNoRecord) {
					t.Fatalf("%s: repeated: %v", how, err)
				}
				look(t, d)
			}
		})
	}
}

// judgeWinner lets both hosts of an epoch ask for it: one of them gets it.
func judgeWinner(t *testing.T, how *death, d *Dir, r Record) {
	t.Helper()
	if r.Epoch == 0 {
		return
	}
	won := map[string]bool{}
	for _, host := range []string{"b", "a", "b"} {
		err := d.Acquire(t.Context(), crashDomain, r.Epoch, host)
		if err != nil && !errors.Is(err, ErrLost) {
			t.Fatalf("%s: then %s asks: %v", how, host, err)
		}
		if err == nil {
			won[host] = true
		}
	}
	if len(won) > 1 || len(won) == 0 && !r.Closed || r.Owner == "a" && won["b"] {
		t.Fatalf("%s: epoch %d, which was %q's, was won by %v", how, r.Epoch, r.Owner, won)
	}
}

// prepared makes a directory and does what comes before.
func prepared(t *testing.T, before []func(*testing.T, *Dir) error) (path string, r Record) {
	t.Helper()
	path = t.TempDir()
	if _, err := InitDir(t.Context(), DirConfig{Path: path}); err != nil {
		t.Fatal(err)
	}
	d, err := NewDir(DirConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range before {
		if err := f(t, d); err != nil {
			t.Fatal(err)
		}
	}
	return path, look(t, d)
}

// play lets do be ended in a copy of a directory.
func play(t *testing.T, how *death, template string, do func(*testing.T, *Dir) error) (path string, after Record) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "arbiter")
	if err := os.CopyFS(path, os.DirFS(template)); err != nil {
		t.Fatal(err)
	}
	victim, err := NewDir(DirConfig{Path: path, Fault: how.fault})
	if err != nil {
		t.Fatal(err)
	}
	if err := do(t, victim); err != nil && !how.dead {
		t.Fatal(err)
	}
	sound, err := NewDir(DirConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	return path, look(t, sound)
}

func look(t *testing.T, d *Dir) Record {
	t.Helper()
	r, err := d.Lookup(t.Context(), crashDomain)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		t.Fatal(err)
	}
	return r
}

// same compares what decides.
func same(a, b Record) bool {
	return a.Epoch == b.Epoch && a.Primary == b.Primary && a.Backup == b.Backup && a.Owner == b.Owner && a.Closed == b.Closed
}

// The directory itself is being made when the machine dies.
func TestInitKilledAtEachStep(t *testing.T) {
	t.Parallel()
	sound := unharmed()
	if _, err := InitDir(t.Context(), DirConfig{Path: t.TempDir(), Fault: sound.fault}); err != nil {
		t.Fatal(err)
	}
	for _, how := range deaths(sound.steps) {
		path := t.TempDir()
		_, _ = InitDir(t.Context(), DirConfig{Path: path, Fault: how.fault})
		first, err := InitDir(t.Context(), DirConfig{Path: path})
		if err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if again, err := InitDir(t.Context(), DirConfig{Path: path}); err != nil || again != first {
			t.Fatalf("%s: identity %q, then %q, %v", how, first, again, err)
		}
	}
}

// TestWitnessKilledAtEachStep: a witness dies at each step of a vote. It comes up
// again with the vote of before or the new one, and never without one that it has
// answered with.
func TestWitnessKilledAtEachStep(t *testing.T) {
	t.Parallel()
	promise := paxos.Request{Op: paxos.OpPrepare, Ballot: paxos.Ballot{Round: 1, Proposer: "a"}}
	accept := paxos.Request{Op: paxos.OpAccept, Ballot: promise.Ballot, Value: []byte("a")}
	vote := func(how *death) (path string, replied bool) {
		path = t.TempDir()
		if _, err := InitWitness(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		serve := func(fault FaultFunc, r paxos.Request) error {
			w := openWitness(t, path, fault)
			defer func() { _ = w.Close() }()
			_, err := w.step(t.Context(), crashDomain, r)
			return err
		}
		if err := serve(nil, promise); err != nil {
			t.Fatal(err)
		}
		armed := false
		w := openWitness(t, path, func(f Fault) error {
			if !armed {
				return nil
			}
			return how.fault(f)
		})
		defer func() { _ = w.Close() }()
		armed = true
		_, err := w.step(t.Context(), crashDomain, accept)
		return path, err == nil
	}
	sound := unharmed()
	if _, replied := vote(sound); !replied || len(sound.steps) < 5 {
		t.Fatalf("answered: %v, after %v", replied, sound.steps)
	}
	for _, how := range deaths(sound.steps) {
		path, replied := vote(how)
		w := openWitness(t, path, nil)
		a, err := w.load(t.Context(), crashDomain)
		if err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		before := paxos.Acceptor{Promised: promise.Ballot}
		after := paxos.Acceptor{Promised: promise.Ballot, Accepted: promise.Ballot, Value: accept.Value}
		if !reflect.DeepEqual(a, after) && (replied || !reflect.DeepEqual(a, before)) {
			t.Errorf("%s: it answered: %v, and has %+v", how, replied, a)
		}
		if _, err := w.step(t.Context(), crashDomain, accept); err != nil {
			t.Errorf("%s: asked again: %v", how, err)
		}
		if left, _ := filepath.Glob(filepath.Join(path, tempPrefix+"*")); len(left) > 0 {
			t.Errorf("%s: %v is left", how, left)
		}
		_ = w.Close()
	}
}

func openWitness(t *testing.T, path string, fault FaultFunc) *Witness {
	t.Helper()
	w, err := OpenWitness(t.Context(), WitnessConfig{
		Path: path, Key: key(strings.Repeat("k", minKey)), Fault: fault, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// A key that is being made is there as a whole or not at all.
func TestKeyKilledAtEachStep(t *testing.T) {
	t.Parallel()
	sound := unharmed()
	if err := makeKey(filepath.Join(t.TempDir(), "key"), sound.fault); err != nil {
		t.Fatal(err)
	}
	for _, how := range deaths(sound.steps) {
		if how.after {
			continue // it is before the next
		}
		path := filepath.Join(t.TempDir(), "key")
		if err := makeKey(path, how.fault); !errors.Is(err, errKilled) {
			t.Fatalf("%s: %v", how, err)
		}
		if _, err := os.Stat(path); err == nil {
			if _, err := ReadKey(path); err != nil {
				t.Fatalf("%s: %v", how, err)
			}
			continue
		}
		if err := MakeKey(path); err != nil {
			t.Fatalf("%s: tried again: %v", how, err)
		}
		if _, err := ReadKey(path); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
	}
}
