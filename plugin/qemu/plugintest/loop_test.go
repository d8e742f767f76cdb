// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// TestEventLoops: a backup whose guest is busy does not wake QEMU's event loops
// for what is the vCPU's. Without loop.c the monitors' loop went to sleep some
// thousand times a second; it looks a hundred times.
func TestEventLoops(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	c := guest.Client{Dial: dial(p.ports), Address: netip.MustParseAddr("10.0.2.15")}
	if err := c.StartLoad(ctx, 300); err != nil {
		t.Fatal(err)
	}
	p.run(t, 2*time.Second)
	const seconds = 5
	before := sleeps(t, p.b, "IO mon_iothread")
	p.run(t, seconds*time.Second)
	n := (sleeps(t, p.b, "IO mon_iothread") - before) / seconds
	t.Logf("the monitors' loop slept %d times a second", n)
	if n > 300 {
		t.Errorf("the monitors' loop of a backup was woken %d times a second", n)
	}
	p.follow(t)
}

// sleeps is how often the thread of that name has gone to sleep.
func sleeps(t *testing.T, m *machine, name string) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		comm, err := os.ReadFile(filepath.Join(task, "comm"))
		if err != nil || strings.TrimSpace(string(comm)) != name {
			continue
		}
		status, err := os.ReadFile(filepath.Join(task, "status"))
		if err != nil {
			t.Fatal(err)
		}
		_, after, _ := strings.Cut(string(status), "\nvoluntary_ctxt_switches:")
		var n int
		if _, err := fmt.Sscan(after, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Fatalf("QEMU has no thread %q", name)
	return 0
}
