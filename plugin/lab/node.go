// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed src/node.sh
var nodeScript []byte

//go:embed src/host.sh
var hostScript []byte

// startTimeout bounds the start of one process 1.
const startTimeout = 20 * time.Second

// Node is a machine of the lab: a host, the client or the switch.
type Node struct {
	Name string

	lab *Lab
}

// process returns the node's process 1, or ErrHostDown.
func (n *Node) process() (process, error) {
	p, ok := n.lab.state.Processes[n.Name]
	if !ok || !p.alive() {
		return process{}, fmt.Errorf("%s: %w", n.Name, ErrHostDown)
	}
	return p, nil
}

// Up tells whether the node runs.
func (n *Node) Up() bool {
	_, err := n.process()
	return err == nil
}

// startNode starts the process 1 of a node that is no host.
func (l *Lab) startNode(ctx context.Context, n *Node) error {
	return l.startProcess1(ctx, n, nodeScript, l.dir, nil, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWNET|unix.CLONE_NEWUTS, n.Name)
}

// startProcess1 runs a script as process 1 of new namespaces and returns when
// it is ready. The process does nothing before its number is in the state
// file, and ends by itself if that never happens: so no death of the caller,
// at whatever moment, leaves a process that Down does not know.
func (l *Lab) startProcess1(ctx context.Context, n *Node, script []byte, dir string, join []string, namespaces uintptr, args ...string) (err error) {
	path := filepath.Join(l.dir, n.Name+".sh")
	if err := os.WriteFile(path, script, 0o644); err != nil {
		return err
	}
	var messages bytes.Buffer
	cmd := exec.Command("/bin/sh", append([]string{"-eu", path}, args...)...)
	cmd.Dir = dir
	cmd.Env = nodeEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer func() { _ = stdin.Close() }()
	// Pipes of our own: exec's would keep Wait from returning while the daemons
	// of a host hold them.
	stdout, stderr, closeWrite, err := outputPipes(cmd)
	if err != nil {
		return err
	}
	defer func() { _ = stdout.Close(); _ = stderr.Close() }()
	err = l.tether.start(cmd)
	closeWrite()
	if err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	go func() { _ = cmd.Wait() }() // only collects it; alive() tells the rest

	start, running := processStart(cmd.Process.Pid)
	if !running {
		return fmt.Errorf("start %s: process %d ended at once", n.Name, cmd.Process.Pid)
	}
	for _, file := range join {
		if err := os.WriteFile(file, []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			return fmt.Errorf("start %s: join control group: %w", n.Name, err)
		}
	}
	l.state.Processes[n.Name] = process{PID: cmd.Process.Pid, Start: start}
	if err := l.saveState(); err != nil {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = stdout.SetDeadline(time.Unix(1, 0)); _ = stderr.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line == "ready\n" {
		return nil
	}
	_, _ = io.Copy(&messages, stderr)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return fmt.Errorf("start %s: %w: %s", n.Name, err, strings.TrimSpace(messages.String()))
}

// outputPipes gives cmd a pipe for each output. closeWrite closes this
// process's copies of the writing ends.
func outputPipes(cmd *exec.Cmd) (stdout, stderr *os.File, closeWrite func(), err error) {
	stdout, outWrite, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	stderr, errWrite, err := os.Pipe()
	if err != nil {
		_, _ = stdout.Close(), outWrite.Close()
		return nil, nil, nil, err
	}
	cmd.Stdout, cmd.Stderr = outWrite, errWrite
	return stdout, stderr, func() { _, _ = outWrite.Close(), errWrite.Close() }, nil
}

// nodeEnv is the environment of everything that runs in the lab.
func nodeEnv() []string {
	env := []string{"PATH=" + toolPath, "HOME=/root", "LANG=C.UTF-8"}
	if term := os.Getenv("TERM"); term != "" {
		env = append(env, "TERM="+term)
	}
	return env
}

// Argv returns the machine's command line that runs argv on the node, for
// callers that want to become it.
func (n *Node) Argv(argv ...string) ([]string, error) {
	if len(argv) == 0 {
		return nil, fmt.Errorf("%s: no command given", n.Name)
	}
	p, err := n.process()
	if err != nil {
		return nil, err
	}
	// The shell joins the node's control groups, and then becomes nsenter.
	full := []string{"/bin/sh", "-eu", "-c", `until [ "$1" = -- ]; do echo 0 >"$1"; shift; done; shift; exec nsenter "$@"`, "sh"}
	namespaces := []string{"--mount", "--pid", "--net", "--uts"}
	if join := n.lab.state.joinFiles(n.Name); n.isHost() {
		namespaces = append(namespaces, "--ipc")
		if len(join) > 0 {
			namespaces = append(namespaces, "--cgroup")
			full = append(full, join...)
		}
	}
	full = append(append(full, "--", "-t", strconv.Itoa(p.PID)), namespaces...)
	return append(append(full, "--"), argv...), nil
}

func (n *Node) isHost() bool { return n.Name != switchName && n.Name != clientName }

// Command prepares argv to run on the node, as root, with the environment of
// the lab and "/" as its directory. The end of ctx kills it and what it
// started, except for daemons that left its process group.
func (n *Node) Command(ctx context.Context, argv ...string) *exec.Cmd {
	full, err := n.Argv(argv...)
	if err != nil {
		cmd := exec.CommandContext(ctx, "/bin/false")
		cmd.Err = err // Start returns it
		return cmd
	}
	cmd := exec.CommandContext(ctx, full[0], full[1:]...)
	cmd.Env = nodeEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// Exec runs argv on the node and returns its standard output. An error carries
// what it wrote to its error output.
func (n *Node) Exec(ctx context.Context, argv ...string) (string, error) {
	return n.execInput(ctx, "", argv...)
}

func (n *Node) execInput(ctx context.Context, input string, argv ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := n.Command(ctx, argv...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w (%w)", ctx.Err(), err)
		}
		return stdout.String(), fmt.Errorf("%s: %s: %w: %s", n.Name, strings.Join(argv, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// InNetwork calls f on a thread that is in the node's network: sockets that f
// opens belong to it, and may be used from anywhere afterwards. f must not
// leave the opening of sockets to other goroutines.
func (n *Node) InNetwork(f func() error) error {
	p, err := n.process()
	if err != nil {
		return err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.PID))
	if err != nil {
		return fmt.Errorf("%s: %w", n.Name, err)
	}
	defer func() { _ = ns.Close() }()
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine, so no
		// other goroutine ever finds itself in the node's network.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("%s: enter network: %w", n.Name, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// Dial opens a TCP connection from the node. The connection may be used from
// anywhere.
func (n *Node) Dial(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	var conn net.Conn
	err := n.InNetwork(func() (err error) {
		// An address without a name to resolve is dialed by this goroutine.
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", n.Name, err)
	}
	return conn, nil
}

// Listen accepts TCP connections at an address of the node.
func (n *Node) Listen(ctx context.Context, addr netip.AddrPort) (net.Listener, error) {
	var listener net.Listener
	err := n.InNetwork(func() (err error) {
		listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("on %s: %w", n.Name, err)
	}
	return listener, nil
}

// joinFiles are the cgroup.procs files of a host's own groups.
func (s *state) joinFiles(host string) []string {
	var files []string
	for _, dir := range s.Cgroups {
		own := filepath.Join(dir, host)
		if _, err := os.Stat(filepath.Join(own, "init")); err == nil {
			own = filepath.Join(own, "init") // v2
		}
		files = append(files, filepath.Join(own, "cgroup.procs"))
	}
	return files
}

// tether starts processes that the kernel kills when this process ends. It has
// a thread of its own, because the kernel looks at the thread that forked.
type tether struct {
	work chan func()
}

func newTether() *tether {
	t := &tether{work: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range t.work {
			f()
		}
	}()
	return t
}

// start starts cmd, tethered unless t is nil.
func (t *tether) start(cmd *exec.Cmd) error {
	if t == nil {
		return cmd.Start()
	}
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	result := make(chan error)
	t.work <- func() { result <- cmd.Start() }
	return <-result
}

// release kills what is still tethered.
func (t *tether) release() { close(t.work) }

// sh runs a shell script on the machine.
func (l *Lab) sh(ctx context.Context, script string, args ...string) error {
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-euc", script, "sh"}, args...)...)
	cmd.Env = nodeEnv()
	return runCombined(ctx, cmd, script)
}

// switchBatch runs ip commands in the switch's network, but with the machine's
// process numbers, which name the other nodes' networks.
func (l *Lab) switchBatch(ctx context.Context, commands ...string) error {
	p, err := l.sw.process()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(p.PID), "--net", "ip", "-batch", "-")
	cmd.Env = nodeEnv()
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	return runCombined(ctx, cmd, "switch: ip")
}

// runCombined runs cmd. An error carries what it wrote, and the reason if ctx
// killed it.
func runCombined(ctx context.Context, cmd *exec.Cmd, what string) error {
	out, err := cmd.CombinedOutput()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", ctx.Err(), err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", what, err, bytes.TrimSpace(out))
	}
	return nil
}
