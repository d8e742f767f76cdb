// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"libvirt.org/go/libvirtxml"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/rrlog"
	"ftvirt.org/ftvirt/plugin/virt"
)

// Errors of enabling, for the command line to tell what to do.
var (
	ErrNotRunning = errors.New("the domain is not running")
	ErrProtected  = errors.New("the domain is protected already")
	ErrPeer       = errors.New("the peer cannot take the backup")
)

// Check tells what keeps a domain from being protected by peer; peer may be
// empty, to check the domain alone. It changes nothing.
func (a *Agent) Check(ctx context.Context, name, peer string) ([]hooks.Problem, error) {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	problems, err := a.checkDomain(ctx, info, peer)
	if err != nil {
		return nil, err
	}
	if peer == "" {
		return problems, nil
	}
	if err := a.checkPeer(ctx, peer); err != nil {
		problems = append(problems, hooks.Problem{
			Code: "peer", Path: "host " + peer, Reason: err.Error(), Remedy: "see the reason; 'ftvirt agent' must run on both hosts",
		})
	}
	return problems, nil
}

func (a *Agent) checkDomain(ctx context.Context, info virt.Info, peer string) ([]hooks.Problem, error) {
	text, err := a.virt.XML(ctx, info.UUID, !info.Active)
	if err != nil {
		return nil, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return nil, err
	}
	opts := hooks.CheckOptions{Host: a.cfg.Host, Peer: peer, Running: info.Active}
	for n := range a.cfg.Peers {
		opts.Peers = append(opts.Peers, n)
	}
	if opts.Snapshots, err = a.virt.Snapshots(ctx, info.UUID); err != nil {
		return nil, err
	}
	problems := hooks.Check(dom, opts)
	problems = append(problems, missingDisks(dom)...)
	version, err := a.virt.Hypervisor(ctx)
	if err != nil {
		return nil, err
	}
	return append(problems, unknownQEMU(version)...), nil
}

// missingDisks tells of images that are not there.
func missingDisks(dom *libvirtxml.Domain) []hooks.Problem {
	var problems []hooks.Problem
	if dom.Devices == nil {
		return nil
	}
	for _, d := range dom.Devices.Disks {
		if d.Source == nil || d.Source.File == nil || d.Source.File.File == "" || d.Target == nil {
			continue
		}
		if _, err := os.Stat(d.Source.File.File); err != nil {
			problems = append(problems, hooks.Problem{
				Code: "disk-missing", Path: "disk " + d.Target.Dev, Reason: err.Error(), Remedy: "restore the image, or take the disk out of the domain",
			})
		}
	}
	return problems
}

// unknownQEMU tells of a QEMU whose event log is not understood.
func unknownQEMU(version string) []hooks.Problem {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		return []hooks.Problem{{Code: "qemu-version", Reason: fmt.Sprintf("version %q of QEMU: %v", version, err), Remedy: "install QEMU 9.1 to 10.x"}}
	}
	if _, err := rrlog.LayoutFor(major, minor); err != nil {
		return []hooks.Problem{{Code: "qemu-version", Reason: err.Error(), Remedy: "install QEMU 9.1 to 10.x; Debian 12 has it in bookworm-backports"}}
	}
	return nil
}

// checkPeer asks the peer's agent what it runs.
func (a *Agent) checkPeer(ctx context.Context, peer string) error {
	theirs, err := a.probe(ctx, peer)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrPeer, err)
	}
	if theirs.Plugin == "" {
		return fmt.Errorf("%w: host %s has no QEMU plugin: install ftvirt.so there, see plugin_file in its ftvirt.toml", ErrPeer, peer)
	}
	ours, err := a.hostInfo(ctx)
	if err != nil {
		return err
	}
	if ours.QEMU != theirs.QEMU {
		return fmt.Errorf("%w: host %s has QEMU %s, this host %s: install the same version on both", ErrPeer, peer, theirs.QEMU, ours.QEMU)
	}
	return nil
}

// Enable protects a running domain with a backup on peer. It returns once the
// clone has begun; what fails before leaves everything as it was. A domain that
// has its backup there already, be it in the making, needs nothing.
func (a *Agent) Enable(ctx context.Context, name, peer string) error {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return err
	}
	d := a.domain(info.UUID)
	if err := d.enable(ctx, info, peer); err != nil {
		return err
	}
	if err := d.annotate(ctx, info, hooks.ModeProtected, peer); err != nil {
		a.log.Warn("cannot annotate the domain", "domain", info.Name, "error", err)
	}
	return nil
}

// enable begins a clone to peer. Errors that wrap ErrPeer are the peer's fault:
// another one might do.
func (d *domain) enable(ctx context.Context, info virt.Info, peer string) error {
	d.enabling.Lock()
	defer d.enabling.Unlock()
	a := d.a
	if a.leaving.Load() {
		return errLeavingHost
	}
	if _, err := a.cfg.Peer(peer); err != nil {
		return err
	}
	if !info.Active {
		return fmt.Errorf("%w: start it with 'virsh start %s'", ErrNotRunning, info.Name)
	}
	status, v, p, _ := d.snapshot()
	if p != nil && status.Peer == peer && (status.State == pair.Cloning || status.State == pair.Protected) {
		return nil
	}
	problems, err := a.checkDomain(ctx, info, peer)
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		return &hooks.NotReadyError{Domain: info.Name, Problems: problems}
	}
	if err := d.settleNow(ctx); err != nil {
		return err
	}
	if status.State != pair.Unprotected && status.State != pair.Live && status.State != pair.Failed {
		return fmt.Errorf("%w: it is %s", ErrProtected, status)
	}
	if v == nil || v.reports().Mode == control.ModeBoot {
		return fmt.Errorf("%w: its definition was not made ready before its start: "+
			"run 'ftvirt enable %s --peer %s --at-next-boot', shut it down, and start it", hooks.ErrNotTransformed, info.Name, peer)
	}
	if why := v.reports().pause; why != "" {
		return pauseError(info.Name, why)
	}
	if _, err := rrlog.LayoutFor(v.Hello().QEMU.Major, v.Hello().QEMU.Minor); err != nil {
		return err
	}
	if err := a.checkPeer(ctx, peer); err != nil {
		return err
	}
	epoch, err := d.openEpoch(ctx, peer)
	if err != nil {
		return err
	}
	v.opened.Store(false)
	d.setFailure(nil)
	d.setRetry(time.Time{})
	d.post(pair.Event{Kind: pair.EventEnable, Epoch: epoch, Peer: peer})
	return d.untilBegun(ctx, epoch)
}

// openEpoch gets a fresh epoch for a pair with peer from the arbiter.
func (d *domain) openEpoch(ctx context.Context, peer string) (plugin.Epoch, error) {
	a := d.a
	ctx, cancel := context.WithTimeout(ctx, arbiterTimeout)
	defer cancel()
	epoch, err := a.arbiter.Open(ctx, d.id, a.cfg.Host, peer)
	if !errors.Is(err, arbiter.ErrUndecided) {
		return epoch, err
	}
	// An epoch of before ended without a decision. If this host can have it,
	// nobody else runs the domain.
	rec, err := a.arbiter.Lookup(ctx, d.id)
	if err != nil {
		return 0, err
	}
	if err := a.arbiter.Acquire(ctx, d.id, rec.Epoch, a.cfg.Host); err != nil {
		return 0, err
	}
	return a.arbiter.Open(ctx, d.id, a.cfg.Host, peer)
}

// untilBegun waits until the machine has taken up a new epoch: until then the
// domain would look as if nobody had protected it yet.
func (d *domain) untilBegun(ctx context.Context, epoch plugin.Epoch) error {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for {
		s, _, _, _ := d.snapshot()
		if s.Epoch >= epoch {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("the clone did not begin: the domain is %s", s)
		}
	}
}

// Disable takes protection away; the domain runs on where it is. Nothing changes
// unless the arbiter answers.
func (a *Agent) Disable(ctx context.Context, name string) error {
	info, err := a.virt.Find(ctx, name)
	if err != nil {
		return err
	}
	d := a.domain(info.UUID)
	if err := d.request(ctx, pair.EventUserDisable); err != nil {
		return err
	}
	// The next clone is not due for protect.retry_min.
	err = d.annotate(ctx, info, "", "")
	a.wg.Go(func() { d.forgetReplicas(a.ctx) })
	if err != nil {
		return fmt.Errorf("the annotation still asks for protection; take it out with 'virsh metadata', or repeat this: %w", err)
	}
	return d.untilGivenUp(ctx)
}

// untilGivenUp waits on the backup's host for the primary's to give the pair up.
func (d *domain) untilGivenUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, aloneTimeout)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		s, _, _, _ := d.snapshot()
		if s.Role != plugin.RoleBackup || !d.paired() {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("host %s does not give the pair up; try it there", s.Peer)
		}
	}
}

// annotate writes the operator's wish into the domain, or, without a mode, takes
// it out. libvirt adds the namespace itself.
func (d *domain) annotate(ctx context.Context, info virt.Info, mode hooks.Mode, peer string) error {
	err := d.settleNow(ctx)
	if err == nil && !info.Persistent {
		info, err = d.a.virt.Lookup(ctx, d.id) // it may be by now
	}
	if err != nil {
		return err
	}
	return d.writeWish(ctx, info, mode, peer)
}

func (d *domain) writeWish(ctx context.Context, info virt.Info, mode hooks.Mode, peer string) error {
	text := ""
	if mode != "" {
		text = hooks.Annotation{Mode: mode, Peer: peer}.Element()
	}
	return d.a.virt.SetMetadata(ctx, info, "ft", hooks.Namespace, text)
}

// setAvoid notes the peer on which a clone failed last, for the next to begin
// elsewhere if that is possible.
func (d *domain) setAvoid(peer string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.avoid = peer
}

func (d *domain) setFailure(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failure = ""
	if err != nil {
		d.failure = err.Error()
	}
}
