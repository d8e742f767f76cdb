// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// TestVerify compares both sides of a pair under load, with a qcow2 disk, again
// and again, while a client goes on. Then a byte of the backup's memory is
// changed: that is found, and the backup is discarded.
func TestVerify(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm, traffic := protected(t, b, hosta, hostb)
	begun := time.Now()
	for range 3 {
		out, err := verify(t, hosta, vm, "-o", "json")
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var v client.Verification
		must(t, json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &v))
		kinds := map[string]int{}
		for _, p := range v.Parts {
			kinds[p.Kind]++
		}
		if !v.Equal || v.Instructions == 0 || kinds["registers"] != 1 || kinds["disk"] != 1 || kinds["memory"] == 0 {
			t.Errorf("%+v", v)
		}
		t.Logf("equal at instruction %d, the domain stood still for %.0f ms", v.Instructions, v.Pause)
		must(t, scenario.Pause(t.Context(), 500*time.Millisecond))
	}
	if out, err := verify(t, hostb, vm); err == nil || !strings.Contains(out, "ask the agent of host "+hosta.Name) {
		t.Errorf("on the backup's host: %v: %s", err, out)
	}

	poison(t, vm, hostb)
	out, err := verify(t, hosta, vm)
	if err == nil || !strings.Contains(err.Error(), "exit status 5") || !strings.Contains(out, "0x0 to 0x10000\n") || !strings.Contains(out, "is discarded") {
		t.Fatalf("a byte of the backup's memory was changed: %v: %s", err, out)
	}
	t.Log(out)
	s, err := b.WaitState(t.Context(), hosta, vm.Name, "live", 15*time.Second)
	must(t, err)
	t.Logf("the primary is %s: %s", s.State, s.Reason)
	must(t, b.WaitGone(t.Context(), hostb, vm.Name))
	report, err := hostb.Exec(t.Context(), "/bin/sh", "-euc", "cat /var/lib/ftvirt/diagnosis/"+s.UUID.String()+"-*/report.json")
	if err != nil || !strings.Contains(report, `"verified": {`) {
		t.Errorf("what was verified is not kept on %s: %v: %s", hostb.Name, err, report)
	}
	alive(t, traffic, begun)
	must(t, protect(t, vm, hosta, hostb))
	must(t, traffic.Stop())
}

func verify(t *testing.T, h *lab.Host, vm *scenario.VM, args ...string) (string, error) {
	t.Helper()
	command := append([]string{"2>&1", lab.BinDir + "/ftvirt", "verify", vm.Name}, args...)
	return h.Exec(t.Context(), "/bin/sh", "-c", strings.Join(command, " "))
}

// poison changes a byte of a guest's memory that Linux leaves alone, in its first
// 64 KiB.
func poison(t *testing.T, vm *scenario.VM, h *lab.Host) {
	t.Helper()
	const guestRAM = 256 << 20
	pid, err := h.QEMUPID(vm.Name)
	must(t, err)
	maps, err := h.Exec(t.Context(), "/bin/cat", fmt.Sprintf("/proc/%d/maps", pid))
	must(t, err)
	for line := range strings.Lines(maps) {
		var start, end int64
		_, err := fmt.Sscanf(line, "%x-%x", &start, &end)
		must(t, err)
		if end-start != guestRAM {
			continue
		}
		_, err = h.Exec(t.Context(), "/bin/sh", "-euc", `printf poison | dd "of=/proc/$1/mem" bs=1 "seek=$2" conv=notrunc 2>&1`, "sh",
			strconv.Itoa(pid), strconv.FormatInt(start+0x9000, 10))
		must(t, err)
		return
	}
	t.Fatal("the guest's memory is not there")
}
