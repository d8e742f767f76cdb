// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

// The data path of an epoch ends a moment after the epoch does, by when the next may
// have a backup on the same host. What it removes is its own.
func TestLogOfTheNextEpochStays(t *testing.T) {
	t.Parallel()
	run := t.TempDir()
	a := &Agent{cfg: config.Config{Host: "hostb", Agent: config.Agent{RunDir: run}}, log: slog.New(slog.DiscardHandler)}
	var cancel context.CancelFunc
	a.ctx, cancel = context.WithCancel(t.Context())
	d := newDomain(a, plugin.UUID{1})

	// Of an agent that died, and of one before epochs had directories of their own.
	stale := []string{"log-" + d.id.String(), "log-" + d.id.String() + "-3"}
	other := "log-" + plugin.UUID{2}.String() + "-3"
	for _, name := range append(stale, other) {
		if err := os.Mkdir(filepath.Join(run, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	before, next := d.newBackup("hosta", 4), d.newBackup("hosta", 5)
	if _, err := before.newSpool(); err != nil {
		t.Fatal(err)
	}
	d.endData(nil, before) // lingers
	if _, err := next.newSpool(); err != nil {
		t.Fatal(err)
	}
	cancel() // of the lingering
	a.wg.Wait()
	if entries, err := os.ReadDir(next.spoolDir()); err != nil || len(entries) != 1 {
		t.Errorf("the log of the next epoch: %v, %v", entries, err)
	}
	if _, err := os.Stat(filepath.Join(run, other)); err != nil {
		t.Errorf("the log of another domain: %v", err)
	}
	for _, dir := range append(stale, filepath.Base(before.spoolDir())) {
		if _, err := os.Stat(filepath.Join(run, dir)); err == nil {
			t.Errorf("%s stays", dir)
		}
	}
}
