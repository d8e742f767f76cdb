// SPDX-License-Identifier: Apache-2.0

package arbiter_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/arbiter/scsi"
)

// simLUN is a logical unit that a file stands for, so that processes share it.
// It knows the commands that the arbiter uses, checks their fields more
// strictly than targets do, and remembers what the standard says it must.
type simLUN struct {
	path  string
	nexus string
	// local is the transport's lock.
	local chan struct{}
	// intercept, if set, is asked before and after each command.
	intercept func(cdb []byte, after bool) error
	// tasks, if set, has the writes that the device took and has yet to do.
	tasks *taskSet
	// racy lets COMPARE AND WRITE compare and write without a lock.
	racy bool
}

const (
	simBlock  = 512
	simBlocks = 2 + 2*64
)

// simState is what the device remembers beside its blocks.
type simState struct {
	NoCompare bool
	// NoAbort devices have no PREEMPT AND ABORT, NoReset ones cannot be reset.
	NoAbort, NoReset bool
	// NoTAS devices give no answer to what others had aborted.
	NoTAS bool
	// NoFUA devices have a volatile cache, and Dirty tells that it is in use.
	NoFUA, Dirty bool
	Blocks       uint64
	Keys         map[string]uint64
	Holder       string
	Type         byte
	// Attention is told to each nexus at its next command: ASC and ASCQ.
	Attention map[string][2]byte
	// Known are the nexuses that were told of the power-on.
	Known map[string]bool
}

// newSim makes a device and gives its path.
func newSim(t testing.TB, st simState) string {
	t.Helper()
	path := t.TempDir() + "/lun"
	if st.Blocks == 0 {
		st.Blocks = simBlocks
	}
	text, err := json.Marshal(st)
	if err == nil {
		err = errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, int64(st.Blocks)*simBlock), os.WriteFile(path+".state", text, 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// login is a new initiator.
func login(path string) *simLUN {
	s := &simLUN{path: path, nexus: rand.Text(), local: make(chan struct{}, 1)}
	s.local <- struct{}{}
	return s
}

func (s *simLUN) Lock(ctx context.Context) (func(), error) {
	select {
	case <-s.local:
		return func() { s.local <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (s *simLUN) Do(ctx context.Context, c scsi.Command) (scsi.Result, error) {
	how, _ := os.ReadFile(s.path + ".hindered")
	switch string(how) {
	case "away":
		return scsi.Result{}, scsi.ErrTransport
	case "slow":
		<-time.After(arbitertest.SlowBy)
	}
	if s.intercept != nil {
		if err := s.intercept(c.CDB, false); err != nil {
			return scsi.Result{}, err
		}
	}
	if ctx.Err() != nil {
		return scsi.Result{}, ctx.Err()
	}
	var r scsi.Result
	var err error
	if s.tasks != nil && s.tasks.takes(c) {
		r, err = s.tasks.hold(s, c)
	} else {
		r, err = s.locked(c, string(how) == "read-only")
	}
	if err == nil && s.intercept != nil {
		err = s.intercept(c.CDB, true)
	}
	return r, err
}

func sense(key, asc, ascq byte) scsi.Result {
	return scsi.Result{Status: scsi.StatusCheckCondition, Sense: []byte{0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0}}
}

var (
	good     = scsi.Result{}
	conflict = scsi.Result{Status: scsi.StatusReservationConflict}
	illegal  = sense(scsi.KeyIllegalRequest, 0x20, 0)
)

// taskSet is the writes of a device that takes its time: each is taken when its
// sender may write, and done when it is let go, whatever became of the reservation.
type taskSet struct {
	lba  uint64        // of the block whose first write is held
	held chan struct{} // closed when it is
	done chan struct{} // let it go
	// deaf senders hear of no answer: they have given up.
	deaf bool

	mu   sync.Mutex
	used bool
	keys map[uint64]chan struct{} // closed to abort what came under the key
}

func newTaskSet(lba uint64) *taskSet {
	return &taskSet{lba: lba, held: make(chan struct{}), done: make(chan struct{}), keys: make(map[uint64]chan struct{})}
}

func (ts *taskSet) takes(c scsi.Command) bool {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return !ts.used && c.CDB[0] == 0x8A && binary.BigEndian.Uint64(c.CDB[2:]) == ts.lba
}

func (ts *taskSet) hold(s *simLUN, c scsi.Command) (scsi.Result, error) {
	text, err := os.ReadFile(s.path + ".state")
	var st simState
	if err == nil {
		err = json.Unmarshal(text, &st)
	}
	if err != nil || st.Holder != s.nexus {
		return conflict, err
	}
	aborted := make(chan struct{})
	ts.mu.Lock()
	ts.used, ts.keys[st.Keys[s.nexus]] = true, aborted
	ts.mu.Unlock()
	answer := make(chan scsi.Result, 1)
	go func() {
		select {
		case <-aborted:
			answer <- scsi.Result{Status: scsi.StatusTaskAborted}
			return
		case <-ts.done:
		}
		f, err := os.OpenFile(s.path, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(c.Out, int64(ts.lba)*simBlock)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			panic(err)
		}
		answer <- good
	}()
	close(ts.held)
	if ts.deaf {
		return scsi.Result{}, scsi.ErrTransport
	}
	r := <-answer
	if r.Status == scsi.StatusTaskAborted && st.NoTAS {
		return scsi.Result{}, scsi.ErrTransport
	}
	return r, nil
}

// abort ends what came under the key, or all with key 0.
func (ts *taskSet) abort(key uint64) {
	if ts == nil {
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for k, aborted := range ts.keys {
		if key == 0 || k == key {
			close(aborted)
			delete(ts.keys, k)
		}
	}
}

// left is how many writes are under way.
func (ts *taskSet) left() int {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return len(ts.keys)
}

func (s *simLUN) Reset(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(func(st *simState) error {
		if st.NoReset {
			return scsi.ErrTransport
		}
		s.tasks.abort(0)
		for nexus := range st.Known {
			st.Attention[nexus] = [2]byte{0x29, 0x02}
		}
		return nil
	})
}

// locked does one command as the device does, one at a time.
func (s *simLUN) locked(c scsi.Command, readOnly bool) (scsi.Result, error) {
	f, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if err != nil {
		return scsi.Result{}, err
	}
	defer func() { _ = f.Close() }()
	if s.racy && c.CDB[0] == 0x89 {
		return s.compareAndWrite(f, c)
	}
	var r scsi.Result
	err = s.change(func(st *simState) (err error) {
		r, err = s.command(f, st, c, readOnly)
		return err
	})
	return r, err
}

// change lets f work on the device's state, one at a time.
func (s *simLUN) change(f func(*simState) error) error {
	lock, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	var st simState
	text, err := os.ReadFile(s.path + ".state")
	if err == nil {
		err = json.Unmarshal(text, &st)
	}
	if err != nil {
		return err
	}
	if st.Keys == nil {
		st.Keys = make(map[string]uint64)
	}
	if st.Attention == nil {
		st.Attention, st.Known = make(map[string][2]byte), make(map[string]bool)
	}
	if err := f(&st); err != nil {
		return err
	}
	next, err := json.Marshal(st)
	if err == nil && !bytes.Equal(next, text) {
		// A process that is killed here must leave a whole file.
		err = errors.Join(os.WriteFile(s.path+".new", next, 0o644), os.Rename(s.path+".new", s.path+".state"))
	}
	return err
}

func (s *simLUN) command(f *os.File, st *simState, c scsi.Command, readOnly bool) (scsi.Result, error) {
	op := c.CDB[0]
	if op != 0x12 {
		if !st.Known[s.nexus] {
			st.Known[s.nexus] = true
			return sense(scsi.KeyUnitAttention, 0x29, 0), nil
		}
		if a, ok := st.Attention[s.nexus]; ok {
			delete(st.Attention, s.nexus)
			return sense(scsi.KeyUnitAttention, a[0], a[1]), nil
		}
	}
	writes := op == 0x8A || op == 0x89 || op == 0x91
	// MODE SENSE, too, is the holder's alone (SPC-4, table 66).
	if (writes || op == 0x1A) && st.Holder != "" && st.Holder != s.nexus {
		return conflict, nil
	}
	if readOnly && writes && op != 0x91 {
		return sense(scsi.KeyDataProtect, 0x27, 0), nil
	}
	if op == 0x88 || op == 0x89 || op == 0x8A {
		switch force := c.CDB[1] == 8; {
		case force && st.NoFUA:
			return sense(scsi.KeyIllegalRequest, 0x24, 0), nil
		case !force && !st.NoFUA && binary.BigEndian.Uint64(c.CDB[2:]) != 0:
			return scsi.Result{}, fmt.Errorf("command %02x may use a cache", op)
		}
		st.Dirty = st.Dirty || st.NoFUA && op != 0x88
	}
	answer := func(b []byte) (scsi.Result, error) { return scsi.Result{Received: copy(c.In, b)}, nil }
	switch op {
	case 0x12:
		if c.CDB[1]&1 != 0 {
			page := make([]byte, 64)
			page[1], page[3] = c.CDB[2], 60
			if c.CDB[2] != 0xB0 {
				return illegal, nil
			}
			if !st.NoCompare {
				page[5] = 1
			}
			return answer(page)
		}
		return answer(append([]byte{0, 0, 6, 2, 31, 0, 0, 0}, "ftvirt  simulated LUN   1   "...))
	case 0x9E:
		b := make([]byte, 32)
		binary.BigEndian.PutUint64(b, st.Blocks-1)
		binary.BigEndian.PutUint32(b[8:], simBlock)
		return answer(b)
	case 0x88, 0x8A:
		lba, n := binary.BigEndian.Uint64(c.CDB[2:]), int(binary.BigEndian.Uint32(c.CDB[10:]))
		if lba+uint64(n) > st.Blocks || n*simBlock != max(len(c.In), len(c.Out)) {
			return sense(scsi.KeyIllegalRequest, 0x21, 0), nil
		}
		if op == 0x88 {
			_, err := f.ReadAt(c.In, int64(lba)*simBlock)
			return scsi.Result{Received: len(c.In)}, err
		}
		_, err := f.WriteAt(c.Out, int64(lba)*simBlock)
		return good, err
	case 0x89:
		if st.NoCompare {
			return illegal, nil
		}
		return s.compareAndWrite(f, c)
	case 0x91:
		st.Dirty = false
		return good, nil
	case 0x1A:
		if st.NoFUA {
			return answer([]byte{23, 0, 0, 0, 8, 18, 4, 19: 0, 23: 0})
		}
		return answer([]byte{23, 0, 0x10, 0, 8, 18, 4, 19: 0, 23: 0})
	case 0x5E:
		b := make([]byte, 8, 24)
		if st.Holder != "" {
			b[7] = 16
			b = binary.BigEndian.AppendUint64(b, st.Keys[st.Holder])
			b = append(b, 0, 0, 0, 0, 0, st.Type, 0, 0)
		}
		return answer(b)
	case 0x5F:
		return s.reserveOut(st, c)
	}
	return illegal, nil
}

var racing sync.Mutex

func (s *simLUN) compareAndWrite(f *os.File, c scsi.Command) (scsi.Result, error) {
	if c.CDB[13] != 1 || len(c.Out) != 2*simBlock {
		return scsi.Result{}, fmt.Errorf("compare and write of %x with %d bytes", c.CDB, len(c.Out))
	}
	at := int64(binary.BigEndian.Uint64(c.CDB[2:])) * simBlock
	now := make([]byte, simBlock)
	if _, err := f.ReadAt(now, at); err != nil {
		return scsi.Result{}, err
	}
	if !bytes.Equal(now, c.Out[:simBlock]) {
		return sense(scsi.KeyMiscompare, 0x1D, 0), nil
	}
	if s.racy {
		racing.Lock() // All compare before any of them writes.
		<-time.After(time.Millisecond)
		racing.Unlock()
	}
	_, err := f.WriteAt(c.Out[simBlock:], at)
	return good, err
}

func (s *simLUN) reserveOut(st *simState, c scsi.Command) (scsi.Result, error) {
	own, other := binary.BigEndian.Uint64(c.Out), binary.BigEndian.Uint64(c.Out[8:])
	action := c.CDB[1] & 0x1F
	if len(c.Out) != 24 || binary.BigEndian.Uint32(c.CDB[5:]) != 24 {
		return illegal, nil
	}
	if action == 0x06 { // REGISTER AND IGNORE EXISTING KEY
		st.Keys[s.nexus] = other
		return good, nil
	}
	if st.Keys[s.nexus] != own || own == 0 {
		if action == 0x05 && st.NoAbort {
			return illegal, nil
		}
		return conflict, nil
	}
	switch action {
	case 0x00: // REGISTER
		st.Keys[s.nexus] = other
	case 0x01: // RESERVE
		if st.Holder != "" && st.Holder != s.nexus {
			return conflict, nil
		}
		st.Holder, st.Type = s.nexus, c.CDB[2]&0x0F
	case 0x04, 0x05: // PREEMPT, PREEMPT AND ABORT
		if action == 0x05 && st.NoAbort {
			return illegal, nil
		}
		found := false
		for nexus, key := range st.Keys {
			if key != other || nexus == s.nexus {
				continue
			}
			found = true
			delete(st.Keys, nexus)
			st.Attention[nexus] = [2]byte{0x2A, 0x05}
			if nexus == st.Holder {
				st.Holder, st.Type = s.nexus, c.CDB[2]&0x0F
			}
		}
		if !found {
			return conflict, nil
		}
		if action == 0x05 {
			s.tasks.abort(other)
		}
	default:
		return illegal, nil
	}
	return good, nil
}

// crashAt ends the process before or after the first command of that code, as
// in "after 89".
func crashAt(point string) func([]byte, bool) error {
	return func(cdb []byte, after bool) error {
		when := "before"
		if after {
			when = "after"
		}
		if fmt.Sprintf("%s %02x", when, cdb[0]) == point {
			return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
		}
		return nil
	}
}
