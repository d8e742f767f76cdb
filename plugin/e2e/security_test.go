// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
)

// TestPlaintextIsToldOf: a channel without TLS is never a surprise, and takes
// part with nobody who wants it.
func TestPlaintextIsToldOf(t *testing.T) {
	b, hosta, hostb := bed(t)
	shared.guests++
	vm, err := b.DefineVM(t.Context(), hosta, 0, "plaintext", nil)
	must(t, err)
	t.Cleanup(func() { must(t, vm.Remove(context.Background())) })
	status := func() string {
		// Standard error as well, where the warning goes.
		out, err := hosta.Exec(t.Context(), "/bin/sh", "-c", filepath.Join(lab.BinDir, "ftvirt")+` status "$1" 2>&1`, "sh", vm.Name)
		must(t, err)
		return out
	}
	if out := status(); strings.Contains(out, "plaintext (") || !strings.Contains(out, "tls") {
		t.Errorf("with TLS:\n%s", out)
	}
	before, err := hosta.AgentLog()
	must(t, err)
	configured(t, b, hosta, func(c *config.Config) { c.Channel.Plaintext = true })
	if out := status(); !strings.Contains(out, "warning: the logging channel is in plaintext") {
		t.Errorf("without TLS:\n%s", out)
	}
	after, err := hosta.AgentLog()
	must(t, err)
	if !strings.Contains(strings.TrimPrefix(after, before), "the logging channel is in plaintext") {
		t.Errorf("the log does not say so:\n%s", after)
	}
	problems, err := b.Agent(hosta).Check(t.Context(), vm.Name, hostb.Name)
	if err != nil || !slices.ContainsFunc(problems, func(p hooks.Problem) bool { return p.Code == "peer" }) {
		t.Errorf("a peer with TLS talks in plaintext: %+v, %v", problems, err)
	}
}
