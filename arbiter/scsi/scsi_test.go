// SPDX-License-Identifier: Apache-2.0

package scsi_test

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter/scsi"
)

// recorder answers each command alike, and keeps it.
type recorder struct {
	result scsi.Result
	in     []byte
	err    error
	got    scsi.Command
}

func (r *recorder) Do(_ context.Context, c scsi.Command) (scsi.Result, error) {
	r.got = c
	res := r.result
	res.Received = copy(c.In, r.in)
	return res, r.err
}

func (r *recorder) Lock(context.Context) (func(), error) { return func() {}, nil }

func (r *recorder) Reset(context.Context) error { return r.err }

// TestCommands holds what is sent against the standards' tables.
func TestCommands(t *testing.T) {
	block := make([]byte, 512)
	for name, c := range map[string]struct {
		do       func(context.Context, scsi.Device) error
		fua      bool
		cdb, out string // out's beginning
		outLen   int
	}{
		"read": {func(ctx context.Context, d scsi.Device) error {
			return d.Read(ctx, 0x0102030405, make([]byte, 1024), 512)
		}, false, "88000000000102030405000000020000", "", 0},
		"read with FUA": {func(ctx context.Context, d scsi.Device) error {
			return d.Read(ctx, 7, make([]byte, 512), 512)
		}, true, "88080000000000000007000000010000", "", 0},
		"write": {func(ctx context.Context, d scsi.Device) error { return d.Write(ctx, 9, block, 512) },
			true, "8a080000000000000009000000010000", "00", 512},
		"compare and write": {func(ctx context.Context, d scsi.Device) error {
			return d.CompareAndWrite(ctx, 9, []byte{1, 2}, []byte{3, 4})
		}, true, "89080000000000000009000000010000", "01020304", 4},
		"synchronize cache": {func(ctx context.Context, d scsi.Device) error { return d.Sync(ctx) },
			true, "91000000000000000000000000000000", "", 0},
		"register": {func(ctx context.Context, d scsi.Device) error { return d.Register(ctx, 0x1122) },
			false, "5f060000000000001800", "00000000000000000000000000001122", 24},
		"change key": {func(ctx context.Context, d scsi.Device) error { return d.Reregister(ctx, 0x1122, 0x33) },
			false, "5f000000000000001800", "00000000000011220000000000000033", 24},
		"reserve": {func(ctx context.Context, d scsi.Device) error { return d.Reserve(ctx, 0x1122) },
			false, "5f010100000000001800", "00000000000011220000000000000000", 24},
		"preempt": {func(ctx context.Context, d scsi.Device) error { return d.Preempt(ctx, 0x1122, 0x33) },
			false, "5f040100000000001800", "00000000000011220000000000000033", 24},
		"preempt and abort": {func(ctx context.Context, d scsi.Device) error { return d.PreemptAndAbort(ctx, 0x1122, 0x33) },
			false, "5f050100000000001800", "00000000000011220000000000000033", 24},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{in: make([]byte, 4096)}
			if err := c.do(t.Context(), scsi.Device{Transport: r, FUA: c.fua}); err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(r.got.CDB); got != c.cdb {
				t.Errorf("CDB %s, want %s", got, c.cdb)
			}
			if out := hex.EncodeToString(r.got.Out); len(r.got.Out) != c.outLen || out[:len(c.out)] != c.out {
				t.Errorf("data %s, want %d bytes from %s", out, c.outLen, c.out)
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	ctx := t.Context()
	r := &recorder{}
	d := scsi.Device{Transport: r}
	from := func(s string) {
		var err error
		if r.in, err = hex.DecodeString(s); err != nil {
			t.Fatal(err)
		}
	}
	from("0000060200000000" + hex.EncodeToString([]byte("IET     VIRTUAL-DISK    0001")))
	if id, err := d.Inquiry(ctx); err != nil || id != (scsi.Identity{Vendor: "IET", Product: "VIRTUAL-DISK", Revision: "0001"}) {
		t.Errorf("Inquiry gives %+v, %v", id, err)
	}
	from("00000000000007ff00000200" + "0000000000000000000000000000000000000000")
	if c, err := d.ReadCapacity(ctx); err != nil || c != (scsi.Capacity{Blocks: 2048, BlockSize: 512}) {
		t.Errorf("ReadCapacity gives %+v, %v", c, err)
	}
	for _, bad := range []string{"", "00000000000007ff", "00000000000007ff00000201", "ffffffffffffffff00000200"} {
		from(bad)
		if c, err := d.ReadCapacity(ctx); err == nil {
			t.Errorf("ReadCapacity of %q gives %+v", bad, c)
		}
	}
	from("00b0003c0005")
	if n, err := d.MaxCompareAndWrite(ctx); err != nil || n != 5 {
		t.Errorf("MaxCompareAndWrite gives %d, %v", n, err)
	}
	from("0000000000000000")
	if res, err := d.ReadReservation(ctx); err != nil || res != (scsi.Reservation{}) {
		t.Errorf("ReadReservation of none gives %+v, %v", res, err)
	}
	from("0000000500000010" + "00000000000011220000000000010000")
	if res, err := d.ReadReservation(ctx); err != nil || res != (scsi.Reservation{Holder: 0x1122, Type: scsi.WriteExclusive}) {
		t.Errorf("ReadReservation gives %+v, %v", res, err)
	}
	from("0000000500000010")
	if res, err := d.ReadReservation(ctx); !errors.Is(err, scsi.ErrShort) {
		t.Errorf("ReadReservation cut short gives %+v, %v", res, err)
	}
	from("00")
	if err := d.Read(ctx, 1, make([]byte, 512), 512); !errors.Is(err, scsi.ErrShort) {
		t.Errorf("Read cut short: %v", err)
	}
	for answer, want := range map[string][2]bool{
		"1700100008120400":                      {true, true},
		"1700100008120000":                      {true, false},
		"1700000008120000":                      {false, false},
		"1f0010080000000000000000" + "08120000": {true, false}, // a block descriptor before it
		"03001000":                              {true, true},  // nothing of its cache
		"":                                      {false, true},
	} {
		from(answer)
		fua, cached, err := d.Caching(ctx)
		if err != nil || [2]bool{fua, cached} != want {
			t.Errorf("Caching of %q gives %v, %v, %v", answer, fua, cached, err)
		}
	}
}

func TestErrors(t *testing.T) {
	kinds := []error{scsi.ErrMiscompare, scsi.ErrReserved, scsi.ErrUnsupported, scsi.ErrAttention, scsi.ErrProtected, scsi.ErrBusy, scsi.ErrAborted}
	for name, c := range map[string]struct {
		status byte
		sense  string
		want   error // nil: success
		other  bool  // an error, but none of kinds
	}{
		"good":              {status: 0x00},
		"condition met":     {status: 0x04},
		"recovered":         {status: 0x02, sense: "700001000000000a00000000170100"},
		"miscompare":        {status: 0x02, sense: "70000e000000000a000000001d0000", want: scsi.ErrMiscompare},
		"in a descriptor":   {status: 0x02, sense: "720e1d0000000000", want: scsi.ErrMiscompare},
		"deferred":          {status: 0x02, sense: "710006000000000a00000000290000", want: scsi.ErrAttention},
		"unknown command":   {status: 0x02, sense: "700005000000000a00000000200000", want: scsi.ErrUnsupported},
		"write protected":   {status: 0x02, sense: "700007000000000a00000000270000", want: scsi.ErrProtected},
		"medium error":      {status: 0x02, sense: "700003000000000a00000000110000", other: true},
		"no sense at all":   {status: 0x02, other: true},
		"sense cut short":   {status: 0x02, sense: "70", other: true},
		"conflict":          {status: 0x18, want: scsi.ErrReserved},
		"busy":              {status: 0x08, want: scsi.ErrBusy},
		"task set full":     {status: 0x28, want: scsi.ErrBusy},
		"aborted elsewhere": {status: 0x40, want: scsi.ErrAborted},
	} {
		t.Run(name, func(t *testing.T) {
			sense, err := hex.DecodeString(c.sense)
			if err != nil {
				t.Fatal(err)
			}
			err = scsi.Result{Status: c.status, Sense: sense}.Check("test")
			if (err != nil) != (c.want != nil || c.other) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			for _, kind := range kinds {
				if is := errors.Is(err, kind); is != errors.Is(c.want, kind) {
					t.Errorf("errors.Is(%v, %v) is %v", err, kind, is)
				}
			}
		})
	}
}

// TestSGOfNoDevice: a file that is no SCSI device is told apart from one that
// answers.
func TestSGOfNoDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sg, err := scsi.OpenSG(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sg.Close() }()
	if _, err := (scsi.Device{Transport: sg}).Inquiry(t.Context()); !errors.Is(err, scsi.ErrTransport) {
		t.Errorf("Inquiry: %v, want ErrTransport", err)
	}
	unlock, err := sg.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Another goroutine, or process, has to wait.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := sg.Lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second Lock: %v", err)
	}
	unlock()
	again, err := sg.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again()
}
