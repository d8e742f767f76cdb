// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSecondAgent: an agent does not serve with the directory of another one, be that
// of this host or of another, and says what to do.
func TestSecondAgent(t *testing.T) {
	t.Parallel()
	first := testAgent(t)
	release, err := first.directories()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		host       string
		run, state string
		says       string
	}{
		"twice":                   {"hosta", first.cfg.Agent.RunDir, first.cfg.Agent.StateDir, "started twice"},
		"state of another host":   {"hostb", t.TempDir(), first.cfg.Agent.StateDir, `agent.state_dir: `},
		"sockets of another host": {"hostb", first.cfg.Agent.RunDir, t.TempDir(), `agent.run_dir: `},
		"state of this host":      {"hosta", t.TempDir(), first.cfg.Agent.StateDir, "started twice"},
	} {
		second := testAgent(t)
		second.cfg.Host, second.cfg.Agent.RunDir, second.cfg.Agent.StateDir = tc.host, tc.run, tc.state
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := second.Run(ctx, func() { t.Errorf("%s: it serves", name); cancel() }); !errors.Is(err, errTaken) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Logf("%s: %v", name, err)
		}
		cancel()
	}
	release()
	// The agent of this host comes back; that of another has to be let in.
	if release, err = first.directories(); err != nil {
		t.Fatal(err)
	}
	release()
	first.cfg.Host = "hostb"
	if _, err := first.directories(); !errors.Is(err, errTaken) || !strings.Contains(err.Error(), lockName) {
		t.Errorf("host hostb takes what is hosta's: %v", err)
	}
	for _, dir := range []string{first.cfg.Agent.RunDir, first.cfg.Agent.StateDir} {
		if err := os.Remove(filepath.Join(dir, lockName)); err != nil {
			t.Fatal(err)
		}
	}
	if release, err = first.directories(); err != nil {
		t.Fatal(err)
	}
	release()
}

// TestLogIsNotOverwritten: what another host, or an earlier life of the domain, keeps
// under the same name stays.
func TestLogIsNotOverwritten(t *testing.T) {
	t.Parallel()
	a := testAgent(t)
	a.cfg.Replay.LogDir = t.TempDir()
	p := &primary{d: newDomain(a, [16]byte{1}), epoch: 1}
	path := filepath.Join(a.cfg.Replay.LogDir, p.d.id.String()+"-1.rrlog")
	if err := os.WriteFile(path, []byte("another's"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.keepLog()
	p.keep([]byte("ours"))
	if text, err := os.ReadFile(path); err != nil || string(text) != "another's" {
		t.Errorf("%q, %v", text, err)
	}
}
