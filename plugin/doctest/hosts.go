// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var (
	//go:embed src/base.sh
	baseScript string
	//go:embed src/host.sh
	hostScript string
)

// startTimeout and bootTimeout bound the parts of a host's start, and pollPeriod is how often it is looked at
// whether something is as it should be.
const (
	startTimeout = 5 * time.Second
	bootTimeout  = time.Minute
	pollPeriod   = 200 * time.Millisecond
)

// host is one with a Debian, a systemd and a network card of its own.
type host struct {
	name    string
	root    string
	process *exec.Cmd
	init    int // its process 1
}

// hosts are in a network namespace of this process, which has the clients' network
// as well.
type hosts struct {
	dir    string // of all that is theirs
	cgroup string
	list   []*host
}

// Addresses of the clients' network.
const (
	clientAddress = "198.51.100.1/24"
	guestAddress  = "198.51.100.10/24"
)

// inOwnNamespaces tells whether this process is the first of its own pid
// namespace: then all that it starts ends with it.
func inOwnNamespaces() bool { return os.Getpid() == 1 }

// enterNamespaces runs this program again, in place of this process.
func enterNamespaces() error {
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", program}, os.Args[1:]...)
	return fmt.Errorf("%s: %w", unshare, unix.Exec(unshare, args, os.Environ()))
}

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// makeBase makes the root that all hosts begin with, unless it is there from an
// earlier run with packages that want the same.
func makeBase(ctx context.Context, o Options, packages []string) (root string, err error) {
	root = filepath.Join(o.Dir, "base-"+o.Suite)
	key := baseScript
	for _, p := range packages {
		out, err := exec.CommandContext(ctx, "dpkg-deb", "-f", p, "Depends", "Recommends").Output()
		if err != nil {
			return "", fmt.Errorf("dpkg-deb -f %s: %w", p, err)
		}
		key += string(out)
	}
	mark := root + ".made-of"
	if was, err := os.ReadFile(mark); err == nil && string(was) == key {
		return root, nil
	}
	if err := errors.Join(os.MkdirAll(o.Dir, 0o755), os.RemoveAll(mark)); err != nil {
		return "", err
	}
	args := append([]string{"-euc", baseScript, "base.sh", o.Suite, o.Mirror, root}, packages...)
	cmd := exec.CommandContext(ctx, "sh", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("making a bare Debian: %w: %s", err, bytes.TrimSpace(out))
	}
	return root, os.WriteFile(mark, []byte(key), 0o600)
}

// start boots hosts from the root base. What they write is below dir.
func start(ctx context.Context, dir, base string) (h *hosts, err error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	h = &hosts{dir: dir, cgroup: filepath.Join(dir, "cgroup")}
	shared := filepath.Join(dir, "arbiter")
	if err := errors.Join(os.MkdirAll(h.cgroup, 0o755), os.MkdirAll(shared, 0o755)); err != nil {
		return nil, err
	}
	if err := command(ctx, "mount", "-t", "cgroup2", "cgroup2", h.cgroup); err != nil {
		return nil, err
	}
	h.cgroup = filepath.Join(h.cgroup, "ftvirt-doctest-"+strconv.FormatInt(time.Now().UnixNano(), 36))
	const quiet = "stp_state 0 forward_delay 0 mcast_snooping 0"
	if err := ipBatch(ctx, 0, "link set lo up", "link add hosts type bridge "+quiet, "link set hosts up",
		"link add clients type bridge "+quiet, "link set clients up", "addr add "+clientAddress+" dev clients"); err != nil {
		return nil, err
	}
	for n, name := range hostNames {
		one, err := h.boot(ctx, n+1, name, base, shared)
		if err != nil {
			return h, fmt.Errorf("%s: %w", name, err)
		}
		h.list = append(h.list, one)
	}
	for _, one := range h.list {
		if err := one.await(ctx); err != nil {
			return h, err
		}
	}
	return h, nil
}

func (h *hosts) boot(ctx context.Context, n int, name, base, shared string) (*host, error) {
	dir := filepath.Join(h.dir, name)
	one := &host{name: name, root: filepath.Join(dir, "root")}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	group := filepath.Join(h.cgroup, name)
	for _, d := range []string{one.root, upper, work, group, filepath.Join(upper, "etc")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(upper, "etc/hostname"), []byte(name+"\n"), 0o644); err != nil { //nolint:gosec // as every host's
		return nil, err
	}
	err := command(ctx, "mount", "-t", "overlay", "overlay", "-o", "lowerdir="+base+",upperdir="+upper+",workdir="+work, one.root)
	if err != nil {
		return nil, err
	}
	dirFD, err := unix.Open(group, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", group, err)
	}
	defer func() { _ = unix.Close(dirFD) }()
	// Not ended by ctx: it has to be there when its logs are fetched.
	one.process = exec.Command("unshare", "--cgroup", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", //nolint:noctx // see above
		"sh", "-euc", hostScript, "host.sh", name, one.root, shared)
	one.process.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: dirFD}
	var said bytes.Buffer
	one.process.Stdout, one.process.Stderr = &said, &said
	ready, err := one.process.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := one.process.Start(); err != nil {
		return nil, err
	}
	if one.init, err = childOf(ctx, one.process.Process.Pid); err != nil {
		_ = one.process.Process.Kill()
		_ = one.process.Wait()
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	if err := ipBatch(ctx, 0,
		fmt.Sprintf("link add h%d type veth peer name eth0 netns %d", n, one.init), fmt.Sprintf("link set h%d master hosts up", n),
		fmt.Sprintf("link add c%d type veth peer name eth1 netns %d", n, one.init), fmt.Sprintf("link set c%d master clients up", n),
	); err != nil {
		return nil, err
	}
	if err := ipBatch(ctx, one.init, "link set lo up",
		fmt.Sprintf("addr add 192.0.2.%d/24 dev eth0", n), "link set eth0 up",
		"link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set eth1 master br0 up", "link set br0 up",
	); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(ready, "go\n"); err != nil {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return one, nil
}

// childOf waits for the only child of a process.
func childOf(ctx context.Context, pid int) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		out, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			return 0, err
		}
		if child, err := strconv.Atoi(strings.TrimSpace(string(out))); err == nil {
			return child, nil
		}
		if err := pause(ctx); err != nil {
			return 0, err
		}
	}
}

func pause(ctx context.Context) error {
	t := time.NewTimer(pollPeriod)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ipBatch runs commands of ip in the network of a process; 0 is this one's.
func ipBatch(ctx context.Context, pid int, commands ...string) error {
	args := []string{"ip", "-batch", "-"}
	if pid != 0 {
		args = append([]string{"nsenter", "--target", strconv.Itoa(pid), "--net"}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// await waits until the host has booted.
func (h *host) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	for {
		out, _, err := h.run(ctx, "systemctl is-system-running || :", 0)
		switch state := strings.TrimSpace(out); {
		case err == nil && state == "running":
			return nil
		case err == nil && state == "degraded":
			out, _, _ = h.run(ctx, "systemctl --failed --no-legend", 0)
			return fmt.Errorf("%s has booted, but for: %s", h.name, strings.TrimSpace(out))
		}
		if pause(ctx) != nil {
			return fmt.Errorf("%s has not booted within %v: %s", h.name, bootTimeout, strings.TrimSpace(out))
		}
	}
}

// run runs a script as root of the host would, from its home directory. With a
// length it is interrupted after that time, and has a terminal until then; that it
// ended sooner is an error. It gives what was printed, and the exit status.
func (h *host) run(ctx context.Context, script string, length time.Duration) (string, int, error) {
	args := []string{
		"--target", strconv.Itoa(h.init), "--all", "--", "/usr/bin/env", "-i", "HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/bash",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TERM=xterm", "DEBIAN_FRONTEND=noninteractive",
		"COLUMNS=140",
	}
	if length > 0 {
		typed := "exec " + strings.TrimSpace(script)
		script = fmt.Sprintf("stty cols 120 rows 40; exec timeout --foreground --signal=INT --kill-after=5 %.0f bash -c %s", length.Seconds(), quote(typed))
		script = fmt.Sprintf("exec script -qefc %s /dev/null", quote(script))
	}
	args = append(args, "bash", "-euo", "pipefail", "-c", "cd /root\n"+script)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// What a command left behind may hold the output open.
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return out.String(), 0, fmt.Errorf("it does not end: %w", context.Cause(ctx))
	}
	if length > 0 && err == nil {
		return out.String(), 0, fmt.Errorf("it ended by itself, before %v were over", length)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.String(), exit.ExitCode(), nil
	}
	return out.String(), 0, err
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func (h *hosts) host(name string) *host {
	for _, one := range h.list {
		if one.name == name {
			return one
		}
	}
	return nil
}

// stop ends the hosts and removes what they wrote. That this process ends would
// end them as well, but leave the files.
func (h *hosts) stop() error {
	for _, one := range h.list {
		_ = one.process.Process.Kill()
		_ = one.process.Wait()
	}
	for _, name := range hostNames {
		_ = unix.Unmount(filepath.Join(h.dir, name, "root"), unix.MNT_DETACH)
	}
	removeGroups(h.cgroup)
	_ = unix.Unmount(filepath.Join(h.dir, "cgroup"), unix.MNT_DETACH)
	return os.RemoveAll(h.dir)
}

// removeGroups removes a control group with all below, once their processes are
// gone.
func removeGroups(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeGroups(filepath.Join(dir, e.Name()))
		}
	}
	for deadline := time.Now().Add(2 * time.Second); ; {
		if err := os.Remove(dir); err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return
		}
		if pause(context.Background()) != nil {
			return
		}
	}
}
