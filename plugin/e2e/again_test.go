// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// againTimeout bounds the return of redundancy, as issue and README promise it.
const againTimeout = 60 * time.Second

// The annotation is all that is asked for: the domain is protected when it
// starts, again after each loss, and by whatever an operator does to its backup.
func TestRedundancyComesBack(t *testing.T) {
	b, hosta, hostb := bed(t)
	for _, h := range b.Hosts() {
		configured(t, b, h, func(c *config.Config) { c.Protect.Auto = true })
	}
	vm := start(t, b, hosta, hostb)
	epoch := again(t, b, vm, hosta, hostb, 0)
	traffic, err := vm.Traffic(t.Context())
	must(t, err)
	t.Cleanup(traffic.Close)

	_, err = vm.KillQEMU(t.Context(), hostb)
	must(t, err)
	epoch = again(t, b, vm, hosta, hostb, epoch)

	killed, err := vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	epoch = again(t, b, vm, hostb, hosta, epoch)
	alive(t, traffic, killed)
	// This host has no replica, but the disk from when the domain ran there.
	resynced(t, b, vm, hostb)

	out, err := hostb.Exec(t.Context(), lab.BinDir+"/ftvirt", "failover", "--test", vm.Name)
	must(t, err)
	t.Log(strings.TrimSpace(out))
	epoch = again(t, b, vm, hosta, hostb, epoch)

	_, err = hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "restart-backup", vm.Name)
	must(t, err)
	epoch = again(t, b, vm, hosta, hostb, epoch)
	// Its replica stayed, and was brought up to date.
	resynced(t, b, vm, hosta)

	_, err = hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "suspend", vm.Name)
	must(t, err)
	staysAlone(t, b, vm, hosta, hostb)
	_, err = hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "resume", vm.Name)
	must(t, err)
	epoch = again(t, b, vm, hosta, hostb, epoch)

	// As an operator does who knows libvirt only.
	annotate := []string{"metadata", vm.Name, "--uri", "urn:ftvirt:domain:1", "--key", "ft", "--live", "--config"}
	_, err = hosta.Virsh(t.Context(), append(annotate, "--remove")...)
	must(t, err)
	staysAlone(t, b, vm, hosta, hostb)
	_, err = hosta.Virsh(t.Context(), append(annotate, "--set", `<pair mode="protected" peer="hostb"/>`)...)
	must(t, err)
	again(t, b, vm, hosta, hostb, epoch)

	alive(t, traffic, killed)
	must(t, traffic.Stop())
	n, err := vm.VerifyDisk(t.Context(), hosta)
	must(t, err)
	t.Logf("%d lines", n)

	_, err = hosta.Exec(t.Context(), lab.BinDir+"/ftvirt", "disable", vm.Name)
	must(t, err)
	// That host's definition names the disk from when the domain ran there.
	defined, err := vm.DiskPath(t.Context(), hostb)
	must(t, err)
	must(t, eventually(t.Context(), 10*time.Second, func() error {
		left, err := filepath.Glob(hostb.Path("/var/lib/libvirt/images/ftvirt-*"))
		if err == nil && !slices.Equal(left, []string{defined}) {
			err = fmt.Errorf("replicas are left: %v, of which %s is a definition's", left, defined)
		}
		return err
	}))
}

// resynced demands that the newest clone did not send all of the disk, and that both
// sides are equal all the same.
func resynced(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary *lab.Host) {
	t.Helper()
	s, err := b.Agent(primary).StatusOf(t.Context(), vm.Name)
	must(t, err)
	t.Logf("%d bytes of the disk were there already", s.CloneEqual)
	if s.CloneEqual == 0 { // most of this disk is empty
		t.Error("the disk was copied whole")
	}
	_, err = b.Wait(t.Context(), primary, vm.Name, "the backup to have caught up", 30*time.Second,
		func(s client.Status) (bool, error) { return s.Lag < 100, nil })
	must(t, err)
	out, err := primary.Exec(t.Context(), lab.BinDir+"/ftvirt", "verify", vm.Name)
	must(t, err)
	t.Log(strings.TrimSpace(out))
}

// again waits for a pair of a later epoch and returns that.
func again(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host, after plugin.Epoch) plugin.Epoch {
	t.Helper()
	begin := time.Now()
	for _, h := range []*lab.Host{primary, backup} {
		s, err := b.Wait(t.Context(), h, vm.Name, vm.Name+" to be protected again on "+h.Name, againTimeout, func(s client.Status) (bool, error) {
			role := plugin.RolePrimary
			if h == backup {
				role = plugin.RoleBackup
			}
			return s.State == "protected" && s.Epoch > after && s.Role == role, nil
		})
		must(t, err)
		if h == backup {
			t.Logf("protected in epoch %d after %v", s.Epoch, time.Since(begin).Round(time.Millisecond))
			return s.Epoch
		}
	}
	return 0
}

// staysAlone demands that the backup goes and that none comes.
func staysAlone(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	must(t, b.WaitGone(t.Context(), backup, vm.Name))
	must(t, scenario.Pause(t.Context(), 4*time.Second))
	s, err := b.Agent(primary).StatusOf(t.Context(), vm.Name)
	if err != nil || s.State != "unprotected" || s.Reason != "user-request" {
		t.Errorf("%s (%v)", s, err)
	}
}

// A whole host dies: its backup's host takes over after the detection's time,
// and the host that comes back refuses its stale copy and gets the next backup.
func TestHostDies(t *testing.T) {
	b, hosta, hostb := bed(t)
	for _, h := range b.Hosts() {
		configured(t, b, h, func(c *config.Config) { c.Protect.Auto = true })
	}
	vm := start(t, b, hosta, hostb)
	epoch := again(t, b, vm, hosta, hostb, 0)
	traffic, err := vm.Traffic(t.Context())
	must(t, err)
	t.Cleanup(traffic.Close)
	// It was cloned while it booted, which is the most that a backup has to follow.
	_, err = b.Wait(t.Context(), hosta, vm.Name, "the backup to have caught up", 30*time.Second,
		func(s client.Status) (bool, error) { return s.Lag < 100, nil })
	must(t, err)

	crashed := time.Now()
	must(t, hosta.Crash(t.Context()))
	t.Logf("the crash took %v", time.Since(crashed))
	_, err = b.WaitState(t.Context(), hostb, vm.Name, "live", 15*time.Second)
	must(t, err)
	alive(t, traffic, crashed)

	must(t, hosta.Boot(t.Context()))
	must(t, b.WaitAgent(t.Context(), hosta))
	refused(t, vm, hosta)
	again(t, b, vm, hostb, hosta, epoch)
	alive(t, traffic, time.Now())
	must(t, traffic.Stop())
	_, err = vm.VerifyDisk(t.Context(), hostb)
	must(t, err)
}
