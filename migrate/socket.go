// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// errSocket is wrapped when what lies where QEMU's socket should be is none of its.
var errSocket = errors.New("not a socket of the backup's QEMU")

// makeSocketDir makes an empty directory. Nothing that its owner can do in it may
// lead root elsewhere.
func makeSocketDir(dir string, owner int, mode os.FileMode) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	if err := os.Chmod(dir, mode); err != nil { // whatever the umask
		return fmt.Errorf("socket directory: %w", err)
	}
	if err := os.Lchown(dir, owner, -1); err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	return nil
}

// makeDir makes the directory of the sockets that the primary's QEMU connects to.
// It is ours: in one of QEMU's user, which could put a link in the place of a
// socket, a change of owner would give any file away.
func (c *clone) makeDir() error { return makeSocketDir(c.o.Dir, os.Geteuid(), 0o711) }

// makeDir makes the directory in which the backup's QEMU makes its sockets; see dial.
func (r *Receiver) makeDir() error { return makeSocketDir(r.Dir, r.replay.User(), 0o700) }

// listenFor makes a socket, in a directory that only we can change, to which a user
// can connect, and nobody else but root.
func listenFor(path string, user int) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chmod(path, 0o600), os.Lchown(path, user, -1)); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// dial connects to a socket that QEMU, running as user, made in a directory of its
// own, but to nothing else that lies there: neither through a link nor to a socket
// that somebody else made.
func dial(ctx context.Context, path string, user int) (net.Conn, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != user {
		return nil, fmt.Errorf("%s: %w", path, errSocket)
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
}
