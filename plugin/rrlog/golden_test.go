// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// monitor speaks just enough QMP for this test.
type monitor struct {
	in  io.Writer
	out *json.Decoder
}

func (m *monitor) run(t *testing.T, command string, arguments any) json.RawMessage {
	t.Helper()
	cmd := map[string]any{"execute": command}
	if arguments != nil {
		cmd["arguments"] = arguments
	}
	if err := json.NewEncoder(m.in).Encode(cmd); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	for {
		var reply struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := m.out.Decode(&reply); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		if reply.Error != nil {
			t.Fatalf("%s: %s", command, reply.Error.Desc)
		}
		if reply.Return != nil {
			return reply.Return
		}
	}
}

// TestLogOfRealQEMU records SeaBIOS and iPXE starting in the QEMU that is
// installed, and decodes the whole file. QEMU itself says how many
// instructions it must contain.
func TestLogOfRealQEMU(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("%v: install QEMU with `make deps`", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	file := filepath.Join(t.TempDir(), "boot.rr")
	serial := filepath.Join(t.TempDir(), "serial")
	cmd := exec.CommandContext(ctx, qemu, "-icount", "shift=3,rr=record,rrfile="+file,
		"-nodefaults", "-display", "none", "-machine", "q35,hpet=off,graphics=off", "-m", "32",
		"-serial", "file:"+serial,
		"-blockdev", "driver=null-co,node-name=disk,size=1048576,read-zeroes=on",
		"-blockdev", "driver=blkreplay,node-name=rr,image=disk", "-device", "virtio-blk-pci,drive=rr,ioeventfd=off",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,ioeventfd=off",
		"-object", "filter-replay,id=r0,netdev=n0", "-qmp", "stdio")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cancel()
	m := &monitor{in: in, out: json.NewDecoder(out)}
	var greeting struct {
		QMP struct {
			Version struct {
				QEMU struct{ Major, Minor int } `json:"qemu"`
			} `json:"version"`
		}
	}
	if err := m.out.Decode(&greeting); err != nil {
		t.Fatal(err)
	}
	m.run(t, "qmp_capabilities", nil)
	l := schemaLayout(t, m)
	version := greeting.QMP.Version.QEMU
	if byVersion, err := LayoutFor(version.Major, version.Minor); err != nil || byVersion.kinds != l.kinds {
		t.Errorf("the layout of QEMU %d.%d differs from that of its schema (%v)", version.Major, version.Minor, err)
	}

	// Stdio writes the log in blocks of 4 KiB: with two of them SeaBIOS is on its way.
	waitForSize(ctx, t, file, 8<<10)
	key := func(kind string, data any, down bool) map[string]any {
		return map[string]any{"type": "key", "data": map[string]any{
			"down": down, "key": map[string]any{"type": kind, "data": data},
		}}
	}
	m.run(t, "input-send-event", map[string]any{"events": []any{
		key("qcode", "a", true), key("qcode", "a", false), key("number", 30, true),
		map[string]any{"type": "rel", "data": map[string]any{"axis": "x", "value": -3}},
		map[string]any{"type": "btn", "data": map[string]any{"button": "left", "down": true}},
	}})
	waitForSize(ctx, t, file, 40<<10)
	m.run(t, "stop", nil)
	var replay struct {
		Icount uint64 `json:"icount"`
	}
	if err := json.Unmarshal(m.run(t, "query-replay", nil), &replay); err != nil {
		t.Fatal(err)
	}
	m.run(t, "quit", nil)
	_, _ = io.Copy(io.Discard, io.MultiReader(m.out.Buffered(), out))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("qemu: %v", err)
	}

	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	sc := NewScanner(f, l)
	counts := map[Kind]int{}
	var last, beforeLast Event
	for sc.Scan() {
		counts[sc.Event().Kind]++
		beforeLast, last = last, *sc.Event()
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if sc.Header() != HeaderFinished || sc.Trailing() != 0 || int64(last.End())+HeaderSize != info.Size() {
		t.Errorf("header %v, %d trailing bytes, events end at %d+%d of %d",
			sc.Header(), sc.Trailing(), last.End(), HeaderSize, info.Size())
	}
	if last.Kind != KindEnd || l.CauseName(beforeLast.Code) != "HOST_SIGNAL" {
		t.Errorf("the log ends in %v, %v; want SHUTDOWN by HOST_SIGNAL, END", beforeLast.Kind, last.Kind)
	}
	if sc.Decoder().Instructions() != replay.Icount || replay.Icount == 0 {
		t.Errorf("%d instructions decoded, QEMU says %d", sc.Decoder().Instructions(), replay.Icount)
	}
	for _, k := range []Kind{
		KindInterrupt, KindException, KindBlock, KindCharWrite, KindClockHost, KindClockVirtualRT,
		KindCheckpointInit, KindCheckpointClockVirtual,
	} {
		if counts[k] == 0 {
			t.Errorf("no %v in %v", k, counts)
		}
	}
	if counts[KindInput] != 5 || counts[KindInputSync] == 0 {
		t.Errorf("%d INPUT and %d INPUT_SYNC, want 5 and some", counts[KindInput], counts[KindInputSync])
	}
	t.Logf("%d events, %d instructions: %v", sc.Decoder().Events(), replay.Icount, counts)
}

// schemaLayout asks the monitor for the names of ShutdownCause. The schema
// masks type names, so the enum is known by its members.
func schemaLayout(t *testing.T, m *monitor) Layout {
	t.Helper()
	var types []struct {
		Meta   string   `json:"meta-type"`
		Values []string `json:"values"`
	}
	if err := json.Unmarshal(m.run(t, "query-qmp-schema", nil), &types); err != nil {
		t.Fatal(err)
	}
	for _, ty := range types {
		for _, v := range ty.Values {
			if ty.Meta == "enum" && v == "host-qmp-quit" {
				l, err := LayoutForCauses(ty.Values)
				if err != nil {
					t.Fatal(err)
				}
				return l
			}
		}
	}
	t.Fatal("the schema has no ShutdownCause")
	return Layout{}
}

// waitForSize polls until a file has grown to a size.
func waitForSize(ctx context.Context, t *testing.T, file string, size int64) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		info, err := os.Stat(file)
		if err == nil && info.Size() >= size {
			return
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the log did not reach %d bytes: %v", size, ctx.Err())
		case <-tick.C:
		}
	}
}
