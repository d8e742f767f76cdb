// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
)

// Part is what a host is to the guest when a fault comes.
type Part string

// The parts. The spare is the third host.
const (
	Primary Part = "primary"
	Backup  Part = "backup"
	Spare   Part = "spare"
	Each    Part = "each"  // all hosts
	Guest   Part = "guest" // which is where the primary is
)

// Kind is a kind of fault.
type Kind string

// The kinds. A fault that lasts is undone when its time is over: what was
// killed is started, what was stopped continues. A QEMU that was killed stays
// dead.
const (
	KillQEMU    Kind = "kill-qemu"
	EndQEMU     Kind = "end-qemu" // by SIGTERM, as the end of its host does
	StopQEMU    Kind = "stop-qemu"
	KillAgent   Kind = "kill-agent"
	StopAgent   Kind = "stop-agent"
	EndAgent    Kind = "end-agent" // in order, as for an upgrade
	KillLibvirt Kind = "kill-libvirtd"
	StopLibvirt Kind = "stop-libvirtd"
	Freeze      Kind = "freeze" // a host that hangs: all of its processes stop
	Crash       Kind = "crash"
	StopHost    Kind = "stop-host" // in order, as for a reboot
	Unplug      Kind = "unplug"
	BadWire     Kind = "bad-wire"
	BadStorage  Kind = "bad-storage"
	FullDisk    Kind = "full-disk" // where images are, while the guest's disk grows
	Reboot      Kind = "reboot"    // by the guest itself, which syncs nothing before
)

// Fault is one thing that goes wrong.
type Fault struct {
	Kind Kind
	Part Part
	// After is when it comes, counted from the beginning of its step, and For
	// how long it lasts.
	After, For time.Duration

	Network lab.Network // of Unplug and BadWire
	Out, In lab.Weather // of BadWire
	Storage lab.StorageFault
	Delay   time.Duration // of slow storage
}

func (f Fault) String() string {
	text := fmt.Sprintf("%s of the %s", f.Kind, f.Part)
	if f.Part == Each {
		text = fmt.Sprintf("%s of each host", f.Kind)
	}
	switch f.Kind {
	case Unplug:
		text += fmt.Sprintf(", %s network", f.Network)
	case BadWire:
		text += fmt.Sprintf(", %s network, out: %s; in: %s", f.Network, f.Out, f.In)
	case BadStorage:
		text += ", " + string(f.Storage)
		if f.Delay > 0 {
			text += fmt.Sprintf(" by %v", f.Delay)
		}
	case KillQEMU, EndQEMU, Reboot:
		return fmt.Sprintf("%s, after %v", text, f.After)
	}
	return fmt.Sprintf("%s, after %v for %v", text, f.After, f.For)
}

// Grave tells whether the fault may cost a pair one of its copies or the
// connection of both. The guarantees are for one such fault at a time.
func (f Fault) Grave() bool {
	switch f.Kind {
	case KillLibvirt, StopLibvirt, BadStorage, Reboot:
		return false
	case Unplug, BadWire:
		if f.Network != lab.Logging || f.Kind == BadWire && mild(f.Out) && mild(f.In) {
			return false
		}
	}
	return f.Part != Spare
}

// mild tells whether frames are late only, and never by so much that a peer
// could be taken for dead.
func mild(w lab.Weather) bool {
	return !w.Cut && w.Drop == 0 && !w.NoTCP && w.Largest == 0 && w.Delay+w.Jitter <= mildDelay
}

const mildDelay = 100 * time.Millisecond

// Breaks tells whether it costs the pair a copy for certain.
func (f Fault) Breaks() bool {
	return (f.Kind == KillQEMU || f.Kind == EndQEMU || f.down()) && f.Part != Spare
}

// down tells whether the whole host is down for a while.
func (f Fault) down() bool { return f.Kind == Crash || f.Kind == StopHost }

// Fatal tells whether it may cost the primary's copy, even if that is the only
// one.
func (f Fault) Fatal() bool { return f.Part == Primary && f.Breaks() }

// Step is what goes wrong at once, or nearly. The pair is redundant before it
// and must be so again after it.
type Step struct {
	// Rest is how long the pair is left in peace before.
	Rest time.Duration
	// Main is the fault that the step is about. Among the others none is
	// grave.
	Main   Fault
	Others []Fault
	// Again, if not nil, comes while the pair is being made again. It is not
	// fatal, since there is one copy then.
	Again *Fault
}

// reboots tells whether the guest does among all that.
func (s Step) reboots() bool {
	return slices.ContainsFunc(s.Faults(), func(f Fault) bool { return f.Kind == Reboot })
}

// Faults lists them all.
func (s Step) Faults() []Fault {
	all := append([]Fault{s.Main}, s.Others...)
	if s.Again != nil {
		all = append(all, *s.Again)
	}
	return all
}

// plan makes steps out of a seed, without end.
type plan struct {
	random *rand.Rand
	// shared: the hosts have one directory of images, and so one that is full is
	// the fault of none of them.
	shared bool
	deck   []card
	steps  int // so far
}

// card gives a step's main fault, and what comes along with that.
type card func() []Fault

func newPlan(seed uint64) *plan {
	return &plan{random: rand.New(rand.NewPCG(seed, 0x6674766972740a))}
}

// share says whether they have.
func (p *plan) share(images bool) {
	if p.shared != images {
		p.shared, p.deck = images, nil
	}
}

// next makes the next step. Kinds are drawn as from a deck of cards, so that
// each comes before any comes again.
func (p *plan) next() Step {
	if len(p.deck) == 0 {
		p.deck = p.cards()
		p.random.Shuffle(len(p.deck), func(i, j int) { p.deck[i], p.deck[j] = p.deck[j], p.deck[i] })
	}
	p.steps++
	s := Step{Rest: p.span(300*time.Millisecond, 2*time.Second)}
	drawn := p.deck[0]()
	p.deck = p.deck[1:]
	s.Main, s.Others = drawn[0], drawn[1:]
	if s.Main.After == 0 {
		s.Main.After = p.span(0, 500*time.Millisecond)
	}
	if p.chance(0.5) {
		for range 1 + p.random.IntN(2) {
			other := p.harmless()
			if !clash(other, s.Faults()) {
				s.Others = append(s.Others, other)
			}
		}
	}
	if s.Main.Breaks() && p.chance(0.5) {
		again := p.whileAlone()
		s.Again = &again
	}
	return s
}

// clash tells whether a fault would get in another's way: two of the same
// thing, or one on a host that is down.
func clash(f Fault, others []Fault) bool {
	for _, o := range others {
		here := f.Part == o.Part
		switch {
		case here && (f.down() || o.down()):
			return true
		case !here && f.Part != Each && o.Part != Each:
		case f.Kind == o.Kind,
			network(f) != "" && network(f) == network(o),
			libvirt(f) && libvirt(o),
			agent(f) && agent(o):
			return true
		}
	}
	return false
}

func network(f Fault) lab.Network {
	if f.Kind == Unplug || f.Kind == BadWire {
		return f.Network
	}
	return ""
}

func libvirt(f Fault) bool { return f.Kind == KillLibvirt || f.Kind == StopLibvirt }
func agent(f Fault) bool   { return f.Kind == KillAgent || f.Kind == StopAgent || f.Kind == EndAgent }

// cards are the kinds of a step's main fault. Some are there twice.
func (p *plan) cards() []card {
	alone := func(f func() Fault) card { return func() []Fault { return []Fault{f()} } }
	on := func(k Kind, part Part, shortest, longest time.Duration) card {
		return alone(func() Fault { return Fault{Kind: k, Part: part, For: p.span(shortest, longest)} })
	}
	const ms = time.Millisecond
	cards := []card{
		on(KillQEMU, Primary, 0, 0), on(KillQEMU, Primary, 0, 0), on(KillQEMU, Backup, 0, 0),
		on(EndQEMU, Primary, 0, 0), on(EndQEMU, Backup, 0, 0),
		on(StopQEMU, Primary, 100*ms, 3000*ms), on(StopQEMU, Backup, 100*ms, 3000*ms),
		on(KillAgent, Primary, 0, 2000*ms), on(KillAgent, Backup, 0, 2000*ms),
		on(StopAgent, Primary, 100*ms, 3000*ms), on(StopAgent, Backup, 100*ms, 3000*ms),
		on(EndAgent, p.either(), 0, 1000*ms),
		on(Freeze, p.either(), 100*ms, 3000*ms),
		on(Crash, Primary, 1000*ms, 4000*ms), on(Crash, p.either(), 1000*ms, 4000*ms),
		on(StopHost, Primary, 1000*ms, 4000*ms), on(StopHost, p.either(), 1000*ms, 4000*ms),
		alone(func() Fault { return p.unplug(lab.Logging, p.either()) }),
		alone(func() Fault { return p.oneWay(lab.Logging, p.either()) }),
		alone(func() Fault { return p.badWire(lab.Logging, p.either()) }),
		alone(func() Fault { return p.badWire(lab.Logging, p.either()) }),
		alone(func() Fault { return p.choosyWire(lab.Weather{NoTCP: true}) }),
		alone(func() Fault { return p.choosyWire(lab.Weather{Largest: 100 + p.random.IntN(1300)}) }),
		alone(p.service), alone(p.storage), alone(p.libvirt),
		on(Reboot, Guest, 0, 0), p.duringBoot, p.duringBoot, p.withoutLibvirt,
	}
	if !p.shared {
		cards = append(cards, on(FullDisk, Primary, 1000*ms, 4000*ms), on(FullDisk, Backup, 1000*ms, 4000*ms))
	}
	return cards
}

// duringBoot makes a fault for the time in which the guest reboots: in its
// firmware, or while its kernel sets its devices up.
func (p *plan) duringBoot() []Fault {
	f := Fault{
		Kind: pick(p, KillQEMU, KillQEMU, EndQEMU, Crash, StopAgent), Part: pick(p, Primary, Primary, Backup),
		After: p.span(time.Millisecond, longestBoot),
	}
	if f.Kind != KillQEMU && f.Kind != EndQEMU {
		f.For = p.span(time.Second, 3*time.Second)
	}
	return []Fault{f, {Kind: Reboot, Part: Guest}}
}

// longestBoot is how long the lab's guest takes to boot, or a little longer.
const longestBoot = 10 * time.Second

// withoutLibvirt makes a failover to a host whose libvirtd does not answer, for
// longer than anybody waits for it.
func (p *plan) withoutLibvirt() []Fault {
	f := Fault{Kind: pick(p, KillQEMU, KillQEMU, EndQEMU, Crash), Part: Primary, After: p.span(200*time.Millisecond, time.Second)}
	if f.Kind == Crash {
		f.For = p.span(time.Second, 4*time.Second)
	}
	return []Fault{f, {Kind: pick(p, StopLibvirt, StopLibvirt, KillLibvirt), Part: Backup, For: p.span(2*time.Second, 15*time.Second)}}
}

// harmless makes a fault that costs the pair nothing.
func (p *plan) harmless() Fault {
	var f Fault
	switch p.random.IntN(7) {
	case 0, 1:
		f = p.storage()
	case 2:
		f = p.libvirt()
	case 3:
		f = p.service()
	case 4:
		f = p.mildWire()
	default:
		f = p.onSpare()
	}
	f.After = p.span(0, 800*time.Millisecond)
	return f
}

func (p *plan) onSpare() Fault {
	switch p.random.IntN(4) {
	case 0:
		return Fault{Kind: Crash, Part: Spare, For: p.span(time.Second, 4*time.Second)}
	case 1:
		return Fault{Kind: KillAgent, Part: Spare, For: p.span(0, 2*time.Second)}
	case 2:
		return Fault{Kind: StopAgent, Part: Spare, For: p.span(0, 3*time.Second)}
	default:
		return p.unplug(lab.Logging, Spare)
	}
}

// whileAlone makes a fault for the time of the next clone. The backup is then
// the host that is to become it.
func (p *plan) whileAlone() Fault {
	var f Fault
	switch p.random.IntN(10) {
	case 0:
		f = Fault{Kind: pick(p, KillQEMU, EndQEMU), Part: Backup}
	case 1:
		f = Fault{Kind: KillAgent, Part: Backup, For: p.span(0, 2*time.Second)}
	case 2:
		f = Fault{Kind: KillAgent, Part: Primary, For: p.span(0, 2*time.Second)}
	case 3:
		f = Fault{Kind: Crash, Part: Backup, For: p.span(time.Second, 4*time.Second)}
	case 4:
		f = p.unplug(lab.Logging, p.either())
	case 5:
		f = p.badWire(lab.Logging, p.either())
	case 6:
		f = p.choosyWire(pick(p, lab.Weather{NoTCP: true}, lab.Weather{Largest: 1000}))
	case 7:
		f = Fault{Kind: StopHost, Part: Backup, For: p.span(time.Second, 4*time.Second)}
	case 8:
		if !p.shared {
			f = Fault{Kind: FullDisk, Part: Backup, For: p.span(time.Second, 4*time.Second)}
			break
		}
		fallthrough
	default:
		f = p.libvirt()
	}
	f.After = p.span(0, 2*time.Second)
	return f
}

func (p *plan) libvirt() Fault {
	return Fault{
		Kind: pick(p, KillLibvirt, StopLibvirt), Part: pick(p, Primary, Backup, Spare),
		For: p.span(100*time.Millisecond, 3*time.Second),
	}
}

func (p *plan) storage() Fault {
	f := Fault{
		Kind: BadStorage, Part: pick(p, Primary, Backup, Each, Each),
		Storage: pick(p, lab.StorageAway, lab.StorageReadOnly, lab.StorageSlow, lab.StorageHung),
		For:     p.span(500*time.Millisecond, 5*time.Second),
	}
	if f.Storage == lab.StorageSlow {
		f.Delay = p.span(20*time.Millisecond, 800*time.Millisecond)
	}
	return f
}

func (p *plan) service() Fault {
	switch part := pick(p, Primary, Primary, Backup); p.random.IntN(4) {
	case 0:
		return p.unplug(lab.Service, part)
	case 1:
		return p.oneWay(lab.Service, part)
	default:
		return p.badWire(lab.Service, part)
	}
}

func (p *plan) unplug(n lab.Network, part Part) Fault {
	return Fault{Kind: Unplug, Part: part, Network: n, For: p.span(50*time.Millisecond, 3*time.Second)}
}

func (p *plan) oneWay(n lab.Network, part Part) Fault {
	f := Fault{Kind: BadWire, Part: part, Network: n, For: p.span(100*time.Millisecond, 3*time.Second)}
	if p.chance(0.5) {
		f.Out.Cut = true
	} else {
		f.In.Cut = true
	}
	return f
}

// choosyWire makes a cable of the logging network over which a part of the
// packets does not come, in one direction or both.
func (p *plan) choosyWire(w lab.Weather) Fault {
	f := Fault{Kind: BadWire, Part: p.either(), Network: lab.Logging, For: p.span(500*time.Millisecond, 5*time.Second)}
	switch p.random.IntN(3) {
	case 0:
		f.Out = w
	case 1:
		f.In = w
	default:
		f.Out, f.In = w, w
	}
	return f
}

// mildWire makes a cable over which all comes, later.
func (p *plan) mildWire() Fault {
	f := Fault{Kind: BadWire, Part: p.either(), Network: lab.Logging, For: p.span(time.Second, 5*time.Second)}
	f.Out = lab.Weather{Delay: p.span(time.Millisecond, mildDelay*8/10), Jitter: p.span(time.Millisecond, mildDelay/5), Reorder: p.chance(0.3)}
	if p.chance(0.5) {
		f.In = lab.Weather{Delay: p.span(time.Millisecond, mildDelay*8/10)}
	}
	return f
}

// badWire makes a cable that is bad in one direction or both.
func (p *plan) badWire(n lab.Network, part Part) Fault {
	f := Fault{Kind: BadWire, Part: part, Network: n, For: p.span(time.Second, 5*time.Second)}
	weather := func() lab.Weather {
		switch p.random.IntN(3) {
		case 0:
			return lab.Weather{Delay: p.span(time.Millisecond, 150*time.Millisecond), Jitter: p.span(0, 50*time.Millisecond)}
		case 1:
			return lab.Weather{Drop: float64(1+p.random.IntN(30)) / 100}
		default:
			return lab.Weather{Jitter: p.span(5*time.Millisecond, 60*time.Millisecond), Reorder: true}
		}
	}
	switch p.random.IntN(3) {
	case 0:
		f.Out = weather()
	case 1:
		f.In = weather()
	default:
		f.Out, f.In = weather(), weather()
	}
	return f
}

func (p *plan) either() Part { return pick(p, Primary, Backup) }

func (p *plan) chance(share float64) bool { return p.random.Float64() < share }

func (p *plan) span(shortest, longest time.Duration) time.Duration {
	if longest <= shortest {
		return shortest
	}
	return (shortest + time.Duration(p.random.Int64N(int64(longest-shortest)))).Round(time.Millisecond)
}

func pick[T any](p *plan, from ...T) T { return from[p.random.IntN(len(from))] }
