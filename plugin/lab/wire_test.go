// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// through sends numbered frames, one each millisecond, and returns those that
// came out, in order, and the latest delay.
func through(w Weather, frames int) (order []int, latest time.Duration) {
	random := rand.New(rand.NewPCG(1, 2))
	q := newFrameQueue(w, random.Float64)
	start := time.Unix(0, 0)
	for ms := 0; ms < frames+1000; ms++ {
		now := start.Add(time.Duration(ms) * time.Millisecond)
		if ms < frames {
			q.push([]byte{byte(ms >> 8), byte(ms)}, now)
		}
		for {
			frame, _ := q.pop(now)
			if frame == nil {
				break
			}
			number := int(frame[0])<<8 | int(frame[1])
			order = append(order, number)
			latest = max(latest, time.Duration(ms-number)*time.Millisecond)
		}
	}
	return order, latest
}

func TestWeather(t *testing.T) {
	const frames = 1000
	for name, test := range map[string]struct {
		weather  Weather
		fewest   int
		most     int
		inOrder  bool
		earliest time.Duration
		latest   time.Duration
	}{
		"fine":    {Weather{}, frames, frames, true, 0, 0},
		"cut":     {Weather{Cut: true}, 0, 0, true, 0, 0},
		"delay":   {Weather{Delay: 30 * time.Millisecond}, frames, frames, true, 30 * time.Millisecond, 30 * time.Millisecond},
		"jitter":  {Weather{Delay: 30 * time.Millisecond, Jitter: 20 * time.Millisecond}, frames, frames, true, 40 * time.Millisecond, 51 * time.Millisecond},
		"reorder": {Weather{Jitter: 20 * time.Millisecond, Reorder: true}, frames, frames, false, 10 * time.Millisecond, 21 * time.Millisecond},
		"drop":    {Weather{Drop: 0.2}, 700, 900, true, 0, 0},
	} {
		order, latest := through(test.weather, frames)
		if len(order) < test.fewest || len(order) > test.most || slices.IsSorted(order) != test.inOrder {
			t.Errorf("%s: %d frames, in order: %v", name, len(order), slices.IsSorted(order))
		}
		if latest < test.earliest || latest > test.latest {
			t.Errorf("%s: the latest frame took %v", name, latest)
		}
		if duplicates := len(order) - len(slices.Compact(slices.Sorted(slices.Values(order)))); duplicates != 0 {
			t.Errorf("%s: %d frames twice", name, duplicates)
		}
	}
}

// TestWeatherLoses holds what a wire loses by what is in a frame.
func TestWeatherLoses(t *testing.T) {
	frame := func(protocol byte, v6 bool, size, segment int) []byte {
		f := make([]byte, offloadHeader+etherHeader+size)
		packet := f[offloadHeader+etherHeader:]
		f[offloadHeader+12], f[offloadHeader+13], packet[9] = 8, 0, protocol
		if v6 {
			f[offloadHeader+12], f[offloadHeader+13], packet[6] = 0x86, 0xdd, protocol
		}
		if segment > 0 {
			f[segmented] = 1
			binary.NativeEndian.PutUint16(f[headersSize:], etherHeader+40)
			binary.NativeEndian.PutUint16(f[segmentSize:], uint16(segment))
		}
		return f
	}
	arp := frame(6, false, 46, 0)
	arp[offloadHeader+13] = 6
	noTCP, hole := Weather{NoTCP: true}, Weather{Largest: 1000}
	for _, tc := range []struct {
		what  string
		w     Weather
		frame []byte
		lost  bool
	}{
		{"TCP", noTCP, frame(unix.IPPROTO_TCP, false, 60, 0), true},
		{"TCP of IPv6", noTCP, frame(unix.IPPROTO_TCP, true, 60, 0), true},
		{"UDP", noTCP, frame(unix.IPPROTO_UDP, false, 60, 0), false},
		{"UDP of IPv6", noTCP, frame(unix.IPPROTO_UDP, true, 60, 0), false},
		{"ARP", noTCP, arp, false},
		{"no frame at all", noTCP, make([]byte, 12), false},
		{"an IP header cut short", noTCP, frame(0, false, 60, 0)[:offloadHeader+etherHeader+5], false},
		{"a small packet", hole, frame(unix.IPPROTO_TCP, false, 1000, 0), false},
		{"a large packet", hole, frame(unix.IPPROTO_UDP, false, 1001, 0), true},
		{"large segments", hole, frame(unix.IPPROTO_TCP, false, 9000, 1448), true},
		{"many small segments", hole, frame(unix.IPPROTO_TCP, false, 9000, 500), false},
		{"a frame where all pass", Weather{}, frame(unix.IPPROTO_TCP, false, 9000, 0), false},
	} {
		if lost := tc.w.loses(tc.frame); lost != tc.lost {
			t.Errorf("%s on a wire that is %s: lost %v", tc.what, tc.w, lost)
		}
	}
}
