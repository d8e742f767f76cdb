// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// staleSuffix marks replicas whose backup was discarded. Nothing uses a file of
// that name, and it may be deleted at any time.
const staleSuffix = ".stale"

// discard deletes a replica, or keeps it for the next backup.
func (f replica) discard(keep bool) error {
	if !keep || !f.once {
		return os.Remove(f.path)
	}
	// From now on its age counts.
	now := time.Now()
	return errors.Join(os.Chtimes(f.path, now, now), os.Rename(f.path, f.path+staleSuffix))
}

// replicaEpoch finds the epoch in the name of a replica of a disk, see
// replicaName.
var replicaEpoch = regexp.MustCompile(`-([0-9]+)\.[a-z0-9]+(\.stale)?$`)

// left lists the replicas of a disk of earlier epochs, the newest first. An
// empty target stands for all disks. No domain here uses them.
func (r *Receiver) left(target string) []string {
	pattern := "ftvirt-" + r.Domain.String() + "-*"
	if target != "" {
		pattern = "ftvirt-" + r.Domain.String() + "-" + target + "-*"
	}
	list, err := filepath.Glob(filepath.Join(r.DiskDir, pattern))
	if err != nil {
		return nil
	}
	epoch := func(path string) uint64 {
		m := replicaEpoch.FindStringSubmatch(path)
		if m == nil {
			return 0
		}
		n, _ := strconv.ParseUint(m[1], 10, 64)
		return n
	}
	slices.SortFunc(list, func(a, b string) int { return cmp.Compare(epoch(b), epoch(a)) })
	return list
}

// takeOld makes the replica of a disk out of one of an earlier epoch, if there
// is one that fits. What is in it is compared before it is believed.
func (r *Receiver) takeOld(ctx context.Context, d Disk, path string) (bool, error) {
	for _, old := range r.left(d.Target) {
		if old == path || !fits(ctx, old, d) {
			continue
		}
		if err := os.Rename(old, path); err != nil {
			return false, err
		}
		r.files = append(r.files, replica{path, true})
		r.resync = append(r.resync, d.Target)
		return true, nil
	}
	return false, ctx.Err()
}

// fitTimeout bounds the check of an old replica.
const fitTimeout = 20 * time.Second

// fits tells whether a file can be the replica of a disk, whatever the guest's
// data in it: an image of that format and size, sound and complete in itself.
func fits(ctx context.Context, path string, d Disk) bool {
	ctx, cancel := context.WithTimeout(ctx, fitTimeout)
	defer cancel()
	if i, err := os.Lstat(path); err != nil || !i.Mode().IsRegular() {
		return false
	}
	text, err := exec.CommandContext(ctx, "qemu-img", "info", "--output=json", "-f", d.Format, path).Output()
	if err != nil {
		return false
	}
	var info struct {
		Size      int64  `json:"virtual-size"`
		Backing   string `json:"backing-filename"`
		Encrypted bool   `json:"encrypted"`
		Specific  struct {
			Data struct {
				DataFile string `json:"data-file"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return false
	}
	if info.Size != d.Size || info.Backing != "" || info.Specific.Data.DataFile != "" || info.Encrypted {
		return false
	}
	if d.Format == "raw" {
		return true
	}
	// The QEMU that used it was killed: clusters may have leaked, which is 3 and
	// does no harm.
	err = exec.CommandContext(ctx, "qemu-img", "check", "-q", "-f", d.Format, path).Run()
	var exit *exec.ExitError
	return err == nil || errors.As(err, &exit) && exit.ExitCode() == 3
}

// removeOld deletes the replicas of earlier epochs that were not taken.
func (r *Receiver) removeOld() {
	for _, path := range r.left("") {
		if !slices.ContainsFunc(r.files, func(f replica) bool { return f.path == path }) {
			_ = os.Remove(path)
		}
	}
}

// RemoveStale deletes the replicas of discarded backups that have been kept in
// dir for longer than age; of one domain, unless id is zero.
func RemoveStale(dir string, id plugin.UUID, age time.Duration) error {
	pattern := "ftvirt-*" + staleSuffix
	if id != (plugin.UUID{}) {
		pattern = "ftvirt-" + id.String() + "-*" + staleSuffix
	}
	list, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		return fmt.Errorf("stale replicas: %w", err)
	}
	var errs []error
	for _, path := range list {
		i, err := os.Lstat(path)
		if err == nil && time.Since(i.ModTime()) >= age {
			err = os.Remove(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
