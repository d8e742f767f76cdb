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
	// The hosts' own guest is the benchmark's.
	kernel, initrd := filepath.Join(lab.GuestDir, "debian-vmlinuz"), filepath.Join(lab.GuestDir, "debian-initrd.gz")
	for _, h := range []*lab.Host{hosta, hostb} {
		for from, to := range map[string]string{debian.Kernel: kernel, debian.Initrd: initrd} {
			if out, err := exec.CommandContext(ctx, "cp", from, h.Path(to)).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
	}
	names := []string{configIdle, configProtected}
	for i := range names {
		d := lab.DescribeGuest(i, fmt.Sprintf("debian%d", i), "qcow2")
		addr := d.Address.Addr()
		debian.Adapt(&d)
		d.Kernel, d.Initrd = kernel, initrd
		if err := debian.NewDisk(ctx, hosta.Path(d.Disk), d.DiskFormat); err != nil {
			return err
		}
		vm, err := b.DefineDomain(ctx, hosta, d, addr, nil)
		if err != nil {
			return err
		}
		vms = append(vms, vm)
		if err := b.Agent(hosta).Prepare(ctx, vm.Name, hostb.Name); err != nil {
			return fmt.Errorf("prepare %s: %w", vm.Name, err)
		}
		if _, err := hosta.Virsh(ctx, "start", vm.Name); err != nil {
			return err
		}
		// Each has a core while it boots.
		if err := pin(ctx, hosta, vm, i); err != nil {
			return err
		}
	}
	var subjects []subject
	for i, config := range names {
		if err := waitPostgres(ctx, b.Client.Dial, vms[i].Guest.Address); err != nil {
			return fmt.Errorf("%s: %w", vms[i].Name, err)
		}
		b.say("%s has booted", vms[i].Name)
		if err := pin(ctx, hosta, vms[i], corePrimary); err != nil {
			return err
		}
		s, err := b.suspended(ctx, hosta, vms[i], config)
		if err != nil {
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

var tps = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)

// transactionRate runs pgbench and returns the transactions that it did in a second.
func (b *benchmark) transactionRate(ctx context.Context, debian guest.Debian, addr netip.Addr) (float64, error) {
	report, err := reportOf(ctx, b.pgbenchOf(debian, addr)(ctx, "--time", strconv.Itoa(pgbenchSeconds)))
	if err != nil {
		return 0, err
	}
	if _, err := transactions(report); err != nil {
		return 0, err
	}
	match := tps.FindStringSubmatch(report)
	if match == nil {
		return 0, fmt.Errorf("%w: its report is %q", ErrPgbench, report)
	}
	return strconv.ParseFloat(match[1], 64)
}
