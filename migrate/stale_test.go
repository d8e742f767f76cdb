// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

func create(t *testing.T, path string, args ...string) {
	t.Helper()
	args = append([]string{"create", "-q"}, args...)
	if out, err := exec.CommandContext(t.Context(), "qemu-img", append(args, path, "1M")...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
}

// Of the replicas that are left, the newest that fits becomes the new one; the
// others go when it is there.
func TestOldReplicas(t *testing.T) {
	t.Parallel()
	id := plugin.UUID{1}
	for _, c := range []struct {
		name string
		make func(t *testing.T, file func(epoch plugin.Epoch, stale bool) string)
		want bool // an old one is taken
	}{
		{"None", func(*testing.T, func(plugin.Epoch, bool) string) {}, false},
		{"Kept", func(t *testing.T, file func(plugin.Epoch, bool) string) { create(t, file(3, true), "-f", "qcow2") }, true},
		{"LeftByACrash", func(t *testing.T, file func(plugin.Epoch, bool) string) { create(t, file(3, false), "-f", "qcow2") }, true},
		{"OtherFormat", func(t *testing.T, file func(plugin.Epoch, bool) string) { create(t, file(3, true), "-f", "raw") }, false},
		{"Damaged", func(t *testing.T, file func(plugin.Epoch, bool) string) {
			create(t, file(3, true), "-f", "qcow2")
			f, err := os.OpenFile(file(3, true), os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("damage"), 64<<10) // the table of reference counts
			}
			if err != nil || f.Close() != nil {
				t.Fatal(err)
			}
		}, false},
		{"BasedOnAnother", func(t *testing.T, file func(plugin.Epoch, bool) string) {
			base := filepath.Join(filepath.Dir(file(3, true)), "base")
			create(t, base, "-f", "raw")
			create(t, file(3, true), "-f", "qcow2", "-b", base, "-F", "raw")
		}, false},
		{"Link", func(t *testing.T, file func(plugin.Epoch, bool) string) {
			target := filepath.Join(t.TempDir(), "elsewhere")
			create(t, target, "-f", "qcow2")
			if err := os.Symlink(target, file(3, true)); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"OlderFits", func(t *testing.T, file func(plugin.Epoch, bool) string) {
			create(t, file(9, true), "-f", "raw")
			create(t, file(8, true), "-f", "qcow2")
			create(t, file(10, false), "-f", "raw")
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := &Receiver{Domain: id, DiskDir: t.TempDir(), Dir: filepath.Join(t.TempDir(), "sockets"), Keep: true, epoch: 11}
			c.make(t, func(epoch plugin.Epoch, stale bool) string {
				path := filepath.Join(r.DiskDir, replicaName(id, "vda", epoch, "qcow2"))
				if stale {
					path += staleSuffix
				}
				return path
			})
			path, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "qcow2", Size: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			if want := filepath.Join(r.DiskDir, replicaName(id, "vda", 11, "qcow2")); path != want {
				t.Errorf("the replica is %s, want %s", path, want)
			}
			if got := slices.Contains(r.resync, "vda"); got != c.want {
				t.Errorf("an old replica is taken: %v, want %v", got, c.want)
			}
			r.removeOld()
			if left := r.left(""); !slices.Equal(left, []string{path}) {
				t.Errorf("left are %v", left)
			}
			// One that was never complete is no use to anybody.
			if err := r.Discard(t.Context()); err != nil {
				t.Fatal(err)
			}
			if kept := len(r.left("")) == 1; kept != c.want {
				t.Errorf("it is kept: %v, want %v", kept, c.want)
			}
		})
	}
}

func TestRemoveStale(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old := time.Now().Add(-time.Hour)
	file := func(id plugin.UUID, suffix string, age time.Time) string {
		path := filepath.Join(dir, replicaName(id, "vda", 1, "raw")+suffix)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, age, age); err != nil {
			t.Fatal(err)
		}
		return path
	}
	one, two, three := plugin.UUID{1}, plugin.UUID{2}, plugin.UUID{3}
	used, fresh := file(three, "", old), file(two, staleSuffix, time.Now())
	_, _ = file(one, staleSuffix, old), file(three, staleSuffix, old)
	left := func(want ...string) {
		t.Helper()
		list, err := filepath.Glob(filepath.Join(dir, "*"))
		if slices.Sort(want); err != nil || !slices.Equal(list, want) {
			t.Errorf("left are %v (%v), want %v", list, err, want)
		}
	}
	if err := RemoveStale(dir, one, 0); err != nil {
		t.Fatal(err)
	}
	left(used, fresh, filepath.Join(dir, replicaName(three, "vda", 1, "raw")+staleSuffix))
	if err := RemoveStale(dir, plugin.UUID{}, time.Minute); err != nil {
		t.Fatal(err)
	}
	left(used, fresh)
}
