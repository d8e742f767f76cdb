// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"ftvirt.org/ftvirt/plugin/config"
)

// MountSmall gives a directory of the host a file system of its own, in memory
// and of a few bytes and files, until the host crashes. What is in the directory
// is hidden by it: nobody may use that then.
func (h *Host) MountSmall(ctx context.Context, path string, bytes, files int) error {
	p, err := h.process()
	if err != nil {
		return err
	}
	_, err = h.Exec(ctx, "/bin/sh", "-euc",
		`mkdir -p "$1"; mount -t tmpfs -o "mode=$(stat -c %a "$1"),size=$2,nr_inodes=$3,nosuid,nodev" tmpfs "$1"`,
		"sh", path, strconv.Itoa(bytes), strconv.Itoa(files))
	if err == nil {
		// The machine reaches it through the process whose mount it is.
		h.own = append(h.own, ownMount{filepath.Clean(path), p})
	}
	return err
}

// UnmountSmall takes such a file system away, with all that is in it.
func (h *Host) UnmountSmall(ctx context.Context, path string) error {
	path = filepath.Clean(path)
	// Lazily: somebody may have a file of it open still.
	if _, err := h.Exec(ctx, "umount", "-l", path); err != nil {
		return err
	}
	h.own = slices.DeleteFunc(h.own, func(m ownMount) bool { return m.path == path })
	return nil
}

// imageDirs are where a host has disks: those that its domains were defined
// with, and the replicas of backups, which become disks at a failover.
func imageDirs() []string { return []string{ImageDir, config.Default().Clone.DiskDir} }

// MountImages gives the directories of the host's disks small file systems, see
// MountSmall, but with what is in them they outlive a crash. No domain may have
// a disk there yet.
func (h *Host) MountImages(ctx context.Context, bytes int) error {
	for _, dir := range imageDirs() {
		if err := h.MountSmall(ctx, dir, bytes, imageFiles); err != nil {
			return err
		}
	}
	h.imageBytes = bytes
	return nil
}

// holdImages keeps what MountImages made from going with the host's mounts.
func (h *Host) holdImages(owner process) error {
	if h.imageBytes == 0 {
		return nil
	}
	for _, dir := range imageDirs() {
		// An open directory is not freed.
		f, err := os.Open(ownMount{dir, owner}.root())
		if err != nil {
			return errors.Join(err, h.dropImages())
		}
		h.images = append(h.images, f)
	}
	return nil
}

func (h *Host) dropImages() error {
	var errs []error
	for _, f := range h.images {
		errs = append(errs, f.Close())
	}
	h.images = nil
	return errors.Join(errs...)
}

// restoreImages gives the host, which was booted, what holdImages kept.
func (h *Host) restoreImages(ctx context.Context) error {
	if len(h.images) == 0 {
		return nil
	}
	if err := h.MountImages(ctx, h.imageBytes); err != nil {
		return err
	}
	for i, dir := range imageDirs() {
		from := fmt.Sprintf("/proc/%d/fd/%d/.", os.Getpid(), h.images[i].Fd())
		if err := h.lab.sh(ctx, `cp -a --sparse=always "$1" "$2"`, from, h.Path(dir)); err != nil {
			return err
		}
	}
	return h.dropImages()
}

// imageFiles is how many files a small file system for disks may have.
const imageFiles = 256

// UnmountImages undoes MountImages.
func (h *Host) UnmountImages(ctx context.Context) error {
	var errs []error
	for _, dir := range imageDirs() {
		errs = append(errs, h.UnmountSmall(ctx, dir))
	}
	h.imageBytes = 0
	return errors.Join(errs...)
}

// FillImages leaves no byte where the host has its disks, after MountImages, and
// returns what gives the room back.
func (h *Host) FillImages(ctx context.Context) (free func(context.Context) error, err error) {
	var undo []func(context.Context) error
	free = func(ctx context.Context) error {
		var errs []error
		for _, f := range undo {
			errs = append(errs, f(ctx))
		}
		return errors.Join(errs...)
	}
	for _, dir := range imageDirs() {
		f, err := h.Fill(ctx, dir, false)
		if err != nil {
			return nil, errors.Join(err, free(context.WithoutCancel(ctx)))
		}
		undo = append(undo, f)
	}
	return free, nil
}

// ownMount is a directory that has another content for the host than what the
// machine sees in its place.
type ownMount struct {
	path  string
	owner process
}

// inside tells where the machine finds a path that is below such a directory.
func (m ownMount) inside(path string) (string, bool) {
	if path != m.path && !strings.HasPrefix(path, m.path+"/") || !m.owner.alive() {
		return "", false
	}
	return ownMount{path, m.owner}.root(), true
}

// root is where the machine finds the path of the process whose mount it is.
func (m ownMount) root() string { return fmt.Sprintf("/proc/%d/root%s", m.owner.PID, m.path) }

// filler takes the room that Fill leaves nobody.
const filler = ".ftvirt-lab-filler"

// Fill leaves no byte, or with files no further file, in the file system of a
// directory that MountSmall made, and returns what gives the room back.
func (h *Host) Fill(ctx context.Context, path string, files bool) (free func(context.Context) error, err error) {
	name := filepath.Join(path, filler)
	script := `dd if=/dev/zero of="$1" bs=4k 2>/dev/null || :; ! printf x >>"$1" 2>/dev/null`
	if files {
		script = `mkdir -m 700 "$1"; i=0; while true >"$1/$i"; do i=$((i+1)); done 2>/dev/null || :; ! true >"$1/last"`
	}
	free = func(ctx context.Context) error {
		_, err := h.Exec(ctx, "rm", "-rf", name)
		return err
	}
	if _, err := h.Exec(ctx, "/bin/sh", "-uc", script, "sh", name); err != nil {
		return nil, errors.Join(fmt.Errorf("fill %s: %w", path, err), free(context.WithoutCancel(ctx)))
	}
	return free, nil
}

// ExhaustFiles leaves a process no further file descriptor, and returns what
// undoes it.
func (h *Host) ExhaustFiles(ctx context.Context, p Process) (undo func(context.Context) error, err error) {
	pid, err := h.PID(p)
	if err != nil {
		return nil, err
	}
	number := strconv.Itoa(pid)
	// New descriptors take the lowest free number, so the limit is the first
	// of those.
	before, err := h.Exec(ctx, "/bin/sh", "-euc",
		`prlimit --pid "$1" --nofile --output SOFT --noheadings; n=0; while [ -e "/proc/$1/fd/$n" ]; do n=$((n+1)); done; prlimit --pid "$1" --nofile="$n:"`, "sh", number)
	if err != nil {
		return nil, fmt.Errorf("%s: limit the files of process %d: %w", h.Name, pid, err)
	}
	return func(ctx context.Context) error {
		_, err := h.Exec(ctx, "/bin/sh", "-euc", `! [ -d "/proc/$1" ] || prlimit --pid "$1" --nofile="$2:"`, "sh", number, strings.TrimSpace(before))
		return err
	}, nil
}

// LimitMemory lets a process have so many bytes more than it has. The kernel kills
// it if it needs them nevertheless. It needs the memory controller of control
// groups.
func (h *Host) LimitMemory(ctx context.Context, p Process, bytes int) (undo func(context.Context) error, err error) {
	pid, err := h.PID(p)
	if err != nil {
		return nil, err
	}
	// Version 1 counts what a process gets from when it is in the group on;
	// version 2 as well.
	group := `g=/sys/fs/cgroup/memory limit=memory.limit_in_bytes; [ -e "$g" ] || { g=/sys/fs/cgroup; limit=memory.max; }; own=$g/ftvirt-lab-limit; `
	undo = func(ctx context.Context) error {
		_, err := h.Exec(ctx, "/bin/sh", "-euc", group+
			`[ -d "$own" ] || exit 0; to=$g; [ ! -d "$g/init" ] || to=$g/init; while read -r p; do echo "$p" >"$to/cgroup.procs" || :; done <"$own/cgroup.procs"; `+
			`i=0; until rmdir "$own"; do i=$((i+1)); [ $i -lt 50 ]; sleep 0.1; done 2>/dev/null`)
		return err
	}
	if _, err := h.Exec(ctx, "/bin/sh", "-euc", group+`mkdir -p "$own"; echo "$2" >"$own/$limit"; echo "$1" >"$own/cgroup.procs"`,
		"sh", strconv.Itoa(pid), strconv.Itoa(bytes)); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: limit the memory of process %d: %w", h.Name, pid, err), undo(context.WithoutCancel(ctx)))
	}
	return undo, nil
}
