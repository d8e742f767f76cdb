// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/pair"
)

// Methods of a verification, which the primary's agent calls.
const (
	// methodLook makes the backup stand where the primary does, and looks.
	methodLook = "verify.look"
	// methodHashes asks for hashes of what the last look saw.
	methodHashes = "verify.hashes"
	// methodDiffers tells that it is not the primary's copy.
	methodDiffers = "verify.differs"
)

// VerifyRequest is the body of POST /v1/verify.
type VerifyRequest struct {
	Domain string `json:"domain"`
	// Limit is the longest time for which the domain may stand still, in
	// milliseconds.
	Limit int64 `json:"limit_ms"`
	// Keep a backup that differs.
	Keep bool `json:"keep,omitempty"`
}

// maxVerify bounds the limit of a verification.
const maxVerify = 24 * time.Hour

// VerifyPlan tells what a verification would read.
type VerifyPlan struct {
	Domain string `json:"domain"`
	Peer   string `json:"peer"`
	Memory int64  `json:"memory"` // bytes
	Disks  int64  `json:"disks"`  // bytes in use of their images
}

// Verification is what came of one.
type Verification struct {
	Domain       string          `json:"domain"`
	UUID         plugin.UUID     `json:"uuid"`
	Epoch        plugin.Epoch    `json:"epoch"`
	Primary      string          `json:"primary"`
	Backup       string          `json:"backup"`
	Position     plugin.Position `json:"position"`
	Instructions uint64          `json:"instructions"`
	// Pause is how long the domain stood still.
	Pause float64 `json:"pause_ms"`
	Equal bool    `json:"equal"`
	// Discarded: the backup differs and is being replaced.
	Discarded bool   `json:"discarded"`
	Parts     []Part `json:"parts"`
}

// Part is the comparison of one block of memory, one disk, or the registers.
type Part struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"`
	Size  int64  `json:"size"`
	Equal bool   `json:"equal"`
	// Different is how many bytes are in chunks that differ, Ranges are the
	// first of those.
	Different int64    `json:"different,omitempty"`
	Ranges    []Range  `json:"ranges,omitempty"`
	Detail    []string `json:"detail,omitempty"`
}

// Range is a part of memory or of a disk, in bytes.
type Range struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
}

// maxRanges are told of each part.
const maxRanges = 32

type lookRequest struct {
	Epoch  plugin.Epoch    `json:"epoch"`
	Pos    plugin.Position `json:"position"`
	Icount uint64          `json:"instructions"`
	Limit  int64           `json:"limit_ms"`
}

type hashesRequest struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"`
	First int    `json:"first"` // chunk
}

type hashesReply struct {
	Hashes []byte `json:"hashes"`
}

// hashesPage is how many hashes one answer has; it fits a frame of the channel.
const hashesPage = 4096

// Plan tells what Verify would read; it changes nothing.
func (a *Agent) Plan(ctx context.Context, name string) (VerifyPlan, error) {
	d, _, p, err := a.recording(ctx, name)
	if err != nil {
		return VerifyPlan{}, err
	}
	plan := VerifyPlan{Domain: d.label(), Peer: p.peer}
	info, err := a.virt.Memory(ctx, d.id)
	if err != nil {
		return plan, err
	}
	plan.Memory = info
	images, err := d.images(ctx)
	if err != nil {
		return plan, err
	}
	for _, i := range images {
		st, err := os.Stat(i.path)
		if err != nil {
			return plan, err
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			plan.Disks += sys.Blocks * 512
		}
	}
	return plan, nil
}

// recording finds a domain that runs here as the primary of a pair.
func (a *Agent) recording(ctx context.Context, name string) (*domain, *vm, *primary, error) {
	d, _, err := a.primaryOf(ctx, name)
	if err != nil {
		return nil, nil, nil, err
	}
	_, v, p, _ := d.snapshot()
	if v == nil || p == nil || v.reports().Mode != control.ModeRecord {
		return nil, nil, nil, fmt.Errorf("%w: its plugin does not record", ErrNotProtected)
	}
	return d, v, p, nil
}

// Verify compares memory, registers and disks of both sides where both stand.
// The domain stands still meanwhile, at most for the limit.
func (a *Agent) Verify(ctx context.Context, req VerifyRequest) (Verification, error) {
	limit := time.Duration(req.Limit) * time.Millisecond
	if limit <= 0 || limit > maxVerify {
		return Verification{}, fmt.Errorf("a limit of %v is not within 0 and %v", limit, maxVerify)
	}
	d, v, p, err := a.recording(ctx, req.Domain)
	if err != nil {
		return Verification{}, err
	}
	if !d.verifying.TryLock() {
		return Verification{}, fmt.Errorf("domain %s is being verified already", d.label())
	}
	defer d.verifying.Unlock()
	images, err := d.images(ctx)
	if err != nil {
		return Verification{}, err
	}
	out := Verification{Domain: d.label(), UUID: d.id, Epoch: p.epoch, Primary: a.cfg.Host, Backup: p.peer}
	ours, theirs, pause, err := d.lookAtBoth(ctx, v, p, images, limit)
	out.Pause = millis(pause)
	if err != nil {
		return out, fmt.Errorf("domain %s stood still for %v and was not compared: %w", out.Domain, pause.Round(time.Millisecond), err)
	}
	out.Position, out.Instructions = ours.Looked.Pos, ours.Looked.Icount
	out.Parts, err = p.differences(ctx, ours, theirs)
	if err != nil {
		return out, err
	}
	out.Equal = true
	for _, part := range out.Parts {
		out.Equal = out.Equal && part.Equal
	}
	a.log.Info("verified", "domain", out.Domain, "epoch", out.Epoch, "equal", out.Equal, "pause", pause)
	if !out.Equal && !req.Keep {
		out.Discarded = true
		tell, cancel := context.WithTimeout(ctx, controlTimeout)
		defer cancel()
		if err := p.Call(tell, methodDiffers, out, nil); err != nil {
			return out, fmt.Errorf("the backup of domain %s differs, and its host is not told: %w", out.Domain, err)
		}
	}
	return out, nil
}

// lookAtBoth holds the primary, and looks at both sides where it stands.
func (d *domain) lookAtBoth(ctx context.Context, v *vm, p *primary, images []image, limit time.Duration) (ours, theirs *side, pause time.Duration, err error) {
	if !v.reports().Running {
		return nil, nil, 0, errors.New("it is paused; 'virsh resume' it first")
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := v.Hold(limit); err != nil {
		return nil, nil, 0, err
	}
	var began time.Time
	held := func(r reports) bool { return r.Text == control.Held && !r.Running }
	defer func() {
		// The plugin lets the VM go on by itself when the limit is over.
		err = errors.Join(err, v.Hold(0))
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), controlTimeout)
		defer cancel()
		err = errors.Join(err, v.wait(wait, "waiting for the domain to go on", func(r reports) bool { return r.Running }))
		if !began.IsZero() {
			pause = time.Since(began)
		}
	}()
	var at control.State
	err = v.wait(ctx, "waiting for a moment without disk requests", func(r reports) bool {
		at = r.State
		return held(r)
	})
	if err != nil {
		return nil, nil, 0, err
	}
	began = time.Now()
	group, both := errgroup.WithContext(ctx)
	group.Go(func() error {
		var err error
		ours, err = d.look(both, v, images)
		return err
	})
	group.Go(func() error {
		theirs = &side{}
		req := lookRequest{Epoch: p.epoch, Pos: at.Pos, Icount: at.Icount, Limit: limit.Milliseconds()}
		if err := p.Call(both, methodLook, req, theirs); err != nil {
			return fmt.Errorf("on %s: %w", p.peer, err)
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return nil, nil, 0, err
	}
	if !held(v.reports()) {
		return nil, nil, 0, fmt.Errorf("the limit of %v was over", limit)
	}
	return ours, theirs, 0, nil
}

// differences compares what was seen; of what differs it asks where.
func (p *primary) differences(ctx context.Context, ours, theirs *side) ([]Part, error) {
	parts := []Part{registers(ours.Looked, theirs.Looked)}
	for _, o := range ours.Objects {
		part := Part{Kind: o.Kind, Name: o.Name, Size: o.Size}
		t := theirs.find(o.Kind, o.Name)
		switch {
		case t == nil || !o.same(t):
			part.Detail = []string{"it is missing or of another size on " + p.peer}
			part.Different = o.Size
		case t.Digest == o.Digest:
			part.Equal = true
		default:
			if err := p.fetch(ctx, t, len(o.hashes)); err != nil {
				return nil, err
			}
			part.Ranges, part.Different = differing(o, t)
		}
		parts = append(parts, part)
	}
	for _, t := range theirs.Objects {
		if ours.find(t.Kind, t.Name) == nil {
			parts = append(parts, Part{Kind: t.Kind, Name: t.Name, Size: t.Size, Different: t.Size, Detail: []string{"only " + p.peer + " has it"}})
		}
	}
	return parts, nil
}

// fetch gets the hashes of an object of the backup's.
func (p *primary) fetch(ctx context.Context, o *object, n int) error {
	for len(o.hashes) < n {
		page, cancel := context.WithTimeout(ctx, controlTimeout)
		var r hashesReply
		err := p.Call(page, methodHashes, hashesRequest{o.Kind, o.Name, len(o.hashes) / control.HashSize}, &r)
		cancel()
		if err != nil {
			return err
		}
		if len(r.Hashes) == 0 || len(o.hashes)+len(r.Hashes) > n {
			return fmt.Errorf("the hashes of %s from %s are not complete", o.Name, p.peer)
		}
		o.hashes = append(o.hashes, r.Hashes...)
	}
	return nil
}

// differing gives the first ranges that differ, and how many bytes all have.
func differing(a, b *object) (ranges []Range, bytesIn int64) {
	for at := int64(0); at < a.Size; at += a.Chunk {
		i := at / a.Chunk * control.HashSize
		if bytes.Equal(a.hashes[i:i+control.HashSize], b.hashes[i:i+control.HashSize]) {
			continue
		}
		n := min(a.Chunk, a.Size-at)
		bytesIn += n
		last := len(ranges) - 1
		switch {
		case last >= 0 && ranges[last].Start+ranges[last].Length == at:
			ranges[last].Length += n
		case len(ranges) < maxRanges:
			ranges = append(ranges, Range{at, n})
		}
	}
	return ranges, bytesIn
}

// registerNames are in the order of control.Looked.
var registerNames = [...]string{
	"RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15",
	"RIP", "flags", "CR0", "CR1", "CR2", "CR3", "CR4",
}

func registers(ours, theirs control.Looked) Part {
	p := Part{Kind: partRegisters, Name: "vcpu0", Size: int64(8 * len(ours.Registers)), Equal: true}
	for i, v := range ours.Registers {
		if w := theirs.Registers[i]; v != w {
			p.Equal = false
			p.Different += 8
			p.Detail = append(p.Detail, fmt.Sprintf("%s is %#x here and %#x on the backup", registerNames[i], v, w))
		}
	}
	return p
}

// look serves methodLook.
func (b *backup) look(ctx context.Context, r lookRequest) (any, error) {
	if r.Epoch != b.epoch {
		return nil, fmt.Errorf("epoch %d is not that of the backup here", r.Epoch)
	}
	b.mu.Lock()
	v := b.vm
	b.mu.Unlock()
	if v == nil {
		return nil, errors.New("the backup's plugin is not connected")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.Limit)*time.Millisecond)
	defer cancel()
	images, err := b.d.images(ctx)
	if err != nil {
		return nil, err
	}
	err = v.wait(ctx, "waiting for the backup to be where the primary is", func(s reports) bool {
		return s.consumed.Pos >= r.Pos && s.consumed.Icount == r.Icount
	})
	if err != nil {
		return nil, err
	}
	s, err := b.d.look(ctx, v, images)
	if err == nil && s.Looked.Icount != r.Icount {
		err = fmt.Errorf("%w: the backup is at instruction %d, not at %d", errLook, s.Looked.Icount, r.Icount)
	}
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	b.looked = s
	b.mu.Unlock()
	return s, nil
}

// hashes serves methodHashes.
func (b *backup) hashes(_ context.Context, r hashesRequest) (any, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.looked == nil {
		return nil, errors.New("the backup was not looked at")
	}
	o := b.looked.find(r.Kind, r.Name)
	if o == nil || r.First < 0 || r.First > len(o.hashes)/control.HashSize {
		return nil, fmt.Errorf("there is no %s %s at chunk %d", r.Kind, r.Name, r.First)
	}
	rest := o.hashes[r.First*control.HashSize:]
	return hashesReply{rest[:min(len(rest), hashesPage*control.HashSize)]}, nil
}

// differs serves methodDiffers: a backup that is not the primary's copy must not
// go live.
func (b *backup) differs(_ context.Context, report json.RawMessage) (any, error) {
	b.mu.Lock()
	b.verdict = report
	v := b.vm
	b.mu.Unlock()
	b.d.a.log.Error("the backup differs from its primary, as was verified", "domain", b.d.label(), "epoch", b.epoch)
	if v == nil || once(&v.left) {
		b.d.a.wg.Go(func() { b.d.post(pair.Event{Kind: pair.EventLocalDiverged, Epoch: b.epoch}) })
	}
	return struct{}{}, nil
}
