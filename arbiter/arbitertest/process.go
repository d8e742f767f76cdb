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
	Op     string // "open", "acquire", "wait", "close" or "lookup"
	Domain plugin.UUID
	Epoch  plugin.Epoch
	Host   string
	Peer   string
}

type answer struct {
	Epoch  plugin.Epoch
	Record arbiter.Record
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
		case "wait":
			err = arbiter.AcquireRetry(context.Background(), a, o.Domain, o.Epoch, o.Host, arbiter.Retry{})
		case "lookup":
			reply.Record, err = a.Lookup(context.Background(), o.Domain)
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

// Contender is this test binary in another process, perhaps on another machine.
type Contender struct {
	in   *json.Encoder
	out  *json.Decoder
	host string
}

// NewContender gives the contender that reads conn and answers on it, which acts
// for one of the two hosts, "a" and "b", of the races.
func NewContender(conn io.ReadWriter, host string) *Contender {
	return &Contender{in: json.NewEncoder(conn), out: json.NewDecoder(bufio.NewReader(conn)), host: "host-" + host}
}

// ContenderEnv is the environment that makes the test binary a contender for
// storage that exists.
func ContenderEnv(b Backend, target string) []string {
	return []string{envName + "=" + b.Name, envTarget + "=" + target}
}

func (c *Contender) ask(o order) (answer, error) {
	if err := c.in.Encode(o); err != nil {
		return answer{}, fmt.Errorf("ordering %s: %w", o.Op, err)
	}
	return c.answer(o)
}

func (c *Contender) answer(o order) (answer, error) {
	var a answer
	if err := c.out.Decode(&a); err != nil {
		return answer{}, fmt.Errorf("%s at host %s: %w", o.Op, c.host, err)
	}
	return a, a.err(o)
}

// Race lets contenders, of both hosts, race for one epoch after the other. In
// each, between is called once all were told to, if it is not nil; then they
// wait for storage that does not answer.
func Race(t testing.TB, contenders []*Contender, rounds int, between func(round int)) {
	t.Helper()
	domain, first := newDomain(), contenders[0]
	op := "acquire"
	if between != nil {
		op = "wait"
	}
	primary, backup := hostA, hostB
	won := make(map[string]int)
	for round := range rounds {
		opened, err := first.ask(order{Op: "open", Domain: domain, Host: primary, Peer: backup})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		o := order{Op: op, Domain: domain, Epoch: opened.Epoch}
		// Each goes first in its turn, or the first written to would always
		// win.
		for i := range contenders {
			c := contenders[(i+round)%len(contenders)]
			o.Host = c.host
			if err := c.in.Encode(o); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
		if between != nil {
			between(round)
		}
		ref := newReferee()
		for _, c := range contenders {
			_, err := c.answer(o)
			ref.answer(c.host, err)
		}
		looked, err := first.ask(order{Op: "lookup", Domain: domain})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := ref.verdict(looked.Record, len(contenders)); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if won[looked.Record.Owner]++; looked.Record.Owner != primary {
			primary, backup = backup, primary
		}
	}
	t.Logf("won: %v", won)
}

// startContender starts a contender here; done ends it.
func startContender(t testing.TB, b Backend, target, point, host string) (c *Contender, done func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(append(os.Environ(), ContenderEnv(b, target)...), envPoint+"="+point)
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
	conn := struct {
		io.Reader
		io.Writer
	}{out, in}
	return NewContender(conn, host), func() {
		_ = in.Close()
		// A contender that was told to crash ends with an error; what it
		// did is judged by the storage.
		_ = cmd.Wait()
		cancel()
	}
}

func testProcessRace(t *testing.T, b Backend) {
	target := b.New(t)
	var contenders []*Contender
	for _, host := range []string{"a", "b", "a", "b"} {
		c, done := startContender(t, b, target, "", host)
		defer done()
		contenders = append(contenders, c)
	}
	Race(t, contenders, b.rounds(), nil)
}

// testCrash lets a process die at a step of each operation. Whatever it left
// behind, the others must agree on one outcome and be able to go on.
func testCrash(t *testing.T, b Backend, point string) {
	crash := func(s *storage, o order) {
		t.Helper()
		c, done := startContender(t, b, s.target, point, "a")
		defer done()
		if a, err := c.ask(o); !errors.Is(err, io.EOF) {
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
