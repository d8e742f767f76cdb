// SPDX-License-Identifier: Apache-2.0

// Package plugintest runs ftvirt.so in real QEMUs, two on this machine and
// without libvirt, so that hundreds of clones can be tried in minutes.
package plugintest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

var (
	clones = flag.Int("clones", 3, "how many clones TestClone makes")
	resets = flag.Int("resets", 3, "how many resets TestReset makes")
	pauses = flag.Int("pauses", 15, "how often TestPause pauses the guest")
	every  = flag.Int("every", 4, "of so many clones one goes live")
	stuck  = flag.Bool("stuck", false, "wait at the first failure, for a debugger")
	keep   = flag.String("keep", "", "directory that keeps the files of a failed clone")
)

const domain = "11111111-2222-3333-4444-555555555555"

// machine is one QEMU with its monitor and its plugin.
type machine struct {
	t      testing.TB
	dir    string
	ports  map[uint16]uint16 // of the guest, and where they are reached
	cmd    *exec.Cmd
	done   chan struct{}
	err    error // of QEMU, once done
	qmp    net.Conn
	mu     sync.Mutex
	r      *bufio.Reader
	plugin *control.Session

	onDigest func(control.Digest)

	state    sync.Mutex
	last     control.State
	consumed control.Consumed
	stats    control.Stats
	diverged *control.Diverged
	digests  map[plugin.Position]control.Digest
	memory   map[string]string // hashes by name and place
	looked   control.Looked
	refused  int // commands
	changed  chan struct{}
}

func (m *machine) log(format string, args ...any) {
	m.t.Helper()
	m.t.Logf("%s %s: %s", time.Now().Format("15:04:05.000"), filepath.Base(m.dir), fmt.Sprintf(format, args...))
}

func (m *machine) update(f func()) {
	m.state.Lock()
	defer m.state.Unlock()
	f()
	close(m.changed)
	m.changed = make(chan struct{})
}

// wait polls a condition on what the plugin reported.
func (m *machine) wait(ctx context.Context, what string, cond func() bool) error {
	for {
		m.state.Lock()
		ok, ch := cond(), m.changed
		m.state.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ch:
		case <-m.done:
			return fmt.Errorf("%s: QEMU ended", what)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
	}
}

// Monitor implements migrate.Monitor straight on QMP.
func (m *machine) Monitor(ctx context.Context, _ plugin.UUID, command string, args, out any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	req := map[string]any{"execute": command}
	if args != nil {
		req["arguments"] = args
	}
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := m.qmp.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := m.qmp.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for {
		line, err := m.r.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		var reply struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
			Event  string
		}
		if err := json.Unmarshal(line, &reply); err != nil {
			return err
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("%s: %s", command, reply.Error.Desc)
		case reply.Return != nil:
			if out == nil {
				return nil
			}
			return json.Unmarshal(reply.Return, out)
		}
	}
}

func (m *machine) XML(context.Context, plugin.UUID, bool) (string, error) {
	return `<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>t</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='` + m.dir + `/disk.raw'/><target dev='vda'/><alias name='virtio-disk0'/></disk></devices>
<qemu:commandline><qemu:arg value='-blockdev'/><qemu:arg value='{"driver":"blkreplay","node-name":"ftvirt-rr-0","image":"libvirt-1-storage"}'/></qemu:commandline>
<qemu:override><qemu:device alias='virtio-disk0'><qemu:frontend><qemu:property name='drive' type='string' value='ftvirt-rr-0'/></qemu:frontend></qemu:device></qemu:override></domain>`, nil
}

type bed struct {
	t       testing.TB
	dir     string
	guest   guest.Artifacts
	accept  map[string]chan *control.Session // by role
	ports   map[uint16]uint16                // the primary's
	params  string                           // of the guest's kernel
	devices func(dir string) []string        // more of them, as arguments
	// iops is how many requests a second the disk takes, 0 for as many as it can.
	iops int
	// reach makes the guest of a backup that went live be reached as well.
	reach bool
}

func newBed(t testing.TB) *bed {
	if _, err := os.Stat("../../../bin/ftvirt.so"); err != nil {
		t.Fatalf("%v: run 'make build' first", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	art, err := guest.Build(ctx, "../../../build/guest")
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, dir: t.TempDir(), guest: art, accept: map[string]chan *control.Session{
		"primary": make(chan *control.Session, 1), "backup": make(chan *control.Session, 1),
	}, ports: freePorts(t), devices: func(string) []string { return nil }}
	l, err := control.Listen(b.socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		_ = l.Serve(func(s *control.Session) {
			role := "primary"
			if s.Hello().Backup {
				role = "backup"
			}
			b.accept[role] <- s
			<-time.After(time.Hour) // sessions end with QEMU; the test owns them
		}, func(err error) { t.Log(err) })
	}()
	return b
}

func (b *bed) socket() string { return filepath.Join(b.dir, "plugin.sock") }

func freePorts(t testing.TB) map[uint16]uint16 {
	ports := map[uint16]uint16{}
	for _, p := range []uint16{guest.PortEcho, guest.PortControl, guest.PortHash} {
		ports[p] = freePort(t)
	}
	return ports
}

func freePort(t testing.TB) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func (b *bed) start(ctx context.Context, name, role string, extra ...string) (*machine, error) {
	dir := filepath.Join(b.dir, name)
	ports := b.ports
	if role == "backup" {
		ports = nil
		if b.reach {
			ports = freePorts(b.t)
		}
	}
	fwd := ""
	for g, h := range ports {
		fwd += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-10.0.2.15:%d", h, g)
	}
	so, err := filepath.Abs("../../../bin/ftvirt.so")
	if err != nil {
		return nil, err
	}
	args := []string{
		"-name", "debug-threads=on", "-S", "-nodefaults", "-display", "none", "-machine", "pc-q35-10.0,hpet=off", "-cpu", "qemu64", "-m", "256",
		"-rtc", "clock=vm", "-global", "apic-common.vapic=off", "-global", "qemu64-x86_64-cpu.model=4",
		"-icount", "shift=2,rr=record,rrfile=/dev/null",
		"-plugin", "file=" + so + ",socket=" + b.socket() + ",uuid=" + domain + ",role=" + role,
		"-kernel", b.guest.Kernel, "-initrd", b.guest.Initrd,
		"-append", "console=ttyS0 quiet ip=10.0.2.15/24,10.0.2.2 " + b.params,
		"-chardev", "file,id=charserial0,path=" + dir + "/console", "-device", "isa-serial,chardev=charserial0",
		"-device", "pcie-root-port,id=p1,chassis=1,addr=1", "-device", "pcie-root-port,id=p2,chassis=2,addr=2",
		"-device", "virtio-blk-pci,id=virtio-disk0,drive=ftvirt-rr-0,ioeventfd=off,event_idx=off,bus=p1",
		"-netdev", "user,id=hostnet0" + fwd,
		"-device", "virtio-net-pci,id=net0,netdev=hostnet0,mac=52:54:00:12:34:56,ioeventfd=off,event_idx=off,guest_announce=off,bus=p2",
		"-object", "filter-replay,id=ftvirt-nf-0,netdev=hostnet0",
	}
	args = append(args, "-blockdev", `{"driver":"file","filename":"`+dir+`/disk.raw","node-name":"libvirt-1-storage"}`)
	image := "libvirt-1-storage"
	if b.iops > 0 {
		image = "slow"
		args = append(args, "-object", fmt.Sprintf("throttle-group,id=slow,x-iops-total=%d", b.iops),
			"-blockdev", `{"driver":"throttle","node-name":"slow","throttle-group":"slow","file":"libvirt-1-storage"}`)
	}
	args = append(args, "-blockdev", `{"driver":"blkreplay","node-name":"ftvirt-rr-0","image":"`+image+`"}`)
	args = append(append(args, b.devices(dir)...), extra...)
	return b.launch(ctx, name, role, ports, args)
}

// launch starts a QEMU with its plugin and waits for both.
func (b *bed) launch(ctx context.Context, name, role string, ports map[uint16]uint16, args []string) (*machine, error) {
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	args = append(args, "-qmp", "unix:"+dir+"/qmp.sock,server=on,wait=off")
	m := &machine{t: b.t, dir: dir, ports: ports, done: make(chan struct{}), changed: make(chan struct{}), digests: map[plugin.Position]control.Digest{}, memory: map[string]string{}}
	stderr, err := os.Create(filepath.Join(dir, "stderr"))
	if err != nil {
		return nil, err
	}
	m.cmd = exec.Command("qemu-system-x86_64", args...)
	m.cmd.Stderr, m.cmd.Stdout = stderr, stderr
	// A test that is killed leaves no QEMU behind.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		m.err = m.cmd.Wait()
		_ = stderr.Close()
		close(m.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	select {
	case m.plugin = <-b.accept[role]:
	case <-m.done:
		text, _ := os.ReadFile(filepath.Join(dir, "stderr"))
		return nil, fmt.Errorf("%s: QEMU ended: %s", name, text)
	case <-ctx.Done():
		m.kill()
		return nil, fmt.Errorf("%s: no hello", name)
	}
	for m.qmp == nil {
		if m.qmp, err = net.Dial("unix", dir+"/qmp.sock"); err != nil && ctx.Err() != nil {
			return nil, err
		}
	}
	m.r = bufio.NewReader(m.qmp)
	if _, err := m.r.ReadBytes('\n'); err != nil {
		return nil, err
	}
	return m, m.Monitor(ctx, plugin.UUID{}, "qmp_capabilities", nil, nil)
}

func (m *machine) kill() {
	_ = m.cmd.Process.Kill()
	<-m.done
}

func (m *machine) handler() control.Handler {
	return control.Handler{
		State: func(s control.State) {
			m.log("%v running=%v epoch=%d pos=%d pause=%v %q", s.Mode, s.Running, s.Epoch, s.Pos, time.Duration(s.PauseNS), s.Text)
			m.update(func() { m.last = s })
		},
		Consumed: func(c control.Consumed) { m.update(func() { m.consumed = c }) },
		Stats:    func(s control.Stats) { m.update(func() { m.stats = s }) },
		Diverged: func(d control.Diverged) {
			m.log("DIVERGED %+v", d)
			m.update(func() { m.diverged = &d })
		},
		Digest: func(d control.Digest) {
			m.update(func() { m.digests[d.Pos] = d })
			if m.onDigest != nil {
				m.onDigest(d)
			}
		},
		Memory: func(c control.Memory) {
			m.update(func() { m.memory[fmt.Sprintf("%s+%#x", c.Name, c.Offset)] = string(c.Hashes) })
		},
		Looked: func(l control.Looked) { m.update(func() { m.looked = l }) },
		Refused: func(err error) {
			m.log("%v", err)
			m.update(func() { m.refused++ })
		},
	}
}

// pair is a primary and, while there is one, its backup.
type pair struct {
	*bed
	a, b  *machine
	epoch plugin.Epoch

	mu   sync.Mutex
	cond *sync.Cond
	dec  *rrlog.Decoder
	log  []byte // of this epoch, to keep when something goes wrong
	fed  plugin.Position
	over bool // no more will come
	// poison is fed once, after the first of the log: events that the primary
	// never logged.
	poison []byte
	// onEvent is told of each event of the log; of the log, no more than up to
	// limit is fed, if there is one.
	onEvent func(*rrlog.Event)
	limit   *plugin.Position
	extra   plugin.Position // bytes of it that were fed
}

func (p *pair) Call(ctx context.Context, method string, in, out any) error {
	none := plugin.UUID{}
	switch method {
	case migrate.MethodPrepare:
		req := in.(migrate.PrepareRequest)
		name := "b" + strconv.Itoa(int(req.Epoch))
		if err := os.MkdirAll(filepath.Join(p.dir, name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(p.dir, name, "disk.raw"), nil, 0o644); err != nil {
			return err
		}
		if err := os.Truncate(filepath.Join(p.dir, name, "disk.raw"), req.Disks[0].Size); err != nil {
			return err
		}
		b, err := p.start(ctx, name, "backup", "-incoming", "defer")
		if err != nil {
			return err
		}
		p.b = b
		if err := b.plugin.Welcome(p.epoch, 0); err != nil {
			return err
		}
		h := b.handler()
		h.Log = p.append // once it is the primary
		go func() { _ = b.plugin.Run(context.Background(), h) }()
		go p.feed(b)
		err = b.Monitor(ctx, none, "nbd-server-start", map[string]any{
			"addr": map[string]any{"type": "unix", "data": map[string]any{"path": b.dir + "/nbd.sock"}}}, nil)
		if err != nil {
			return err
		}
		return b.Monitor(ctx, none, "block-export-add", map[string]any{
			"id": "x", "type": "nbd", "node-name": "libvirt-1-storage", "name": "vda", "writable": true}, nil)
	case migrate.MethodIncoming:
		if err := p.b.Monitor(ctx, none, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil); err != nil {
			return err
		}
		if err := p.b.Monitor(ctx, none, "migrate-incoming", map[string]any{"uri": "unix:" + p.b.dir + "/mig.sock"}, nil); err != nil {
			return err
		}
		return p.b.Monitor(ctx, none, "cont", nil, nil)
	case migrate.MethodSeeded:
		return p.b.Monitor(ctx, none, "nbd-server-stop", nil, nil)
	case migrate.MethodFinish:
		return p.b.wait(ctx, "backup runs", func() bool { return p.b.last.Running })
	case migrate.MethodDiscard:
		if p.b != nil {
			p.b.kill()
		}
		return nil
	}
	return errors.New(method)
}

func (p *pair) Tunnel(_ context.Context, purpose, _ string) (net.Conn, error) {
	if purpose == "nbd" {
		return net.Dial("unix", p.b.dir+"/nbd.sock")
	}
	return net.Dial("unix", p.b.dir+"/mig.sock")
}

func (p *pair) Arm(e plugin.Epoch) error { return p.a.plugin.Arm(e) }
func (p *pair) Disarm() error            { return p.a.plugin.Disarm() }
func (p *pair) Recording(ctx context.Context, e plugin.Epoch) (time.Duration, error) {
	err := p.a.wait(ctx, "primary records", func() bool { return p.a.last.Mode == control.ModeRecord && p.a.last.Epoch == e && p.a.last.Running })
	if err != nil {
		return 0, err
	}
	err = p.a.wait(ctx, "pause known", func() bool { return p.a.last.PauseNS > 0 && p.a.last.Text == "cloned" })
	return time.Duration(p.a.last.PauseNS), err
}

// append takes the primary's log and acknowledges its whole events.
func (p *pair) append(pos plugin.Position, b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if int(pos) != len(p.log) {
		return fmt.Errorf("log at %d, want %d", pos, len(p.log))
	}
	p.log = append(p.log, b...)
	if err := p.dec.Feed(b); err != nil {
		return err
	}
	p.cond.Broadcast()
	return p.a.plugin.Ack(p.dec.Boundary())
}

func (p *pair) feed(b *machine) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.b == b || p.b == nil {
		end := p.dec.Boundary()
		if p.limit != nil {
			end = min(end, *p.limit)
		}
		switch {
		case p.fed < end:
			chunk := append([]byte(nil), p.log[p.fed:end]...)
			pos := p.fed + p.extra
			p.fed = end
			if pos > 0 && len(p.poison) > 0 {
				chunk = append(p.poison, chunk...)
				p.extra, p.poison = plugin.Position(len(p.poison)), nil
			}
			p.mu.Unlock()
			err := b.plugin.Feed(pos, chunk)
			p.mu.Lock()
			if err != nil {
				return
			}
		case p.over:
			_ = b.plugin.Promote(p.epoch)
			return
		default:
			p.cond.Wait()
		}
	}
}

func (p *pair) begin() {
	layout, err := rrlog.LayoutFor(p.a.plugin.Hello().QEMU.Major, p.a.plugin.Hello().QEMU.Minor)
	if err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.epoch++
	p.b, p.log, p.fed, p.over, p.limit = nil, nil, 0, false, nil
	p.dec = rrlog.NewDecoder(layout, rrlog.OnEvent(func(e *rrlog.Event) {
		if p.onEvent != nil {
			p.onEvent(e)
		}
	}))
}

func dial(ports map[uint16]uint16) guest.DialFunc {
	return func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", "127.0.0.1:"+strconv.Itoa(int(ports[addr.Port()])))
	}
}

// boot starts the primary and its guest, with load.
func boot(ctx context.Context, t *testing.T) *pair {
	t.Helper()
	b := newBed(t)
	p := &pair{bed: b}
	p.cond = sync.NewCond(&p.mu)
	if err := p.power(ctx, t, "a"); err != nil {
		t.Fatal(err)
	}
	c := p.a.guest()
	if err := c.StartLines(ctx, 10); err != nil {
		t.Fatal(err)
	}
	if err := c.StartLoad(ctx, 20); err != nil {
		t.Fatal(err)
	}
	go p.echo(ctx)
	return p
}

// power starts a primary with a new disk, and waits for its guest.
func (p *pair) power(ctx context.Context, t *testing.T, name string) error {
	if err := p.guest.NewDisk(ctx, filepath.Join(mkdir(t, p.dir, name), "disk.raw"), "raw"); err != nil {
		return err
	}
	a, err := p.start(ctx, name, "primary")
	if err != nil {
		return err
	}
	t.Cleanup(a.kill)
	p.a = a
	if err := a.plugin.Welcome(0, 0); err != nil {
		return err
	}
	h := a.handler()
	h.Log = p.append
	go func() {
		if err := a.plugin.Run(context.Background(), h); err != nil && !errors.Is(err, io.EOF) && ctx.Err() == nil {
			t.Errorf("plugin of the primary: %v", err)
		}
	}()
	if err := a.Monitor(ctx, plugin.UUID{}, "cont", nil, nil); err != nil {
		return err
	}
	return a.guest().WaitReady(ctx)
}

func (m *machine) guest() guest.Client {
	return guest.Client{Dial: dial(m.ports), Address: netip.MustParseAddr("10.0.2.15")}
}

// clone makes the backup of the epoch that was begun.
func (p *pair) clone(ctx context.Context, t *testing.T) {
	t.Helper()
	s := migrate.Source{Local: p.a, Peer: p, Plugin: p}
	_, err := s.Clone(ctx, migrate.Options{
		Epoch: p.epoch, Dir: filepath.Join(p.dir, "clone"), QEMUUser: os.Getuid(), Downtime: 100 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.b.kill)
}

// TestDivergence: a backup that does not follow the log is found out, and the
// primary goes on.
func TestDivergence(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	// CHECKPOINT_SUSPEND_REQUESTED: nobody asks the guest to suspend.
	p.poison = []byte{33}
	p.clone(ctx, t)
	if err := p.b.plugin.Configure(time.Second, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if err := p.b.wait(ctx, "divergence is found", func() bool { return p.b.diverged != nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.idle(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestClone clones one guest again and again under TCP and disk load and
// checks that the backup follows; a quarter of the backups goes live at a
// random instant, and their consoles must be equal to the primary's.
func TestClone(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*clones+2)*60*time.Second)
	defer cancel()
	p := boot(ctx, t)
	var failed int
	for i := range *clones {
		if err := p.round(ctx, i); err != nil {
			failed++
			t.Errorf("clone %d: %v", i, err)
			p.keep(i)
		}
		if p.b != nil {
			p.b.kill()
			_ = os.RemoveAll(p.b.dir)
		}
		if err := p.idle(ctx); err != nil {
			t.Fatalf("after clone %d: %v", i, err)
		}
	}
	t.Logf("RESULT clones=%d failed=%d", *clones, failed)
}

func mkdir(t testing.TB, dir, name string) string {
	d := filepath.Join(dir, name)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// echo is the TCP load: 20 bytes every 20 ms.
func (p *pair) echo(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := dial(p.ports)(ctx, netip.AddrPortFrom(netip.MustParseAddr("10.0.2.15"), guest.PortEcho))
		if err != nil {
			continue
		}
		buf := make([]byte, 20)
		tick := time.NewTicker(20 * time.Millisecond)
		for ctx.Err() == nil {
			<-tick.C
			if _, err := conn.Write(buf); err != nil {
				break
			}
			if _, err := io.ReadFull(conn, buf); err != nil {
				break
			}
		}
		tick.Stop()
		_ = conn.Close()
	}
}

func (p *pair) idle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if p.a.last.Mode == control.ModeIdle {
		return nil
	}
	if err := p.a.plugin.Open(p.epoch); err != nil {
		return err
	}
	if err := p.a.plugin.Idle(); err != nil {
		return err
	}
	return p.a.wait(ctx, "primary idle", func() bool { return p.a.last.Mode == control.ModeIdle && p.a.last.Text == "idle" })
}

func (p *pair) round(ctx context.Context, i int) error {
	p.begin()
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	s := migrate.Source{Local: p.a, Peer: p, Plugin: p}
	start := time.Now()
	pause, err := s.Clone(ctx, migrate.Options{
		Epoch: p.epoch, Dir: filepath.Join(p.dir, "clone"), QEMUUser: os.Getuid(), Downtime: 100 * time.Millisecond,
	})
	if err != nil {
		return err
	}
	p.a.log("clone %d took %v, pause %v", i, time.Since(start).Round(time.Millisecond), pause.Round(time.Microsecond))
	live := i%*every == *every-1
	run := 3 * time.Second
	if live {
		run = 50*time.Millisecond + time.Duration(rand.Int63n(int64(2*time.Second)))
	}
	select {
	case <-time.After(run):
	case <-p.b.done:
		return errors.New("backup's QEMU ended")
	}
	if live {
		return p.goLive(ctx)
	}
	// The backup must follow: what was logged by now is consumed soon.
	p.mu.Lock()
	target := p.dec.Boundary()
	p.mu.Unlock()
	start = time.Now()
	ctx, cancel = context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	err = p.b.wait(ctx, "backup follows", func() bool { return p.b.consumed.Pos >= target || p.b.diverged != nil })
	if err == nil && p.b.diverged != nil {
		err = errors.New("diverged")
	}
	p.b.log("at %d of %d after %v", p.b.consumed.Pos, target, time.Since(start).Round(time.Millisecond))
	if err == nil {
		var status struct{ Running bool }
		err = p.b.Monitor(ctx, plugin.UUID{}, "query-status", nil, &status)
	}
	return err
}

// fenced demands that the backup does not go live for another epoch than its own.
func (p *pair) fenced(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	p.b.update(func() { p.b.refused = 0 })
	for _, other := range []plugin.Epoch{p.epoch - 1, p.epoch + 1} {
		if err := p.b.plugin.Promote(other); err != nil {
			return err
		}
	}
	err := p.b.wait(ctx, "backup refuses other epochs", func() bool { return p.b.refused == 2 })
	if err == nil && p.b.last.Mode == control.ModeLive {
		err = errors.New("live for another epoch")
	}
	return err
}

// goLive stops the primary dead, as a crash does, and lets the backup go on.
func (p *pair) goLive(ctx context.Context) error {
	if err := p.fenced(ctx); err != nil {
		return err
	}
	p.mu.Lock()
	p.over = true
	p.cond.Broadcast()
	p.mu.Unlock()
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	if err := p.b.wait(ctx, "backup goes live", func() bool { return p.b.last.Mode == control.ModeLive }); err != nil {
		return err
	}
	p.b.log("live after %v", time.Since(start).Round(time.Millisecond))
	// It must go on: its lines follow those of the log.
	size := func() int64 {
		st, err := os.Stat(p.b.dir + "/console")
		if err != nil {
			return 0
		}
		return st.Size()
	}
	before := size()
	for size() <= before {
		if ctx.Err() != nil {
			return errors.New("no line after go-live")
		}
		<-time.After(10 * time.Millisecond)
	}
	p.b.log("first line %v after go-live", time.Since(start).Round(time.Millisecond))
	f, err := os.Open(p.b.dir + "/console")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	// The clone began in the middle of a line.
	_, rest, _ := strings.Cut(string(text), "\n")
	first, last, err := guest.VerifyConsole(strings.NewReader(rest[:strings.LastIndexByte(rest, '\n')+1]))
	p.b.log("console has lines %d to %d", first, last)
	return err
}

func (p *pair) keep(i int) {
	if *keep == "" {
		return
	}
	dir := filepath.Join(*keep, strconv.Itoa(i))
	if *stuck {
		p.a.log("A pid %d, B pid %d: looked at until they end", p.a.cmd.Process.Pid, p.b.cmd.Process.Pid)
		<-p.a.done
	}
	_ = os.MkdirAll(dir, 0o755)
	p.mu.Lock()
	_ = os.WriteFile(filepath.Join(dir, "log"), p.log, 0o644)
	p.mu.Unlock()
	if text, err := os.ReadFile(filepath.Join(p.a.dir, "stderr")); err == nil {
		p.a.log("stderr: %s", text)
	}
	if p.b != nil {
		if text, err := os.ReadFile(filepath.Join(p.b.dir, "stderr")); err == nil {
			p.b.log("stderr: %s", text)
		}
		for _, f := range []string{"stderr", "console"} {
			if text, err := os.ReadFile(filepath.Join(p.b.dir, f)); err == nil {
				_ = os.WriteFile(filepath.Join(dir, f), text, 0o644)
			}
		}
	}
}
