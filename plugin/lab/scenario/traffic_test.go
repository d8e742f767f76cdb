// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// peer serves one connection with f and returns traffic to it.
func peer(t *testing.T, f func(net.Conn)) *Traffic {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		f(conn)
	}()
	traffic, err := StartTraffic(t.Context(), func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}, netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(traffic.Close)
	return traffic
}

func TestTrafficGap(t *testing.T) {
	const silence = 300 * time.Millisecond
	silent := make(chan time.Time, 1)
	traffic := peer(t, func(c net.Conn) {
		buf := make([]byte, recordSize)
		for i := 0; ; i++ {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if i == 10 {
				silent <- time.Now()
				<-time.After(silence)
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	from := <-silent
	reply, err := traffic.WaitReply(t.Context(), from, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if d := reply.Sub(from); d < silence {
		t.Errorf("first reply after %v, want at least %v", d, silence)
	}
	if gap := traffic.LongestGap(from); gap < silence-trafficInterval {
		t.Errorf("longest gap %v, want about %v", gap, silence)
	}
	if later := traffic.LongestGap(reply.Add(time.Hour)); later != 0 {
		t.Errorf("a gap of %v in the future", later)
	}
	if err := traffic.Stop(); err != nil {
		t.Error(err)
	}
	if replies, lost, duplicated := traffic.Counts(); replies < 11 || lost != 0 || duplicated != 0 {
		t.Errorf("%d replies, %d lost, %d duplicated", replies, lost, duplicated)
	}
	if trips := traffic.RoundTrips(from); len(trips) == 0 {
		t.Error("no round trips after the silence")
	}
}

func TestTrafficFaults(t *testing.T) {
	tests := map[string]struct {
		change           func(i int, r []byte) [][]byte
		lost, duplicated int
	}{
		"lost": {func(i int, r []byte) [][]byte {
			if i == 3 {
				return nil
			}
			return [][]byte{r}
		}, 1, 0},
		"duplicated": {func(i int, r []byte) [][]byte {
			if i == 3 {
				return [][]byte{r, r}
			}
			return [][]byte{r}
		}, 0, 1},
		"altered": {func(i int, r []byte) [][]byte {
			if i == 3 {
				r[12]++
			}
			return [][]byte{r}
		}, 0, 0},
		"closed": {func(i int, r []byte) [][]byte {
			if i == 3 {
				panic("close") // recovered by the peer
			}
			return [][]byte{r}
		}, 0, 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			traffic := peer(t, func(c net.Conn) {
				defer func() { _ = recover() }()
				for i := 0; ; i++ {
					buf := make([]byte, recordSize)
					if _, err := io.ReadFull(c, buf); err != nil {
						return
					}
					for _, r := range test.change(i, buf) {
						if _, err := c.Write(r); err != nil {
							return
						}
					}
				}
			})
			err := poll(t.Context(), 5*time.Second, func(context.Context) (bool, error) { return traffic.Err() != nil, nil })
			if err != nil {
				t.Fatal("the fault was not noticed")
			}
			if err := traffic.Err(); !errors.Is(err, ErrTraffic) {
				t.Errorf("got %v, want ErrTraffic", err)
			}
			_, lost, duplicated := traffic.Counts()
			if lost != test.lost || duplicated != test.duplicated {
				t.Errorf("%d lost, %d duplicated; want %d and %d", lost, duplicated, test.lost, test.duplicated)
			}
		})
	}
}

func TestRelay(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = target.Close() }()
	go func() {
		conn, err := target.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	relay := newRelay(t.Context(), front, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", target.Addr().String())
	})
	defer relay.Close()
	conn, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	echo := func(limit time.Duration) (time.Duration, error) {
		start := time.Now()
		buf := []byte{1}
		if _, err := conn.Write(buf); err != nil {
			return 0, err
		}
		if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
			return 0, err
		}
		_, err := io.ReadFull(conn, buf)
		return time.Since(start), err
	}
	if _, err := echo(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	const delay = 150 * time.Millisecond
	relay.Delay(delay)
	if d, err := echo(5 * time.Second); err != nil || d < delay {
		t.Errorf("delayed: %v, %v", d, err)
	}
	relay.Hold(true)
	if _, err := echo(2 * delay); err == nil {
		t.Error("held: there was a reply")
	}
	relay.Hold(false)
	relay.Delay(0)
	// Two replies are due: the held one and its own.
	for range 2 {
		if _, err := echo(5 * time.Second); err != nil {
			t.Errorf("released: %v", err)
		}
	}
}
