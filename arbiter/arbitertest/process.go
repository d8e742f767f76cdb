// SPDX-License-Identifier: Apache-2.0

package arbitertest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
)

// The environment that makes a test binary a contender instead.
const (
	envName   = "FTVIRT_ARBITERTEST_BACKEND"
	envTarget = "FTVIRT_ARBITERTEST_TARGET"
	envPoint  = "FTVIRT_ARBITERTEST_CRASH_AT"
)

// order is what the suite asks of a contender, answer what that says. Both
// travel as lines of JSON.
type order struct {
	Op     string // "open", "acquire" or "close"
	Domain plugin.UUID
	Epoch  plugin.Epoch
	Host   string
	Peer   string
}

type answer struct {
	Epoch  plugin.Epoch
	Lost   bool
	Winner string
	Closed bool
	Err    string // of any other kind
}

func (a answer) err(o order) error {
	switch {
	case a.Lost:
		return &arbiter.LostError{Domain: o.Domain, Epoch: o.Epoch, Winner: a.Winner, Closed: a.Closed}
	case a.Err != "":
		return errors.New(a.Err)
	}
	return nil
}

// Main runs the tests, or plays a contender if this process was started as
// one by the suite. Call it from TestMain, with all backends that have
// processes, and exit with what it returns.
func Main(m *testing.M, backends ...Backend) int {
	name, contender := os.LookupEnv(envName)
	if !contender {
		return m.Run()
	}
	target := os.Getenv(envTarget)
	i := slices.IndexFunc(backends, func(b Backend) bool { return b.Name == name })
	if i < 0 {
		fmt.Fprintf(os.Stderr, "error: no backend %q\n", name)
		return 1
	}
	b := backends[i]
	connect := b.Connect
	if point := os.Getenv(envPoint); point != "" {
		connect = func(target string) (arbiter.Arbiter, error) { return b.Crashing(target, point) }
	}
	a, err := connect(target)
	if err == nil {
		err = contend(a, os.Stdin, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	return 0
}

func contend(a arbiter.Arbiter, in io.Reader, out io.Writer) error {
	orders, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("reading order: %w", err)
		}
		var reply answer
		var err error
		switch o.Op {
		case "open":
			reply.Epoch, err = a.Open(context.Background(), o.Domain, o.Host, o.Peer)
		case "acquire":
			err = a.Acquire(context.Background(), o.Domain, o.Epoch, o.Host)
		case "close":
			err = a.Close(context.Background(), o.Domain, o.Epoch, o.Host)
		default:
			err = fmt.Errorf("unknown order %q", o.Op)
		}
		var lost *arbiter.LostError
		if errors.As(err, &lost) {
			reply.Lost, reply.Winner, reply.Closed = true, lost.Winner, lost.Closed
		} else if err != nil {
			reply.Err = err.Error()
		}
		if err := answers.Encode(reply); err != nil {
			return fmt.Errorf("answering: %w", err)
		}
	}
}

// contender is this test binary in another process.
type contender struct {
	cmd  *exec.Cmd
	in   *json.Encoder
	out  *json.Decoder
	done func()
}

func startContender(t testing.TB, b Backend, target, point string) *contender {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), envName+"="+b.Name, envTarget+"="+target, envPoint+"="+point)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &contender{cmd: cmd, in: json.NewEncoder(in), out: json.NewDecoder(bufio.NewReader(out))}
	c.done = func() {
		_ = in.Close()
		// A contender that was told to crash ends with an error; what it
		// did is judged by the storage.
		_ = cmd.Wait()
		cancel()
	}
	return c
}

func testProcessRace(t *testing.T, b Backend) {
	s := fresh(t, b)
	hosts := []string{hostA, hostB, hostA, hostB}
	var contenders []*contender
	for range hosts {
		c := startContender(t, b, s.target, "")
		defer c.done()
		contenders = append(contenders, c)
	}
	won := make(map[string]int)
	for round := range b.rounds() {
		primary, backup := hostA, hostB
		if rec, err := s.Lookup(t.Context(), s.domain); err == nil && rec.Owner == hostB {
			primary, backup = hostB, hostA
		}
		epoch := s.mustOpen(primary, backup)
		// Each goes first in its turn, or the first written to would always
		// win.
		for i := range contenders {
			n := (i + round) % len(contenders)
			if err := contenders[n].in.Encode(order{Op: "acquire", Domain: s.domain, Epoch: epoch, Host: hosts[n]}); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
		ref := newReferee()
		for i, c := range contenders {
			var a answer
			if err := c.out.Decode(&a); err != nil {
				t.Fatalf("round %d: contender %d: %v", round, i, err)
			}
			ref.answer(hosts[i], a.err(order{Domain: s.domain, Epoch: epoch}))
		}
		rec := s.mustLookup()
		if err := ref.verdict(rec, len(contenders)); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		won[rec.Owner]++
	}
	t.Logf("won: %v", won)
}

// testCrash lets a process die at a step of each operation. Whatever it left
// behind, the others must agree on one outcome and be able to go on.
func testCrash(t *testing.T, b Backend, point string) {
	crash := func(s *storage, o order) {
		t.Helper()
		c := startContender(t, b, s.target, point)
		defer c.done()
		if err := c.in.Encode(o); err != nil {
			t.Fatal(err)
		}
		var a answer
		if err := c.out.Decode(&a); !errors.Is(err, io.EOF) {
			t.Fatalf("%s at %s: answer %+v, %v; want a crash", o.Op, point, a, err)
		}
	}
	t.Run("acquire", func(t *testing.T) {
		s := fresh(t, b)
		epoch := s.mustOpen(hostA, hostB)
		crash(s, order{Op: "acquire", Domain: s.domain, Epoch: epoch, Host: hostA})
		winner := hostB
		if s.mustLookup().Owner == hostA {
			winner = hostA
			s.wantLost(s.Acquire(t.Context(), s.domain, epoch, hostB), hostA, false)
		} else {
			s.mustAcquire(epoch, hostB)
			s.wantLost(s.Acquire(t.Context(), s.domain, epoch, hostA), hostB, false)
		}
		s.mustAcquire(epoch, winner)
		s.mustOpen(winner, hostC)
	})
	t.Run("open", func(t *testing.T) {
		s := fresh(t, b)
		crash(s, order{Op: "open", Domain: s.domain, Host: hostA, Peer: hostB})
		// Either the epoch exists, and its host can take it; or not.
		rec, err := s.Lookup(t.Context(), s.domain)
		if err == nil {
			s.mustAcquire(rec.Epoch, hostA)
		} else {
			s.wantErr(err, arbiter.ErrNoRecord)
		}
		if next := s.mustOpen(hostA, hostB); next <= rec.Epoch {
			t.Fatalf("epoch %d after %d", next, rec.Epoch)
		}
	})
	t.Run("close", func(t *testing.T) {
		s := fresh(t, b)
		epoch := s.mustOpen(hostA, hostB)
		crash(s, order{Op: "close", Domain: s.domain, Epoch: epoch, Host: hostA})
		// The power-off happened or not, but no failover crosses it.
		switch rec := s.mustLookup(); {
		case rec.Undecided():
			s.mustAcquire(epoch, hostB)
			s.wantLost(s.Close(t.Context(), s.domain, epoch, hostA), hostB, false)
		default:
			s.wantLost(s.Acquire(t.Context(), s.domain, epoch, hostB), hostA, rec.Closed)
			if err := s.Close(t.Context(), s.domain, epoch, hostA); err != nil {
				t.Fatalf("Close again: %v", err)
			}
		}
	})
}
