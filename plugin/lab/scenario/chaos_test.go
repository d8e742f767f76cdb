// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
)

func steps(seed uint64, n int) []Step {
	p := newPlan(seed)
	list := make([]Step, n)
	for i := range list {
		list[i] = p.next()
	}
	return list
}

// The guarantees are for one failure at a time: a plan that asked for more would
// find fault with what is right.
func TestPlansAreSurvivable(t *testing.T) {
	for seed := range uint64(200) {
		for number, s := range steps(seed, 60) {
			for i, o := range s.Others {
				if o.Grave() {
					t.Errorf("seed %d, step %d: %s at the same time as %s", seed, number, o, s.Main)
				}
				if clash(o, append([]Fault{s.Main}, s.Others[:i]...)) {
					t.Errorf("seed %d, step %d: %s cannot be told from the others", seed, number, o)
				}
			}
			if s.Again != nil && (s.Again.Fatal() || !s.Main.Breaks()) {
				t.Errorf("seed %d, step %d: %s while the pair is being made after %s", seed, number, s.Again, s.Main)
			}
			for _, f := range s.Faults() {
				longest, latest := 5*time.Second, 2*time.Second
				if libvirt(f) {
					longest = 15 * time.Second
				}
				if s.reboots() {
					latest = longestBoot
				}
				if f.For < 0 || f.For > longest || f.After < 0 || f.After > latest {
					t.Errorf("seed %d, step %d: %s", seed, number, f)
				}
				if (f.Network != "") != (f.Kind == Unplug || f.Kind == BadWire) || (f.Storage != "") != (f.Kind == BadStorage) {
					t.Errorf("seed %d, step %d: %s is not complete", seed, number, f)
				}
				if (f.Out != lab.Weather{} || f.In != lab.Weather{}) != (f.Kind == BadWire) {
					t.Errorf("seed %d, step %d: %s does nothing, or too much", seed, number, f)
				}
			}
		}
	}
}

func TestPlansFollowFromTheSeed(t *testing.T) {
	if a, b := steps(7, 50), steps(7, 50); !reflect.DeepEqual(a, b) {
		t.Error("two plans of one seed differ")
	}
	if a, b := steps(7, 50), steps(8, 50); reflect.DeepEqual(a, b) {
		t.Error("two seeds give one plan")
	}
}

// Each kind comes as a main fault before any deck is over, and everything that
// can go wrong does in a few hours' worth of steps.
func TestPlansLeaveNothingOut(t *testing.T) {
	size := len(newPlan(1).cards())
	kinds := map[Kind]bool{}
	for _, s := range steps(1, size) {
		kinds[s.Main.Kind] = true
	}
	for _, k := range []Kind{
		KillQEMU, EndQEMU, StopQEMU, KillAgent, StopAgent, EndAgent, Freeze, Crash, StopHost, Unplug, BadWire, BadStorage, FullDisk, Reboot,
	} {
		if !kinds[k] {
			t.Errorf("no %s among the first %d steps", k, size)
		}
	}
	seen := map[string]bool{}
	for _, s := range steps(1, 2000) {
		for _, f := range s.Faults() {
			seen[string(f.Kind)+" "+string(f.Part)] = true
			for _, w := range []lab.Weather{f.Out, f.In} {
				seen[string(f.Network)+" cut"] = seen[string(f.Network)+" cut"] || w.Cut
				seen["delay"] = seen["delay"] || w.Delay > 0
				seen["drop"] = seen["drop"] || w.Drop > 0
				seen["reorder"] = seen["reorder"] || w.Reorder
				seen["no TCP"] = seen["no TCP"] || w.NoTCP
				seen["black hole"] = seen["black hole"] || w.Largest > 0
			}
			seen[string(f.Storage)] = true
		}
		along := func(k Kind, part Part) bool {
			return slices.ContainsFunc(s.Others, func(f Fault) bool { return f.Kind == k && f.Part == part })
		}
		seen["failover in a boot"] = seen["failover in a boot"] || s.Main.Fatal() && along(Reboot, Guest)
		seen["failover without libvirt"] = seen["failover without libvirt"] || s.Main.Fatal() && along(StopLibvirt, Backup)
	}
	for _, want := range []string{
		"kill-qemu primary", "kill-qemu backup", "crash primary", "crash backup", "crash spare", "kill-agent spare",
		"freeze primary", "freeze backup", "kill-libvirtd primary", "stop-libvirtd spare", "unplug spare", "bad-storage each",
		"service cut", "logging cut", "delay", "drop", "reorder", "away", "read-only", "slow", "hung", "no TCP", "black hole",
		"end-qemu primary", "end-qemu backup", "stop-host primary", "stop-host backup", "full-disk primary", "full-disk backup", "reboot guest",
		"failover in a boot", "failover without libvirt",
	} {
		if !seen[want] {
			t.Errorf("never: %s", want)
		}
	}
}

// With one directory for all, no host's disk is full alone.
func TestPlansOfSharedImages(t *testing.T) {
	p := newPlan(1)
	p.next()
	p.share(true)
	for range 2000 {
		for _, f := range p.next().Faults() {
			if f.Kind == FullDisk {
				t.Fatalf("step %d: %s", p.steps, f)
			}
		}
	}
}

func TestGrave(t *testing.T) {
	wire := func(part Part, n lab.Network, w lab.Weather) Fault {
		return Fault{Kind: BadWire, Part: part, Network: n, In: w}
	}
	for _, test := range []struct {
		fault Fault
		want  bool
	}{
		{Fault{Kind: KillQEMU, Part: Backup}, true},
		{Fault{Kind: StopAgent, Part: Primary}, true},
		{Fault{Kind: StopAgent, Part: Spare}, false},
		{Fault{Kind: Crash, Part: Spare}, false},
		{Fault{Kind: KillLibvirt, Part: Primary}, false},
		{Fault{Kind: EndQEMU, Part: Backup}, true},
		{Fault{Kind: StopHost, Part: Primary}, true},
		{Fault{Kind: FullDisk, Part: Backup}, true},
		{Fault{Kind: Reboot, Part: Guest}, false},
		{wire(Primary, lab.Logging, lab.Weather{NoTCP: true}), true},
		{wire(Primary, lab.Logging, lab.Weather{Largest: 1000}), true},
		{Fault{Kind: BadStorage, Part: Each, Storage: lab.StorageHung}, false},
		{Fault{Kind: Unplug, Part: Backup, Network: lab.Logging}, true},
		{Fault{Kind: Unplug, Part: Backup, Network: lab.Service}, false},
		{wire(Primary, lab.Logging, lab.Weather{Drop: 0.01}), true},
		{wire(Primary, lab.Logging, lab.Weather{Cut: true}), true},
		{wire(Primary, lab.Logging, lab.Weather{Delay: mildDelay + 1}), true},
		{wire(Primary, lab.Logging, lab.Weather{Delay: mildDelay / 2, Jitter: mildDelay / 2}), false},
		{wire(Primary, lab.Service, lab.Weather{Cut: true}), false},
	} {
		if got := test.fault.Grave(); got != test.want {
			t.Errorf("%s: grave is %v", test.fault, got)
		}
	}
}

func TestPercentile(t *testing.T) {
	list := []time.Duration{3, 1, 2}
	for of, want := range map[int]time.Duration{1: 1, 50: 2, 67: 3, 99: 3, 100: 3} {
		if got := percentile(list, of); got != want {
			t.Errorf("%d of a hundred: %d, want %d", of, got, want)
		}
	}
	if got := percentile(nil, 99); got != 0 {
		t.Errorf("of nothing: %d", got)
	}
}
