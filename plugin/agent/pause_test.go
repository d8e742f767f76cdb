// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"testing"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// A backup that is given up since a disk of its primary failed keeps its replicas,
// which may be the best copy that there is; one whose own disk failed does not.
func TestWhoseDiskFailed(t *testing.T) {
	for _, mine := range []bool{false, true} {
		a := &Agent{
			cfg: config.Config{Host: "hostb", Agent: config.Agent{RunDir: t.TempDir(), StateDir: t.TempDir()}}, log: slog.New(slog.DiscardHandler),
			domains: map[plugin.UUID]*domain{}, ctx: t.Context(),
		}
		d := newDomain(a, plugin.UUID{1})
		b := d.newBackup("hosta", 1)
		b.receiver = &migrate.Receiver{Local: heldLocal{}, Domain: d.id, Dir: t.TempDir(), Keep: true}
		b.receiver.Won() // there are no files to discard
		d.backup = b
		a.domains[d.id] = d
		if mine {
			a.diskFailed(virt.DiskError{UUID: d.id, Path: "/replica", Reason: "enospc"})
		}
		d.execute(t.Context(), pair.Action{Kind: pair.ActionDiscardBackup, Epoch: 1, Reason: pair.IOError})
		a.wg.Wait()
		if b.receiver.Keep == mine {
			t.Errorf("own disk failed %v, replicas are kept %v", mine, b.receiver.Keep)
		}
	}
}
