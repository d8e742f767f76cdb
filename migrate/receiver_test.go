// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestReplicasStayWhereTheyBelong: a peer that names disks like paths makes no
// files elsewhere.
func TestReplicasStayWhereTheyBelong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := &Receiver{Replicas: replicasOf(t, "hostb", filepath.Join(dir, "images"))}
	if err := os.Mkdir(r.Replicas.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"", "x/../../y", "../x", "/etc/x", "vd a", "-o", "vda\n", "VDA", "vda;x"} {
		if _, err := r.makeReplica(t.Context(), Disk{Target: target, Format: "raw", Size: 1}, nil); !errors.Is(err, ErrTarget) {
			t.Errorf("%q: %v", target, err)
		}
	}
	if _, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw", Size: -1}, nil); !errors.Is(err, ErrTarget) {
		t.Errorf("negative size: %v", err)
	}
	if _, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw,file=/etc/x", Size: 1}, nil); !errors.Is(err, ErrFormat) {
		t.Errorf("format: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*/*")); err != nil || len(left) != 0 {
		t.Errorf("made %v, %v", left, err)
	}
}

// TestSpaceIsThere: a backup is not begun where its disks have no room, and those
// that can grow only a little need only a little.
func TestSpaceIsThere(t *testing.T) {
	t.Parallel()
	const most = 1 << 60 // more than any storage has
	for _, c := range []struct {
		disk Disk
		fits bool
	}{
		{Disk{Target: "vda", Format: "raw", Size: most, Used: most / 2}, false},
		{Disk{Target: "vda", Format: "raw", Size: most}, true},
		{Disk{Target: "vda", Format: "raw", Size: 4096, Used: 4096}, true},
		{Disk{Target: "vda", Format: "raw", Size: 4096, Used: most}, true},
	} {
		r := &Receiver{Replicas: replicasOf(t, "hostb", t.TempDir()), disks: []Disk{c.disk}}
		if _, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw"}, nil); err != nil {
			t.Fatal(err)
		}
		switch err := r.checkSpace(); {
		case c.fits && err != nil, !c.fits && !errors.Is(err, ErrSpace):
			t.Errorf("%+v: %v", c.disk, err)
		}
	}
	if w := wants(Disk{Size: 1 << 40, Used: 100 << 30}); w != 101<<30 {
		t.Errorf("a disk of 1 TiB that has 100 GiB wants %d", w)
	}
}
