// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// StorageFault is what can be wrong with the arbiter's storage on one host. The
// other hosts' view of it stays as it is.
type StorageFault string

// The faults.
const (
	// StorageAway: nothing is mounted where it should be.
	StorageAway StorageFault = "away"
	// StorageReadOnly: it can be read, and each change fails.
	StorageReadOnly StorageFault = "read-only"
	// StorageSlow: each file that is opened takes as long as was asked for.
	StorageSlow StorageFault = "slow"
	// StorageHung: no file can be opened; the call neither fails nor returns.
	StorageHung StorageFault = "hung"
)

// DisturbStorage lets the fault begin on the host, and returns what ends it.
// delay is that of StorageSlow.
func (h *Host) DisturbStorage(ctx context.Context, fault StorageFault, delay time.Duration) (heal func(context.Context) error, err error) {
	p, err := h.process()
	if err != nil {
		return nil, err
	}
	script := func(commands ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			if now, err := h.process(); err != nil || now != p {
				return nil // its mounts went with it
			}
			_, err := h.Exec(ctx, commands...)
			return err
		}
	}
	switch fault {
	case StorageAway:
		// An empty file system in its place looks as the mount point does.
		if err := script("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", ArbiterDir)(ctx); err != nil {
			return nil, err
		}
		return script("umount", "-l", ArbiterDir), nil
	case StorageReadOnly:
		// A mount with a file that is being written cannot be made read-only,
		// but another that is so can take its place.
		err := script("/bin/sh", "-euc",
			`mkdir -p "$2"; mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; mount --bind "$2" "$1"; umount "$2"`,
			"sh", ArbiterDir, "/run/ftvirt-lab-read-only")(ctx)
		if err != nil {
			return nil, err
		}
		return script("umount", "-l", ArbiterDir), nil
	case StorageSlow, StorageHung:
		if fault == StorageHung {
			delay = time.Hour
		}
		g, err := startGate(fmt.Sprintf("/proc/%d/root%s", p.PID, ArbiterDir), delay)
		if err != nil {
			return nil, fmt.Errorf("%s: storage %s: %w", h.Name, fault, err)
		}
		return func(context.Context) error { return g.stop() }, nil
	}
	return nil, fmt.Errorf("%s: unknown storage fault %q", h.Name, fault)
}

// openGate answers the kernel, late, which asks it about each file that is
// opened through one mount. The kernel lets all go on once the gate is closed,
// also by the end of this process.
type openGate struct {
	fd     int
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func startGate(mount string, delay time.Duration) (*openGate, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN_PERM|unix.FAN_ONDIR, unix.AT_FDCWD, mount); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("fanotify of %s: %w", mount, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &openGate{fd: fd, cancel: cancel}
	g.wg.Go(func() { g.run(ctx, delay) })
	return g, nil
}

func (g *openGate) stop() error {
	g.cancel()
	g.wg.Wait()
	return unix.Close(g.fd)
}

func (g *openGate) run(ctx context.Context, delay time.Duration) {
	buf := make([]byte, 4096)
	for ctx.Err() == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(g.fd), Events: unix.POLLIN}}, 50)
		n, err := unix.Read(g.fd, buf)
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return
		}
		const size = int(unsafe.Sizeof(unix.FanotifyEventMetadata{}))
		for rest := buf[:max(n, 0)]; len(rest) >= size; {
			event := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&rest[0]))
			if int(event.Event_len) < size || int(event.Event_len) > len(rest) {
				return
			}
			file := event.Fd
			rest = rest[event.Event_len:]
			if file < 0 {
				continue
			}
			g.wg.Go(func() {
				timer := time.NewTimer(delay)
				defer timer.Stop()
				select {
				case <-timer.C:
				case <-ctx.Done():
				}
				answer := unix.FanotifyResponse{Fd: file, Response: unix.FAN_ALLOW}
				_, _ = unix.Write(g.fd, (*[unsafe.Sizeof(answer)]byte)(unsafe.Pointer(&answer))[:])
				_ = unix.Close(int(file))
			})
		}
	}
}
