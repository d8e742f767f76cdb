// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// trafficInterval is between two requests.
const trafficInterval = 20 * time.Millisecond

// recordSize: a number, and a second word that follows from it, so that a
// record tells whether it is one.
const recordSize = 16

// ErrTraffic is wrapped by every fault of a connection.
var ErrTraffic = errors.New("connection with the guest")

// errBroke is wrapped when a connection ended by itself.
var errBroke = errors.New("broke")

// Traffic is one TCP connection to a guest's echo port. It sends a numbered
// record every 20 ms and demands each back, once, in order and unaltered.
type Traffic struct {
	conn    net.Conn
	cancel  context.CancelFunc
	sending sync.WaitGroup
	reading sync.WaitGroup

	mu         sync.Mutex
	sent       []time.Time // by number
	received   []time.Time // by number; shorter than sent by what is on its way
	lost       int
	duplicated int
	err        error
	failed     time.Time     // when err came
	changed    chan struct{} // closed and renewed at each reply and at the end
}

// StartTraffic connects and begins to send.
func StartTraffic(ctx context.Context, dial guest.DialFunc, addr netip.Addr) (*Traffic, error) {
	attempt, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	conn, err := dial(attempt, netip.AddrPortFrom(addr, guest.PortEcho))
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	t := &Traffic{conn: conn, cancel: stop, changed: make(chan struct{})}
	t.sending.Go(func() { t.send(ctx) })
	t.reading.Go(t.receive)
	return t, nil
}

// Traffic starts a connection from the lab's client to the guest.
func (vm *VM) Traffic(ctx context.Context) (*Traffic, error) {
	return StartTraffic(ctx, vm.Guest.Dial, vm.Guest.Address)
}

func record(number uint64) []byte {
	r := make([]byte, recordSize)
	binary.BigEndian.PutUint64(r, number)
	binary.BigEndian.PutUint64(r[8:], check(number))
	return r
}

func check(number uint64) uint64 { return (number + 1) * 0x9e3779b97f4a7c15 }

func (t *Traffic) send(ctx context.Context) {
	tick := time.NewTicker(trafficInterval)
	defer tick.Stop()
	for number := uint64(0); ; number++ {
		t.mu.Lock()
		t.sent = append(t.sent, time.Now())
		t.mu.Unlock()
		if _, err := t.conn.Write(record(number)); err != nil {
			t.fail(fmt.Errorf("%w %w at request %d: %w", ErrTraffic, errBroke, number, err))
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (t *Traffic) receive() {
	buf := make([]byte, recordSize)
	for {
		if _, err := io.ReadFull(t.conn, buf); err != nil {
			t.fail(fmt.Errorf("%w %w: %w", ErrTraffic, errBroke, err))
			return
		}
		if err := t.take(binary.BigEndian.Uint64(buf), binary.BigEndian.Uint64(buf[8:])); err != nil {
			t.fail(err)
			return
		}
	}
}

// take judges one reply.
func (t *Traffic) take(number, sum uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := uint64(len(t.received))
	switch {
	case sum != check(number) || number >= uint64(len(t.sent)):
		return fmt.Errorf("%w: reply %d was altered", ErrTraffic, next)
	case number < next:
		t.duplicated++
		return nil
	}
	now := time.Now()
	t.lost += int(number - next)
	for range number - next + 1 {
		t.received = append(t.received, now)
	}
	close(t.changed)
	t.changed = make(chan struct{})
	return nil
}

func (t *Traffic) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err, t.failed = err, time.Now()
	}
	close(t.changed)
	t.changed = make(chan struct{})
}

// Err tells whether the connection is as it should be.
func (t *Traffic) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fault()
}

func (t *Traffic) fault() error {
	switch {
	case t.err != nil:
		return fmt.Errorf("%w (after %d replies)", t.err, len(t.received))
	case t.lost > 0 || t.duplicated > 0:
		return fmt.Errorf("%w: %d replies lost, %d duplicated", ErrTraffic, t.lost, t.duplicated)
	}
	return nil
}

// Counts returns how many replies came, were skipped, and came twice.
func (t *Traffic) Counts() (replies, lost, duplicated int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.received), t.lost, t.duplicated
}

// WaitReply waits for the first reply to a request that was sent after the
// instant, and returns when it came.
func (t *Traffic) WaitReply(ctx context.Context, after time.Time, limit time.Duration) (time.Time, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		t.mu.Lock()
		at, ok := t.replyAfter(after)
		replies, changed, err := len(t.received), t.changed, t.fault()
		t.mu.Unlock()
		switch {
		case ok:
			return at, nil
		case err != nil:
			return at, err
		}
		select {
		case <-changed:
		case <-timer.C:
			return at, fmt.Errorf("%w: no reply within %v, the last was number %d", ErrTraffic, limit, replies-1)
		case <-ctx.Done():
			return at, ctx.Err()
		}
	}
}

func (t *Traffic) replyAfter(after time.Time) (time.Time, bool) {
	for i := len(t.received) - 1; i >= 0; i-- {
		if t.sent[i].After(after) {
			continue
		}
		if i+1 < len(t.received) {
			return t.received[i+1], true
		}
		return time.Time{}, false
	}
	if len(t.received) > 0 {
		return t.received[0], true
	}
	return time.Time{}, false
}

// LongestGap returns the longest time between two replies of which the second
// came after since; also that from the last reply to now.
func (t *Traffic) LongestGap(since time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	later, gap := time.Now(), time.Duration(0)
	for i := len(t.received) - 1; i >= 0 && later.After(since); i-- {
		gap = max(gap, later.Sub(t.received[i]))
		later = t.received[i]
	}
	return gap
}

// RoundTrips returns how long the replies took that came for requests sent
// after since.
func (t *Traffic) RoundTrips(since time.Time) []time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []time.Duration
	for i := range t.received {
		if t.sent[i].After(since) {
			list = append(list, t.received[i].Sub(t.sent[i]))
		}
	}
	return list
}

// Stop ends the connection after the replies to all requests have come. A
// request that stays without one is lost.
func (t *Traffic) Stop() error {
	t.cancel()
	_ = t.conn.SetWriteDeadline(time.Now().Add(time.Second))
	t.sending.Wait()
	end := time.NewTimer(commandTimeout)
	defer end.Stop()
	for waiting := true; waiting; {
		t.mu.Lock()
		missing, broken, changed := len(t.sent)-len(t.received), t.err != nil, t.changed
		t.mu.Unlock()
		if missing == 0 || broken {
			break
		}
		select {
		case <-changed:
		case <-end.C:
			waiting = false
		}
	}
	t.mu.Lock()
	t.lost += len(t.sent) - len(t.received)
	err := t.fault()
	t.mu.Unlock()
	t.Close()
	return err
}

// End drops a connection whose other end is gone since the instant, as by a
// reboot of the guest. That it broke then is as it should be; what came before
// must be right all the same.
func (t *Traffic) End(gone time.Time) error {
	t.mu.Lock()
	if errors.Is(t.err, errBroke) && !t.failed.Before(gone) {
		t.err = nil
	}
	err := t.fault()
	t.mu.Unlock()
	t.Close()
	return err
}

// Close drops the connection, whatever is on its way.
func (t *Traffic) Close() {
	t.cancel()
	_ = t.conn.Close()
	t.sending.Wait()
	t.reading.Wait()
}
