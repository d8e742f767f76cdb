// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// The definition goes where the domain goes, as it was edited meanwhile, and so
// does its autostart; though libvirtd hangs during the failover, and the agent is
// restarted before it can define anything.
func TestDefinitionMovesAlong(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm := start(t, b, hosta, hostb)
	_, err := hosta.Virsh(t.Context(), "autostart", vm.Name)
	must(t, err)
	traffic, err := vm.Traffic(t.Context())
	must(t, err)
	t.Cleanup(traffic.Close)
	must(t, protect(t, vm, hosta, hostb))
	edited := editMemory(t, vm, hosta, 16<<10)

	stopLibvirt(t, hostb)
	killed, err := vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	liveBeforeLibvirt(t, b, vm, hostb)
	begin := time.Now()
	must(t, b.RestartAgent(t.Context(), hostb, nil))
	t.Logf("the agent was restarted in %v", time.Since(begin).Round(time.Millisecond))
	liveBeforeLibvirt(t, b, vm, hostb)
	alive(t, traffic, killed)
	continueLibvirt(t, hostb)
	begin = time.Now()
	settled(t, b, vm, hostb, edited)
	t.Logf("defined %v after libvirtd went on", time.Since(begin).Round(time.Millisecond))
	wantAutostart(t, vm, hostb, hosta)
	traffic.Close()
	_, err = hostb.Virsh(t.Context(), "destroy", vm.Name)
	must(t, err)
	must(t, b.WaitGone(t.Context(), hostb, vm.Name))
	must(t, vm.Boot(t.Context(), hostb))
	if got := memory(t, vm, hostb); got != edited {
		t.Errorf("started with %d KiB, want the %d KiB of the edit", got, edited)
	}

	// And back the same way, to a host that has a definition, which is old.
	must(t, protect(t, vm, hostb, hosta))
	edited = editMemory(t, vm, hostb, 8<<10)
	_, err = vm.KillQEMU(t.Context(), hostb)
	must(t, err)
	_, err = b.WaitState(t.Context(), hosta, vm.Name, "live", 15*time.Second)
	must(t, err)
	settled(t, b, vm, hosta, edited)
	wantAutostart(t, vm, hosta, hostb)

	// It is made once: an operator may take it away again.
	_, err = hosta.Virsh(t.Context(), "undefine", vm.Name)
	must(t, err)
	must(t, b.RestartAgent(t.Context(), hosta, nil))
	must(t, scenario.Pause(t.Context(), 5*time.Second))
	info, err := hosta.Virsh(t.Context(), "dominfo", vm.Name)
	must(t, err)
	if !regexp.MustCompile(`Persistent: +no`).MatchString(info) {
		t.Errorf("defined again after virsh undefine:\n%s", info)
	}
}

// A guest that powers itself off before libvirtd could be asked to define it can
// be started all the same.
func TestPowerOffBeforeTheDefinition(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	stopLibvirt(t, hostb)
	_, err := vm.KillQEMU(t.Context(), hosta)
	must(t, err)
	liveBeforeLibvirt(t, b, vm, hostb)
	traffic.Close()
	must(t, vm.Guest.PowerOff(t.Context()))
	must(t, b.RestartAgent(t.Context(), hostb, nil))
	continueLibvirt(t, hostb)
	must(t, b.WaitGone(t.Context(), hostb, vm.Name))
	must(t, eventually(t.Context(), 20*time.Second, func() error {
		_, err := hostb.Virsh(t.Context(), "dominfo", vm.Name)
		return err
	}))
	must(t, vm.Boot(t.Context(), hostb))
}

func stopLibvirt(t *testing.T, h *lab.Host) {
	t.Helper()
	_, err := h.Signal(t.Context(), lab.LibvirtProcess, unix.SIGSTOP)
	must(t, err)
	t.Cleanup(func() { _, _ = h.Signal(context.Background(), lab.LibvirtProcess, unix.SIGCONT) })
}

func continueLibvirt(t *testing.T, h *lab.Host) {
	t.Helper()
	_, err := h.Signal(t.Context(), lab.LibvirtProcess, unix.SIGCONT)
	must(t, err)
}

// liveBeforeLibvirt waits for a copy to be live whose host cannot define it yet,
// and to say so.
func liveBeforeLibvirt(t *testing.T, b *scenario.Bed, vm *scenario.VM, h *lab.Host) {
	t.Helper()
	s, err := b.Wait(t.Context(), h, vm.Name, vm.Name+" to be live on "+h.Name+" without a definition", 30*time.Second,
		func(s client.Status) (bool, error) { return s.State == "live" && s.Definition != "", nil })
	must(t, err)
	t.Log(s)
}

// settled waits until the host's definition is that of the domain: with the
// edited memory, and the disk that counts.
func settled(t *testing.T, b *scenario.Bed, vm *scenario.VM, h *lab.Host, kib int) {
	t.Helper()
	_, err := b.Wait(t.Context(), h, vm.Name, "the definition on "+h.Name, 20*time.Second,
		func(s client.Status) (bool, error) { return s.Definition == "", nil })
	must(t, err)
	must(t, eventually(t.Context(), 10*time.Second, func() error {
		text, err := h.Virsh(t.Context(), "dumpxml", "--inactive", vm.Name)
		if err != nil {
			return err
		}
		if got := memoryOf(text); got != kib {
			return fmt.Errorf("the definition on %s has %d KiB, want %d", h.Name, got, kib)
		}
		live, err := h.Virsh(t.Context(), "domblklist", vm.Name)
		if err != nil {
			return err
		}
		defined, err := h.Virsh(t.Context(), "domblklist", "--inactive", vm.Name)
		if err == nil && live != defined {
			err = fmt.Errorf("the definition on %s names %s, and the domain runs on %s", h.Name, defined, live)
		}
		return err
	}))
	info, err := h.Virsh(t.Context(), "dominfo", vm.Name)
	must(t, err)
	if !regexp.MustCompile(`Persistent: +yes`).MatchString(info) {
		t.Errorf("dominfo on %s:\n%s", h.Name, info)
	}
}

// editMemory does what "virsh edit" does, and returns the new size in KiB.
func editMemory(t *testing.T, vm *scenario.VM, h *lab.Host, more int) int {
	t.Helper()
	kib := memory(t, vm, h) + more
	_, err := h.Exec(t.Context(), "env", fmt.Sprintf("EDITOR=sed -i -r 's,(emory.unit=.KiB.>)[0-9]+,\\1%d,'", kib),
		"virsh", "-q", "-c", "qemu:///system", "edit", vm.Name)
	must(t, err)
	text, err := h.Virsh(t.Context(), "dumpxml", "--inactive", vm.Name)
	must(t, err)
	if got := memoryOf(text); got != kib {
		t.Fatalf("virsh edit left %d KiB, want %d", got, kib)
	}
	// libvirt tells the agent, and that the peer's, which says nothing.
	must(t, scenario.Pause(t.Context(), 2*time.Second))
	return kib
}

// memory is what the running domain has.
func memory(t *testing.T, vm *scenario.VM, h *lab.Host) int {
	t.Helper()
	text, err := h.Virsh(t.Context(), "dumpxml", vm.Name)
	must(t, err)
	return memoryOf(text)
}

func memoryOf(text string) (kib int) {
	m := regexp.MustCompile(`<memory unit='KiB'>([0-9]+)`).FindStringSubmatch(text)
	if m != nil {
		_, _ = fmt.Sscan(m[1], &kib)
	}
	return kib
}

// wantAutostart demands that only the host that has the domain starts it.
func wantAutostart(t *testing.T, vm *scenario.VM, on, off *lab.Host) {
	t.Helper()
	is := func(h *lab.Host, want string) error {
		info, err := h.Virsh(t.Context(), "dominfo", vm.Name)
		if err == nil && !regexp.MustCompile(`Autostart: +`+want).MatchString(info) {
			err = fmt.Errorf("autostart on %s is not %sd:\n%s", h.Name, want, strings.TrimSpace(info))
		}
		return err
	}
	must(t, eventually(t.Context(), 20*time.Second, func() error { return errors.Join(is(on, "enable"), is(off, "disable")) }))
}
