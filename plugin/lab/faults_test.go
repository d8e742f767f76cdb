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
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/labtest"
)

// TestFaults puts each fault to a host, and demands that it does what its name
// says, there only, until it is undone.
func TestFaults(t *testing.T) {
	l := labtest.Up(t, lab.Options{NoAgent: true})
	hosta, hostb := host(t, l, "hosta"), host(t, l, "hostb")
	t.Run("wire", func(t *testing.T) { badWire(t, hosta, hostb) })
	t.Run("storage", func(t *testing.T) { badStorage(t, hosta, hostb) })
	t.Run("signal", func(t *testing.T) { signals(t, hosta) })
	t.Run("crash", func(t *testing.T) { crashAmidst(t, hosta, hostb) })
	t.Run("images", func(t *testing.T) { fullImages(t, hosta, hostb) })
}

// fullImages leaves a host no room for its disks, which are there again after it
// was powered off.
func fullImages(t *testing.T, hosta, hostb *lab.Host) {
	path := filepath.Join(lab.ImageDir, "image")
	write := func(h *lab.Host, text string) error {
		_, err := h.Exec(within(t), "/bin/sh", "-euc", `echo "$1" >>"$2"`, "sh", text, path)
		return err
	}
	if err := hosta.MountImages(within(t), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := write(hosta, strings.Repeat("one", 1500)); err != nil { // the next is in a block of its own
		t.Fatal(err)
	}
	free, err := hosta.FillImages(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := write(hosta, strings.Repeat("two", 3000)); err == nil {
		t.Error("there is room on the host without any")
	}
	if err := write(hostb, "three"); err != nil {
		t.Errorf("no room on the other: %v", err)
	}
	if err := free(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := write(hosta, "four"); err != nil {
		t.Error(err)
	}
	before, err := os.ReadFile(hosta.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := hosta.PowerOff(within(t)); err != nil {
		t.Fatal(err)
	}
	if hosta.Up() {
		t.Fatal("it is up after its power-off")
	}
	if err := hosta.Boot(within(t)); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(hosta.Path(path)); err != nil || string(after) != string(before) || !strings.HasSuffix(string(after), "four\n") {
		t.Errorf("after the power-off %d bytes, %v; before %d", len(after), err, len(before))
	}
	if free, err = hosta.FillImages(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := write(hosta, strings.Repeat("five", 3000)); err == nil {
		t.Error("there is room on the host without any, after a boot")
	}
	if err := free(within(t)); err != nil {
		t.Fatal(err)
	}
}

func connect(t *testing.T, from, to *lab.Host) net.Conn {
	t.Helper()
	address := netip.AddrPortFrom(to.LoggingAddr(), 9999)
	listener, err := to.Listen(within(t), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go serveEcho(listener)
	conn, err := from.Dial(within(t), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	echo(t, conn, "hello")
	return conn
}

func badWire(t *testing.T, hosta, hostb *lab.Host) {
	conn := connect(t, hosta, hostb)
	const delay = 100 * time.Millisecond
	disturb := func(out, in lab.Weather, what func()) {
		t.Helper()
		wire, err := hosta.Disturb(within(t), lab.Logging, out, in)
		if err != nil {
			t.Fatal(err)
		}
		what()
		if err := wire.Close(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range [][2]lab.Weather{{{Delay: delay}, {}}, {{}, {Delay: delay}}} {
		disturb(w[0], w[1], func() {
			start := time.Now()
			echo(t, conn, "late")
			if d := time.Since(start); d < delay {
				t.Errorf("out %s, in %s: an echo took %v", w[0], w[1], d)
			}
		})
	}
	// Segments that the kernel did not cut, with checksums that it did not
	// make, come through as well.
	disturb(lab.Weather{Jitter: 5 * time.Millisecond, Reorder: true}, lab.Weather{Drop: 0.02}, func() {
		bulk := bytes.Repeat([]byte("0123456789abcdef"), 1<<15)
		go func() { _, _ = conn.Write(bulk) }()
		got := make([]byte, len(bulk))
		if err := conn.SetDeadline(time.Now().Add(deadline)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, bulk) {
			t.Errorf("%d bytes do not come through: %v", len(bulk), err)
		}
	})
	for _, w := range [][2]lab.Weather{{{Cut: true}, {}}, {{}, {Cut: true}}} {
		disturb(w[0], w[1], func() {
			if !silent(t, conn) {
				t.Errorf("out %s, in %s: something comes through", w[0], w[1])
			}
		})
		comes(t, conn, "cut?")
	}
	datagrams := udpEcho(t, hosta, hostb)
	for _, w := range [][2]lab.Weather{{{NoTCP: true}, {}}, {{}, {NoTCP: true}}} {
		disturb(w[0], w[1], func() {
			echo(t, datagrams, "UDP")
			if !silent(t, conn) {
				t.Errorf("out %s, in %s: TCP comes through", w[0], w[1])
			}
		})
		comes(t, conn, "cut?")
	}
	const largest = 1000
	for _, w := range [][2]lab.Weather{{{Largest: largest}, {}}, {{}, {Largest: largest}}} {
		large := strings.Repeat("x", 10*largest)
		disturb(w[0], w[1], func() {
			echo(t, conn, "small")
			if _, err := io.WriteString(conn, large); err != nil {
				t.Fatal(err)
			}
			if !silent(t, conn) {
				t.Errorf("out %s, in %s: large packets come through", w[0], w[1])
			}
		})
		comes(t, conn, large+"cut?")
	}
}

// udpEcho gives a socket of one host whose datagrams another sends back.
func udpEcho(t *testing.T, from, to *lab.Host) net.Conn {
	t.Helper()
	var conn net.Conn
	address := netip.AddrPortFrom(to.LoggingAddr(), 9999)
	err := to.InNetwork(func() error {
		server, err := net.ListenPacket("udp", address.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = server.Close() })
		go func() {
			buf := make([]byte, 2048)
			for {
				n, from, err := server.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = server.WriteTo(buf[:n], from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := from.InNetwork(func() (err error) {
		conn, err = net.Dial("udp", address.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// comes demands what was sent before.
func comes(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Errorf("%q came, %v; want %q", got, err, text)
	}
}

func badStorage(t *testing.T, hosta, hostb *lab.Host) {
	const limit = 500 * time.Millisecond
	probe, fresh := filepath.Join(lab.ArbiterDir, "probe"), filepath.Join(lab.ArbiterDir, "fresh")
	if err := os.WriteFile(hosta.Path(probe), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	read := func(h *lab.Host) (time.Duration, error) {
		ctx, cancel := context.WithTimeout(within(t), 4*limit)
		defer cancel()
		start := time.Now()
		_, err := h.Exec(ctx, "cat", probe)
		return time.Since(start), err
	}
	write := func(h *lab.Host) error {
		_, err := h.Exec(within(t), "touch", fresh)
		return err
	}
	for fault, broken := range map[lab.StorageFault]func() bool{
		lab.StorageAway:     func() bool { _, err := read(hosta); return err != nil },
		lab.StorageReadOnly: func() bool { _, err := read(hosta); return err == nil && write(hosta) != nil },
		lab.StorageSlow:     func() bool { d, err := read(hosta); return err == nil && d >= limit },
		lab.StorageHung:     func() bool { _, err := read(hosta); return errors.Is(err, context.DeadlineExceeded) },
	} {
		heal, err := hosta.DisturbStorage(within(t), fault, limit)
		if err != nil {
			t.Fatal(err)
		}
		if !broken() {
			t.Errorf("%s: hosta's storage is as it should be", fault)
		}
		if _, err := read(hostb); err != nil || write(hostb) != nil {
			t.Errorf("%s: hostb's storage is hit, too: %v", fault, err)
		}
		if err := heal(within(t)); err != nil {
			t.Fatal(err)
		}
		if _, err := read(hosta); err != nil || write(hosta) != nil {
			t.Errorf("%s: hosta's storage is not as it was: %v", fault, err)
		}
	}
}

func signals(t *testing.T, h *lab.Host) {
	pid, err := h.PID(lab.LibvirtProcess)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []unix.Signal{unix.SIGSTOP, unix.SIGCONT} {
		before := time.Now()
		at, err := h.Signal(within(t), lab.LibvirtProcess, s)
		if err != nil || at.Before(before) || at.After(time.Now()) {
			t.Fatalf("%v at %v: %v", s, at, err)
		}
		ctx, cancel := context.WithTimeout(within(t), 2*time.Second)
		_, err = h.Virsh(ctx, "list")
		cancel()
		if (err == nil) != (s == unix.SIGCONT) {
			t.Errorf("libvirtd, process %d, after %v: %v", pid, s, err)
		}
	}
	if _, err := h.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	state := fmt.Sprintf("/proc/%d/status", pid)
	if out, err := h.Exec(within(t), "grep", "State:.*stopped", state); err != nil {
		t.Errorf("libvirtd of a frozen host: %q, %v", out, err)
	}
	if err := h.Thaw(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Virsh(within(t), "list"); err != nil {
		t.Errorf("after the thaw: %v", err)
	}
}

// A host that crashes takes its cable and its mounts with it, and neither comes
// back to haunt the next boot.
func crashAmidst(t *testing.T, hosta, hostb *lab.Host) {
	wire, err := hosta.Disturb(within(t), lab.Logging, lab.Weather{Cut: true}, lab.Weather{})
	if err != nil {
		t.Fatal(err)
	}
	var heals []func(context.Context) error
	for _, fault := range []lab.StorageFault{lab.StorageHung, lab.StorageAway} {
		heal, err := hosta.DisturbStorage(within(t), fault, 0)
		if err != nil {
			t.Fatal(err)
		}
		heals = append(heals, heal)
	}
	if err := hosta.Crash(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := hosta.Boot(within(t)); err != nil {
		t.Fatal(err)
	}
	for _, heal := range append(heals, wire.Close) {
		if err := heal(within(t)); err != nil {
			t.Error(err)
		}
	}
	connect(t, hosta, hostb)
}
