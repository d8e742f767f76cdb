// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrLedger is wrapped when the guest does not hold what it acknowledged.
var ErrLedger = errors.New("the guest's ledger")

// ledgerInterval is between two records.
const ledgerInterval = 50 * time.Millisecond

// Ledger is a client that gives the guest records to keep, and knows which of
// them the guest has acknowledged. What was acknowledged must be in the guest's
// memory for ever after, on whichever host that is, until the guest itself
// reboots.
type Ledger struct {
	dial    guest.DialFunc
	addr    netip.AddrPort
	conn    net.Conn
	cancel  context.CancelFunc
	sending sync.WaitGroup
	reading sync.WaitGroup

	mu    sync.Mutex
	sums  []uint32 // of the first n records, for each n
	acked int
	lost  int // acknowledged, and not there any more
	err   error
	// failed is when err came.
	failed time.Time
}

// Ledger starts to give records to the guest, which has none yet.
func (vm *VM) Ledger(ctx context.Context) (*Ledger, error) {
	return startLedger(ctx, vm.Guest.Dial, vm.Guest.Address)
}

func startLedger(ctx context.Context, dial guest.DialFunc, addr netip.Addr) (*Ledger, error) {
	l := &Ledger{dial: dial, addr: netip.AddrPortFrom(addr, guest.PortLedger), sums: []uint32{0}}
	attempt, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	conn, count, sum, err := l.open(attempt)
	if err != nil {
		return nil, err
	}
	if count != 0 || sum != 0 {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: it begins with %d records", ErrLedger, count)
	}
	l.conn = conn
	ctx, l.cancel = context.WithCancel(ctx)
	l.sending.Go(func() { l.send(ctx) })
	l.reading.Go(l.receive)
	return l, nil
}

// open connects and takes the greeting.
func (l *Ledger) open(ctx context.Context) (net.Conn, uint64, uint32, error) {
	conn, err := l.dial(ctx, l.addr)
	if err != nil {
		return nil, 0, 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	count, sum, err := readTotal(conn)
	if err != nil {
		_ = conn.Close()
		return nil, 0, 0, err
	}
	return conn, count, sum, nil
}

func readTotal(r io.Reader) (count uint64, sum uint32, err error) {
	buf := make([]byte, recordSize)
	_, err = io.ReadFull(r, buf)
	return binary.BigEndian.Uint64(buf), binary.BigEndian.Uint32(buf[8:]), err
}

func (l *Ledger) send(ctx context.Context) {
	tick := time.NewTicker(ledgerInterval)
	defer tick.Stop()
	for number := uint64(0); ; number++ {
		r := record(number)
		l.mu.Lock()
		l.sums = append(l.sums, crc32.Update(l.sums[number], crc32.IEEETable, r))
		l.mu.Unlock()
		if _, err := l.conn.Write(r); err != nil {
			l.fail(fmt.Errorf("%w: connection %w at record %d: %w", ErrLedger, errBroke, number, err))
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (l *Ledger) receive() {
	for {
		count, sum, err := readTotal(l.conn)
		if err != nil {
			l.fail(fmt.Errorf("%w: connection %w: %w", ErrLedger, errBroke, err))
			return
		}
		if err := l.take(count, sum); err != nil {
			l.fail(err)
			return
		}
	}
}

// take judges an acknowledgement, which must be for the next record.
func (l *Ledger) take(count uint64, sum uint32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.judge(count, sum, l.acked+1); err != nil {
		return err
	}
	l.acked++
	return nil
}

// judge compares what the guest has with what was sent: at least so many
// records, and the right ones.
func (l *Ledger) judge(count uint64, sum uint32, atLeast int) error {
	switch {
	case count >= uint64(len(l.sums)):
		return fmt.Errorf("%w: it has %d records, of %d sent", ErrLedger, count, len(l.sums)-1)
	case int(count) < atLeast:
		l.lost += atLeast - int(count)
		return fmt.Errorf("%w: it has %d records, of at least %d that it took", ErrLedger, count, atLeast)
	case sum != l.sums[count]:
		l.lost++
		return fmt.Errorf("%w: its %d records are not those that were sent", ErrLedger, count)
	}
	return nil
}

// Check asks the guest by a connection of its own what it has.
func (l *Ledger) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	l.mu.Lock()
	acked := l.acked
	l.mu.Unlock()
	conn, count, sum, err := l.open(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrLedger, err)
	}
	_ = conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	return l.judge(count, sum, acked)
}

func (l *Ledger) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err, l.failed = err, time.Now()
	}
}

// Counts returns how many records were acknowledged, and how many of those the
// guest lost.
func (l *Ledger) Counts() (acked, lost int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked, l.lost
}

// Err tells what was wrong so far.
func (l *Ledger) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// End ends it for a guest that has rebooted since the instant, and so broken the
// connection and forgotten all records.
func (l *Ledger) End(gone time.Time) error {
	l.mu.Lock()
	err := l.err
	if errors.Is(err, errBroke) && !l.failed.Before(gone) {
		err = nil
	}
	l.mu.Unlock()
	l.Close()
	return err
}

// Close ends the connection.
func (l *Ledger) Close() {
	l.cancel()
	_ = l.conn.Close()
	l.sending.Wait()
	l.reading.Wait()
}
