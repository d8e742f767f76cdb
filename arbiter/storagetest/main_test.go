// SPDX-License-Identifier: Apache-2.0

// Package storagetest runs the arbiter on real shared storage: a directory that
// nfs-ganesha exports and Linux's NFS client mounts, and LUNs that open-iscsi
// logs in to and SG_IO reaches. One is of tgt, which has reservations and no
// COMPARE AND WRITE, the other of Linux's own target, which has both and runs in
// a virtual machine. nfs-ganesha and tgt run in user space; the clients are in
// the kernels of two virtual machines, which are two hosts as far as the storage
// can tell. A library as the client would have been lighter, but what decides at
// an operator's site is the kernel: its caches, its repeated requests, its error
// handling.
//
// The test binary plays several parts, told apart by its environment: the
// tests; the same in a machine's guest, where they find the storage mounted;
// the agent that runs commands in a guest; and a contender of arbitertest.
package storagetest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter/arbitertest"
)

const (
	// envWork is the directory with what prepare made, inside the namespaces.
	envWork = "FTVIRT_STORAGETEST_WORK"
	// envAgent makes the binary a guest's agent for the host at its address.
	envAgent = "FTVIRT_STORAGETEST_AGENT"
	// envStorage tells a test in the guest what to use.
	envStorage = "FTVIRT_STORAGETEST_STORAGE"
)

// soak multiplies the rounds of the races.
var soak = flag.Int("soak", 1, "run `N` times as many rounds of each race, and all servers die in one")

func TestMain(m *testing.M) {
	flag.Parse()
	switch {
	case os.Getenv(envAgent) != "":
		os.Exit(agent(os.Getenv(envAgent)))
	case os.Getenv(envWork) != "":
		os.Exit(inside(m))
	case inGuest():
		os.Exit(arbitertest.Main(m, directory, lun))
	}
	os.Exit(outside())
}

// outside prepares what needs the network, and runs this binary again in
// namespaces of its own: the servers get their ports, and whatever happens,
// nothing outlives the tests.
func outside() int {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	work, err := os.MkdirTemp("", "ftvirt-storagetest-")
	if err == nil {
		defer func() { _ = os.RemoveAll(work) }()
		err = prepare(ctx, work)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "storagetest:", err)
		return 1
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), envWork+"="+work)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode()
	case err != nil:
		fmt.Fprintln(os.Stderr, "storagetest: it needs root:", err)
		return 1
	}
	return 0
}

// TestStorage proves the directory and the LUN backend on real servers and real
// clients.
func TestStorage(t *testing.T) {
	if storage := os.Getenv(envStorage); storage != "" {
		suite(t, storage)
		return
	}
	// They boot at the same time.
	san, a, b := startSAN(t), boot(t, "host-a"), boot(t, "host-b")
	nfs, tgt := startGanesha(t), startTGT(t)
	san.serve(t)
	for _, m := range []*machine{a, b} {
		m.logIn(t)
	}
	// Each suite fills and breaks its storage, so only one at a time uses it.
	for _, storage := range [][2]string{{"3", reserve}, {compare, "4.1"}} {
		t.Run("suites", func(t *testing.T) {
			for i, m := range []*machine{a, b} {
				t.Run(storage[i], func(t *testing.T) {
					t.Parallel()
					m.test(t, storage[i])
				})
			}
		})
	}
	t.Run("race on nfs", func(t *testing.T) {
		// One host with each version.
		race(t, nfs, 6, true, append(contendersOn(t, a, "a", directory, "3/"+raceDir), contendersOn(t, b, "b", directory, "4.1/"+raceDir)...))
	})
	t.Run("race by "+compare, func(t *testing.T) {
		// It takes long to boot again.
		race(t, san, 20, *soak > 1, append(contendersOn(t, a, "a", lun, compare), contendersOn(t, b, "b", lun, compare)...))
	})
	t.Run("race by "+reserve, func(t *testing.T) {
		race(t, tgt, 20, true, append(contendersOn(t, a, "a", lun, reserve), contendersOn(t, b, "b", lun, reserve)...))
	})
}

// suite runs in a guest.
func suite(t *testing.T, storage string) {
	b, rounds := directory, 3
	if points := crashPoints[storage]; points != nil {
		b, rounds = lun, 8
		b.CrashPoints = points
	}
	b.Rounds = rounds * *soak
	arbitertest.Run(t, b)
}

// inside makes the namespaces fit for the servers.
func inside(m *testing.M) int {
	for _, args := range [][]string{
		{"mount", "--make-rprivate", "/"},
		{"mount", "-t", "proc", "proc", "/proc"},
		{"mount", "-t", "tmpfs", "run", "/run"},
		{"ip", "link", "set", "lo", "up"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "storagetest: %s: %v: %s\n", strings.Join(args, " "), err, out)
			return 1
		}
	}
	return m.Run()
}

// inGuest tells whether this is a process of a guest, such as a contender that
// a test there started.
func inGuest() bool {
	_, err := os.Stat(guestMark)
	return err == nil
}

// work names a file of the directory that prepare filled.
func work(name string) string { return filepath.Join(os.Getenv(envWork), name) }

// waitFor polls until check is satisfied, at most as long as limit.
func waitFor(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}
