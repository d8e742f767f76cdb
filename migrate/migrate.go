// SPDX-License-Identifier: Apache-2.0

// Package migrate is FT VMotion (the paper, section 3.1): it clones a running
// domain to another host, disks and memory, without moving it. The original
// goes on as the primary and records; the clone becomes the backup and
// replays. Source runs on the primary's host, Receiver on the backup's.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/migrate/resync"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
)

// Errors of a clone. Whatever fails before the switch leaves the domain
// running as it was.
var (
	ErrPrepare = errors.New("the backup could not be prepared")
	ErrDisk    = errors.New("a disk could not be copied")
	ErrMemory  = errors.New("the memory could not be copied")
	ErrSwitch  = errors.New("the domain did not begin to record")
	// ErrRevert comes with one of the others: the domain may stand still, or be
	// copied yet. CleanUp has to be tried until it succeeds.
	ErrRevert = errors.New("the domain could not be left as it was")
	// ErrAfterSwitch: the primary records already, so that the arbiter must
	// be asked before it goes on alone.
	ErrAfterSwitch = errors.New("the backup failed after the primary began to record")
)

// Methods that the source calls on the backup's agent.
const (
	MethodPrepare  = "clone.prepare"
	MethodIncoming = "clone.incoming"
	MethodSeeded   = "clone.seeded"
	MethodFinish   = "clone.finish"
	MethodDiscard  = "clone.discard"
)

// Disk is one replicated disk of a domain.
type Disk struct {
	Target string `json:"target"` // vda
	Root   string `json:"root"`   // the blkreplay node, which the device uses
	Format string `json:"format"`
	Size   int64  `json:"size"` // virtual size, bytes
	Used   int64  `json:"used"` // what the image takes of its host's storage; 0 if unknown
}

// PrepareRequest asks for a backup domain that waits for its state.
type PrepareRequest struct {
	XML   string       `json:"xml"` // of the running primary
	Epoch plugin.Epoch `json:"epoch"`
	Disks []Disk       `json:"disks"`
}

// PrepareReply tells of a backup domain that waits.
type PrepareReply struct {
	// Resync are the targets of disks whose replica is an old one, or that an
	// older copy of the disk can be read for. See package resync.
	Resync []string `json:"resync,omitempty"`
}

// EpochRequest names the epoch that a later step is about.
type EpochRequest struct {
	Epoch plugin.Epoch `json:"epoch"`
}

// Monitor is what a clone needs of libvirt; virt.Conn is one.
type Monitor interface {
	Monitor(ctx context.Context, id plugin.UUID, command string, args, out any) error
	XML(ctx context.Context, id plugin.UUID, inactive bool) (string, error)
}

// Peer is the backup's agent.
type Peer interface {
	Call(ctx context.Context, method string, in, out any) error
	// Tunnel opens a raw connection to the backup's QEMU: for its incoming
	// migration ("migrate") or for one of its disks ("nbd"); or to the backup's
	// agent, to bring a replica up to date ("resync").
	Tunnel(ctx context.Context, purpose, target string) (net.Conn, error)
}

// Recorder is the plugin in the primary's QEMU.
type Recorder interface {
	Arm(epoch plugin.Epoch) error
	Disarm() error
	// Recording waits until the VM records in this epoch, and tells how long
	// the clone stopped it.
	Recording(ctx context.Context, epoch plugin.Epoch) (time.Duration, error)
}

// Progress of a clone, in bytes.
type Progress struct {
	Phase       string `json:"phase"` // preparing, disks, memory, switching
	Transferred int64  `json:"transferred"`
	Remaining   int64  `json:"remaining"`
	// Equal is how much of the disks the backup had already, and was not sent.
	Equal int64 `json:"equal"`
}

// Options of a clone.
type Options struct {
	Domain   plugin.UUID
	Epoch    plugin.Epoch
	Dir      string        // for sockets; made, and removed at the end
	QEMUUser int           // uid of QEMU, which connects to the sockets
	Downtime time.Duration // limit asked of QEMU for the last copy of memory
	// Bandwidth in bytes per second; 0 is no limit.
	Bandwidth int64
	Progress  func(Progress)
	// Switched is called as soon as the primary records.
	Switched func(pause time.Duration)
}

// Times of the polls: QEMU reports no event for these states, or libvirt does
// not pass it on.
const (
	pollSlow = 50 * time.Millisecond
	pollFast = 2 * time.Millisecond
	// stepTimeout bounds each step in which nothing is copied.
	stepTimeout = 30 * time.Second
	// prepareTimeout bounds the start of the backup's QEMU; it is longer than
	// the receiver's own limit, so that its reason arrives.
	prepareTimeout = 70 * time.Second
	// switchTimeout bounds the part in which the guest is stopped.
	switchTimeout = 5 * time.Second
)

// Source clones from here.
type Source struct {
	Local  Monitor
	Peer   Peer
	Plugin Recorder
}

// Disks lists what has to be replicated: the disks that can be written to and
// whose device sits on a blkreplay node that the transform put there.
func (s *Source) Disks(ctx context.Context, id plugin.UUID, xml string) ([]Disk, error) {
	dom, err := hooks.Parse([]byte(xml))
	if err != nil {
		return nil, err
	}
	images, err := s.images(ctx, id)
	if err != nil {
		return nil, err
	}
	var disks []Disk
	for _, n := range hooks.DiskNodes(dom) {
		if n.ReadOnly {
			continue // the backup's host has the same image; nothing could be written to a replica
		}
		image, ok := images[n.Node]
		if _, replayed := images[n.Replay]; !ok || !replayed {
			return nil, fmt.Errorf("%w: %s: QEMU has no block node %q below %q", ErrDisk, n.Target, n.Node, n.Replay)
		}
		d := Disk{Target: n.Target, Root: n.Replay, Format: "raw", Size: image.Size, Used: image.Used}
		for _, x := range dom.Devices.Disks {
			if x.Target != nil && x.Target.Dev == n.Target && x.Driver != nil && x.Driver.Type != "" {
				d.Format = x.Driver.Type
			}
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// image is what QEMU tells of one.
type image struct {
	Size int64 `json:"virtual-size"`
	Used int64 `json:"actual-size"`
}

func (s *Source) images(ctx context.Context, id plugin.UUID) (map[string]image, error) {
	var nodes []struct {
		NodeName string `json:"node-name"`
		Image    image  `json:"image"`
	}
	if err := s.Local.Monitor(ctx, id, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	images := map[string]image{}
	for _, n := range nodes {
		images[n.NodeName] = n.Image
	}
	return images, nil
}

// Clone makes the backup. On an error that wraps neither ErrAfterSwitch nor
// ErrRevert the domain runs as before, unprotected, and nothing of it is left on
// the peer.
// It returns how long the guest was stopped.
func (s *Source) Clone(ctx context.Context, o Options) (pause time.Duration, err error) {
	c := &clone{Source: s, o: o}
	// The end of ctx ends the tunnels at once. QEMU waits for a replica that
	// does not answer, and we would for QEMU.
	c.tunnels, c.cancel = context.WithCancel(ctx)
	if o.Progress == nil {
		c.o.Progress = func(Progress) {}
	}
	defer func() {
		// Clean-up must work when ctx is what ended the clone.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
		defer cancel()
		if err != nil && !c.switched {
			err = errors.Join(err, c.revert(clean))
		}
		c.cleanup()
	}()
	if err := c.prepare(ctx); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrPrepare, err)
	}
	if err := c.copyDisks(ctx); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrDisk, err)
	}
	if err := c.copyMemory(ctx); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrMemory, err)
	}
	if pause, err = c.switchOver(ctx); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrSwitch, err)
	}
	if o.Switched != nil {
		o.Switched(pause)
	}
	finish, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	if err := s.Peer.Call(finish, MethodFinish, EpochRequest{o.Epoch}, nil); err != nil {
		return pause, fmt.Errorf("%w: %w", ErrAfterSwitch, err)
	}
	return pause, nil
}

type clone struct {
	*Source
	o         Options
	disks     []Disk
	old       []string // targets to bring up to date
	stats     resync.Stats
	listeners []net.Listener
	cancel    context.CancelFunc // of the tunnels
	tunnels   context.Context
	nodes     []string // target nodes to delete
	jobs      []string // mirror jobs that run
	prepared  bool
	switched  bool
}

func (c *clone) monitor(ctx context.Context, command string, args, out any) error {
	return c.Local.Monitor(ctx, c.o.Domain, command, args, out)
}

func (c *clone) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	c.progress(Progress{Phase: "preparing"})
	xml, err := c.Local.XML(ctx, c.o.Domain, false)
	if err != nil {
		return err
	}
	if c.disks, err = c.Disks(ctx, c.o.Domain, xml); err != nil {
		return err
	}
	if err := c.makeDir(); err != nil {
		return err
	}
	c.prepared = true
	var reply PrepareReply
	err = c.Peer.Call(ctx, MethodPrepare, PrepareRequest{XML: xml, Epoch: c.o.Epoch, Disks: c.disks}, &reply)
	c.old = reply.Resync
	return err
}

func (c *clone) progress(p Progress) {
	p.Equal = c.stats.Equal.Load()
	c.o.Progress(p)
}

// relay serves a connection of QEMU by the peer.
type relay func(ctx context.Context, qemu, peer net.Conn) error

// listen makes a unix socket whose connections go to the peer.
func (c *clone) listen(name, purpose, target string, serve relay) (string, error) {
	path := filepath.Join(c.o.Dir, name)
	l, err := listenFor(path, c.o.QEMUUser)
	if err != nil {
		return "", err
	}
	c.listeners = append(c.listeners, l)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				peer, err := c.Peer.Tunnel(c.tunnels, purpose, target)
				if err != nil {
					return
				}
				defer func() { _ = peer.Close() }()
				_ = serve(c.tunnels, conn, peer)
			}()
		}
	}()
	return path, nil
}

// copyDisks mirrors every disk to the backup until both are equal and stay so:
// from there on each write of the guest goes to both before it completes.
func (c *clone) copyDisks(ctx context.Context) error {
	for i, d := range c.disks {
		name := seedPrefix + strconv.Itoa(i)
		// All disks are copied at once. What the guest writes meanwhile comes on
		// top: it cannot be held back.
		speed := c.o.Bandwidth / int64(len(c.disks))
		purpose, serve := "nbd", relay(channel.Splice)
		if slices.Contains(c.old, d.Target) {
			// What is read here is not what is sent.
			o := resync.Options{Stats: &c.stats, Limit: resync.NewLimit(speed)}
			speed, purpose = 0, "resync"
			serve = func(ctx context.Context, qemu, peer net.Conn) error { return resync.Send(ctx, qemu, peer, o) }
		}
		path, err := c.listen("nbd-"+strconv.Itoa(i)+".sock", purpose, d.Target, serve)
		if err != nil {
			return err
		}
		err = c.monitor(ctx, "blockdev-add", map[string]any{
			"driver": "nbd", "node-name": name, "export": d.Target,
			// Holes stay holes: blkreplay does not tell where they are.
			"detect-zeroes": "on",
			"server":        map[string]any{"type": "unix", "path": path},
		}, nil)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Target, err)
		}
		c.nodes = append(c.nodes, name)
		err = c.monitor(ctx, "blockdev-mirror", map[string]any{
			"job-id": name, "device": d.Root, "target": name, "sync": "full",
			"copy-mode": "write-blocking", "filter-node-name": name + filterSuffix,
			// An error must not end it; see stop.
			"on-source-error": "stop", "on-target-error": "stop",
			"speed": speed,
		}, nil)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Target, err)
		}
		c.jobs = append(c.jobs, name)
	}
	return c.poll(ctx, pollSlow, c.disksReady)
}

type blockJob struct {
	Device string `json:"device"`
	Len    int64  `json:"len"`
	Offset int64  `json:"offset"`
	Ready  bool   `json:"ready"`
	Synced bool   `json:"actively-synced"`
	Status string `json:"io-status"` // ok, failed, nospace
}

// err tells why a job, which exists or not, copies no longer.
func (j blockJob) err(target string, exists bool) error {
	switch {
	case !exists:
		return fmt.Errorf("%s: the copy ended early", target)
	case j.Status == "nospace":
		return fmt.Errorf("%s: there is no room on the peer", target)
	case j.Status == "failed":
		return fmt.Errorf("%s: the copy met an error; the peer, or the connection to it, may have failed", target)
	}
	return nil
}

func (c *clone) blockJobs(ctx context.Context) (map[string]blockJob, error) {
	var list []blockJob
	if err := c.monitor(ctx, "query-block-jobs", nil, &list); err != nil {
		return nil, err
	}
	jobs := map[string]blockJob{}
	for _, j := range list {
		jobs[j.Device] = j
	}
	return jobs, nil
}

func (c *clone) disksReady(ctx context.Context) (bool, error) {
	if len(c.jobs) == 0 {
		return true, nil
	}
	jobs, err := c.blockJobs(ctx)
	if err != nil {
		return false, err
	}
	p := Progress{Phase: "disks"}
	ready := true
	for i, name := range c.jobs {
		j, ok := jobs[name]
		if err := j.err(c.disks[i].Target, ok); err != nil {
			return false, err
		}
		p.Transferred += j.Offset
		p.Remaining += j.Len - j.Offset
		ready = ready && j.Ready && j.Synced
	}
	c.progress(p)
	return ready, nil
}

type migration struct {
	Status string `json:"status"`
	Error  string `json:"error-desc"`
	RAM    struct {
		Transferred int64 `json:"transferred"`
		Remaining   int64 `json:"remaining"`
	} `json:"ram"`
}

func (c *clone) copyMemory(ctx context.Context) error {
	if err := c.Peer.Call(ctx, MethodIncoming, EpochRequest{c.o.Epoch}, nil); err != nil {
		return err
	}
	path, err := c.listen("migrate.sock", "migrate", "", channel.Splice)
	if err != nil {
		return err
	}
	if err := c.migrationOver(ctx); err != nil {
		return err
	}
	caps := []map[string]any{{"capability": "pause-before-switchover", "state": true}}
	if err := c.monitor(ctx, "migrate-set-capabilities", map[string]any{"capabilities": caps}, nil); err != nil {
		return err
	}
	err = c.monitor(ctx, "migrate-set-parameters", map[string]any{
		"downtime-limit": c.o.Downtime.Milliseconds(), "max-bandwidth": c.o.Bandwidth,
	}, nil)
	if err != nil {
		return err
	}
	if err := c.Plugin.Arm(c.o.Epoch); err != nil {
		return err
	}
	if err := c.monitor(ctx, "migrate", map[string]any{"uri": "unix:" + path}, nil); err != nil {
		return err
	}
	return c.poll(ctx, 5*pollFast, func(ctx context.Context) (bool, error) {
		m, err := c.query(ctx)
		if err != nil {
			return false, err
		}
		c.progress(Progress{Phase: "memory", Transferred: m.RAM.Transferred, Remaining: m.RAM.Remaining})
		return m.Status == "pre-switchover", nil
	})
}

func (c *clone) query(ctx context.Context) (migration, error) {
	var m migration
	if err := c.monitor(ctx, "query-migrate", nil, &m); err != nil {
		return m, err
	}
	if m.Status == "failed" || m.Status == "cancelled" {
		return m, fmt.Errorf("migration %s: %s", m.Status, m.Error)
	}
	return m, nil
}

// switchOver runs while the guest is stopped: the disks' copies end, equal,
// the rest of the state goes over, and the plugin resumes the guest recording.
func (c *clone) switchOver(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, switchTimeout)
	defer cancel()
	c.progress(Progress{Phase: "switching"})
	for _, name := range c.jobs {
		// A mirror that is ready ends with equal disks when cancelled.
		if err := c.monitor(ctx, "block-job-cancel", map[string]any{"device": name}, nil); err != nil {
			return 0, err
		}
	}
	err := c.poll(ctx, pollFast, func(ctx context.Context) (bool, error) {
		if len(c.jobs) == 0 {
			return true, nil
		}
		jobs, err := c.blockJobs(ctx)
		for i, name := range c.jobs {
			if j, runs := jobs[name]; runs {
				return false, j.err(c.disks[i].Target, true)
			}
		}
		return err == nil, err
	})
	if err != nil {
		return 0, err
	}
	c.jobs = nil
	if err := c.seeded(ctx); err != nil {
		return 0, err
	}
	if err := c.monitor(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"}, nil); err != nil {
		return 0, err
	}
	pause, err := c.Plugin.Recording(ctx, c.o.Epoch)
	if err != nil {
		return 0, err
	}
	c.switched = true
	return pause, nil
}

// seeded takes the disks' connection down on both sides at once. It must be
// gone before either VM runs in lockstep: draining it would wait for requests
// that wait for the log.
func (c *clone) seeded(ctx context.Context) error {
	if len(c.disks) == 0 {
		return nil
	}
	peer := make(chan error, 1)
	go func() { peer <- c.Peer.Call(ctx, MethodSeeded, EpochRequest{c.o.Epoch}, nil) }()
	err := c.deleteNodes(ctx)
	return errors.Join(err, <-peer)
}

func (c *clone) deleteNodes(ctx context.Context) error {
	for len(c.nodes) > 0 {
		if err := c.monitor(ctx, "blockdev-del", map[string]any{"node-name": c.nodes[0]}, nil); err != nil {
			return err
		}
		c.nodes = c.nodes[1:]
	}
	return nil
}

// revert undoes an unfinished clone; the guest runs on.
func (c *clone) revert(ctx context.Context) error {
	local := c.Plugin.Disarm()
	c.cancel() // see Clone
	if local = errors.Join(local, CleanUp(ctx, c.Local, c.o.Domain)); local != nil {
		local = fmt.Errorf("%w: %w", ErrRevert, local)
	}
	if !c.prepared {
		return local
	}
	return errors.Join(local, c.Peer.Call(ctx, MethodDiscard, EpochRequest{c.o.Epoch}, nil))
}

// CleanUp ends what an unfinished clone left in a domain's QEMU, so that it runs,
// alone, and can be cloned again. It asks QEMU what there is: an agent may have
// died, and libvirt not have told the end of a command.
func CleanUp(ctx context.Context, local Monitor, id plugin.UUID) error {
	c := &clone{Source: &Source{Local: local}, o: Options{Domain: id}}
	if err := c.cancelMigration(ctx); err != nil {
		return err
	}
	var nodes []struct {
		NodeName string `json:"node-name"`
	}
	if err := c.monitor(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return err
	}
	stopped := false
	for _, n := range nodes {
		switch {
		case n.NodeName == stopNode:
			stopped = true
		case strings.HasPrefix(n.NodeName, seedPrefix) && !strings.HasSuffix(n.NodeName, filterSuffix):
			c.nodes = append(c.nodes, n.NodeName)
		}
	}
	jobs, err := c.blockJobs(ctx)
	if err != nil {
		return err
	}
	for name := range jobs {
		if strings.HasPrefix(name, seedPrefix) {
			c.jobs = append(c.jobs, name)
		}
	}
	if len(c.jobs) > 0 {
		if stopped, err = c.stop(ctx, stopped); err == nil {
			err = c.cancelJobs(ctx)
		}
		if err != nil {
			return err
		}
	}
	if stopped {
		if err := c.resume(ctx); err != nil {
			return err
		}
	}
	return c.deleteNodes(ctx)
}

// seedPrefix begins the names of jobs and nodes that copy disks.
const seedPrefix = "ftvirt-seed-"

// filterSuffix ends the names of nodes that come and go with a job.
const filterSuffix = "-filter"

// stopNode is a block node that does nothing but tell, in QEMU itself, that it
// was us who stopped the guest: an agent that comes after us resumes it.
const stopNode = seedPrefix + "stop"

// stop stops the guest if it runs, and tells whether it was us who did, now or
// before. While the copies of disks end it must not run: QEMU (10.0,
// block/mirror.c, mirror_run at immediate_exit) frees what a write to both disks
// still uses when the mirror ends under it, be it cancelled or by an error. A stop
// lets all writes finish.
func (c *clone) stop(ctx context.Context, before bool) (bool, error) {
	var status struct {
		Running bool `json:"running"`
	}
	if err := c.monitor(ctx, "query-status", nil, &status); err != nil || !status.Running {
		return before, err
	}
	if !before {
		err := c.monitor(ctx, "blockdev-add", map[string]any{"driver": "null-co", "node-name": stopNode}, nil)
		if err != nil {
			return false, err
		}
	}
	return true, c.monitor(ctx, "stop", nil, nil)
}

// cancelJobs ends the copies of disks, unfinished.
func (c *clone) cancelJobs(ctx context.Context) error {
	var errs []error // of no interest once the jobs are gone
	for _, name := range c.jobs {
		errs = append(errs, c.monitor(ctx, "block-job-cancel", map[string]any{"device": name, "force": true}, nil))
	}
	return c.poll(ctx, pollFast, func(ctx context.Context) (bool, error) {
		jobs, err := c.blockJobs(ctx)
		for _, name := range c.jobs {
			if _, runs := jobs[name]; runs {
				return false, errors.Join(append(errs, err)...)
			}
		}
		return err == nil, err
	})
}

func (c *clone) resume(ctx context.Context) error {
	if err := c.monitor(ctx, "cont", nil, nil); err != nil {
		return err
	}
	return c.monitor(ctx, "blockdev-del", map[string]any{"node-name": stopNode}, nil)
}

func (c *clone) cancelMigration(ctx context.Context) error {
	var m migration
	if err := c.monitor(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	switch m.Status {
	case "setup", "active", "pre-switchover", "device", "cancelling":
		// QEMU resumes the guest by itself.
		if err := c.monitor(ctx, "migrate_cancel", nil, nil); err != nil {
			return err
		}
	}
	return c.migrationOver(ctx)
}

// migrationOver waits for the end of a migration. It is not there yet when the
// status says so: the guest may not run again, and QEMU (10.0) dies when the next
// one begins before it has put the last away.
func (c *clone) migrationOver(ctx context.Context) error {
	return c.poll(ctx, pollFast, func(ctx context.Context) (bool, error) {
		var instances []struct {
			Type string `json:"type"`
		}
		err := c.monitor(ctx, "query-yank", nil, &instances)
		for _, i := range instances {
			if i.Type == "migration" {
				return false, err
			}
		}
		return err == nil, err
	})
}

func (c *clone) cleanup() {
	for _, l := range c.listeners {
		_ = l.Close()
	}
	c.cancel()
	_ = os.RemoveAll(c.o.Dir)
}

func (c *clone) poll(ctx context.Context, every time.Duration, done func(context.Context) (bool, error)) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		ok, err := done(ctx)
		if err != nil || ok {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
