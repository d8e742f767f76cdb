// SPDX-License-Identifier: Apache-2.0

package storagetest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// request is what a guest's agent is to run. The rest of the connection is the
// command's standard input and output.
type request struct {
	Args []string
	Env  []string
	// Plain keeps the command's errors and the exit line out of its output.
	Plain bool
}

// exitLine ends the output of a command that is not Plain.
const exitLine = "#exit "

// agent runs commands for the host, each on a connection that it opens to it.
func agent(address string) int {
	for {
		conn, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			<-time.After(100 * time.Millisecond)
			continue
		}
		in := bufio.NewReader(conn)
		line, err := in.ReadBytes('\n')
		var r request
		if err == nil {
			err = json.Unmarshal(line, &r)
		}
		if err != nil {
			// The host has gone, and this machine with it.
			fmt.Fprintln(os.Stderr, "agent:", err)
			return 1
		}
		go serve(conn, in, r)
	}
}

func serve(conn net.Conn, in io.Reader, r request) {
	defer func() { _ = conn.Close() }()
	cmd := exec.Command(r.Args[0], r.Args[1:]...)
	cmd.Env = append(r.Env, "PATH=/bin", "HOME=/")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, conn, conn
	if r.Plain {
		cmd.Stderr = os.Stderr
	}
	// The host may leave the command's input open when it has ended.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if !r.Plain {
		_, _ = fmt.Fprintf(conn, "\n%s%v\n", exitLine, err)
	}
}

// machine is a virtual machine that is a client of the storage. It reaches the
// host's loopback as 10.0.2.2.
type machine struct {
	name    string
	agents  net.Listener
	console string
	cmd     *exec.Cmd
}

// boot starts a machine, with more arguments for its network and disks; it ends
// with the test.
func boot(t testing.TB, name string, more ...string) *machine {
	t.Helper()
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agents.Close() })
	m := &machine{name: name, agents: agents, console: filepath.Join(t.TempDir(), name+".console")}
	_, port, _ := net.SplitHostPort(agents.Addr().String())
	// The kernel gives what it does not know to init, as its environment.
	args := fmt.Sprintf("console=ttyS0 quiet panic=-1 %s=10.0.2.2:%s", envAgent, port)
	if more == nil {
		more = []string{"-netdev", "user,id=n"}
	}
	m.cmd = exec.Command("qemu-system-x86_64", append(more, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "pc", "-accel", "tcg", "-m", "512", "-kernel", work("vmlinuz"), "-initrd", work("initrd"), "-append", args,
		"-device", "virtio-net-pci,netdev=n,romfile=", "-serial", "file:"+m.console)...)
	start(t, m.cmd)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		text, err := os.ReadFile(m.console)
		t.Logf("console of %s: %v\n%s", m.name, err, text)
	})
	return m
}

// start runs a program until the test ends.
func start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (run 'make deps')", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// connect gives the connection of a command that the machine runs.
func (m *machine) connect(t testing.TB, r request) *net.TCPConn {
	t.Helper()
	l := m.agents.(*net.TCPListener)
	if err := l.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		t.Fatalf("machine %s does not come up: %v", m.name, err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		t.Fatal(err)
	}
	return conn
}

// run runs a command in the machine and gives its output; it must succeed.
func (m *machine) run(t testing.TB, env []string, args ...string) string {
	t.Helper()
	conn := m.connect(t, request{Args: args, Env: env})
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(conn)
	text, exit, _ := strings.Cut(string(out), "\n"+exitLine)
	if exit = strings.TrimSpace(exit); err != nil || exit != "<nil>" {
		t.Fatalf("machine %s: %s: %s, %v\n%s", m.name, strings.Join(args, " "), exit, err, text)
	}
	return text
}

// test runs the suite in the machine, on the storage named.
func (m *machine) test(t *testing.T, storage string) {
	t.Helper()
	out := m.run(t, []string{envStorage + "=" + storage}, "/bin/storagetest", "-test.v", fmt.Sprintf("-test.timeout=%dm", 3**soak),
		"-test.run=^TestStorage$", fmt.Sprintf("-soak=%d", *soak))
	if !strings.Contains(out, "--- PASS: TestStorage") {
		t.Fatalf("nothing was tested in machine %s:\n%s", m.name, out)
	}
	t.Logf("in machine %s:\n%s", m.name, out)
}
