// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
)

// deadline bounds one step of a test on a busy machine.
const deadline = 90 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	return ctx
}

func host(t *testing.T, l *lab.Lab, name string) *lab.Host {
	t.Helper()
	h, err := l.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// startGuest defines and starts the lab's first guest on h and waits for it.
func startGuest(t *testing.T, l *lab.Lab, h *lab.Host, format string) guest.Client {
	t.Helper()
	d, err := h.GuestDomain(within(t), 0, "guest0", format)
	if err != nil {
		t.Fatal(err)
	}
	xml, err := guest.DomainXML(d)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Define(within(t), xml); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Virsh(within(t), "start", d.Name); err != nil {
		t.Fatal(err)
	}
	client := guest.Client{Dial: l.Client.Dial, Address: d.Address.Addr()}
	if err := client.WaitReady(within(t)); err != nil {
		console, _ := os.ReadFile(h.Path(lab.ConsolePath(d.Name)))
		t.Fatalf("%v\nconsole:\n%s", err, console)
	}
	return client
}

// TestGuest runs the guest under libvirt as an operator would, without any of
// ftvirt, and checks everything that later tests rely on.
func TestGuest(t *testing.T) {
	l := labtest.Up(t, lab.Options{NoAgent: true})
	h := host(t, l, "hosta")
	client := startGuest(t, l, h, "qcow2")

	conn, err := l.Client.Dial(within(t), netip.AddrPortFrom(client.Address, guest.PortEcho))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	echo(t, conn, "over the service network")

	if err := client.StartLines(within(t), 50); err != nil {
		t.Fatal(err)
	}
	if err := client.StartLoad(within(t), 50); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "20 lines and 20 disk operations", func() bool {
		s, err := client.Status(within(t))
		if err != nil {
			t.Fatal(err)
		}
		return s.Lines >= 20 && s.LoadOps >= 20
	})
	grows(t, client, h.Path(filepath.Join(lab.ImageDir, "guest0.qcow2")))
	reboots(t, client)
	if err := errors.Join(client.StartLines(within(t), 50), client.StartLoad(within(t), 50)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "20 disk operations after the reboot", func() bool {
		s, err := client.Status(within(t))
		if err != nil {
			t.Fatal(err)
		}
		return s.LoadOps >= 20
	})
	digest, err := client.Quiesce(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if digest.LineErrors != 0 || digest.LoadErrors != 0 || digest.LoadOps < 20 {
		t.Errorf("guest had trouble with its disk: %+v", digest)
	}
	consoleAnswers(t, h)
	if err := client.PowerOff(within(t)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "power-off", func() bool {
		out, err := h.Virsh(within(t), "domstate", "guest0")
		return err == nil && strings.TrimSpace(out) == "shut off"
	})

	lines, err := guest.DiskLines(within(t), h.Path(filepath.Join(lab.ImageDir, "guest0.qcow2")))
	if err != nil || lines != digest.Lines {
		t.Errorf("disk has %d lines, %v; the guest wrote %d", lines, err, digest.Lines)
	}
	console, err := os.Open(h.Path(lab.ConsolePath("guest0")))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = console.Close() }()
	if first, last, err := guest.VerifyConsole(console); err != nil || first != 1 || last != digest.Lines {
		t.Errorf("console has lines %d to %d, %v; the guest wrote %d", first, last, err, digest.Lines)
	}
}

// TestSharedImages: what one host writes to its image directory, the other has.
func TestSharedImages(t *testing.T) {
	l := labtest.Up(t, lab.Options{NoAgent: true, SharedImages: true})
	a, b := host(t, l, "hosta"), host(t, l, "hostb")
	path := filepath.Join(lab.ImageDir, "image")
	if _, err := a.Exec(within(t), "/bin/sh", "-c", "echo shared >"+path); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*lab.Host{a, b} {
		if out, err := h.Exec(within(t), "cat", path); err != nil || out != "shared\n" {
			t.Errorf("%s has %q, %v", h.Name, out, err)
		}
		if text, err := os.ReadFile(h.Path(path)); err != nil || string(text) != "shared\n" {
			t.Errorf("the machine has %q of %s, %v", text, h.Name, err)
		}
		c, err := config.Load(h.Path(config.DefaultPath))
		if err != nil || c.Clone.DiskDir != lab.ImageDir {
			t.Errorf("%s keeps replicas in %q, %v", h.Name, c.Clone.DiskDir, err)
		}
	}
	if _, err := b.Exec(within(t), "rm", path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(a.Path(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that %s removed is there for %s: %v", b.Name, a.Name, err)
	}
}

// grows demands that the image of the guest's disk grows if the guest is told to.
func grows(t *testing.T, client guest.Client, image string) {
	t.Helper()
	const kib = 512
	size := func() int64 {
		var s unix.Stat_t
		if err := unix.Stat(image, &s); err != nil {
			t.Fatal(err)
		}
		return s.Blocks / 2
	}
	for range 2 {
		before := size()
		if err := client.Grow(within(t), kib); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "a larger image", func() bool { return size() >= before+kib })
	}
}

// reboots demands that the guest comes back by itself with each line that it said
// to be on its disk.
func reboots(t *testing.T, client guest.Client) {
	t.Helper()
	before, err := client.Status(within(t))
	if err != nil || before.Boot == "" {
		t.Fatalf("before the reboot: %+v, %v", before, err)
	}
	lines, err := client.Reboot(within(t))
	if err != nil || lines < 20 {
		t.Fatalf("reboot: %d lines, %v", lines, err)
	}
	if err := client.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
	s, err := client.Status(within(t))
	if err != nil || s.Lines < lines || s.LinesRunning || s.LoadOps != 0 || s.Boot == before.Boot {
		t.Errorf("after the reboot: %+v, %v; there were %d lines in %s", s, err, lines, before.Boot)
	}
}

// consoleAnswers types a command into the guest's serial console. QEMU notices
// within a second that somebody has opened the terminal, so it stays open until
// the answer is there.
func consoleAnswers(t *testing.T, h *lab.Host) {
	t.Helper()
	pty, err := h.Virsh(within(t), "ttyconsole", "guest0")
	if err != nil {
		t.Fatal(err)
	}
	out, err := h.Exec(within(t), "/bin/sh", "-euc", `exec 3<>"$1"; echo status >&3; head -n 1 <&3`, "sh", strings.TrimSpace(pty))
	if err != nil || !strings.HasPrefix(out, "ok uptime_ms=") {
		t.Errorf("console answers %q, %v", out, err)
	}
}

func echo(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("echo of %q is %q, %v", text, got, err)
	}
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx := within(t)
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("no %s within %s", what, deadline)
		case <-ticker.C:
		}
	}
}

// TestHosts checks that each host is one of its own, and what a crash and a
// pulled cable do.
func TestHosts(t *testing.T) {
	l := labtest.Up(t, lab.Options{NoAgent: true, Hosts: 3})
	hosta, hostb := host(t, l, "hosta"), host(t, l, "hostb")

	seen := map[string]string{}
	for _, h := range l.Hosts() {
		name, err := h.Virsh(within(t), "hostname")
		if err != nil || strings.TrimSpace(name) != h.Name {
			t.Errorf("libvirt of %s says it is %q, %v", h.Name, name, err)
		}
		out, err := exec.CommandContext(within(t), "virsh", "-q", "-c", h.LibvirtURI(), "list", "--all").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "" {
			t.Errorf("%s from the machine: %q, %v; want no domains", h.LibvirtURI(), out, err)
		}
		capabilities, err := h.Virsh(within(t), "capabilities")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(capabilities, "<uuid>")
		uuid, _, _ := strings.Cut(rest, "</uuid>")
		if other, ok := seen[uuid]; ok || uuid == "" {
			t.Errorf("%s has host UUID %q, like %s", h.Name, uuid, other)
		}
		seen[uuid] = h.Name
		if c, err := config.Load(h.Path(config.DefaultPath)); err != nil || c.Host != h.Name || len(c.Peers) != 2 {
			t.Errorf("ftvirt.toml of %s: host %q, %d peers, %v", h.Name, c.Host, len(c.Peers), err)
		}
	}
	if err := os.WriteFile(hosta.Path(filepath.Join(lab.ArbiterDir, "probe")), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := hostb.Exec(within(t), "test", "-s", filepath.Join(lab.ArbiterDir, "probe")); err != nil {
		t.Errorf("hostb does not share the arbiter's directory: %v", err)
	}

	// Logging network: through, cut, through.
	listener, err := hostb.Listen(within(t), netip.AddrPortFrom(hostb.LoggingAddr(), 9999))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go serveEcho(listener)
	conn, err := hosta.Dial(within(t), netip.AddrPortFrom(hostb.LoggingAddr(), 9999))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	echo(t, conn, "before")
	if err := hostb.CutLink(within(t), lab.Logging); err != nil {
		t.Fatal(err)
	}
	if !silent(t, conn) {
		t.Error("the cut logging link still carries data")
	}
	if err := hostb.RestoreLink(within(t), lab.Logging); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("cut?"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "cut?" {
		t.Errorf("TCP should send again what the cut lost: %q, %v", got, err)
	}

	// A crash is silent: no end of the connection reaches the other side.
	if err := hostb.Crash(within(t)); err != nil {
		t.Fatal(err)
	}
	if !silent(t, conn) {
		t.Error("the crash of hostb reached hosta's connection")
	}
	if _, err := hostb.Exec(within(t), "true"); !errors.Is(err, lab.ErrHostDown) {
		t.Errorf("command on a crashed host: %v, want %v", err, lab.ErrHostDown)
	}
	if err := hostb.Boot(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := hostb.Virsh(within(t), "list"); err != nil {
		t.Errorf("after the boot: %v", err)
	}

	// The end of a context ends the command on the host, too.
	ctx, cancel := context.WithTimeout(within(t), 200*time.Millisecond)
	defer cancel()
	if _, err := hosta.Exec(ctx, "sleep", "31415"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("sleep past the deadline: %v, want %v", err, context.DeadlineExceeded)
	}
	waitFor(t, "end of the sleep", func() bool {
		_, err := hosta.Exec(within(t), "pgrep", "-f", "^sleep 31415")
		return err != nil
	})
}

func serveEcho(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(conn, conn); _ = conn.Close() }()
	}
}

// silent sends something and tells whether nothing comes back, neither data nor
// the connection's end.
func silent(t *testing.T, conn net.Conn) bool {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "cut?"); err != nil {
		t.Fatal(err)
	}
	_, err := conn.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// standInAgent behaves as the lab expects of ftvirt, and no more.
const standInAgent = `#!/bin/sh
[ "$*" = "agent --config /etc/ftvirt/ftvirt.toml" ] || exit 2
echo "agent of $(hostname)"
[ ! -e /etc/ftvirt/broken ] || exit 1
mkdir -p /run/ftvirt
: >/run/ftvirt/agent.sock
exec sleep 1000
`

// TestAgent drives an agent through its life.
func TestAgent(t *testing.T) {
	bin := t.TempDir()
	for _, name := range []string{"ftvirt", "ftvirt-hook"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(standInAgent), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l := labtest.Up(t, lab.Options{Bin: bin, Configure: func(c *config.Config) { c.Heartbeat.Timeout = 7 * time.Second }})
	h := host(t, l, "hostb")
	log, err := h.AgentLog()
	if err != nil || log != "agent of hostb\n" {
		t.Errorf("after Up the agent's log is %q, %v", log, err)
	}
	if c, err := config.Load(h.Path(config.DefaultPath)); err != nil || c.Heartbeat.Timeout != 7*time.Second {
		t.Errorf("configured timeout is %s, %v", c.Heartbeat.Timeout, err)
	}
	if _, err := h.Exec(within(t), "test", "-x", "/etc/libvirt/hooks/qemu.d/ftvirt"); err != nil {
		t.Errorf("the hook is not installed: %v", err)
	}
	if err := h.StartAgent(within(t)); err == nil {
		t.Error("a second agent was started")
	}
	if err := h.KillAgent(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := h.StartAgent(within(t)); err != nil {
		t.Errorf("after the kill: %v", err)
	}
	if err := h.StopAgent(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Path("/etc/ftvirt/broken"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := h.StartAgent(within(t)); !errors.Is(err, lab.ErrAgentEnded) || !strings.Contains(err.Error(), "agent of hostb") {
		t.Errorf("an agent that fails: %v, want %v with its log", err, lab.ErrAgentEnded)
	}
}

// TestDown checks that a lab leaves nothing, whoever takes it down.
func TestDown(t *testing.T) {
	const name = "downtest"
	before := leftovers(t, name)
	if before != "" {
		t.Fatalf("before the test there are already:\n%s", before)
	}
	l := labtest.Up(t, lab.Options{Name: name, NoAgent: true})
	startGuest(t, l, host(t, l, "hosta"), "raw")
	if leftovers(t, name) == "" {
		t.Fatal("the check for leftovers does not see a running lab")
	}

	if _, err := lab.Up(within(t), lab.Options{Name: name}); !errors.Is(err, lab.ErrUp) {
		t.Errorf("second Up: %v, want %v", err, lab.ErrUp)
	}
	again, err := lab.Open(within(t), name)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := host(t, again, "hosta").Virsh(within(t), "list", "--name"); err != nil || strings.TrimSpace(out) != "guest0" {
		t.Errorf("opened lab lists %q, %v", out, err)
	}
	if err := again.Down(within(t)); err != nil {
		t.Fatal(err)
	}
	if after := leftovers(t, name); after != "" {
		t.Errorf("the lab left:\n%s", after)
	}
	if _, err := lab.Open(within(t), name); !errors.Is(err, lab.ErrNotUp) {
		t.Errorf("Open after Down: %v, want %v", err, lab.ErrNotUp)
	}
	if err := lab.Remove(within(t), name); !errors.Is(err, lab.ErrNotUp) {
		t.Errorf("Remove after Down: %v, want %v", err, lab.ErrNotUp)
	}
}

// TestInterruptedUp checks that the end of the context leaves nothing either.
func TestInterruptedUp(t *testing.T) {
	const name = "cuttest"
	for _, after := range []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		l, err := lab.Up(ctx, lab.Options{Name: name, NoAgent: true})
		cancel()
		if err == nil {
			err = l.Down(t.Context())
			t.Logf("up within %s; down: %v", after, err)
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Up cut after %s: %v, want %v", after, err, context.DeadlineExceeded)
		}
		if left := leftovers(t, name); left != "" {
			t.Errorf("Up cut after %s left:\n%s", after, left)
		}
	}
}

// TestKilledMaker kills the process that made an ephemeral lab: the lab's
// processes end with it, and the next Up, whatever its lab is called, removes
// the rest.
func TestKilledMaker(t *testing.T) {
	const name = "killtest"
	if os.Getenv("LAB_TEST_MAKER") != "" {
		labtest.Up(t, lab.Options{Name: name, NoAgent: true})
		fmt.Println("up")
		select {}
	}
	for _, next := range []string{name, "killtest2"} {
		killMaker(t, name)
		l := labtest.Up(t, lab.Options{Name: next, NoAgent: true})
		if left := leftovers(t, name+"/"); next != name && left != "" {
			t.Errorf("the next lab did not remove:\n%s", left)
		}
		if err := l.Down(within(t)); err != nil {
			t.Error(err)
		}
	}
}

// killMaker has another process make a lab and kills it.
func killMaker(t *testing.T, name string) {
	t.Helper()
	cmd := exec.CommandContext(within(t), os.Args[0], "-test.run=^TestKilledMaker$")
	cmd.Env = append(os.Environ(), "LAB_TEST_MAKER=1")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAtLeast(stdout, make([]byte, 64), len("up\n")); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	waitFor(t, "end of the lab's processes", func() bool {
		_, err := lab.Open(within(t), name)
		return errors.Is(err, lab.ErrNotUp) && processes(t, name) == ""
	})
}

func TestBadOptions(t *testing.T) {
	for _, o := range []lab.Options{
		{Name: "Upper"},
		{Name: "../escape"},
		{Name: "far-too-long-a-name"},
		{Hosts: 1},
		{Hosts: 4},
		{Bin: "/does/not/exist"},
		{Guest: guest.Artifacts{Kernel: "/does/not/exist"}},
	} {
		if _, err := lab.Up(t.Context(), o); !errors.Is(err, lab.ErrInvalidOptions) {
			t.Errorf("%+v: %v, want %v", o, err, lab.ErrInvalidOptions)
		}
	}
}

// leftovers lists what belongs to the lab called name on the machine.
func leftovers(t *testing.T, name string) string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/var/lib/ftvirt-lab/" + name, "/sys/fs/cgroup/ftvirt-" + name, "/sys/fs/cgroup/*/ftvirt-" + name} {
		paths, err := filepath.Glob(filepath.Clean(pattern))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, paths...)
	}
	for _, list := range []string{"/proc/self/mounts", "/proc/net/dev"} {
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, "ftvirt-lab/"+name) || strings.HasPrefix(strings.TrimSpace(line), "hosta-") {
				found = append(found, list+": "+line)
			}
		}
	}
	return strings.Join(found, "\n") + processes(t, name)
}

// processes lists the processes whose mounts are the lab's.
func processes(t *testing.T, name string) string {
	t.Helper()
	tables, err := filepath.Glob("/proc/[0-9]*/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, table := range tables {
		text, err := os.ReadFile(table)
		if err != nil {
			continue // it ended meanwhile
		}
		if bytes.Contains(text, []byte("ftvirt-lab/"+name+"/")) {
			found = append(found, filepath.Dir(table))
		}
	}
	return strings.Join(found, "\n")
}
