// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// workPgbench is pgbench over the network, from the lab's client.
const workPgbench = "pgbench"

// pgbenchSeconds is how long one measurement of it is.
const pgbenchSeconds = 10

// benchPgbench measures transactions a second of a Debian server with PostgreSQL.
func benchPgbench(ctx context.Context, b *benchmark) (err error) {
	debian, err := guest.BuildDebian(ctx, b.DebianDir)
	if err != nil {
		return err
	}
	hosta, hostb := b.Pair()
	var vms []*VM
	defer func() { err = errors.Join(err, removeAll(ctx, vms)) }()
	names := []string{configIdle, configProtected}
	for i := range names {
		vm, err := b.startDebian(ctx, debian, i)
		if err != nil {
			return err
		}
		vms = append(vms, vm)
	}
	var subjects []subject
	for i, config := range names {
		vm := vms[i]
		if err := b.bootDebian(ctx, hosta, vm); err != nil {
			return err
		}
		turn := func(command string) func(context.Context) error {
			return func(ctx context.Context) error {
				_, err := hosta.Virsh(ctx, command, vm.Name)
				return err
			}
		}
		s := subject{config: config, guest: vm.Guest, enter: turn("resume"), leave: turn("suspend")}
		if config == configProtected {
			s.pair = vm
			if _, err := b.protectPinned(ctx, vm, hosta, hostb); err != nil {
				return err
			}
		}
		if err := s.leave(ctx); err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	w := work{workPgbench, "tps", true, false, func(ctx context.Context, b *benchmark, c guest.Client) (float64, error) {
		return b.transactionRate(ctx, debian, c.Address)
	}}
	for range 3 {
		if err := b.measure(ctx, w, subjects); err != nil {
			return err
		}
	}
	return nil
}

// startDebian starts the i-th of the servers, each on a core while it boots.
func (b *benchmark) startDebian(ctx context.Context, debian guest.Debian, i int) (*VM, error) {
	hosta, hostb := b.Pair()
	name := fmt.Sprintf("debian%d", i)
	d, err := hosta.GuestDomain(ctx, i, name, "qcow2")
	if err != nil {
		return nil, err
	}
	addr := d.Address.Addr()
	debian.Adapt(&d)
	// The lab's hosts have the benchmark's own guest.
	if err := removeFile(hosta.Path(d.Disk)); err != nil {
		return nil, err
	}
	if err := debian.NewDisk(ctx, hosta.Path(d.Disk), "qcow2"); err != nil {
		return nil, err
	}
	d.Kernel, d.Initrd = filepath.Join(lab.GuestDir, "debian-vmlinuz"), filepath.Join(lab.GuestDir, "debian-initrd.gz")
	for _, h := range []*lab.Host{hosta, hostb} {
		for from, to := range map[string]string{debian.Kernel: d.Kernel, debian.Initrd: d.Initrd} {
			if out, err := exec.CommandContext(ctx, "cp", from, h.Path(to)).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("%w: %s", err, out)
			}
		}
	}
	vm, err := b.DefineDomain(ctx, hosta, d, addr, nil)
	if err != nil {
		return nil, err
	}
	if err := b.Agent(hosta).Prepare(ctx, name, hostb.Name); err != nil {
		return nil, fmt.Errorf("prepare %s: %w", name, err)
	}
	if _, err := hosta.Virsh(ctx, "start", name); err != nil {
		return nil, err
	}
	return vm, pin(ctx, hosta, vm, i)
}

// bootDebian waits for the database and gives the server the primary's core.
func (b *benchmark) bootDebian(ctx context.Context, h *lab.Host, vm *VM) error {
	var last error
	err := poll(ctx, realBootTimeout, func(ctx context.Context) (bool, error) {
		attempt, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		var db *postgres
		if db, last = dialPostgres(attempt, b.Client.Dial, vm.Guest.Address); last == nil {
			db.Close()
			return true, nil
		}
		return false, Pause(ctx, time.Second)
	})
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", vm.Name, err), last)
	}
	b.say("%s has booted", vm.Name)
	return pin(ctx, h, vm, corePrimary)
}

var tps = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)

// transactionRate runs pgbench and returns the transactions that it did in a second.
func (b *benchmark) transactionRate(ctx context.Context, debian guest.Debian, addr netip.Addr) (float64, error) {
	out, err := b.Client.Exec(ctx, debian.Pgbench, "--host", addr.String(), "--username", "postgres", "--no-vacuum",
		"--client", strconv.Itoa(pgbenchClients), "--time", strconv.Itoa(pgbenchSeconds), "postgres")
	if err != nil {
		return 0, fmt.Errorf("%w: %w: %s", ErrPgbench, err, out)
	}
	if _, err := transactions(out); err != nil {
		return 0, err
	}
	match := tps.FindStringSubmatch(out)
	if match == nil {
		return 0, fmt.Errorf("%w: its report is %q", ErrPgbench, out)
	}
	return strconv.ParseFloat(match[1], 64)
}
