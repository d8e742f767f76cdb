// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"ftvirt.org/ftvirt/plugin"
)

// Errors of the receiving side.
var (
	ErrActive = errors.New("the domain already runs on this host")
	ErrEpoch  = errors.New("not the epoch that is being cloned")
	ErrFormat = errors.New("unsupported disk format")
	ErrTarget = errors.New("not the name of a disk")
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
	Local   Hypervisor
	Domain  plugin.UUID
	Dir     string // for sockets; made, and removed at the end
	DiskDir string // for replicas of disks
	// Describe makes the backup's description out of the primary's; disks
	// maps targets to paths on this host, nodes to the block nodes that
	// libvirt will make for them.
	Describe func(xml string, epoch plugin.Epoch, disks map[string]string) (xmlHere string, nodes map[string]string, err error)
	// Attached waits for the plugin of the new QEMU.
	Attached func(ctx context.Context) (Replayer, error)

	epoch   plugin.Epoch
	disks   []Disk
	nodes   map[string]string // by target
	files   []string
	created bool
	replay  Replayer
}

// diskTarget is what libvirt calls disks.
var diskTarget = regexp.MustCompile(`^[a-z]{1,8}[a-z0-9]{0,8}$`)

// replicaName is unique to an epoch, so that no clone ever writes into a file
// that it did not make.
func replicaName(id plugin.UUID, target string, epoch plugin.Epoch, format string) string {
	return fmt.Sprintf("ftvirt-%s-%s-%d.%s", id, target, epoch, format)
}

// Prepare starts a backup domain that waits for its state, with empty replicas
// of the disks, exported for the primary to fill. If it fails, nothing is left.
func (r *Receiver) Prepare(ctx context.Context, req PrepareRequest) (err error) {
	active, err := r.Local.Active(ctx, r.Domain)
	if err != nil {
		return err
	}
	if active {
		return fmt.Errorf("%w: %s", ErrActive, r.Domain)
	}
	r.epoch, r.disks = req.Epoch, req.Disks
	defer func() {
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
			defer cancel()
			err = errors.Join(err, r.Discard(clean))
		}
	}()
	r.removeOld()
	paths := map[string]string{}
	for _, d := range req.Disks {
		path, err := r.makeReplica(ctx, d)
		if err != nil {
			return fmt.Errorf("replica of %s: %w", d.Target, err)
		}
		paths[d.Target] = path
	}
	xml, nodes, err := r.Describe(req.XML, req.Epoch, paths)
	if err != nil {
		return err
	}
	r.nodes = nodes
	if err := r.Local.Create(ctx, xml); err != nil {
		return err
	}
	r.created = true
	if r.replay, err = r.Attached(ctx); err != nil {
		return err
	}
	if err := MakeSocketDir(r.Dir, r.replay.User()); err != nil {
		return err
	}
	return r.export(ctx)
}

// Adopt takes up a backup that another Receiver made in epoch, for Discard to
// remove. It finds its replicas by their names.
func (r *Receiver) Adopt(epoch plugin.Epoch) error {
	files, err := filepath.Glob(filepath.Join(r.DiskDir, fmt.Sprintf("ftvirt-%s-*-%d.*", r.Domain, epoch)))
	if err != nil {
		return err
	}
	r.epoch, r.files, r.created = epoch, files, true
	return nil
}

func (r *Receiver) makeReplica(ctx context.Context, d Disk) (string, error) {
	if d.Format != "raw" && d.Format != "qcow2" {
		return "", fmt.Errorf("%w %q: use raw or qcow2", ErrFormat, d.Format)
	}
	// The peer's word becomes part of a path.
	if !diskTarget.MatchString(d.Target) || d.Size < 0 {
		return "", fmt.Errorf("%w: %q of %d bytes", ErrTarget, d.Target, d.Size)
	}
	path := filepath.Join(r.DiskDir, replicaName(r.Domain, d.Target, r.epoch, d.Format))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	r.files = append(r.files, path)
	if err := f.Close(); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", d.Format, path, strconv.FormatInt(d.Size, 10))
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("qemu-img: %w: %s", err, strings.TrimSpace(string(text)))
	}
	return path, nil
}

// removeOld deletes replicas of earlier epochs: no domain here uses them.
func (r *Receiver) removeOld() {
	old, err := filepath.Glob(filepath.Join(r.DiskDir, "ftvirt-"+r.Domain.String()+"-*"))
	if err != nil {
		return
	}
	for _, path := range old {
		_ = os.Remove(path)
	}
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
	if !r.created || (purpose != "nbd" && purpose != "migrate") {
		return nil, fmt.Errorf("%w: no %s socket", ErrEpoch, purpose)
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", r.socket(purpose))
}

// Incoming makes QEMU wait for its state. It starts by itself once it has it;
// it announces nothing, since that would change what the guest sees.
func (r *Receiver) Incoming(ctx context.Context, epoch plugin.Epoch) error {
	if err := r.check(epoch); err != nil {
		return err
	}
	if err := r.monitor(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}); err != nil {
		return err
	}
	if err := r.monitor(ctx, "migrate-incoming", map[string]any{"uri": "unix:" + r.socket("migrate")}); err != nil {
		return err
	}
	return r.monitor(ctx, "cont", nil)
}

// Seeded takes the disks' export down; see clone.seeded.
func (r *Receiver) Seeded(ctx context.Context, epoch plugin.Epoch) error {
	if err := r.check(epoch); err != nil {
		return err
	}
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
	return os.RemoveAll(r.Dir)
}

// Discard removes the backup and every file made for it.
func (r *Receiver) Discard(ctx context.Context) error {
	var errs []error
	if r.created {
		if err := r.Local.Destroy(ctx, r.Domain); err != nil {
			// Its disks are in use still.
			return err
		}
		r.created = false
	}
	for _, path := range r.files {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	r.files = nil
	errs = append(errs, os.RemoveAll(r.Dir))
	return errors.Join(errs...)
}
