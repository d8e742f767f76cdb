// SPDX-License-Identifier: Apache-2.0

package migrate_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/migrate/resync"
	"ftvirt.org/ftvirt/plugin"
)

// writer is a guest, a boot sector, that writes 4 KiB at random places of its disk
// without a pause.
var writer = []byte{
	0x31, 0xc0, // xor ax, ax
	0x8e, 0xd8, // mov ds, ax
	0x8e, 0xd0, // mov ss, ax
	0xbc, 0x00, 0x7c, // mov sp, 0x7c00
	0xbe, 0x28, 0x7c, // again: mov si, packet
	0xb8, 0x00, 0x43, // mov ax, 0x4300 ; extended write
	0xcd, 0x13, // int 0x13
	0xa1, 0x38, 0x7c, // mov ax, [seed]
	0x69, 0xc0, 0x55, 0x62, // imul ax, ax, 25173
	0x05, 0x19, 0x36, // add ax, 13849
	0xa3, 0x38, 0x7c, // mov [seed], ax
	0x25, 0xff, 0x1f, // and ax, 0x1fff
	0x0c, 0x08, // or al, 8
	0xa3, 0x30, 0x7c, // mov [sector], ax
	0xeb, 0xe1, // jmp again
	0x10, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x10, // packet: 8 sectors from 1000:0000
	0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // sector
	0x00, 0x00, // seed
}

// writerDisk is so small that what QEMU has of it in its heap, a bit for 64 KiB,
// is where the allocator keeps its own data once it is freed.
const writerDisk = 6 << 20

// machine is a QEMU that runs the writer, and its monitor.
type machine struct {
	conn net.Conn
	in   *bufio.Reader
	died chan struct{}
}

func start(t *testing.T, name string, args ...string) *machine {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = t.Output()
	// The allocator looks for damage to the heap.
	cmd.Env = append(os.Environ(), "LD_PRELOAD=libc_malloc_debug.so.0", "GLIBC_TUNABLES=glibc.malloc.check=3")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m := &machine{died: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(m.died)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-m.died
	})
	return m
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
}

func (m *machine) XML(context.Context, plugin.UUID, bool) (string, error) { return domain, nil }

func (m *machine) Monitor(ctx context.Context, _ plugin.UUID, command string, args, out any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	line, err := json.Marshal(request)
	if err != nil {
		return err
	}
	limit := time.Now().Add(10 * time.Second)
	if err := m.conn.SetDeadline(limit); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(m.conn, "%s\n", line); err != nil {
		return err
	}
	for {
		line, err := m.in.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		var reply struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		switch err := json.Unmarshal(line, &reply); {
		case err != nil:
			return err
		case reply.Error != nil:
			return fmt.Errorf("%s: %s", command, reply.Error.Desc)
		case reply.Return != nil && out != nil:
			return json.Unmarshal(reply.Return, out)
		case reply.Return != nil:
			return nil
		}
	}
}

// replica is a peer that has a QEMU's NBD server, takes memory to throw it away, and
// fails when the disks are equal.
type replica string

var errEqual = errors.New("the disks are equal")

func (replica) Call(_ context.Context, method string, _, out any) error {
	switch method {
	case migrate.MethodPrepare:
		if rand.IntN(2) == 0 {
			out.(*migrate.PrepareReply).Resync = []string{"vda"}
		}
	case migrate.MethodSeeded:
		return errEqual
	}
	return nil
}

func (r replica) Tunnel(ctx context.Context, purpose, target string) (net.Conn, error) {
	near, far := net.Pipe()
	if purpose == "migrate" {
		go func() { _, _ = io.Copy(io.Discard, far) }()
		return near, nil
	}
	nbd, err := net.Dial("unix", string(r))
	if err != nil || purpose == "nbd" {
		return nbd, err
	}
	go func() {
		defer func() { _, _ = nbd.Close(), far.Close() }()
		_ = resync.Receive(ctx, far, nbd, target, nil)
	}()
	return near, nil
}

// A guest that writes without a pause must survive that the copy of its disk is cut
// off, at whichever moment. QEMU 10.0 destroys its heap if the guest runs
// meanwhile, within a hundred of these.
func TestCutOff(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "cut") // a socket's path has to be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	disk := append(writer, make([]byte, 510-len(writer))...)
	disk = append(disk, 0x55, 0xaa)
	for name, content := range map[string][]byte{"disk": disk, "copy": nil} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, content, 0o600), os.Truncate(path, writerDisk)); err != nil {
			t.Fatal(err)
		}
	}
	server := filepath.Join(dir, "nbd.sock")
	start(t, "qemu-nbd", "-t", "-f", "raw", "-k", server, "-x", "vda", filepath.Join(dir, "copy"))
	_ = dial(t, server).Close()
	monitor := filepath.Join(dir, "qmp.sock")
	m := start(t, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35", "-m", "32", "-accel", "tcg",
		"-qmp", "unix:"+monitor+",server=on,wait=off",
		"-blockdev", "driver=file,node-name=file,filename="+filepath.Join(dir, "disk"), "-blockdev", "driver=raw,node-name=libvirt-1-format,file=file",
		"-blockdev", "driver=blkreplay,node-name=ftvirt-rr-0,image=libvirt-1-format", "-device", "virtio-blk-pci,drive=ftvirt-rr-0")
	m.conn = dial(t, monitor)
	m.in = bufio.NewReader(m.conn)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var id plugin.UUID
	if err := m.Monitor(ctx, id, "qmp_capabilities", nil, nil); err != nil {
		t.Fatal(err)
	}
	written := func() int64 {
		var devices []struct {
			Stats struct {
				Written int64 `json:"wr_operations"`
			}
		}
		if err := m.Monitor(ctx, id, "query-blockstats", nil, &devices); err != nil {
			t.Fatal(err)
		}
		return devices[0].Stats.Written
	}
	writes := func(than int64) {
		t.Helper()
		for written() <= than {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				t.Fatal("the guest does not write")
			}
		}
	}
	writes(0)
	phases := map[string]int{}
	for range 100 {
		cut, stop := context.WithTimeout(ctx, time.Duration(rand.IntN(int(longestClone))))
		phase := "begin"
		_, err := (&migrate.Source{Local: m, Peer: replica(server), Plugin: idle{}}).Clone(cut, migrate.Options{
			Domain: id, Dir: filepath.Join(dir, "clone"), QEMUUser: os.Getuid(), Downtime: 100 * time.Millisecond,
			Progress: func(p migrate.Progress) { phase = p.Phase },
		})
		stop()
		if err == nil || errors.Is(err, migrate.ErrRevert) {
			t.Fatalf("while %s: %v", phase, err)
		}
		phases[phase]++
		writes(written())
	}
	t.Log(phases)
}

// longestClone is when nearly every clone of the test has come to its end.
const longestClone = 300 * time.Millisecond
