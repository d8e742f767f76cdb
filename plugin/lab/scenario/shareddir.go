// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrDisk is wrapped when a file that was not the agents' to touch was touched.
var ErrDisk = errors.New("a disk was touched")

// SharedDir has both hosts keep disks and replicas in one directory, as on NFS, fails
// over again and again, clones back each time, and demands that no file goes that a
// host runs from or may start from, nor any that is nobody's. At the end the guest is
// powered off and started from what is left.
func SharedDir(ctx context.Context, o Options) error {
	o.SharedImages = true
	return Run(ctx, "shared_dir", o, sharedDir)
}

func sharedDir(ctx context.Context, r *run) (figures string, err error) {
	failovers, lost := 0, 0
	w := &diskWatch{run: r}
	defer func() {
		w.stop()
		figures = fmt.Sprintf("failovers=%d deleted=%d lost=%d", failovers, w.deleted, lost)
	}()
	s, err := r.begin(ctx, 1)
	if err != nil {
		return "", err
	}
	defer s.traffic.Close()
	w.vm = s.vm
	if err := w.start(s.primary.Path(lab.ImageDir)); err != nil {
		return "", err
	}
	for range r.Rounds {
		start := time.Now()
		if err := w.protect(ctx, s); err != nil {
			return "", err
		}
		if err := Pause(ctx, steady); err != nil {
			return "", err
		}
		failover, lines, _, err := s.failOver(ctx, start)
		lost += lines.Lost
		if err != nil {
			return "", err
		}
		failovers++
		if err := w.check(ctx, s); err != nil {
			return "", err
		}
		r.say("failover %d/%d ok: %s -> %s, failover_ms=%s lines=%d", failovers, r.Rounds, s.backup.Name, s.primary.Name, ms(failover.Reply), lines.Disk)
	}
	if err := w.protect(ctx, s); err != nil {
		return "", err
	}
	r.say("the survivor on %s is protected again", s.primary.Name)
	replica, err := w.disk(ctx, s.backup, false)
	if err != nil {
		return "", err
	}
	if err := s.vm.Unprotect(ctx, s.primary, s.backup); err != nil {
		return "", err
	}
	delete(w.live, replica) // its backup was discarded
	_, unanswered, _ := s.traffic.Counts()
	lost += unanswered
	if err := s.traffic.Stop(); err != nil {
		return "", err
	}
	if err := s.powerCycle(ctx); err != nil {
		return "", err
	}
	r.say("the guest was powered off, had all its data, and booted again")
	return "", w.check(ctx, s)
}

// powerCycle lets the guest end, judges the disk that its host has of it, and starts
// it from that.
func (s *session) powerCycle(ctx context.Context) error {
	path, err := s.vm.DiskPath(ctx, s.primary)
	if err != nil {
		return err
	}
	digest, err := s.vm.Quiesce(ctx)
	if err != nil {
		return err
	}
	off, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if err := s.vm.Guest.PowerOff(off); err != nil {
		return err
	}
	if err := s.vm.bed.WaitGone(ctx, s.primary, s.vm.Name); err != nil {
		return err
	}
	if defined, err := s.vm.DiskPath(ctx, s.primary); err != nil || defined != path {
		return errors.Join(fmt.Errorf("%w: the domain ran from %s, and its definition names %s", ErrDisk, path, defined), err)
	}
	if n, err := guest.DiskLines(ctx, path); err != nil || n != digest.Lines {
		return errors.Join(fmt.Errorf("%w: the guest wrote %d, its disk has %d", ErrLines, digest.Lines, n), err)
	}
	return s.vm.Boot(ctx, s.primary)
}

// diskFile is a file that must stay.
type diskFile struct {
	inode uint64
	// sum is of one that nobody writes to.
	sum  [sha256.Size]byte
	idle bool
}

// diskWatch sees which files go from the directory.
type diskWatch struct {
	*run
	vm     *VM
	dir    string
	events *os.File // of inotify

	foreign map[string]diskFile // by name; nobody's, or of somebody else
	live    map[string]diskFile // that a host runs from, or would start from

	wg      sync.WaitGroup
	mu      sync.Mutex
	gone    map[string]bool // names that were deleted, renamed or replaced
	deleted int
}

// start puts files into the directory that agents could take for their own, and
// watches all.
func (w *diskWatch) start(dir string) error {
	w.dir, w.gone, w.foreign = dir, map[string]bool{}, map[string]diskFile{}
	id := w.vm.UUID.String()
	for _, name := range []string{
		"operator.qcow2", "ftvirt-notes.stale",
		// As earlier versions named them, and those of a host of another pair.
		"ftvirt-" + id + "-vda-81.qcow2", "ftvirt-" + id + "-vda-82.qcow2.stale", "ftvirt-hostc-" + id + "-vda-1.qcow2",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("precious "+name), 0o600); err != nil {
			return err
		}
		f, err := w.look(name, true)
		if err != nil {
			return err
		}
		w.foreign[name] = f
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("inotify: %w", err)
	}
	w.events = os.NewFile(uintptr(fd), "inotify")
	w.wg.Go(w.read)
	return nil
}

func (w *diskWatch) stop() {
	if w.events != nil {
		_ = w.events.Close()
		w.wg.Wait()
	}
}

func (w *diskWatch) read() {
	buf := make([]byte, 16<<10)
	for {
		n, err := w.events.Read(buf)
		if err != nil {
			return
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			length := int(rest[12]) | int(rest[13])<<8 // little-endian, and never long
			end := unix.SizeofInotifyEvent + length
			if end > len(rest) {
				return
			}
			name := strings.TrimRight(string(rest[unix.SizeofInotifyEvent:end]), "\x00")
			w.mu.Lock()
			w.gone[name] = true
			w.mu.Unlock()
			rest = rest[end:]
		}
	}
}

// protect clones the guest to the other host, and looks at the files before and after.
func (w *diskWatch) protect(ctx context.Context, s *session) error {
	if err := w.check(ctx, s); err != nil {
		return err
	}
	if _, err := s.vm.Protect(ctx, s.primary, s.backup); err != nil {
		return err
	}
	return w.check(ctx, s)
}

// check demands that of what had to stay when it was called last all is there as it
// was, and finds out what has to stay from now on.
func (w *diskWatch) check(ctx context.Context, s *session) error {
	for name, old := range w.foreign {
		w.compare(name, old)
	}
	for name, old := range w.live {
		w.compare(name, old)
	}
	w.live = map[string]diskFile{}
	running := map[string]bool{}
	for _, h := range []*lab.Host{s.primary, s.backup} {
		for _, inactive := range []bool{false, true} {
			name, err := w.disk(ctx, h, inactive)
			if err != nil {
				return err
			}
			if name == "" {
				continue
			}
			if !inactive {
				on, err := w.Running(ctx, h, w.vm.Name)
				if err != nil {
					return err
				}
				running[name] = running[name] || on
			}
			w.live[name] = diskFile{}
		}
	}
	for name := range w.live {
		f, err := w.look(name, !running[name])
		if err != nil {
			w.blame("%s is not there: %v", name, err)
			continue
		}
		w.live[name] = f
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.gone)
	if w.deleted > 0 {
		return fmt.Errorf("%w: %d of %s", ErrDisk, w.deleted, strings.Join(slices.Sorted(maps.Keys(w.live)), ", "))
	}
	return nil
}

// disk is the file that a host runs the domain from, or with inactive would start it
// from; "" if it does not know the domain.
func (w *diskWatch) disk(ctx context.Context, h *lab.Host, inactive bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	args := []string{"domblklist", w.vm.Name}
	if inactive {
		args = append(args, "--inactive")
	}
	out, err := h.Virsh(ctx, args...)
	if err != nil {
		return "", nil // not defined there, or transient
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "vda" {
			return filepath.Base(f[1]), nil
		}
	}
	return "", fmt.Errorf("%s on %s: no disk vda in %q", w.vm.Name, h.Name, out)
}

func (w *diskWatch) look(name string, idle bool) (diskFile, error) {
	f := diskFile{idle: idle}
	var st unix.Stat_t
	path := filepath.Join(w.dir, name)
	if err := unix.Lstat(path, &st); err != nil {
		return f, err
	}
	f.inode = st.Ino
	if !idle {
		return f, nil
	}
	content, err := os.ReadFile(path)
	f.sum = sha256.Sum256(content)
	return f, err
}

func (w *diskWatch) compare(name string, old diskFile) {
	w.mu.Lock()
	gone := w.gone[name]
	w.mu.Unlock()
	now, err := w.look(name, old.idle)
	switch {
	case err != nil || gone:
		w.blame("%s was deleted, renamed or replaced: %v", name, err)
	case now.inode != old.inode:
		w.blame("%s is another file", name)
	case now.sum != old.sum:
		w.blame("%s was written to, although no host runs from it", name)
	}
}

func (w *diskWatch) blame(format string, args ...any) {
	w.deleted++
	w.say(format, args...)
}
