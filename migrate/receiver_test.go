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
	r := &Receiver{DiskDir: filepath.Join(dir, "images")}
	if err := os.Mkdir(r.DiskDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"", "x/../../y", "../x", "/etc/x", "vd a", "-o", "vda\n", "VDA", "vda;x"} {
		if _, err := r.makeReplica(t.Context(), Disk{Target: target, Format: "raw", Size: 1}); !errors.Is(err, ErrTarget) {
			t.Errorf("%q: %v", target, err)
		}
	}
	if _, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw", Size: -1}); !errors.Is(err, ErrTarget) {
		t.Errorf("negative size: %v", err)
	}
	if _, err := r.makeReplica(t.Context(), Disk{Target: "vda", Format: "raw,file=/etc/x", Size: 1}); !errors.Is(err, ErrFormat) {
		t.Errorf("format: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*/*")); err != nil || len(left) != 0 {
		t.Errorf("made %v, %v", left, err)
	}
}
