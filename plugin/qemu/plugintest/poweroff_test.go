// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// TestPowerOff: a guest that powers itself off ends both QEMUs in order, and the
// log says so: it is the paper's control entry (section 3.3).
func TestPowerOff(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	p := boot(ctx, t)
	p.begin()
	p.clone(ctx, t)
	c := guest.Client{Dial: dial(p.ports), Address: netip.MustParseAddr("10.0.2.15")}
	if err := c.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*machine{"primary": p.a, "backup": p.b} {
		select {
		case <-m.done:
		case <-ctx.Done():
			t.Fatalf("the %s does not end", name)
		}
		var exit *exec.ExitError
		if errors.As(m.err, &exit) {
			text, _ := os.ReadFile(filepath.Join(m.dir, "stderr"))
			t.Errorf("the %s's QEMU ended with %v: %s", name, exit, text)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dec.Ended() {
		t.Errorf("the log has no END: %d bytes behind the last event", p.dec.Trailing())
	}
}
