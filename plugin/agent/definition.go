// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// A domain that went live here is transient until libvirt has a definition of it,
// which has to name this host's disks, and to be what the operator last made of
// it on the primary's host. The primary's agent tells of it whenever it changes;
// the backup's keeps it in its state directory, and makes it libvirt's once this
// host owns the domain. What is kept goes then and no sooner: as long as it is
// there, it is yet to be done, whatever ended or hung meanwhile.

// definitionRequest gives the backup's host the definition of the primary's.
type definitionRequest struct {
	Epoch     plugin.Epoch `json:"epoch"`
	XML       string       `json:"xml"`
	Autostart bool         `json:"autostart"`
}

type definitionReply struct {
	// Problem is why the backup's host keeps to the former definition.
	Problem string `json:"problem,omitempty"`
}

// keptDefinition is what a backup's host knows of the definition that it is to make.
type keptDefinition struct {
	Epoch   plugin.Epoch `json:"epoch"`
	Primary string       `json:"primary"`
	// Live describes the primary that the backup was cloned from, Disks are where
	// the replicas of its disks are, by target.
	Live  string            `json:"live"`
	Disks map[string]string `json:"disks"`
	// Defined is the newest definition that can be had here; until there is one,
	// it is made of Live.
	Defined string `json:"defined,omitempty"`
	// Autostart is nil as long as it was not told.
	Autostart *bool `json:"autostart,omitempty"`
	// Ended: the domain was powered off, and the replicas are kept until it is
	// known whose it is.
	Ended bool `json:"ended,omitempty"`
}

// domain makes the definition of this host.
func (k *keptDefinition) domain(o hooks.Options) (*libvirtxml.Domain, error) {
	live, err := hooks.Parse([]byte(k.Live))
	if err != nil {
		return nil, err
	}
	def := live
	if k.Defined != "" {
		if def, err = hooks.Parse([]byte(k.Defined)); err != nil {
			return nil, err
		}
	}
	replicas := map[string]hooks.Replica{}
	for target, path := range k.Disks {
		replicas[target] = hooks.Replica{File: path}
	}
	return hooks.PeerDefinition(def, live, hooks.Annotation{Mode: hooks.ModeProtected, Peer: k.Primary}, o, replicas)
}

// definitionDir holds what is kept, a file for each domain.
func (a *Agent) definitionDir() string { return filepath.Dir(a.cfg.Agent.KeptDefinition("")) }

func (d *domain) keptPath() string { return d.a.cfg.Agent.KeptDefinition(d.id.String()) }

// kept reads what is kept of the domain's definition, nil if nothing is.
func (d *domain) kept() (*keptDefinition, error) {
	text, err := os.ReadFile(d.keptPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k := new(keptDefinition)
	if err := json.Unmarshal(text, k); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errDamaged, d.keptPath(), err)
	}
	return k, nil
}

var errDamaged = errors.New("the definition that was kept is damaged")

// keepDefinition replaces what is kept.
func (d *domain) keepDefinition(k *keptDefinition) error {
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d.a.definitionDir(), 0o700); err != nil {
		return err
	}
	return replaceFile(d.keptPath(), text)
}

// replaceFile writes a file as a whole, or leaves what was there.
func replaceFile(path string, text []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// dropDefinition forgets what is kept for an epoch, or for any before.
func (d *domain) dropDefinition(epoch plugin.Epoch) error {
	d.keeping.Lock()
	defer d.keeping.Unlock()
	k, err := d.kept()
	if k != nil && k.Epoch > epoch {
		return nil
	}
	if k == nil && err == nil {
		return nil
	}
	return os.Remove(d.keptPath())
}

// ---- the primary's side ------------------------------------------------------

// definitionPeriod is between two looks at what libvirt tells no event of, such
// as autostart.
const definitionPeriod = 30 * time.Second

// definitionRetry is between tries of what failed.
const definitionRetry = time.Second

// tellDefinition keeps the backup's host up to date about the definition as long
// as the session lasts.
func (p *primary) tellDefinition(conn *channel.Conn) {
	var told definitionRequest
	var refused error // what the peer said of it
	// What it was woken for last may be for the next session.
	defer p.d.wakeTeller()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-p.d.redefined:
		case <-conn.Done():
			return
		case <-p.ctx.Done():
			return
		}
		now, err := p.d.definition(p.ctx)
		now.Epoch = p.epoch
		if err == nil && now.XML != "" && now != told {
			var reply definitionReply
			ctx, cancel := context.WithTimeout(p.ctx, controlTimeout)
			err = conn.Call(ctx, methodDefinition, now, &reply)
			cancel()
			switch {
			case err != nil:
				err = fmt.Errorf("host %s does not have the newest: %w", p.peer, err)
			case reply.Problem != "":
				told, refused = now, fmt.Errorf("host %s keeps to the former, which would count after a failover: %s", p.peer, reply.Problem)
			default:
				told, refused = now, nil
			}
		}
		if conn.Err() != nil || p.ctx.Err() != nil {
			return
		}
		wait := definitionPeriod
		if err != nil {
			wait = definitionRetry
		}
		t.Reset(wait)
		if s, _, _, _ := p.d.snapshot(); err != nil && s.State == pair.Cloning {
			err = nil // the peer may not be ready for it
		}
		p.d.setDefinition(wishTold, errors.Join(err, refused))
	}
}

// wakeTeller has tellDefinition look for a change.
func (d *domain) wakeTeller() {
	select {
	case d.redefined <- struct{}{}:
	default: // it will look anyway
	}
}

// definition reads the persistent definition; without XML, there is none to be
// told of.
func (d *domain) definition(ctx context.Context) (definitionRequest, error) {
	var r definitionRequest
	if k, err := d.kept(); err != nil || k != nil {
		d.lookAtDefinition()
		return r, errors.Join(err, errors.New("that of this host is yet to be made"))
	}
	info, err := d.a.virt.Lookup(ctx, d.id)
	if err != nil || !info.Persistent {
		return r, err
	}
	text, err := d.a.virt.XML(ctx, d.id, true)
	if err != nil {
		return r, err
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil {
		return r, err
	}
	// Without a wish to be protected the pair ends, see follow.
	if wish, _, err := hooks.ReadAnnotation(dom); err != nil || wish.Mode != hooks.ModeProtected {
		return r, err
	}
	if r.Autostart, err = d.a.virt.Autostart(ctx, d.id); err != nil {
		return r, err
	}
	r.XML = text
	return r, nil
}

// ---- the backup's side -------------------------------------------------------

// takeDefinition keeps what the primary's host tells, if this host can have it.
func (b *backup) takeDefinition(_ context.Context, r definitionRequest) (any, error) {
	if r.Epoch != b.epoch {
		return nil, migrate.ErrEpoch
	}
	b.d.keeping.Lock()
	defer b.d.keeping.Unlock()
	b.mu.Lock()
	leaving := b.leaving
	b.mu.Unlock()
	if leaving {
		return nil, errLeaving
	}
	k, err := b.d.kept()
	if err != nil && !errors.Is(err, errDamaged) {
		return nil, err
	}
	if k == nil || k.Epoch != b.epoch {
		return nil, fmt.Errorf("%w: the backup is yet to be prepared", migrate.ErrEpoch)
	}
	former := k.Defined
	k.Autostart, k.Defined = &r.Autostart, r.XML
	var reply definitionReply
	dom, err := k.domain(b.d.a.hookOptions())
	if err == nil {
		if missing := missingDisks(dom); len(missing) > 0 {
			err = &hooks.NotReadyError{Domain: dom.Name, Problems: missing}
		}
	}
	if err != nil {
		reply.Problem, k.Defined = err.Error(), former
	}
	return reply, b.d.keepDefinition(k)
}

// keepReplicas begins to keep the definition of a backup that is being made.
func (b *backup) keepReplicas(xml string, disks map[string]string) error {
	b.d.keeping.Lock()
	defer b.d.keeping.Unlock()
	return b.d.keepDefinition(&keptDefinition{Epoch: b.epoch, Primary: b.peer, Live: xml, Disks: disks})
}

// ---- the host that owns the domain -------------------------------------------

// takeUpDefinitions has what an earlier agent kept looked at.
func (a *Agent) takeUpDefinitions() {
	files, err := filepath.Glob(filepath.Join(a.definitionDir(), "*.json"))
	if err != nil {
		a.log.Error("definitions that are kept", "error", err)
	}
	for _, path := range files {
		if id, err := plugin.ParseUUID(strings.TrimSuffix(filepath.Base(path), ".json")); err == nil {
			d := a.domain(id)
			d.lookAtDefinition()
			d.adopting(func() { d.adoptEnd(a.ctx) })
		}
	}
}

// lookAtDefinition has keep see to libvirt's definition of the domain here.
func (d *domain) lookAtDefinition() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wanted, d.settleAt = d.wanted+1, time.Time{}
}

// settleDefinition does that, until it is done.
func (d *domain) settleDefinition(ctx context.Context, now time.Time) {
	d.mu.Lock()
	wanted := d.wanted
	due := d.settled < wanted && !now.Before(d.settleAt)
	d.mu.Unlock()
	if !due {
		return
	}
	done, err := d.defineHere(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		d.a.log.Warn("the definition on this host is not what it should be", "domain", d.label(), "error", err)
	}
	wait := definitionRetry
	if err == nil {
		wait = settlePeriod
	}
	d.mu.Lock()
	switch {
	case done:
		d.settled = wanted
	case d.wanted == wanted:
		d.settleAt = now.Add(wait)
	}
	d.mu.Unlock()
	if done || err != nil {
		d.setDefinition(wishHere, err)
	}
}

// settlePeriod is between looks at whether what is kept counts yet.
const settlePeriod = 5 * time.Second

// defineHere makes libvirt's definition what it should be, which depends on
// whose the domain is. It is done unless that is undecided, or it fails.
func (d *domain) defineHere(ctx context.Context) (done bool, err error) {
	lookup, cancel := context.WithTimeout(ctx, arbiterTimeout)
	rec, err := d.a.arbiter.Lookup(lookup, d.id)
	cancel()
	if err != nil && !errors.Is(err, arbiter.ErrNoRecord) {
		return false, fmt.Errorf("whose the domain is, the arbiter does not say: %w", err)
	}
	d.defining.Lock()
	defer d.defining.Unlock()
	host := d.a.cfg.Host
	s, v, _, _ := d.snapshot()
	switch arbiter.MayStart(rec, host, false).Decision {
	case arbiter.StartAllowed, arbiter.StartAfterAcquire:
		if v != nil && v.reports().Mode == control.ModeReplay || s.State == pair.GoingLive {
			return false, nil
		}
		if err := d.define(ctx, rec); err != nil {
			return false, err
		}
		// The other host may be about to win it.
		return v != nil || !rec.Undecided(), nil
	}
	if rec.Undecided() && rec.Backup == host {
		// Going live has it looked at again.
		err := d.noAutostart(ctx)
		return err == nil && v != nil, err
	}
	if err := errors.Join(d.dropDefinition(rec.Epoch), d.noAutostart(ctx)); err != nil {
		return false, err
	}
	return true, nil
}

// define gives libvirt the definition that is kept or, of a copy of which none is,
// that of the running domain. Of a domain that never was a backup here, there is
// nothing to do.
func (d *domain) define(ctx context.Context, rec arbiter.Record) error {
	k, err := d.kept()
	if errors.Is(err, errDamaged) {
		d.a.log.Error("that of the running domain will have to do", "domain", d.label(), "error", err)
		err = d.dropDefinition(rec.Epoch)
	}
	if err != nil {
		return err
	}
	info, live, err := d.running(ctx)
	if err != nil {
		return err
	}
	var wish hooks.Annotation
	if live != nil {
		if wish, _, err = hooks.ReadAnnotation(live); err != nil {
			return err
		}
	}
	if k != nil && (!wish.Backup() || k.Epoch != wish.Epoch) && (k.Epoch != rec.Epoch || rec.Owner != d.a.cfg.Host) {
		// Of a backup that never went live.
		if err := d.dropDefinition(k.Epoch); err != nil {
			return err
		}
		k = nil
	}
	if k == nil && !wish.Backup() {
		return nil
	}
	defined := false
	if k == nil && info.Persistent {
		// An earlier version did it, and left the annotation as it was. What was
		// edited since is not undone.
		if defined, err = d.definedAs(ctx, live); err != nil {
			return err
		}
	}
	if !defined {
		if err := d.defineBest(ctx, k, live, wish); err != nil {
			return err
		}
	}
	if k != nil && k.Autostart != nil {
		if err := d.a.virt.SetAutostart(ctx, d.id, *k.Autostart); err != nil {
			return err
		}
	}
	if wish.Backup() {
		// It is none any more. What is none is not defined a second time, as
		// after an operator's virsh undefine.
		info.Persistent = false // the running domain alone
		if err := d.writeWish(ctx, info, hooks.ModeProtected, wish.Peer); err != nil {
			return err
		}
	}
	if k != nil {
		if err := d.dropDefinition(k.Epoch); err != nil {
			return err
		}
	}
	d.a.log.Info("the domain is defined on this host", "domain", d.label())
	d.kick() // the next backup's host is told of it
	return nil
}

// defineBest makes the newest definition that this host's libvirt takes.
func (d *domain) defineBest(ctx context.Context, k *keptDefinition, live *libvirtxml.Domain, wish hooks.Annotation) error {
	err := d.defineAs(ctx, k, live, wish)
	if k != nil && k.Defined != "" && err != nil && !errors.Is(err, virt.ErrTimeout) {
		// This host's libvirt may not know what the other's does.
		former := *k
		former.Defined = ""
		if d.defineAs(ctx, &former, live, wish) == nil {
			d.a.log.Error("what was edited of the definition since the clone is lost: libvirt on this host does not take it", "domain", d.label(), "error", err)
			err = nil
		}
	}
	return err
}

// defineAs does so as it is kept or, without that, as what runs.
func (d *domain) defineAs(ctx context.Context, k *keptDefinition, live *libvirtxml.Domain, wish hooks.Annotation) error {
	var def *libvirtxml.Domain
	var err error
	if k != nil {
		def, err = k.domain(d.a.hookOptions())
	}
	if live != nil && (k == nil || err != nil) {
		def, err = hooks.Definition(live, hooks.Annotation{Mode: hooks.ModeProtected, Peer: wish.Peer}, d.a.hookOptions())
	}
	if err != nil {
		return err
	}
	text, err := def.Marshal()
	if err != nil {
		return err
	}
	_, err = d.a.virt.Define(ctx, text)
	return err
}

// definedAs tells whether libvirt's definition is of the copy that runs: whether it
// has its disks.
func (d *domain) definedAs(ctx context.Context, live *libvirtxml.Domain) (bool, error) {
	text, err := d.a.virt.XML(ctx, d.id, true)
	if err != nil {
		return false, err
	}
	def, err := hooks.Parse([]byte(text))
	if err != nil || live.Devices == nil || def.Devices == nil {
		return false, err
	}
	named := map[image]bool{}
	for _, x := range def.Devices.Disks {
		if i, ok := imageOf(x); ok {
			named[i] = true
		}
	}
	for _, x := range live.Devices.Disks {
		if i, ok := imageOf(x); ok && !named[i] {
			return false, nil
		}
	}
	return true, nil
}

// settleNow makes the definition before the domain is changed in a way that would
// hide that it is yet to be made.
func (d *domain) settleNow(ctx context.Context) error {
	d.mu.Lock()
	pending := d.settled < d.wanted
	d.mu.Unlock()
	if !pending {
		return nil
	}
	if _, err := d.defineHere(ctx); err != nil {
		return fmt.Errorf("the domain's definition on this host is yet to be made: %w", err)
	}
	return nil
}

// running describes the domain if it runs.
func (d *domain) running(ctx context.Context) (virt.Info, *libvirtxml.Domain, error) {
	info, err := d.a.virt.Lookup(ctx, d.id)
	if errors.Is(err, virt.ErrNoDomain) {
		return info, nil, nil
	}
	if err != nil || !info.Active {
		return info, nil, err
	}
	text, err := d.a.virt.XML(ctx, d.id, false)
	if err != nil {
		return info, nil, err
	}
	dom, err := hooks.Parse([]byte(text))
	return info, dom, err
}

// noAutostart keeps a host from trying to start a copy that is stale, which the
// hook would refuse.
func (d *domain) noAutostart(ctx context.Context) error {
	info, err := d.a.virt.Lookup(ctx, d.id)
	if errors.Is(err, virt.ErrNoDomain) || err == nil && !info.Persistent {
		return nil
	}
	if err != nil {
		return err
	}
	on, err := d.a.virt.Autostart(ctx, d.id)
	if err != nil || !on {
		return err
	}
	d.a.log.Info("the copy here is not the domain's any more: it does not start with the host", "domain", d.label())
	return d.a.virt.SetAutostart(ctx, d.id, false)
}

// What can be amiss with a domain's definition.
type definitionWish int

const (
	wishHere definitionWish = iota // libvirt's on this host
	wishTold                       // what the peer knows
)

// pending is something that is yet to be done to a definition.
type pending struct {
	why   string
	since time.Time
}

// setDefinition notes for the status why a definition is not as it should be.
func (d *domain) setDefinition(w definitionWish, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := &d.pending[w]
	switch {
	case err == nil:
		*p = pending{}
	case p.why == "":
		p.since = time.Now()
		fallthrough
	default:
		p.why = strings.ReplaceAll(err.Error(), "\n", "; ") // it may be several joined
	}
}

// definitionStatus tells it; the lock is held.
func (d *domain) definitionStatus(s pair.Status) (why string, age time.Duration) {
	var parts []string
	for w, p := range d.pending {
		if p.why != "" && (definitionWish(w) == wishHere || s.State == pair.Protected) {
			parts = append(parts, p.why)
			age = max(age, time.Since(p.since))
		}
	}
	return strings.Join(parts, "; "), age
}
