// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// TestFailedClone: whatever keeps a clone from succeeding, the guest runs on as
// it was, nothing of the clone stays on the peer, and the next one works.
func TestFailedClone(t *testing.T) {
	b, hosta, hostb := bed(t)
	vm := start(t, b, hosta, hostb)
	traffic, err := vm.Traffic(t.Context())
	must(t, err)
	t.Cleanup(traffic.Close)
	const smallDir = "/srv/small"
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T)
		want  string // part of the error
	}{
		{"PeerUnreachable", func(t *testing.T) {
			must(t, hostb.CutLink(t.Context(), lab.Logging))
			t.Cleanup(func() { must(t, hostb.RestoreLink(context.Background(), lab.Logging)) })
		}, "peer"},
		{"PeerWithoutPlugin", func(t *testing.T) {
			configured(t, b, hostb, func(c *config.Config) { c.Agent.PluginFile = "/srv/ftvirt/none.so" })
		}, "plugin"},
		{"DiskDirMissing", func(t *testing.T) {
			configured(t, b, hostb, func(c *config.Config) { c.Clone.DiskDir = "/srv/none" })
		}, "/srv/none"},
		{"DiskDirFull", func(t *testing.T) {
			_, err := hostb.Exec(t.Context(), "sh", "-euc", `mkdir -p "$1"; mount -t tmpfs -o size=512k,mode=755 tmpfs "$1"`, "sh", smallDir)
			must(t, err)
			t.Cleanup(func() {
				_, err := hostb.Exec(context.Background(), "umount", smallDir)
				must(t, err)
			})
			configured(t, b, hostb, func(c *config.Config) { c.Clone.DiskDir = smallDir })
		}, "not enough room"},
	} {
		t.Run(c.name, func(t *testing.T) {
			traces := peerFiles(t, hostb)
			c.spoil(t)
			began := time.Now()
			before, err := vm.Enable(t.Context(), hosta, hostb)
			if err == nil {
				_, err = vm.WaitProtected(t.Context(), hosta, hostb, before)
			}
			if err == nil {
				t.Fatal("the clone succeeded")
			}
			t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), err)
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error does not tell of %q", c.want)
			}
			alive(t, traffic, began)
			rate, err := vm.LinesPerSecond(t.Context(), hosta, 2*time.Second)
			if err != nil || rate < scenario.LinesRate/2 {
				t.Errorf("the guest writes %.1f lines a second (%v)", rate, err)
			}
			if s, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name); err != nil || s.State != "unprotected" && s.State != "live" {
				t.Errorf("status is %s (%v)", s, err)
			}
			must(t, b.WaitGone(t.Context(), hostb, vm.Name))
			out, err := hostb.Virsh(t.Context(), "list", "--all", "--name")
			if err != nil || strings.TrimSpace(out) != "" {
				t.Errorf("domains on the peer: %q (%v)", out, err)
			}
			if after := peerFiles(t, hostb); after != traces {
				t.Errorf("files on the peer before:\n%s\nafter:\n%s", traces, after)
			}
		})
	}
	must(t, protect(t, vm, hosta, hostb))
	must(t, traffic.Stop())
}

// peerFiles lists what a clone may leave on its host.
func peerFiles(t *testing.T, h *lab.Host) string {
	t.Helper()
	var list []string
	for _, dir := range []string{"/var/lib/libvirt/images", "/srv/small", "/srv/none", "/run/ftvirt"} {
		entries, err := os.ReadDir(h.Path(dir))
		if err != nil {
			continue
		}
		for _, e := range entries {
			list = append(list, filepath.Join(dir, e.Name()))
		}
	}
	return strings.Join(list, "\n")
}
