// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"context"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/lab/guest"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// BenchmarkLog tells how much log a guest makes, and how much of it the channel
// carries, in 15 seconds each. Its pieces are those that the plugin sends.
func BenchmarkLog(b *testing.B) {
	for _, bench := range []struct {
		name         string
		lines, loads int
	}{{"idle", 0, 0}, {"lines and disk", 10, 20}} {
		b.Run(bench.name, func(b *testing.B) {
			for b.Loop() {
				measureLog(b, bench.lines, bench.loads)
			}
		})
	}
}

func measureLog(b *testing.B, lines, loads int) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	bed := newBed(b)
	if err := bed.guest.NewDisk(ctx, filepath.Join(mkdir(b, bed.dir, "a"), "disk.raw"), "raw"); err != nil {
		b.Fatal(err)
	}
	a, err := bed.start(ctx, "a", "primary")
	if err != nil {
		b.Fatal(err)
	}
	defer a.kill()
	q := a.plugin.Hello().QEMU
	layout, err := rrlog.LayoutFor(q.Major, q.Minor)
	if err != nil {
		b.Fatal(err)
	}
	var mu sync.Mutex
	dec, packer := rrlog.NewDecoder(layout), rrlog.NewPacker()
	var packed []byte
	var pieces, carried int
	var spent time.Duration
	h := a.handler()
	h.Log = func(_ plugin.Position, piece []byte) error {
		mu.Lock()
		defer mu.Unlock()
		began := time.Now()
		packed = packer.Pack(packed[:0], piece)
		spent += time.Since(began)
		pieces, carried = pieces+1, carried+len(packed)
		if err := dec.Feed(piece); err != nil {
			return err
		}
		return a.plugin.Ack(dec.Boundary())
	}
	if err := a.plugin.Welcome(0, 0); err != nil {
		b.Fatal(err)
	}
	go func() { _ = a.plugin.Run(ctx, h) }()
	if err := a.Monitor(ctx, plugin.UUID{}, "cont", nil, nil); err != nil {
		b.Fatal(err)
	}
	c := guest.Client{Dial: dial(bed.ports), Address: netip.MustParseAddr("10.0.2.15")}
	if err := c.WaitReady(ctx); err != nil {
		b.Fatal(err)
	}
	if lines > 0 {
		if err := c.StartLines(ctx, lines); err != nil {
			b.Fatal(err)
		}
		if err := c.StartLoad(ctx, loads); err != nil {
			b.Fatal(err)
		}
	}
	record(ctx, b, a)
	began := time.Now()
	select {
	case <-time.After(15 * time.Second):
	case <-a.done:
		b.Fatal("QEMU ended")
	}
	mu.Lock()
	defer mu.Unlock()
	seconds := time.Since(began).Seconds()
	raw, thousands := float64(dec.Position()), float64(dec.Instructions())/1000
	b.ReportMetric(raw*8/1e6/seconds, "raw-Mbit/s")
	b.ReportMetric(float64(carried)*8/1e6/seconds, "packed-Mbit/s")
	b.ReportMetric(raw/thousands, "raw-B/kinsn")
	b.ReportMetric(float64(carried)/thousands, "packed-B/kinsn")
	b.ReportMetric(float64(pieces)/seconds, "pieces/s")
	b.ReportMetric(float64(spent.Microseconds())/float64(pieces), "us/piece")
}
