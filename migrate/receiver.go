// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"ftvirt.org/ftvirt/migrate/resync"
	"ftvirt.org/ftvirt/plugin"
)

// Errors of the receiving side.
var (
	ErrActive = errors.New("the domain already runs on this host")
	ErrEpoch  = errors.New("not the epoch that is being cloned")
	ErrFormat = errors.New("unsupported disk format")
	ErrTarget = errors.New("not the name of a disk")
	ErrSpace  = errors.New("not enough room for the backup's disks")
)

// Hypervisor is what the receiver needs of the backup's libvirt.
type Hypervisor interface {
	Monitor(ctx context.Context, id plugin.UUID, command string, args, out any) error
	// Create starts a transient domain, paused.
	Create(ctx context.Context, xml string) error
	Destroy(ctx context.Context, id plugin.UUID) error
	Active(ctx context.Context, id plugin.UUID) (bool, error)
}

// Replayer is the plugin in the backup's QEMU.
type Replayer interface {
	// User is the uid that QEMU runs as.
	User() int
	// Replaying waits until the VM has its state and runs.
	Replaying(ctx context.Context) error
}

// Receiver makes and unmakes one backup on this host. Its methods are the
// Method* calls of a Source, in that order.
type Receiver struct {
	Local    Hypervisor
	Domain   plugin.UUID
	Dir      string // for sockets; made, and removed at the end
	Replicas *Replicas
	// Seed finds an older copy of a disk on this host, which is only read; nil
	// if there is none.
	Seed func(ctx context.Context, disk Disk) Seed
	// Keep leaves the replicas of a backup that is discarded, for the next to
	// begin with; see Discard.
	Keep bool
	// Describe makes the backup's description out of the primary's; disks
	// maps targets to paths on this host, nodes to the block nodes that
	// libvirt will make for them.
	Describe func(xml string, epoch plugin.Epoch, disks map[string]string) (xmlHere string, nodes map[string]string, err error)
	// Attached waits for the plugin of the new QEMU.
	Attached func(ctx context.Context) (Replayer, error)

	epoch  plugin.Epoch
	disks  []Disk
	nodes  map[string]string // by target
	files  []replica
	resync []string // targets whose replica is an old one, or has a seed

	seedMu  sync.Mutex      // since tunnels come beside the calls
	seeds   map[string]Seed // by target
	created bool
	won     atomic.Bool
	replay  Replayer
}

// diskTarget is what libvirt calls disks.
var diskTarget = regexp.MustCompile(`^[a-z]{1,8}[a-z0-9]{0,8}$`)

// Seed is an older copy of a disk.
type Seed interface {
	io.ReaderAt
	io.Closer
}

// replica is a file of a backup.
type replica struct {
	record
	// once: it was complete at some time, so that the next backup can begin
	// with it.
	once bool
}

// Prepare starts a backup domain that waits for its state, with replicas of the
// disks, empty or old, exported for the primary to fill. If it fails, nothing is
// left that was not there before.
func (r *Receiver) Prepare(ctx context.Context, req PrepareRequest) (reply PrepareReply, err error) {
	active, err := r.Local.Active(ctx, r.Domain)
	if err != nil {
		return reply, err
	}
	if active {
		return reply, fmt.Errorf("%w: %s", ErrActive, r.Domain)
	}
	r.epoch, r.disks = req.Epoch, req.Disks
	defer func() {
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
			defer cancel()
			err = errors.Join(err, r.Discard(clean))
		}
	}()
	u, err := r.Replicas.usage(ctx, req.XML)
	if err != nil {
		r.Replicas.Log.Warn("old replicas are left alone", "domain", r.Domain, "error", err)
	}
	paths := map[string]string{}
	for _, d := range req.Disks {
		path, err := r.makeReplica(ctx, d, u)
		if err != nil {
			return reply, fmt.Errorf("replica of %s: %w", d.Target, err)
		}
		paths[d.Target] = path
	}
	r.Replicas.clear(r.Domain, req.XML, u)
	if err := r.checkSpace(); err != nil {
		return reply, err
	}
	xml, nodes, err := r.Describe(req.XML, req.Epoch, paths)
	if err != nil {
		return reply, err
	}
	r.nodes = nodes
	if err := r.Local.Create(ctx, xml); err != nil {
		return reply, err
	}
	r.created = true
	r.Replicas.release(r.files)
	if r.replay, err = r.Attached(ctx); err != nil {
		return reply, err
	}
	if err := r.makeDir(); err != nil {
		return reply, err
	}
	return PrepareReply{Resync: r.resync}, r.export(ctx)
}

// Adopt takes up a backup that another Receiver made in epoch, for Discard to
// remove. One that replays had complete replicas.
func (r *Receiver) Adopt(epoch plugin.Epoch, replays bool) error {
	r.created = true
	return r.AdoptEnded(epoch, replays)
}

// AdoptEnded takes up what is left of one after End: its replicas, and no domain.
func (r *Receiver) AdoptEnded(epoch plugin.Epoch, replayed bool) error {
	list, err := r.Replicas.list(r.Domain)
	if err != nil {
		return err
	}
	r.epoch = epoch
	for _, rec := range list {
		if rec.Epoch == epoch {
			r.files = append(r.files, replica{rec, replayed})
		}
	}
	return nil
}

func (r *Receiver) makeReplica(ctx context.Context, d Disk, u *usage) (string, error) {
	if d.Format != "raw" && d.Format != "qcow2" {
		return "", fmt.Errorf("%w %q: use raw or qcow2", ErrFormat, d.Format)
	}
	// The peer's word becomes part of a path.
	if !diskTarget.MatchString(d.Target) || d.Size < 0 {
		return "", fmt.Errorf("%w: %q of %d bytes", ErrTarget, d.Target, d.Size)
	}
	old, taken, err := r.Replicas.take(ctx, r.Domain, r.epoch, d, u)
	if err != nil {
		return "", err
	}
	if taken {
		r.files = append(r.files, replica{old, true})
		r.resync = append(r.resync, d.Target)
		r.openSeed(ctx, d)
		return old.Path, nil
	}
	rec, err := r.Replicas.create(r.Domain, r.epoch, d)
	if err != nil {
		return "", err
	}
	path := rec.Path
	r.files = append(r.files, replica{record: rec})
	cmd := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", d.Format, path, strconv.FormatInt(d.Size, 10))
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("qemu-img: %w: %s", err, strings.TrimSpace(string(text)))
	}
	if r.openSeed(ctx, d) {
		r.resync = append(r.resync, d.Target)
	}
	return path, nil
}

// openSeed looks for an older copy of a disk.
func (r *Receiver) openSeed(ctx context.Context, d Disk) bool {
	if r.Seed == nil {
		return false
	}
	seed := r.Seed(ctx, d)
	if seed == nil {
		return false
	}
	r.seedMu.Lock()
	defer r.seedMu.Unlock()
	if r.seeds == nil {
		r.seeds = map[string]Seed{}
	}
	r.seeds[d.Target] = seed
	return true
}

func (r *Receiver) closeSeeds() {
	r.seedMu.Lock()
	defer r.seedMu.Unlock()
	for _, s := range r.seeds {
		_ = s.Close()
	}
	r.seeds = nil
}

func (r *Receiver) monitor(ctx context.Context, command string, args any) error {
	return r.Local.Monitor(ctx, r.Domain, command, args, nil)
}

func (r *Receiver) export(ctx context.Context) error {
	if len(r.disks) == 0 {
		return nil
	}
	err := r.monitor(ctx, "nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": r.socket("nbd")}},
	})
	if err != nil {
		return err
	}
	for _, d := range r.disks {
		err := r.monitor(ctx, "block-export-add", map[string]any{
			"id": "ftvirt-" + d.Target, "type": "nbd", "node-name": r.nodes[d.Target], "name": d.Target, "writable": true,
		})
		if err != nil {
			return fmt.Errorf("export of %s: %w", d.Target, err)
		}
	}
	return nil
}

func (r *Receiver) socket(purpose string) string { return filepath.Join(r.Dir, purpose+".sock") }

func (r *Receiver) check(epoch plugin.Epoch) error {
	if !r.created || epoch != r.epoch {
		return fmt.Errorf("%w: %d", ErrEpoch, epoch)
	}
	return nil
}

// Dial connects a tunnel to the backup's QEMU: "nbd" or "migrate".
func (r *Receiver) Dial(ctx context.Context, purpose string) (net.Conn, error) {
	if r.replay == nil || !r.created || (purpose != "nbd" && purpose != "migrate") {
		return nil, fmt.Errorf("%w: no %s socket", ErrEpoch, purpose)
	}
	return dial(ctx, r.socket(purpose), r.replay.User())
}

// Resync brings the replica of a disk up to date with what comes from the
// primary, until that hangs up.
func (r *Receiver) Resync(ctx context.Context, peer net.Conn, target string) error {
	qemu, err := r.Dial(ctx, "nbd")
	if err != nil {
		_ = peer.Close()
		return err
	}
	var seed io.ReaderAt
	r.seedMu.Lock()
	if s, ok := r.seeds[target]; ok {
		seed = s
	}
	r.seedMu.Unlock()
	return resync.Receive(ctx, peer, qemu, target, seed)
}

// Incoming makes QEMU wait for its state. It starts by itself once it has it;
// it announces nothing, since that would change what the guest sees.
func (r *Receiver) Incoming(ctx context.Context, epoch plugin.Epoch) error {
	if err := r.check(epoch); err != nil {
		return err
	}
	for _, d := range r.disks {
		// Or the tables of an image would be in this QEMU's memory alone until
		// the guest flushes, and the image worth nothing to the next backup.
		if err := r.flush(ctx, d.Target); err != nil {
			return err
		}
	}
	if err := r.monitor(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}); err != nil {
		return err
	}
	if err := r.monitor(ctx, "migrate-incoming", map[string]any{"uri": "unix:" + r.socket("migrate")}); err != nil {
		return err
	}
	return r.monitor(ctx, "cont", nil)
}

func (r *Receiver) flush(ctx context.Context, target string) error {
	qemu, err := r.Dial(ctx, "nbd")
	if err != nil {
		return err
	}
	return resync.Flush(ctx, qemu, target)
}

// Seeded takes the disks' export down; see clone.seeded.
func (r *Receiver) Seeded(ctx context.Context, epoch plugin.Epoch) error {
	if err := r.check(epoch); err != nil {
		return err
	}
	r.closeSeeds()
	return r.monitor(ctx, "nbd-server-stop", nil)
}

// Finish waits until the backup replays.
func (r *Receiver) Finish(ctx context.Context, epoch plugin.Epoch) error {
	if err := r.check(epoch); err != nil {
		return err
	}
	if err := r.replay.Replaying(ctx); err != nil {
		return err
	}
	for i := range r.files {
		r.files[i].once = true
	}
	return os.RemoveAll(r.Dir)
}

// Won is called when the arbiter gave this side the epoch: the replicas are the
// domain's disks from now on, and are not discarded with the backup.
func (r *Receiver) Won() { r.won.Store(true) }

// End ends the backup and keeps its replicas, until Discard or for good. It may be
// called again.
func (r *Receiver) End(ctx context.Context) error {
	r.closeSeeds()
	if r.created {
		if err := r.Local.Destroy(ctx, r.Domain); err != nil {
			return err
		}
		r.created = false
	}
	return os.RemoveAll(r.Dir)
}

// Discard removes the backup and every file made for it, except that replicas
// are kept, if wanted, that were complete once: the next backup begins with them.
func (r *Receiver) Discard(ctx context.Context) error {
	r.closeSeeds()
	if r.created {
		if err := r.Local.Destroy(ctx, r.Domain); err != nil {
			// Its disks are in use still.
			return err
		}
		r.created = false
	}
	if !r.won.Load() {
		r.discardFiles(ctx)
	}
	r.files = nil
	return os.RemoveAll(r.Dir)
}

// discardFiles keeps what is worth it. One that may not be deleted now is tried again
// when it is old.
func (r *Receiver) discardFiles(ctx context.Context) {
	r.Replicas.release(r.files)
	var u *usage
	for _, f := range r.files {
		var err error
		if !r.Keep || !f.once {
			if u == nil {
				u, err = r.Replicas.usage(ctx)
			}
			if err == nil {
				err = r.Replicas.remove(f.record, u)
			}
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				continue
			}
		}
		if err = errors.Join(err, r.Replicas.discard(f.record)); err != nil {
			r.Replicas.Log.Warn("the replica of a discarded backup stays", "path", f.Path, "error", err)
		}
	}
}
