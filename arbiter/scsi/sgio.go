// SPDX-License-Identifier: Apache-2.0

package scsi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sgHeader is struct sg_io_hdr of <scsi/sg.h>.
type sgHeader struct {
	interfaceID    int32
	direction      int32
	cmdLen         uint8
	maxSense       uint8
	iovecCount     uint16
	transferLen    uint32
	transfer       unsafe.Pointer
	cmd            unsafe.Pointer
	sense          unsafe.Pointer
	timeout        uint32 // in ms
	flags          uint32
	packID         int32
	_              int32
	userPtr        unsafe.Pointer
	status         uint8
	maskedStatus   uint8
	msgStatus      uint8
	senseLen       uint8
	hostStatus     uint16
	driverStatus   uint16
	residual       int32
	duration, info uint32
}

const (
	sgIO              = 0x2285
	sgReset           = 0x2284
	sgResetDevice     = 1
	sgResetNoMore     = 0x100 // nothing that reaches further than the device
	sgNone            = -1
	sgToDevice        = -2
	sgFromDevice      = -3
	driverSense       = 0x08
	maxSense          = 96
	lockPoll          = 5 * time.Millisecond
	defaultSGTimeout  = 5 * time.Second
	shortestSGTimeout = time.Second
)

// ErrTransport: the kernel could not get a command to the device, or no answer
// back.
var ErrTransport = errors.New("no answer from the device")

// SG carries commands through Linux's SG_IO ioctl on a block or sg device. The
// commands that change reservations or compare need CAP_SYS_RAWIO.
type SG struct{ file *os.File }

var _ Transport = (*SG)(nil)

// OpenSG opens a device such as /dev/disk/by-id/wwn-...
func OpenSG(path string) (*SG, error) {
	// Opened for reading, since closing a disk that was open for writing makes
	// udev probe it anew. SG_IO writes all the same.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return &SG{file: f}, nil
}

// Close closes the device.
func (s *SG) Close() error { return s.file.Close() }

// Do implements Transport. The kernel gives a command up, and aborts it, at the
// deadline of ctx or after five seconds.
func (s *SG) Do(ctx context.Context, c Command) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrTransport, context.Cause(ctx))
	}
	timeout := defaultSGTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, max(time.Until(deadline), shortestSGTimeout))
	}
	sense := make([]byte, maxSense)
	h := &sgHeader{
		interfaceID: 'S', direction: sgNone,
		cmdLen: uint8(len(c.CDB)), cmd: unsafe.Pointer(&c.CDB[0]),
		maxSense: maxSense, sense: unsafe.Pointer(&sense[0]),
		timeout: uint32(timeout.Milliseconds()),
	}
	data := c.Out
	switch {
	case len(c.Out) > 0:
		h.direction = sgToDevice
	case len(c.In) > 0:
		h.direction, data = sgFromDevice, c.In
	}
	if len(data) > 0 {
		h.transfer, h.transferLen = unsafe.Pointer(&data[0]), uint32(len(data))
	}
	conn, err := s.file.SyscallConn()
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrTransport, err)
	}
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, sgIO, uintptr(unsafe.Pointer(h)))
	})
	runtime.KeepAlive(c)
	switch {
	case err != nil:
		return Result{}, fmt.Errorf("%w: %w", ErrTransport, err)
	case errno != 0:
		return Result{}, fmt.Errorf("%w: SG_IO: %w", ErrTransport, errno)
	case h.hostStatus != 0 || h.driverStatus&^driverSense != 0:
		return Result{}, fmt.Errorf("%w: host status %02xh, driver status %02xh", ErrTransport, h.hostStatus, h.driverStatus)
	}
	return Result{
		Status: h.status, Sense: sense[:h.senseLen],
		Received: len(c.In) - min(max(int(h.residual), 0), len(c.In)),
	}, nil
}

// Reset implements Transport. The kernel gives the device as long as its transport
// is configured to, such as 30 seconds. It needs CAP_SYS_ADMIN and CAP_SYS_RAWIO.
func (s *SG) Reset(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrTransport, context.Cause(ctx))
	}
	conn, err := s.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrTransport, err)
	}
	how := int32(sgResetDevice | sgResetNoMore)
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, sgReset, uintptr(unsafe.Pointer(&how)))
	})
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrTransport, err)
	case errno != 0:
		return fmt.Errorf("%w: resetting the device: %w", ErrTransport, errno)
	}
	return nil
}

// Lock implements Transport by a lock on the device's node, which all processes
// of the host see. It has nothing to do with the device itself.
func (s *SG) Lock(ctx context.Context) (unlock func(), err error) {
	// A description of its own, or goroutines would share the lock.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()))
	if err != nil {
		return nil, fmt.Errorf("locking %s: %w", s.file.Name(), err)
	}
	poll := time.NewTicker(lockPoll)
	defer poll.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", s.file.Name(), err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", s.file.Name(), context.Cause(ctx))
		case <-poll.C:
		}
	}
}
