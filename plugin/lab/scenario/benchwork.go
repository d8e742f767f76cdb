// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/bench"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// idleTime is how long a guest is watched that does nothing.
const idleTime = 4 * time.Second

// workTimeout bounds one workload, in the slowest configuration.
const workTimeout = 3 * time.Minute

// work is what a guest is made to do. One without a unit is only watched.
type work struct {
	name, unit string
	// rate tells that more is better.
	rate  bool
	quick bool
	do    func(context.Context, *benchmark, guest.Client) (float64, error)
}

// Names of those that targets are about.
const (
	workIdle      = "idle"
	workCompile   = "compile"
	workCompress  = "compress"
	workMemory    = "memory"
	workProcesses = "processes"
	workDiskSeq   = "disk sequential"
	workDiskRand  = "disk random"
	workDiskSync  = "disk fsync"
	workRoundTrip = "round trip"
	workToGuest   = "network to guest"
	workFromGuest = "network from guest"
)

// works are a few seconds each on plain TCG.
var works = []work{
	{workIdle, "", false, true, func(ctx context.Context, _ *benchmark, _ guest.Client) (float64, error) {
		return 0, Pause(ctx, idleTime)
	}},
	{workCompile, "s", false, true, command("cd " + guest.BenchSources + ` &&
		for f in check control gate stream; do cc1 -fpreprocessed -quiet -O1 $f.i -o /tmp/out.s || exit; done`)},
	{workCompress, "s", false, false, command("for f in 1 2 3; do gzip -c /data/tools/bin/fio | md5sum; done")},
	{workMemory, "s", false, false, command("ftbench memory 6")},
	{workProcesses, "s", false, true, command("ftbench forks 200")},
	{workDiskSeq, "s", false, false, fio("--rw=write --bs=256k --size=48m")},
	{workDiskRand, "s", false, false, fio("--rw=randrw --bs=4k --size=32m --io_size=6m")},
	{workDiskSync, "s", false, true, fio("--rw=write --bs=4k --size=1m --fsync=1")},
	{workRoundTrip, "µs", false, true, roundTrip},
	{workToGuest, "Mbit/s", true, true, iperf()},
	{workFromGuest, "Mbit/s", true, true, iperf("-R")},
}

// command measures how long a line of shell takes in the guest.
func command(line string) func(context.Context, *benchmark, guest.Client) (float64, error) {
	line = strings.Join(strings.Fields(line), " ")
	return func(ctx context.Context, _ *benchmark, c guest.Client) (float64, error) {
		_, took, err := c.Run(ctx, line)
		return took.Seconds(), err
	}
}

// fio measures how long a job takes, without the start of fio, which takes longer
// than some jobs.
func fio(job string) func(context.Context, *benchmark, guest.Client) (float64, error) {
	return command("fio --name=job --filename=/data/fio --ioengine=psync --direct=1 --randseed=1 --thread --output=/tmp/fio.txt " + job +
		" --exec_prerun='echo " + guest.MarkBegin + " >&9' --exec_postrun='echo " + guest.MarkEnd + " >&9' 9>&1 || { cat /tmp/fio.txt; exit 1; }")
}

// roundTrips is how many requests a round trip is the median of.
const roundTrips = 300

// roundTrip measures the microseconds of a request and its reply.
func roundTrip(ctx context.Context, b *benchmark, c guest.Client) (float64, error) {
	times, err := echoTimes(ctx, c.Dial, netip.AddrPortFrom(c.Address, guest.PortEcho), roundTrips)
	return times.Median(), err
}

// echoTimes sends requests one after the other, and returns how many
// microseconds each reply took.
func echoTimes(ctx context.Context, dial guest.DialFunc, to netip.AddrPort, n int) (bench.Figures, error) {
	conn, err := dial(ctx, to)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var times bench.Figures
	buf := make([]byte, recordSize)
	for i := range n {
		start := time.Now()
		if _, err := conn.Write(record(uint64(i))); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			return nil, err
		}
		times = append(times, float64(time.Since(start).Nanoseconds())/1000)
	}
	return times, nil
}

// iperfSeconds is how long a throughput is measured.
const iperfSeconds = 3

// iperf measures Mbit/s of a TCP stream, to the guest, or with -R from it.
func iperf(options ...string) func(context.Context, *benchmark, guest.Client) (float64, error) {
	return func(ctx context.Context, b *benchmark, c guest.Client) (float64, error) {
		out, err := b.Client.Exec(ctx, append([]string{"iperf3", "-J", "-c", c.Address.String(), "-t", strconv.Itoa(iperfSeconds)}, options...)...)
		var result struct {
			Error string
			End   struct {
				Sent struct {
					Seconds float64
				} `json:"sum_sent"`
				Received struct {
					Bytes, Seconds float64
				} `json:"sum_received"`
			}
		}
		if decode := json.Unmarshal([]byte(out), &result); decode != nil {
			return 0, errors.Join(err, decode)
		}
		if err != nil || result.Error != "" {
			return 0, fmt.Errorf("iperf3: %s: %w", result.Error, err)
		}
		// The side in the guest counts what it received, but has its own idea of
		// a second.
		seconds := result.End.Received.Seconds
		if len(options) == 0 {
			seconds = result.End.Sent.Seconds
		}
		return result.End.Received.Bytes * 8 / 1e6 / seconds, nil
	}
}

// Configurations.
const (
	configPlain     = "plain TCG"
	configCounted   = "icount alone"
	configIdle      = "FT idle"
	configProtected = "FT protected"
	configCOLO      = "COLO"
)

var configs = []string{configPlain, configCounted, configIdle, configProtected, configCOLO}

// subject is a guest in one configuration. It runs only between enter and leave.
type subject struct {
	config       string
	guest        guest.Client
	enter, leave func(context.Context) error
	// pair is the protected guest, if it is one.
	pair *VM
	// limit, unless 0, is how long a work may take. One that fails makes the
	// subject broken, which tells why and is ready again at the next enter, and
	// is not tried again. Without broken it ends the benchmark.
	limit  time.Duration
	broken func(context.Context) (why string, err error)
}

// editBench makes the lab's guest one of the benchmark, with that much memory.
func editBench(mib int, more ...string) func(string) string {
	return func(text string) string {
		replace := append([]string{
			"</cmdline>", " " + guest.BenchCmdline + "</cmdline>",
			"<memory unit='MiB'>256</memory>", fmt.Sprintf("<memory unit='MiB'>%d</memory>", mib),
		}, more...)
		return strings.NewReplacer(replace...).Replace(text)
	}
}

// counted adds instruction counting alone to a definition.
func counted(shift int) []string {
	return []string{
		"<domain type='qemu'>", "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
		"</domain>", fmt.Sprintf("<qemu:commandline><qemu:arg value='-icount'/><qemu:arg value='shift=%d'/></qemu:commandline></domain>", shift),
	}
}

// benchMemory is that of guests of which nothing else is said.
const benchMemory = 512

// startBench starts the n-th guest on a host, ready to be protected by a backup
// on peer unless that is nil, and pins its QEMU.
func (b *benchmark) startBench(ctx context.Context, h, peer *lab.Host, n int, name string, edit func(string) string) (*VM, error) {
	vm, err := b.DefineVM(ctx, h, n, name, edit)
	if err != nil {
		return nil, err
	}
	if peer != nil {
		if err := b.Agent(h).Prepare(ctx, name, peer.Name); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", name, err)
		}
	}
	boot, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if _, err := h.Virsh(boot, "start", name); err != nil {
		return nil, err
	}
	if err := pin(boot, h, vm, corePrimary); err != nil {
		return nil, err
	}
	if err := vm.Guest.WaitReady(boot); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return vm, nil
}

// Each QEMU of a pair has a core of its own, as on two hosts. All else runs
// where there is time.
const (
	corePrimary = 0
	coreBackup  = 1
)

func pin(ctx context.Context, h *lab.Host, vm *VM, core int) error {
	pid, err := h.QEMUPID(vm.Name)
	if err != nil {
		return err
	}
	_, err = h.Exec(ctx, "taskset", "-a", "-p", "-c", strconv.Itoa(core), strconv.Itoa(pid))
	return err
}

// protectPinned protects a guest and gives its backup the other core.
func (b *benchmark) protectPinned(ctx context.Context, vm *VM, from, to *lab.Host) (float64, error) {
	s, err := vm.Protect(ctx, from, to)
	if err != nil {
		return 0, err
	}
	return s.ClonePause, pin(ctx, to, vm, coreBackup)
}

// servers starts what the works talk to in the guest, lays out fio's file, and
// reads the compiler, so that nobody measures the first reading of it.
const servers = "cd /tmp; fio --name=job --filename=/data/fio --rw=write --bs=1m --size=48m --output=/tmp/fio.txt; iperf3 -s -D >/dev/null 2>&1; " +
	"cat /data/tools/bin/* >/dev/null; cc1 -fpreprocessed -quiet -O1 " + guest.BenchSources + "/veto.i -o /tmp/out.s"

// serve starts the servers and suspends the guest until it is its turn.
func (b *benchmark) serve(ctx context.Context, h *lab.Host, vm *VM, config string) (subject, error) {
	if _, _, err := vm.Guest.Run(ctx, servers); err != nil {
		return subject{}, err
	}
	return b.suspended(ctx, h, vm, config)
}

// suspended makes a guest that is up a subject, protected if that is its
// configuration, and suspends it until it is its turn.
func (b *benchmark) suspended(ctx context.Context, h *lab.Host, vm *VM, config string) (subject, error) {
	turn := func(command string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := h.Virsh(ctx, command, vm.Name)
			return err
		}
	}
	s := subject{config: config, guest: vm.Guest, enter: turn("resume"), leave: turn("suspend")}
	if config == configProtected {
		s.pair = vm
		_, hostb := b.Pair()
		if _, err := b.protectPinned(ctx, vm, h, hostb); err != nil {
			return s, err
		}
	}
	return s, s.leave(ctx)
}

// measure has each subject do one work.
func (b *benchmark) measure(ctx context.Context, w work, subjects []subject) error {
	for _, s := range subjects {
		if m := b.report.Find(w.name, s.config); m != nil && m.Note != "" {
			continue
		}
		value, err := b.once(ctx, w, s)
		if errors.Is(err, errPairLost) {
			if err = b.mend(ctx, s.pair, fmt.Errorf("%s: %w", w.name, err)); err == nil {
				value, err = b.once(ctx, w, s)
			}
		}
		switch {
		case err == nil && w.unit != "":
			b.report.Add(w.name, s.config, w.unit, w.rate, value)
		case err == nil:
		case s.broken == nil || ctx.Err() != nil:
			return fmt.Errorf("%s, %s: %w", w.name, s.config, err)
		default:
			why, end := s.broken(ctx)
			if end != nil {
				return end
			}
			b.say("%s, %s: %v%s", w.name, s.config, err, why)
			b.report.Skip(w.name, s.config, oneLine(err))
		}
	}
	return nil
}

func (b *benchmark) once(ctx context.Context, w work, s subject) (value float64, err error) {
	if err := s.enter(ctx); err != nil {
		return 0, err
	}
	whole := ctx
	defer func() { err = errors.Join(err, s.leave(whole)) }()
	limit := workTimeout
	if s.limit > 0 {
		limit = s.limit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if s.pair == nil {
		return w.do(ctx, b, s.guest)
	}
	primary, _ := b.Pair()
	before, err := b.meter(ctx, primary, s.pair)
	if err != nil {
		return 0, err
	}
	stop := b.follow(ctx, w.name, primary, s.pair)
	value, err = w.do(ctx, b, s.guest)
	stop()
	if err != nil {
		return 0, err
	}
	after, err := b.meter(ctx, primary, s.pair)
	if err != nil {
		return 0, err
	}
	// What a guest does that is protected no more is no figure of protection.
	if after.state != stateProtected || after.epoch != before.epoch {
		return 0, fmt.Errorf("%w: state %s, reason %s, epoch %d after %d", errPairLost, after.state, after.reason, after.epoch, before.epoch)
	}
	b.addLog(w.name, after.since(before))
	return value, nil
}

// errPairLost is returned when a guest was not protected for as long as it
// worked.
var errPairLost = errors.New("the pair was lost")

// lostName counts the pairs that were lost without anyone wanting it.
const lostName = "pairs lost"

// mend notes that the pair was lost, keeps the logs, and makes another.
func (b *benchmark) mend(ctx context.Context, vm *VM, why error) error {
	b.say("%v", why)
	b.report.Lost = append(b.report.Lost, oneLine(why))
	b.keepEvidence(ctx, "bench-pair-lost")
	hosta, hostb := b.Pair()
	if _, err := hosta.Virsh(ctx, "resume", vm.Name); err != nil {
		return err
	}
	if _, err := b.Wait(ctx, hosta, vm.Name, "the loss of the pair to be settled", removeTimeout, func(s client.Status) (bool, error) {
		return s.State == stateLive || s.State == stateUnprotected, nil
	}); err != nil {
		return err
	}
	if err := b.WaitGone(ctx, hostb, vm.Name); err != nil {
		return err
	}
	if _, err := b.protectPinned(ctx, vm, hosta, hostb); err != nil {
		return err
	}
	_, err := hosta.Virsh(ctx, "suspend", vm.Name)
	return err
}
