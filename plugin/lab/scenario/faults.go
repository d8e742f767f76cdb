// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
)

// What the faults demand.
const (
	// stopped is how long a process does not run.
	stopped = 30 * time.Second
	// servedLimit is how soon the guest must answer while a fault lasts that one
	// of its copies does not feel, a failover included.
	servedLimit = 20 * time.Second
	// resumeLimit is how soon it must go on after one that it felt: TCP waits
	// up to twice as long as it was cut off.
	resumeLimit = 2*stopped + 10*time.Second
	// small is the room of the file systems that faults fill: the log of a pair
	// and then some.
	smallBytes = 96 << 20
	smallFiles = 512
)

// Ports of what a lab leaves off otherwise.
const (
	metricsPort = ":7712"
	webPort     = ":7713"
)

// ErrFault is wrapped when a fault had an effect that it must not have.
var ErrFault = errors.New("a fault had an effect")

// Faults takes resources away from a protected pair, damages its files, stops its
// processes, and demands each time that the guest goes on and that the pair is
// whole again afterwards.
func Faults(ctx context.Context, o Options) error {
	o.HostCount = 2
	r := &run{Options: o, start: time.Now(), configure: func(c *config.Config) {
		c.Metrics.Listen, c.Web.Listen = metricsPort, webPort
		// By name, so that names must be resolved.
		for name, p := range c.Peers {
			p.Channel, p.Heartbeat = name+config.Default().Channel.Listen, name+config.Default().Heartbeat.Listen
			c.Peers[name] = p
		}
	}}
	return r.run(ctx, "faults", faults)
}

// trial is one fault, put to one host of the pair.
type trial struct {
	name string
	part Part
	// begin lets it happen; undo, unless nil, ends it, whatever else failed.
	begin func(ctx context.Context, h *lab.Host, c couple) (undo func(context.Context) error, err error)
	// lasts is how long at least.
	lasts time.Duration
	// during, unless nil, demands something while it lasts, and tells what it
	// saw.
	during func(ctx context.Context, h *lab.Host, c couple) (string, error)
	// keeps: it may not even cost the backup.
	keeps bool
	// silent: the guest need not answer while it lasts.
	silent bool
}

func (t trial) String() string { return fmt.Sprintf("%s (%s)", t.name, t.part) }

// ordeal is a run of faults.
type ordeal struct {
	*storm
	cases int
}

func faults(ctx context.Context, r *run) (figures string, err error) {
	o := &ordeal{storm: &storm{run: r}}
	if err := o.makeRoomSmall(ctx); err != nil {
		return "", err
	}
	a, b := r.Pair()
	if o.vm, err = r.StartVM(ctx, a, b, 0, "guest"); err != nil {
		return "", err
	}
	if o.witness, err = o.vm.Witness(ctx, a); err != nil {
		return "", err
	}
	defer o.witness.Close()
	if o.traffic, err = o.vm.Traffic(ctx); err != nil {
		return "", err
	}
	defer o.traffic.Close()
	if o.ledger, err = o.vm.Ledger(ctx); err != nil {
		return "", err
	}
	defer o.ledger.Close()
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer stop()
	watch.Go(func() { o.watchLines(watching) })
	if _, err := o.waitWhole(ctx, time.Now(), redundantLimit); err != nil {
		return "", err
	}
	r.say("the guest is protected")
	for _, list := range [][]trial{o.full(), o.starved(), o.clocks(), o.crowds(), o.paths(), o.stops(), o.damage()} {
		for _, t := range list {
			if r.Only != nil && !r.Only.MatchString(t.String()) {
				continue
			}
			told, failure := o.endure(ctx, t)
			if failure != nil {
				err = fmt.Errorf("%s: %w", t, failure)
				break
			}
			o.cases++
			r.say("ok: %s: %s", t, told)
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		stop()
		watch.Wait()
		err = o.settle(ctx)
	}
	split, _ := o.witness.Verdict()
	lost := 0
	if errors.Is(err, ErrTraffic) {
		lost = 1
	}
	if err != nil {
		r.say("%s", o.witness.History())
	}
	replies, _, _ := o.traffic.Counts()
	return fmt.Sprintf("cases=%d vm_lost=%d split=%d failovers=%d replies=%d", o.cases, lost, split, o.witness.Failovers(), replies), err
}

// makeRoomSmall gives what the agents write to file systems of their own, which
// can be filled.
func (o *ordeal) makeRoomSmall(ctx context.Context) error {
	c := config.Default().Agent
	for _, h := range o.Hosts() {
		if err := h.StopAgent(ctx); err != nil {
			return err
		}
		for _, path := range []string{c.RunDir, c.StateDir} {
			if err := h.MountSmall(ctx, path, smallBytes, smallFiles); err != nil {
				return err
			}
		}
		o.agents[h.Name] = client.New(h.Path(c.AdminSocket))
		if err := o.StartAgent(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

// endure lets one fault happen, and demands what every one allows.
func (o *ordeal) endure(ctx context.Context, t trial) (string, error) {
	before, err := o.pair(ctx)
	if err != nil {
		return "", err
	}
	h := before.primary
	if t.part == Backup {
		h = before.backup
	}
	hosts := o.witness.Failovers()
	began := time.Now()
	undo, err := t.begin(ctx, h, before)
	told := ""
	if err == nil {
		told, err = o.bear(ctx, t, h, before, began)
	}
	// In any case: the lab is to be taken down.
	if undo != nil {
		err = errors.Join(err, undo(context.WithoutCancel(ctx)))
	}
	if err != nil {
		return "", err
	}
	healed := time.Now()
	whole, err := o.waitWhole(ctx, healed, redundantLimit)
	if err != nil {
		return "", err
	}
	if _, err := o.traffic.WaitReply(ctx, healed, resumeLimit); err != nil {
		return "", err
	}
	if err := o.check(ctx); err != nil {
		return "", err
	}
	after, err := o.pair(ctx)
	if err != nil {
		return "", err
	}
	outcome := fmt.Sprintf("a new backup %.1f s after it", whole.Seconds())
	switch {
	case after.epoch == before.epoch:
		outcome = "the pair stayed"
	case t.keeps:
		return "", fmt.Errorf("%w: it cost the pair; epoch %d, before %d", ErrFault, after.epoch, before.epoch)
	case o.witness.Failovers() != hosts:
		outcome = "failed over, " + outcome
	}
	outcome += fmt.Sprintf(", longest gap %s ms", ms(o.traffic.LongestGap(began)))
	if told != "" {
		outcome = told + "; " + outcome
	}
	return outcome, nil
}

// bear lets the time pass for which a fault lasts.
func (o *ordeal) bear(ctx context.Context, t trial, h *lab.Host, c couple, began time.Time) (told string, err error) {
	if t.during != nil {
		if told, err = t.during(ctx, h, c); err != nil {
			return "", err
		}
	}
	if err := Pause(ctx, time.Until(began.Add(t.lasts))); err != nil {
		return "", err
	}
	if !t.silent {
		_, err = o.traffic.WaitReply(ctx, began, servedLimit)
	}
	return told, err
}

// other is the one of the pair that is not h.
func (c couple) other(h *lab.Host) *lab.Host {
	if h == c.primary {
		return c.backup
	}
	return c.primary
}

// both gives a trial for each host of the pair.
func both(t trial) []trial {
	p, b := t, t
	p.part, b.part = Primary, Backup
	return []trial{p, b}
}

// says waits for a line in the log of a host's agent that comes after from bytes.
func (o *ordeal) says(ctx context.Context, h *lab.Host, from int, text string) (string, error) {
	err := poll(ctx, servedLimit, func(context.Context) (bool, error) {
		log, err := h.AgentLog()
		if err != nil {
			return false, err
		}
		return strings.Contains(log[min(from, len(log)):], text), nil
	})
	if err != nil {
		return "", fmt.Errorf("%w: the agent of %s does not say %q: %w", ErrFault, h.Name, text, err)
	}
	return fmt.Sprintf("%s says %q", h.Name, text), nil
}

func logSize(h *lab.Host) int {
	text, _ := h.AgentLog()
	return len(text)
}

// cut takes the logging network away from a host for so long that the pair must
// decide.
func (o *ordeal) cut(ctx context.Context, h *lab.Host) error {
	if err := h.CutLink(ctx, lab.Logging); err != nil {
		return err
	}
	err := Pause(ctx, 3*config.Default().Heartbeat.Timeout)
	return errors.Join(err, h.RestoreLink(context.WithoutCancel(ctx), lab.Logging))
}

func (o *ordeal) address(h *lab.Host, listen string) netip.AddrPort {
	return netip.MustParseAddrPort(h.LoggingAddr().String() + listen)
}
