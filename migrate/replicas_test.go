// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin"
)

func create(t *testing.T, path string, args ...string) {
	t.Helper()
	args = append([]string{"create", "-q"}, args...)
	if out, err := exec.CommandContext(t.Context(), "qemu-img", append(args, path, "1M")...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
}

// replicasOf are those of a host whose libvirt has these descriptions.
func replicasOf(t *testing.T, host, dir string, described ...string) *Replicas {
	t.Helper()
	return &Replicas{
		Host: host, Dir: dir, Records: filepath.Join(t.TempDir(), "replicas"), Log: slog.New(slog.DiscardHandler),
		Described: func(context.Context) ([]string, error) { return described, nil },
	}
}

// made makes a replica as an earlier epoch left it.
func made(t *testing.T, r *Replicas, id plugin.UUID, epoch plugin.Epoch, format string, discarded time.Time) record {
	t.Helper()
	rec, err := r.create(id, epoch, Disk{Target: "vda", Format: format})
	if err != nil {
		t.Fatal(err)
	}
	create(t, rec.Path, "-f", format)
	rec.Discarded = discarded
	if err := r.save(rec); err != nil {
		t.Fatal(err)
	}
	r.release([]replica{{record: rec}})
	return rec
}

// lockAs opens an image as QEMU does, by another open file than ours.
func lockAs(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	// BLK_PERM_CONSISTENT_READ, and nobody else may write.
	for _, at := range []int64{lockStart, lockStart + 101} {
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: at, Len: 1}); err != nil {
			t.Fatal(err)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

const oneMiB = 1 << 20

// Of the replicas that are left, the newest that fits and that nobody uses becomes the
// new one; the others go when it is there, unless somebody uses them.
func TestOldReplicas(t *testing.T) {
	t.Parallel()
	id, now := plugin.UUID{1}, time.Now()
	source := func(path string) string { return "<domain><source file='" + path + "'/></domain>" }
	for _, c := range []struct {
		name  string
		make  func(t *testing.T, r *Replicas, describe func(string)) (old record)
		taken bool // the old one is taken
		stays bool // it is there afterwards
	}{
		{"Discarded", func(t *testing.T, r *Replicas, _ func(string)) record { return made(t, r, id, 3, "qcow2", now) }, true, true},
		{"LeftByACrash", func(t *testing.T, r *Replicas, _ func(string)) record {
			return made(t, r, id, 3, "qcow2", time.Time{})
		}, true, true},
		{"OtherFormat", func(t *testing.T, r *Replicas, _ func(string)) record { return made(t, r, id, 3, "raw", now) }, false, false},
		{"OtherDomain", func(t *testing.T, r *Replicas, _ func(string)) record {
			return made(t, r, plugin.UUID{2}, 3, "qcow2", now)
		}, false, true},
		{"Damaged", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			f, err := os.OpenFile(rec.Path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("damage"), 64<<10) // the table of reference counts
			}
			if err != nil || f.Close() != nil {
				t.Fatal(err)
			}
			return rec
		}, false, false},
		{"BasedOnAnother", func(t *testing.T, r *Replicas, _ func(string)) record {
			base := filepath.Join(t.TempDir(), "base")
			create(t, base, "-f", "raw")
			rec := made(t, r, id, 3, "qcow2", now)
			create(t, rec.Path, "-f", "qcow2", "-b", base, "-F", "raw")
			return rec
		}, false, false},
		{"LinkInItsPlace", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			target := filepath.Join(t.TempDir(), "elsewhere")
			if err := errors.Join(os.Rename(rec.Path, target), os.Symlink(target, rec.Path)); err != nil {
				t.Fatal(err)
			}
			return rec
		}, false, true},
		{"OtherFileInItsPlace", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			create(t, rec.Path+".new", "-f", "qcow2")
			if err := os.Rename(rec.Path+".new", rec.Path); err != nil {
				t.Fatal(err)
			}
			return rec
		}, false, true},
		{"HasAnotherName", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			if err := os.Link(rec.Path, filepath.Join(r.Dir, "snapshot")); err != nil {
				t.Fatal(err)
			}
			return rec
		}, false, true},
		{"OfAnotherHost", func(t *testing.T, r *Replicas, _ func(string)) record {
			return made(t, replicasOf(t, "hosta", r.Dir), id, 3, "qcow2", now)
		}, false, true},
		{"OfAnotherHostWithItsNote", func(t *testing.T, r *Replicas, _ func(string)) record {
			// As when two hosts have one state directory.
			other := replicasOf(t, "hosta", r.Dir)
			other.Records = r.Records
			return made(t, other, id, 3, "qcow2", now)
		}, false, true},
		{"OfAnEarlierVersion", func(t *testing.T, r *Replicas, _ func(string)) record {
			path := filepath.Join(r.Dir, "ftvirt-"+id.String()+"-vda-3.qcow2.stale")
			create(t, path, "-f", "qcow2")
			return record{Path: path}
		}, false, true},
		{"Defined", func(t *testing.T, r *Replicas, describe func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			describe(source(rec.Path))
			return rec
		}, false, true},
		{"DefinedByALink", func(t *testing.T, r *Replicas, describe func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			link := filepath.Join(t.TempDir(), "a & b")
			if err := os.Symlink(rec.Path, link); err != nil {
				t.Fatal(err)
			}
			describe(source(strings.ReplaceAll(link, "&", "&amp;")))
			return rec
		}, false, true},
		{"BaseOfADefinedImage", func(t *testing.T, r *Replicas, describe func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			first, second := filepath.Join(r.Dir, "first.snap"), filepath.Join(r.Dir, "second.snap")
			create(t, first, "-f", "qcow2", "-b", filepath.Base(rec.Path), "-F", "qcow2")
			create(t, second, "-f", "qcow2", "-b", first, "-F", "qcow2")
			describe(source(second))
			return rec
		}, false, true},
		{"OpenInAQEMU", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 3, "qcow2", now)
			lockAs(t, rec.Path)
			return rec
		}, false, true},
		{"OlderFits", func(t *testing.T, r *Replicas, _ func(string)) record {
			rec := made(t, r, id, 8, "qcow2", now)
			made(t, r, id, 9, "raw", now)
			lockAs(t, made(t, r, id, 10, "qcow2", now).Path)
			return rec
		}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var described []string
			replicas := replicasOf(t, "hostb", t.TempDir())
			replicas.Described = func(context.Context) ([]string, error) { return described, nil }
			r := &Receiver{Domain: id, Replicas: replicas, Dir: filepath.Join(t.TempDir(), "sockets"), Keep: true, epoch: 11}
			old := c.make(t, replicas, func(xml string) { described = append(described, xml) })
			before, _ := os.ReadFile(old.Path)
			u, err := replicas.usage(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			path, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "qcow2", Size: oneMiB}, u)
			if err != nil {
				t.Fatal(err)
			}
			if taken := path == old.Path; taken != c.taken || slices.Contains(r.resync, "vda") != taken {
				t.Errorf("the replica is %s, taken: %v, want %v; to be brought up to date: %v", path, taken, c.taken, r.resync)
			}
			replicas.clear(id, "", u)
			if got := exists(old.Path); got != c.stays || !exists(path) {
				t.Errorf("%s is there: %v, want %v", old.Path, got, c.stays)
			}
			if after, _ := os.ReadFile(old.Path); c.stays && !bytes.Equal(after, before) {
				t.Error("it was written to")
			}
			// One that was never complete is no use to anybody.
			if err := r.Discard(t.Context()); err != nil {
				t.Fatal(err)
			}
			if exists(path) != c.taken {
				t.Errorf("it is kept: %v, want %v", exists(path), c.taken)
			}
		})
	}
}

// TestPrimaryRunsFromReplica: an operator moved the domain to the other host with
// what was this host's replica, on storage that both have. It is the operator's now.
func TestPrimaryRunsFromReplica(t *testing.T) {
	t.Parallel()
	r, id := replicasOf(t, "hostb", t.TempDir()), plugin.UUID{1}
	moved := made(t, r, id, 3, "qcow2", time.Now())
	primary := fmt.Sprintf("<domain><source file='/mnt/images/%s'/></domain>", filepath.Base(moved.Path))
	u, err := r.usage(t.Context(), primary)
	if err != nil {
		t.Fatal(err)
	}
	if _, taken, err := r.take(t.Context(), id, 4, Disk{Target: "vda", Format: "qcow2", Size: oneMiB}, u); taken || err != nil {
		t.Errorf("the primary's disk is taken: %v, %v", taken, err)
	}
	r.clear(id, primary, u)
	// Later, when nobody has it open.
	if err := r.Forget(t.Context(), id, 0); err != nil {
		t.Error(err)
	}
	if !exists(moved.Path) {
		t.Error("the primary's disk was deleted")
	}
}

// TestNoProof: without an answer of libvirt nothing is deleted, and the replica of the
// discarded backup goes once there is one.
func TestNoProof(t *testing.T) {
	t.Parallel()
	replicas, id := replicasOf(t, "hostb", t.TempDir()), plugin.UUID{1}
	answer := replicas.Described
	replicas.Described = func(context.Context) ([]string, error) { return nil, fs.ErrPermission }
	r := &Receiver{Domain: id, Replicas: replicas, Dir: filepath.Join(t.TempDir(), "sockets"), epoch: 3}
	path, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw", Size: oneMiB}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Discard(t.Context()); err != nil || !exists(path) {
		t.Fatalf("discarded: %v; it is there: %v", err, exists(path))
	}
	if err := replicas.Forget(t.Context(), id, 0); !errors.Is(err, fs.ErrPermission) || !exists(path) {
		t.Errorf("forget: %v; it is there: %v", err, exists(path))
	}
	replicas.Described = answer
	if err := replicas.Forget(t.Context(), id, 0); err != nil || exists(path) {
		t.Errorf("forget: %v; it is there: %v", err, exists(path))
	}
}

// TestWonReplicaStays: from when the arbiter gave this side the epoch its replica is
// the domain's disk, whatever becomes of the copy.
func TestWonReplicaStays(t *testing.T) {
	t.Parallel()
	replicas, id := replicasOf(t, "hostb", t.TempDir()), plugin.UUID{1}
	r := &Receiver{Domain: id, Replicas: replicas, Dir: filepath.Join(t.TempDir(), "sockets"), epoch: 3}
	path, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw", Size: oneMiB}, nil)
	if err != nil {
		t.Fatal(err)
	}
	replicas.release(r.files)
	r.Won()
	if err := errors.Join(r.Discard(t.Context()), replicas.Forget(t.Context(), id, 0)); err != nil || !exists(path) {
		t.Errorf("%v; it is there: %v", err, exists(path))
	}
}

// TestNames: a name that is taken, also by a file that is away with its storage, is
// not used again, as after 'ftvirt arbiter forget'.
func TestNames(t *testing.T) {
	t.Parallel()
	r, id := replicasOf(t, "hostb", t.TempDir()), plugin.UUID{1}
	first := made(t, r, id, 1, "raw", time.Time{})
	if err := os.Remove(first.Path); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(r.Dir, fmt.Sprintf("ftvirt-hostb-%s-vda-2.raw", id))
	if err := os.WriteFile(second, []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	third, err := r.create(id, 1, Disk{Target: "vda", Format: "raw"})
	if err != nil || third.Path != filepath.Join(r.Dir, fmt.Sprintf("ftvirt-hostb-%s-vda-3.raw", id)) {
		t.Errorf("%s, %v", third.Path, err)
	}
	if text, err := os.ReadFile(second); err != nil || string(text) != "somebody's" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestForget(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, other := replicasOf(t, "hostb", dir), replicasOf(t, "hosta", dir)
	one, two, three := plugin.UUID{1}, plugin.UUID{2}, plugin.UUID{3}
	old := time.Now().Add(-time.Hour)
	used, fresh, foreign := made(t, r, three, 1, "raw", time.Time{}), made(t, r, two, 1, "raw", time.Now()), made(t, other, one, 1, "raw", old)
	first, last := made(t, r, one, 1, "raw", old), made(t, r, three, 2, "raw", old)
	mine := filepath.Join(dir, "ftvirt-mine.qcow2.stale")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left := func(want ...string) {
		t.Helper()
		list, err := filepath.Glob(filepath.Join(dir, "*"))
		if slices.Sort(want); err != nil || !slices.Equal(list, want) {
			t.Errorf("left are %v (%v), want %v", list, err, want)
		}
	}
	if err := r.Forget(t.Context(), one, 0); err != nil {
		t.Fatal(err)
	}
	left(used.Path, fresh.Path, foreign.Path, last.Path, mine)
	if err := r.Forget(t.Context(), plugin.UUID{}, time.Minute); err != nil {
		t.Fatal(err)
	}
	left(used.Path, fresh.Path, foreign.Path, mine)
	if exists(first.Path) {
		t.Error("it is still there")
	}
	if notes, err := r.list(plugin.UUID{}); err != nil || len(notes) != 2 {
		t.Errorf("notes: %v, %v", notes, err)
	}
}

func TestStrangers(t *testing.T) {
	t.Parallel()
	dir, id := t.TempDir(), plugin.UUID{1}
	r := replicasOf(t, "hostb", dir, "<source file='"+filepath.Join(dir, "ftvirt-"+id.String()+"-vda-1.qcow2")+"'/>")
	made(t, r, id, 5, "raw", time.Now())
	made(t, replicasOf(t, "host-a.example", dir), id, 5, "raw", time.Now())
	lost := made(t, replicasOf(t, "hostb", dir), id, 7, "raw", time.Now()) // its note is elsewhere
	old := filepath.Join(dir, "ftvirt-"+id.String()+"-vda-2.qcow2.stale")
	busy := filepath.Join(dir, "ftvirt-"+id.String()+"-vda-3.qcow2")
	for _, path := range []string{old, busy, filepath.Join(dir, "ftvirt-"+id.String()+"-vda-1.qcow2"), filepath.Join(dir, "web.qcow2")} {
		create(t, path, "-f", "qcow2")
	}
	lockAs(t, busy)
	s, err := r.Strangers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"host-a.example"}; !slices.Equal(s.Hosts, want) {
		t.Errorf("hosts %v, want %v", s.Hosts, want)
	}
	if want := []string{old, lost.Path}; !slices.Equal(slices.Sorted(slices.Values(s.Unproven)), slices.Sorted(slices.Values(want))) {
		t.Errorf("unproven %v, want %v", s.Unproven, want)
	}
}
