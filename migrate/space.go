// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"fmt"
	"os"
	"syscall"
)

// A replica grows with what the guest writes. One that begins with less room than
// this to grow, unless its disk cannot, would soon be full, and the backup lost.
const (
	leastGrowth = 32 << 20
	mostGrowth  = 1 << 30
)

// wants is how much room the replica of a disk should have, in bytes.
func wants(d Disk) int64 {
	growth := min(max(d.Used/10, leastGrowth), mostGrowth)
	// A full image has its tables, too.
	return min(d.Used+growth, d.Size+d.Size/100+1<<20)
}

// checkSpace tells whether there is room for the replicas, which are there, empty
// or old. A backup whose disk is full is worse than none: it holds the primary up
// and is lost.
func (r *Receiver) checkSpace() error {
	var missing int64
	for i, f := range r.files {
		info, err := os.Stat(f.Path)
		if err != nil {
			return err
		}
		missing += max(0, wants(r.disks[i])-allocated(info))
	}
	free, err := Free(r.Replicas.Dir)
	if err != nil {
		return err
	}
	if free < missing {
		return fmt.Errorf("%w: %s has %d MiB left, and they may take %d MiB; make room there, or name another directory as clone.disk_dir",
			ErrSpace, r.Replicas.Dir, free>>20, missing>>20)
	}
	return nil
}

// Free is how much room there is in a directory, in bytes.
func Free(dir string) (int64, error) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("%s: %w", dir, err)
	}
	return int64(fs.Bavail) * fs.Bsize, nil
}

// allocated is what a file takes of its storage.
func allocated(info os.FileInfo) int64 {
	const block = 512 // of st_blocks, see inode(7)
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * block
	}
	return info.Size()
}
