// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// keeper is a guest's ledger. What it does wrong, it does from the fifth record
// on.
type keeper struct {
	forgets, garbles bool

	mu    sync.Mutex
	count uint64
	sum   uint32
}

func (k *keeper) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	buf := make([]byte, recordSize)
	for {
		answer := make([]byte, recordSize)
		k.mu.Lock()
		binary.BigEndian.PutUint64(answer, k.count)
		binary.BigEndian.PutUint32(answer[8:], k.sum)
		k.mu.Unlock()
		if _, err := conn.Write(answer); err != nil {
			return
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		k.mu.Lock()
		if k.garbles && k.count == 5 {
			buf[0]++
		}
		k.count, k.sum = k.count+1, crc32.Update(k.sum, crc32.IEEETable, buf)
		if k.forgets && k.count == 5 {
			k.count, k.sum = 2, 0
		}
		k.mu.Unlock()
	}
}

func TestLedger(t *testing.T) {
	for name, test := range map[string]struct {
		keeper *keeper
		bad    bool
	}{
		"good":    {&keeper{}, false},
		"forgets": {&keeper{forgets: true}, true},
		"garbles": {&keeper{garbles: true}, true},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					go test.keeper.serve(conn)
				}
			}()
			dial := func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
			}
			ledger, err := startLedger(t.Context(), dial, netip.MustParseAddr("127.0.0.1"))
			if err != nil {
				t.Fatal(err)
			}
			defer ledger.Close()
			err = poll(t.Context(), 10*time.Second, func(context.Context) (bool, error) {
				acked, _ := ledger.Counts()
				return acked >= 10 || ledger.Err() != nil, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			acked, lost := ledger.Counts()
			if err := ledger.Check(t.Context()); errors.Is(err, ErrLedger) != test.bad || (lost > 0) != test.bad {
				t.Errorf("%d of %d lost, %v", lost, acked, err)
			}
		})
	}
}

// What the guest forgets while nobody is connected is found out as well.
func TestLedgerCheck(t *testing.T) {
	l := &Ledger{sums: []uint32{0, 11, 22, 33}, acked: 2}
	for name, test := range map[string]struct {
		count uint64
		sum   uint32
		bad   bool
	}{
		"as acknowledged":   {2, 22, false},
		"one on its way":    {3, 33, false},
		"one that was lost": {1, 11, true},
		"other records":     {2, 23, true},
		"more than sent":    {4, 44, true},
	} {
		if err := l.judge(test.count, test.sum, l.acked); (err != nil) != test.bad {
			t.Errorf("%s: %v", name, err)
		}
	}
}
