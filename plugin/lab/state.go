// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	stateFile  = "state.json"
	switchName = "switch"
	clientName = "client"
)

// state is what must be known to remove a lab that another process made. It is
// written before anything that it names exists.
type state struct {
	Name      string             `json:"name"`
	Created   time.Time          `json:"created"`
	Hosts     []string           `json:"hosts"`
	Bin       string             `json:"bin"`
	NoAgent   bool               `json:"no_agent"`
	Shared    bool               `json:"shared_images"`
	Processes map[string]process `json:"processes"`
	// Cgroups are the directories that hold the lab's control groups.
	Cgroups []string `json:"cgroups"`
}

// process identifies a process for longer than its number does.
type process struct {
	PID int `json:"pid"`
	// Start is its start time in clock ticks after boot, of /proc/PID/stat.
	Start uint64 `json:"start"`
}

func newState(o Options) *state {
	names := []string{"hosta", "hostb", "hostc"}
	return &state{
		Name: o.Name, Created: time.Now().Round(time.Second), Hosts: names[:o.Hosts], Bin: o.Bin, NoAgent: o.NoAgent,
		Shared:    o.SharedImages,
		Processes: map[string]process{}, Cgroups: cgroupDirs(o.Name),
	}
}

func readState(dir string) (*state, error) {
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return nil, err
	}
	s := &state{}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, stateFile), err)
	}
	return s, nil
}

// saveState replaces the state file in one step.
func (l *Lab) saveState() error {
	text, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(l.dir, stateFile)
	if err := os.WriteFile(path+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// alive tells whether any process 1 of the lab is left.
func (s *state) alive() bool {
	for _, p := range s.Processes {
		if p.alive() {
			return true
		}
	}
	return false
}

func (p process) alive() bool {
	start, running := processStart(p.PID)
	return running && start == p.Start
}

// kill kills p and waits until it is gone. The kernel reports the end of a
// process 1 only after all other processes of its namespace have ended.
func (p process) kill(ctx context.Context) error {
	if !p.alive() {
		return nil
	}
	// The descriptor keeps meaning this process; alive is asked again because
	// the number may have been reused before the descriptor was opened.
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", p.PID, err)
	}
	return poll(ctx, func() (bool, error) { return !p.alive(), nil }, "end of process %d", p.PID)
}

// processStart reads a process's start time. A zombie does not run.
func processStart(pid int) (start uint64, running bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The name in parentheses may hold anything; fields count from after it.
	// The state is field 3 and the start time field 22 of proc(5).
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, false
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return start, err == nil
}

// removeState removes the lab that dir describes: processes, control groups,
// then the directory itself, last, because it is what finds the rest.
func removeState(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, teardownTimeout)
	defer cancel()
	s, err := readState(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot tell what belongs to the lab: %w", err)
	}
	if s != nil {
		var errs []error
		for _, p := range s.Processes {
			errs = append(errs, p.kill(ctx))
		}
		for _, c := range s.Cgroups {
			errs = append(errs, removeCgroup(ctx, c))
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// removeDead removes labs whose processes are all gone, because they were
// ephemeral or the machine was restarted.
func removeDead(ctx context.Context) error {
	entries, err := os.ReadDir(stateRoot)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		dir := filepath.Join(stateRoot, e.Name())
		s, err := readState(dir)
		if err != nil || s.alive() {
			continue
		}
		// One that is being made has no processes yet, but its maker has the
		// lock.
		if unlock, err := tryLockLab(e.Name()); err == nil {
			err := removeState(ctx, dir)
			unlock()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func lockPath(name string) string { return filepath.Join(stateRoot, name+".lock") }

var errLocked = errors.New("locked")

// tryLockLab takes the lock under which a lab is made and removed.
func tryLockLab(name string) (unlock func(), err error) {
	if err := os.MkdirAll(stateRoot, 0o755); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(lockPath(name), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, errLocked
			}
			return nil, fmt.Errorf("lock %s: %w", lockPath(name), err)
		}
		// The holder before us removes the file; a lock on a removed file is
		// none.
		mine, err := f.Stat()
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		if current, err := os.Stat(lockPath(name)); err == nil && os.SameFile(mine, current) {
			return func() { _ = os.Remove(lockPath(name)); _ = f.Close() }, nil
		}
		_ = f.Close()
	}
}

func lockLab(ctx context.Context, name string) (unlock func(), err error) {
	err = poll(ctx, func() (bool, error) {
		unlock, err = tryLockLab(name)
		if errors.Is(err, errLocked) {
			return false, nil
		}
		return err == nil, err
	}, "end of another command on lab %s", name)
	return unlock, err
}

// ---- control groups --------------------------------------------------------

// cgroupRoots lists where control groups can be made: one directory for each
// v1 hierarchy, or the only one of v2.
func cgroupRoots() []string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var roots []string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 3 && (f[2] == "cgroup" || f[2] == "cgroup2") && strings.HasPrefix(f[1], "/sys/fs/cgroup") {
			roots = append(roots, f[1])
		}
	}
	return roots
}

// cgroupDirs are the directories, one in each hierarchy, of a lab's groups.
// Nil means that control groups cannot be made here, as in many containers:
// hosts go without then.
func cgroupDirs(name string) []string {
	var dirs []string
	for _, root := range cgroupRoots() {
		if unix.Access(root, unix.W_OK) != nil || readOnly(root) {
			return nil
		}
		dirs = append(dirs, filepath.Join(root, "ftvirt-"+name))
	}
	return dirs
}

func readOnly(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) != nil || s.Flags&unix.ST_RDONLY != 0
}

// makeCgroups makes the groups of one host and returns the files that a process
// writes itself to in order to join.
func (s *state) makeCgroups(host string) (join []string, err error) {
	for _, dir := range s.Cgroups {
		own := filepath.Join(dir, host)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return nil, err
		}
		if _, err := os.Stat(filepath.Join(own, "cgroup.controllers")); err == nil {
			// v2: groups below the host's get controllers only if each level
			// above passes them on, and only if no process is in between.
			for _, d := range []string{filepath.Dir(dir), dir, own} {
				passControllers(d)
			}
			own = filepath.Join(own, "init")
			if err := os.MkdirAll(own, 0o755); err != nil {
				return nil, err
			}
		}
		if err := inheritCPUs(dir, own); err != nil {
			return nil, err
		}
		join = append(join, filepath.Join(own, "cgroup.procs"))
	}
	return join, nil
}

// passControllers enables what it can: a controller that is missing or in use
// elsewhere costs only libvirt's limits of that kind.
func passControllers(dir string) {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(available)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// inheritCPUs fills in what v1's cpuset leaves empty in a new group, for the
// lab's group and the host's.
func inheritCPUs(dirs ...string) error {
	for _, dir := range dirs {
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			path := filepath.Join(dir, name)
			value, err := os.ReadFile(path)
			if err != nil || strings.TrimSpace(string(value)) != "" {
				continue
			}
			parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(parent)) == "" {
				continue // v2: empty means the parent's
			}
			if err := os.WriteFile(path, parent, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeCgroup removes a group and those below it. A group stays busy for a
// moment after its last process has ended.
func removeCgroup(ctx context.Context, dir string) error {
	return poll(ctx, func() (bool, error) {
		var dirs []string
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // what vanishes meanwhile needs no removal
		})
		if err != nil {
			return false, err
		}
		slices.Reverse(dirs)
		for _, d := range dirs {
			if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				if errors.Is(err, unix.EBUSY) {
					return false, nil
				}
				return false, err
			}
		}
		return true, nil
	}, "end of control group %s", dir)
}

// ---- waiting ---------------------------------------------------------------

const pollInterval = 20 * time.Millisecond

// poll calls done until it returns true or an error, or ctx ends. The rest says
// what is waited for.
func poll(ctx context.Context, done func() (bool, error), what string, args ...any) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		ok, err := done()
		if err != nil {
			return err
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", fmt.Sprintf(what, args...), ctx.Err())
		case <-ticker.C:
		}
	}
}
