// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// Rates of the guest's own load, per second.
const (
	LinesRate = 10
	LoadRate  = 20
)

// VM is a test guest in the lab, wherever it runs.
type VM struct {
	Name  string
	UUID  plugin.UUID
	MAC   string
	Guest guest.Client

	bed *Bed
}

// StartVM defines the lab's n-th test guest on a host, ready to be protected
// by a backup on another, with a disk of its own, and boots it.
func (b *Bed) StartVM(ctx context.Context, h, peer *lab.Host, n int, name string) (*VM, error) {
	return b.StartVMAs(ctx, h, peer, n, name, nil)
}

// StartVMAs does the same with a definition that edit has changed, unless that
// is nil.
func (b *Bed) StartVMAs(ctx context.Context, h, peer *lab.Host, n int, name string, edit func(string) string) (*VM, error) {
	vm, err := b.DefineVM(ctx, h, n, name, edit)
	if err != nil {
		return nil, err
	}
	prepare, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if err := b.Agent(h).Prepare(prepare, name, peer.Name); err != nil {
		return nil, fmt.Errorf("prepare %s on %s: %w", name, h.Name, err)
	}
	return vm, vm.Boot(ctx, h)
}

// DefineVM defines the lab's n-th test guest on a host as an operator would who
// has never heard of ftvirt; edit may be nil.
func (b *Bed) DefineVM(ctx context.Context, h *lab.Host, n int, name string, edit func(string) string) (*VM, error) {
	d, err := h.GuestDomain(ctx, n, name, "qcow2")
	if err != nil {
		return nil, err
	}
	return b.DefineDomain(ctx, h, d, d.Address.Addr(), edit)
}

// DefineDomain defines what is described, which has the address; edit may be
// nil.
func (b *Bed) DefineDomain(ctx context.Context, h *lab.Host, d guest.Domain, addr netip.Addr, edit func(string) string) (*VM, error) {
	text, err := guest.DomainXML(d)
	if err != nil {
		return nil, err
	}
	if edit != nil {
		text = edit(text)
	}
	if err := h.Define(ctx, text); err != nil {
		return nil, err
	}
	id, err := h.Virsh(ctx, "domuuid", d.Name)
	if err != nil {
		return nil, err
	}
	vm := &VM{Name: d.Name, MAC: d.MAC, Guest: guest.Client{Dial: b.Client.Dial, Address: addr}, bed: b}
	vm.UUID, err = plugin.ParseUUID(strings.TrimSpace(id))
	return vm, err
}

// Boot starts the domain and waits until the guest answers and writes.
func (vm *VM) Boot(ctx context.Context, h *lab.Host) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if _, err := h.Virsh(ctx, "start", vm.Name); err != nil {
		return err
	}
	if err := vm.Guest.WaitReady(ctx); err != nil {
		return fmt.Errorf("%s on %s: %w", vm.Name, h.Name, err)
	}
	return vm.Load(ctx)
}

// Load makes the guest write lines and load its disk.
func (vm *VM) Load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return errors.Join(vm.Guest.StartLines(ctx, LinesRate), vm.Guest.StartLoad(ctx, LoadRate))
}

// Protect has the domain, which runs on one host, cloned to another, and waits
// until both hosts say that it is protected. It returns the primary's status.
func (vm *VM) Protect(ctx context.Context, from, to *lab.Host) (client.Status, error) {
	if err := vm.newConsole(to); err != nil {
		return client.Status{}, err
	}
	before, err := vm.Enable(ctx, from, to)
	if err != nil {
		return before, err
	}
	return vm.WaitProtected(ctx, from, to, before)
}

// Enable asks for protection and returns the status of before.
func (vm *VM) Enable(ctx context.Context, from, to *lab.Host) (client.Status, error) {
	agent := vm.bed.Agent(from)
	ctx, cancel := context.WithTimeout(ctx, protectTimeout)
	defer cancel()
	before, err := agent.StatusOf(ctx, vm.Name)
	if err != nil {
		return before, err
	}
	if err := agent.Enable(ctx, vm.Name, to.Name); err != nil {
		return before, fmt.Errorf("enable %s on %s with peer %s: %w", vm.Name, from.Name, to.Name, err)
	}
	return before, nil
}

// WaitProtected waits for the end of a clone that began after before was told.
func (vm *VM) WaitProtected(ctx context.Context, from, to *lab.Host, before client.Status) (client.Status, error) {
	primary, err := vm.bed.Wait(ctx, from, vm.Name, vm.Name+" to be protected on "+from.Name, protectTimeout,
		func(s client.Status) (bool, error) {
			switch {
			case s.Epoch <= before.Epoch:
				if s.Failure != "" && s.Failure != before.Failure {
					return false, fmt.Errorf("%w: %s", ErrState, s)
				}
				return false, nil
			case s.State == stateProtected:
				return true, nil
			case s.State == stateCloning, s.State == stateGoingLive:
				return false, nil
			default:
				return false, fmt.Errorf("%w: %s", ErrState, s)
			}
		})
	if errors.Is(err, ErrState) {
		// The agent tells the reason once the clone is undone.
		why, _ := vm.bed.Wait(ctx, from, vm.Name, "the reason", removeTimeout, func(s client.Status) (bool, error) { return s.Failure != "", nil })
		return why, fmt.Errorf("%w: %s", ErrState, why)
	}
	if err != nil {
		return primary, err
	}
	_, err = vm.bed.Wait(ctx, to, vm.Name, vm.Name+" to be protected on "+to.Name, commandTimeout,
		func(s client.Status) (bool, error) { return s.Epoch == primary.Epoch && s.State == stateProtected, nil })
	return primary, err
}

// Unprotect takes the protection away and waits until the backup is gone.
func (vm *VM) Unprotect(ctx context.Context, primary, backup *lab.Host) error {
	ctx, cancel := context.WithTimeout(ctx, 2*removeTimeout)
	defer cancel()
	if err := vm.bed.Agent(primary).Disable(ctx, vm.Name); err != nil {
		return fmt.Errorf("disable %s on %s: %w", vm.Name, primary.Name, err)
	}
	if _, err := vm.bed.WaitState(ctx, primary, vm.Name, stateUnprotected, removeTimeout); err != nil {
		return err
	}
	_, err := vm.bed.Wait(ctx, backup, vm.Name, "the end of the backup on "+backup.Name, removeTimeout,
		func(s client.Status) (bool, error) { return s.Mode == modeNone && s.State == stateUnprotected, nil })
	if err != nil && !errors.Is(err, client.ErrNoDomain) {
		return err
	}
	return vm.bed.WaitGone(ctx, backup, vm.Name)
}

// Events returns what the host's agent noted of the domain in the epoch.
func (vm *VM) Events(ctx context.Context, h *lab.Host, epoch plugin.Epoch) ([]client.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var list []client.Event
	err := vm.bed.Agent(h).Events(ctx, false, func(e client.Event) error {
		// By UUID: the agent learns the name of a backup a little later.
		if e.UUID == vm.UUID && e.Epoch == epoch {
			list = append(list, e)
		}
		return nil
	})
	return list, err
}

// KillQEMU kills the domain's QEMU on a host without warning and returns the
// instant of the kill.
func (vm *VM) KillQEMU(ctx context.Context, h *lab.Host) (time.Time, error) {
	return vm.SignalQEMU(ctx, h, unix.SIGKILL)
}

// SignalQEMU does so with another signal.
func (vm *VM) SignalQEMU(ctx context.Context, h *lab.Host, signal unix.Signal) (time.Time, error) {
	pid, err := h.QEMUPID(vm.Name)
	if err != nil {
		return time.Time{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	// The host tells the time itself: starting a command there takes longer
	// than a failover may.
	out, err := h.Exec(ctx, "/bin/sh", "-euc", `date +%s%N; kill "-$2" "$1"`, "sh", strconv.Itoa(pid), strconv.Itoa(int(signal)))
	if err != nil {
		return time.Time{}, err
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	return time.Unix(0, ns), err
}

// Remove ends the domain on all hosts and removes its definitions and disks,
// in whatever state it is. It returns what went wrong, but tries everything.
func (vm *VM) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*removeTimeout)
	defer cancel()
	var errs []error
	for _, h := range vm.bed.Hosts() {
		// An agent that has nothing to do with it any more refuses.
		_ = vm.bed.Agent(h).Disable(ctx, vm.Name)
	}
	for _, h := range vm.bed.Hosts() {
		running, err := vm.bed.Running(ctx, h, vm.Name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if running {
			// The kill comes first: one that waits for the log does not
			// answer libvirt.
			_, _ = vm.KillQEMU(ctx, h)
			errs = append(errs, vm.bed.WaitGone(ctx, h, vm.Name))
		}
		defined, err := h.Virsh(ctx, "list", "--all", "--name")
		if err != nil {
			errs = append(errs, err)
		}
		for _, name := range strings.Fields(defined) {
			if name == vm.Name {
				_, err := h.Virsh(ctx, "undefine", vm.Name)
				errs = append(errs, err)
			}
		}
		errs = append(errs, removeFile(h.Path(filepath.Join(lab.ImageDir, vm.Name+".qcow2"))))
	}
	return errors.Join(errs...)
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ConsolePath is where the machine finds the console of the domain's newest run
// on a host.
func (vm *VM) ConsolePath(h *lab.Host) string { return h.Path(lab.ConsolePath(vm.Name)) }

// Console reads it.
func (vm *VM) Console(h *lab.Host) (string, error) {
	text, err := os.ReadFile(vm.ConsolePath(h))
	return string(text), err
}

// newConsole puts the console of an earlier run on the host aside, so that each
// file has the output of one run.
func (vm *VM) newConsole(h *lab.Host) error {
	path := vm.ConsolePath(h)
	err := os.Rename(path, path+"."+strconv.FormatInt(time.Now().UnixNano(), 10))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// DiskPath is where the machine finds the domain's disk on a host.
func (vm *VM) DiskPath(ctx context.Context, h *lab.Host) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	out, err := h.Virsh(ctx, "domblklist", vm.Name)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "vda" {
			return h.Path(f[1]), nil
		}
	}
	return "", fmt.Errorf("%s on %s: no disk vda in %q", vm.Name, h.Name, out)
}

// QueryMonitor asks the domain's QEMU for its status, as an operator would, and
// returns how long that took.
func (vm *VM) QueryMonitor(ctx context.Context, h *lab.Host, limit time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	_, err := h.Virsh(ctx, "qemu-monitor-command", vm.Name, `{"execute":"query-status"}`)
	return time.Since(start), err
}

// WaitPaused waits until libvirt says that the domain's copy on a host does not
// run, and why: "I/O error" or "user".
func (vm *VM) WaitPaused(ctx context.Context, h *lab.Host, reason string, limit time.Duration) error {
	var last string
	err := poll(ctx, limit, func(ctx context.Context) (bool, error) {
		out, err := h.Virsh(ctx, "domstate", "--reason", vm.Name)
		if err == nil {
			last = strings.TrimSpace(out)
		}
		return last == "paused ("+reason+")", nil
	})
	if err != nil {
		return fmt.Errorf("%s to be paused on %s by %s: %w; it is %q", vm.Name, h.Name, reason, err, last)
	}
	return nil
}
