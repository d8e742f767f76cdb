// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// errTaken is wrapped when a directory is another agent's: two would take each other's
// notes, sockets and logs for their own.
var errTaken = errors.New("the directory is another agent's")

// directories makes those of this agent alone, and keeps others out of them until
// they are released.
func (a *Agent) directories() (release func(), err error) {
	var locks []io.Closer
	release = func() {
		for _, l := range locks {
			_ = l.Close()
		}
	}
	for _, d := range []struct {
		key, path string
		mode      os.FileMode
	}{
		// QEMU's user must get through to the plugin socket and to the sockets
		// of a clone.
		{"agent.run_dir", a.cfg.Agent.RunDir, 0o711},
		{"agent.state_dir", a.cfg.Agent.StateDir, 0o700},
	} {
		if len(locks) > 0 && a.cfg.Agent.RunDir == a.cfg.Agent.StateDir {
			continue
		}
		err := ownDirectory(d.path, d.mode)
		var lock io.Closer
		if err == nil {
			lock, err = takeDirectory(d.path, a.cfg.Host)
		}
		if err != nil {
			release()
			return nil, fmt.Errorf("%s: %w", d.key, err)
		}
		locks = append(locks, lock)
	}
	return release, nil
}

// ownDirectory makes a directory, or takes one that is there and nobody else's.
func ownDirectory(path string, mode os.FileMode) error {
	if err := os.MkdirAll(path, mode); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who could replace what is in it; give it to root", path, st.Uid)
	}
	return os.Chmod(path, mode)
}

// lockName is the file whose lock the agent of a directory has, and which names its
// host.
const lockName = "agent.lock"

// takeDirectory keeps a directory for the agent of a host until it is closed. The lock
// tells of an agent that runs; on storage that has none, or whose locks do not reach
// the other host, the name of that host does.
func takeDirectory(dir, host string) (io.Closer, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	refuse := func(err error) (io.Closer, error) {
		_ = f.Close()
		return nil, err
	}
	lockErr := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	text, err := io.ReadAll(io.LimitReader(f, 256))
	if err != nil {
		return refuse(fmt.Errorf("%s: %w", path, err))
	}
	switch owner := strings.TrimSpace(string(text)); {
	case owner != "" && owner != host:
		return refuse(fmt.Errorf("%w: %s is that of host %q, and this is %q; give each host a directory of its own, or, "+
			"if this host was renamed, remove %s", errTaken, dir, owner, host, path))
	case errors.Is(lockErr, unix.EAGAIN), errors.Is(lockErr, unix.EACCES):
		return refuse(fmt.Errorf("%w: an agent that runs as host %q has %s; is it started twice, or on two hosts of one name?", errTaken, host, dir))
	case owner == "":
		if _, err := f.WriteAt([]byte(host+"\n"), 0); err != nil {
			return refuse(fmt.Errorf("%s: %w", path, err))
		}
	}
	return f, nil
}
