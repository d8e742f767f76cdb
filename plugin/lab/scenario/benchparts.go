// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/bench"
)

// Names of what is measured beside the works.
const (
	logWire     = "log on the wire"
	logRaw      = "log of QEMU"
	logWireEach = "wire bytes per 1000 instructions"
	logRawEach  = "log bytes per 1000 instructions"
	lagName     = "execution lag"
	networkName = "logging network round trip"
	pauseName   = "clone pause"
	replyName   = "failover to the next reply"
	perSecond   = "Mbit/s"
	millisUnit  = "ms"
	perThousand = "B/kinsn"
)

// benchWork has guests in all configurations do all works in turn, round by
// round.
func benchWork(ctx context.Context, b *benchmark) (err error) {
	hosta, hostb := b.Pair()
	shift := config.Default().Replay.ICountShift
	var vms []*VM
	defer func() { err = errors.Join(err, removeAll(ctx, vms)) }()
	boot := func(peer *lab.Host, config string, more ...string) (*VM, error) {
		n := len(vms)
		vm, err := b.startBench(ctx, hosta, peer, n, fmt.Sprintf("work%d", n), editBench(benchMemory, more...))
		if err != nil {
			return nil, err
		}
		vms = append(vms, vm)
		b.say("%s: %s", vm.Name, config)
		return vm, nil
	}
	var subjects []subject
	for _, c := range []struct {
		config string
		peer   *lab.Host
		more   []string
	}{
		{configPlain, nil, nil},
		{configCounted, nil, counted(shift)},
		{configIdle, hostb, nil},
		{configProtected, hostb, nil},
	} {
		vm, err := boot(c.peer, c.config, c.more...)
		if err != nil {
			return err
		}
		s, err := b.serve(ctx, hosta, vm, c.config)
		if err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	if !b.Quick {
		c := &coloSubject{b: b}
		defer func() { err = errors.Join(err, c.end(ctx)) }()
		if lacks := b.hasCOLO(); lacks == nil {
			subjects = append(subjects, c.subject())
		} else {
			for _, w := range works {
				b.report.Skip(w.name, configCOLO, lacks.Error())
			}
		}
	}
	rounds, limit := 5, 13*time.Minute
	if b.Quick {
		rounds, limit = 3, 170*time.Second
	}
	if b.Length > 0 {
		limit = b.Length
	}
	start := time.Now()
	for round := range rounds {
		// A machine that does other things as well gets fewer.
		if time.Since(start) > limit*time.Duration(rounds-1)/time.Duration(rounds) {
			break
		}
		if err := b.networkTrip(ctx, 0); err != nil {
			return err
		}
		for _, w := range works {
			if b.Quick && !w.quick {
				continue
			}
			turn := subjects
			if w.unit == "" {
				turn = slices.DeleteFunc(slices.Clone(subjects), func(s subject) bool { return s.pair == nil })
			}
			if err := b.measure(ctx, w, turn); err != nil {
				return err
			}
		}
		b.say("round %d of %d is done", round+1, rounds)
	}
	return nil
}

func (b *benchmark) addLog(what string, f logFigures) {
	b.report.Add(logWire+", "+what, configProtected, perSecond, false, f.wire)
	b.report.Add(logRaw+", "+what, configProtected, perSecond, false, f.raw)
	b.report.Add(logWireEach+", "+what, configProtected, perThousand, false, f.wirePerThousand)
	b.report.Add(logRawEach+", "+what, configProtected, perThousand, false, f.rawPerThousand)
}

func removeAll(ctx context.Context, vms []*VM) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for _, vm := range vms {
		errs = append(errs, vm.Remove(ctx))
	}
	return errors.Join(errs...)
}

// tripPort is where the logging network is measured; not one of COLO's.
const tripPort = 9990

// networkTrip measures the microseconds of a round trip between the hosts on
// the logging network, as two programs see it.
func (b *benchmark) networkTrip(ctx context.Context, d time.Duration) error {
	hosta, hostb := b.Pair()
	to := netip.AddrPortFrom(hostb.LoggingAddr(), tripPort)
	listener, err := hostb.Listen(ctx, to)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	go echo(listener)
	times, err := echoTimes(ctx, hosta.Dial, to, roundTrips)
	if err != nil {
		return err
	}
	b.report.Add(atDelay(networkName, d), configProtected, "µs", false, times.Median())
	return nil
}

// echo gives the first who connects back what it sends.
func echo(listener net.Listener) {
	conn, err := listener.Accept()
	if err != nil {
		return
	}
	_, _ = io.Copy(conn, conn)
	_ = conn.Close()
}

// delays are what the logging network takes longer, there and back; benchWork
// has it as it is.
var delays = []time.Duration{time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond}

// benchDelay measures round trips with a logging network that is far away.
func benchDelay(ctx context.Context, b *benchmark) (err error) {
	hosta, hostb := b.Pair()
	var vms []*VM
	defer func() { err = errors.Join(err, removeAll(ctx, vms)) }()
	var subjects []subject
	for i, config := range []string{configIdle, configProtected} {
		vm, err := b.startBench(ctx, hosta, hostb, i, fmt.Sprintf("delay%d", i), editBench(benchMemory))
		if err != nil {
			return err
		}
		vms = append(vms, vm)
		s, err := b.serve(ctx, hosta, vm, config)
		if err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	for _, d := range delays {
		if err := b.delayed(ctx, d, subjects); err != nil {
			return fmt.Errorf("%v: %w", d, err)
		}
	}
	return nil
}

func (b *benchmark) delayed(ctx context.Context, d time.Duration, subjects []subject) (err error) {
	hosta, _ := b.Pair()
	wire, err := hosta.Disturb(ctx, lab.Logging, lab.Weather{Delay: d / 2}, lab.Weather{Delay: d / 2})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, wire.Close(context.WithoutCancel(ctx))) }()
	for range 3 {
		if err := b.networkTrip(ctx, d); err != nil {
			return err
		}
		for _, w := range works {
			if w.name != workRoundTrip && w.name != workToGuest && w.name != workFromGuest {
				continue
			}
			w.name = atDelay(w.name, d)
			if err := b.measure(ctx, w, subjects); err != nil {
				return err
			}
		}
	}
	return nil
}

// atDelay names what was measured with a delay of the logging network.
func atDelay(name string, d time.Duration) string {
	if d == 0 {
		return name
	}
	return fmt.Sprintf("%s, logging network +%d ms", name, d.Milliseconds())
}

// cloneSizes are guests' memory in MiB.
var cloneSizes = []int{256, 1024, 4096}

// Part of a guest's memory that is written to while it is cloned, and how long
// each page is left alone.
const (
	dirtyPart    = 0.2
	dirtySeconds = 10
)

// benchClone measures for how long a clone stops a guest that writes to a part
// of its memory.
func benchClone(ctx context.Context, b *benchmark) error {
	rounds, sizes := 10, cloneSizes
	if b.Quick {
		rounds, sizes = 5, cloneSizes[:1]
	}
	for i, mib := range sizes {
		if err := b.clones(ctx, i, mib, rounds); err != nil {
			return fmt.Errorf("%d MiB: %w", mib, err)
		}
	}
	return nil
}

func (b *benchmark) clones(ctx context.Context, i, mib, rounds int) (err error) {
	hosta, hostb := b.Pair()
	vm, err := b.startBench(ctx, hosta, hostb, i, fmt.Sprintf("clone%d", mib), editBench(mib))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeAll(ctx, []*VM{vm})) }()
	dirty := fmt.Sprintf("ftbench dirty %.0f %d </dev/null >/dev/null 2>&1 &", dirtyPart*float64(mib), dirtySeconds)
	if _, _, err := vm.Guest.Run(ctx, dirty); err != nil {
		return err
	}
	if err := Pause(ctx, dirtySeconds*time.Second); err != nil {
		return err
	}
	for range rounds {
		start := time.Now()
		pause, err := b.protectPinned(ctx, vm, hosta, hostb)
		if err != nil {
			return err
		}
		b.report.Add(cloned(mib), configProtected, millisUnit, false, pause)
		b.say("%d MiB: paused for %.1f ms, cloned in %.1f s", mib, pause, time.Since(start).Seconds())
		if err := vm.Unprotect(ctx, hosta, hostb); err != nil {
			return err
		}
	}
	return nil
}

func cloned(mib int) string { return fmt.Sprintf("%s, %d MiB", pauseName, mib) }

// benchFailover kills primaries.
func benchFailover(ctx context.Context, b *benchmark) (err error) {
	rounds := 10
	if b.Quick {
		rounds = 3
	}
	s, err := b.begin(ctx, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end(ctx)) }()
	for range rounds {
		start := time.Now()
		if _, err := b.protectPinned(ctx, s.vm, s.primary, s.backup); err != nil {
			return err
		}
		if err := Pause(ctx, time.Second+rand.N(time.Second)); err != nil {
			return err
		}
		failover, _, _, err := s.failOver(ctx, start)
		if err != nil {
			return err
		}
		b.report.Add(replyName, configProtected, millisUnit, false, float64(failover.Reply.Microseconds())/1000)
	}
	return nil
}

// compare judges what was measured.
func (b *benchmark) compare() {
	r := b.report
	r.Compare(configCounted, configPlain)
	r.Compare(configIdle, configPlain)
	r.Compare(configProtected, configIdle)
	r.Compare(configProtected, configPlain)
	r.Compare(configProtected, configCOLO)
	for _, t := range []struct {
		work  string
		limit float64
	}{
		{workCompile, 0.95},
		{workCompress, 0.95},
		{workMemory, 0.95},
		{workProcesses, 0.90},
		{workDiskSeq, 0.90},
		{workDiskRand, 0.90},
		{workDiskSync, 0.90},
		{workToGuest, 0.90},
		{workFromGuest, 0.90},
	} {
		r.AtLeast(t.work+", FT protected/FT idle", "", t.limit, r.Speed(t.work, configProtected, configIdle).Median())
	}
	r.AtLeast(workPgbench+", FT protected/FT idle", "", 0.85, r.Speed(workPgbench, configProtected, configIdle).Median())
	for _, work := range []string{workCompile, workCompress, workMemory, workProcesses, workDiskSeq, workDiskRand, workDiskSync} {
		r.AtLeast(work+", FT idle/plain TCG", "", 0.75, r.Speed(work, configIdle, configPlain).Median())
	}
	log := func(what, of string) float64 { return r.Figures(what+", "+of, configProtected).Median() }
	r.AtMost(logWire+", "+workIdle, perSecond, 0.15, log(logWire, workIdle))
	r.AtMost(logWire+", "+workCompile, perSecond, 0.5, log(logWire, workCompile))
	r.AtMost(logWireEach+", "+workCompile, perThousand, 0.05, log(logWireEach, workCompile))
	for _, d := range append([]time.Duration{0}, delays...) {
		r.AtMost(atDelay("added round trip less the network's", d), "µs", 300, b.addedTrip(atDelay(workRoundTrip, d), atDelay(networkName, d)))
	}
	for _, mib := range cloneSizes {
		pauses := r.Figures(cloned(mib), configProtected)
		r.AtMost(cloned(mib)+", median", millisUnit, 100, pauses.Median())
		r.AtMost(cloned(mib)+", p99", millisUnit, 300, pauses.Quantile(0.99))
	}
	lags := r.Figures(lagName, configProtected)
	r.AtMost(lagName+", median", millisUnit, 20, lags.Median())
	r.AtMost(lagName+", p99", millisUnit, 100, lags.Quantile(0.99))
	r.AtMost(replyName+", median", millisUnit, 200, r.Figures(replyName, configProtected).Median())
	r.AtMost(lostName, "", 0, float64(len(r.Lost)))
	b.judgeCOLO()
	b.judgePairs()
}

// addedTrip is what protection adds to a round trip, beyond that of the logging
// network.
func (b *benchmark) addedTrip(trip, network string) float64 {
	return b.report.Figures(trip, configProtected).Median() - b.report.Figures(trip, configIdle).Median() -
		b.report.Figures(network, configProtected).Median()
}

// result is the RESULT line.
func (b *benchmark) result() string {
	r := b.report
	number := func(v float64) string { return bench.Figures{v}.String() }
	speed := func(work string) float64 { return r.Speed(work, configProtected, configIdle).Median() }
	disk := speed(workDiskSync)
	for _, work := range []string{workDiskSeq, workDiskRand} {
		if v := speed(work); v < disk {
			disk = v
		}
	}
	met, of := r.Met()
	pauses := r.Figures(cloned(cloneSizes[0]), configProtected)
	return fmt.Sprintf("cpu=%s proc=%s disk=%s net_rtt_us=%s log_idle_mbit=%s log_cpu_b_per_kinsn=%s lag_ms_p99=%s clone_pause_ms=%s failover_ms=%s targets=%d/%d",
		number(speed(workCompile)), number(speed(workProcesses)), number(disk), number(r.Figures(workRoundTrip, configProtected).Median()),
		number(r.Figures(logWire+", "+workIdle, configProtected).Median()), number(r.Figures(logWireEach+", "+workCompile, configProtected).Median()),
		number(r.Figures(lagName, configProtected).Quantile(0.99)), number(pauses.Median()), number(r.Figures(replyName, configProtected).Median()), met, of)
}
