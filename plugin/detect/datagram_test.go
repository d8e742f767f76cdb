// SPDX-License-Identifier: Apache-2.0

package detect

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"ftvirt.org/ftvirt/plugin"
)

var (
	testKey    = []byte("0123456789abcdef0123456789abcdef")
	testDomain = plugin.UUID{0xf7, 15: 1}
)

// TestLayout pins the bytes on the wire, which another version has to read.
func TestLayout(t *testing.T) {
	d := Datagram{Flags: QEMUAlive | Stopping, Domain: testDomain, Epoch: 7, Sender: 0x0102030405060708, Sequence: 0x1122334455667788}
	const want = "46544842" + "01" + "03" + "0000" +
		"f7000000000000000000000000000001" + "0000000000000007" + "0102030405060708" + "1122334455667788"
	got := newSigner(testKey).sign(nil, d)
	if len(got) != Size || hex.EncodeToString(got[:signed]) != want {
		t.Fatalf("%x, want %s and a code", got, want)
	}
	back, err := Decode(got)
	if err != nil || back != d {
		t.Fatalf("%+v, %v; want %+v", back, err, d)
	}
}

func TestAuthentic(t *testing.T) {
	s := newSigner(testKey)
	good := s.sign([]byte("what was there"), Datagram{Domain: testDomain, Epoch: 1, Sequence: 1})
	good = good[len(good)-Size:]
	if !s.authentic(good) {
		t.Fatal("own code is refused")
	}
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			if s.authentic(bad) {
				t.Fatalf("bit %d of byte %d can be changed", bit, i)
			}
		}
	}
	if newSigner(bytes.ToUpper(testKey)).authentic(good) {
		t.Fatal("another key will do")
	}
}

func TestDecodeRefuses(t *testing.T) {
	good := newSigner(testKey).sign(nil, Datagram{Domain: testDomain, Epoch: 1, Sequence: 1})
	for name, change := range map[string]func([]byte) []byte{
		"empty":    func([]byte) []byte { return nil },
		"short":    func(b []byte) []byte { return b[:Size-1] },
		"long":     func(b []byte) []byte { return append(b, 0) },
		"magic":    func(b []byte) []byte { b[0] = 'X'; return b },
		"version":  func(b []byte) []byte { b[4] = 2; return b },
		"reserved": func(b []byte) []byte { b[7] = 1; return b },
	} {
		if d, err := Decode(change(bytes.Clone(good))); !errors.Is(err, ErrDatagram) {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
}

func TestWindow(t *testing.T) {
	type arrival struct {
		sequence uint64
		want     bool
	}
	for name, arrivals := range map[string][]arrival{
		"in order":         {{1, true}, {2, true}, {3, true}},
		"zero":             {{0, false}},
		"twice":            {{5, true}, {5, false}},
		"overtaken":        {{10, true}, {12, true}, {11, true}, {11, false}, {10, false}},
		"edge":             {{100, true}, {37, true}, {37, false}, {36, false}},
		"leap of 63":       {{1, true}, {64, true}, {1, false}, {2, true}},
		"leap of 64":       {{1, true}, {65, true}, {1, false}, {2, true}},
		"leap of millions": {{1, true}, {1 << 40, true}, {1, false}, {1<<40 - 63, true}, {1<<40 - 64, false}},
		"the end":          {{1<<64 - 1, true}, {1<<64 - 1, false}, {1, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var w window
			for i, a := range arrivals {
				if got := w.accept(a.sequence); got != a.want {
					t.Fatalf("arrival %d, number %d: %v", i, a.sequence, got)
				}
			}
		})
	}
}

func TestFlagsString(t *testing.T) {
	for f, want := range map[Flags]string{
		0: "none", QEMUAlive: "qemu-alive", QEMUAlive | PoweredOff: "qemu-alive,powered-off", 1 << 7: "unknown",
	} {
		if got := f.String(); got != want {
			t.Errorf("%#x is %q, want %q", uint8(f), got, want)
		}
	}
}

// FuzzDecode: what is accepted is exactly what would be sent.
func FuzzDecode(f *testing.F) {
	s := newSigner(testKey)
	f.Add(s.sign(nil, Datagram{Flags: QEMUAlive, Domain: testDomain, Epoch: 1, Sender: 2, Sequence: 3}))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrDatagram) {
				t.Fatalf("error %v is not ErrDatagram", err)
			}
			return
		}
		if again := d.append(nil); !bytes.Equal(again, b[:signed]) {
			t.Fatalf("%x is read as %+v, which is %x", b, d, again)
		}
	})
}

// TestCorpus writes, with FTVIRT_WRITE_CORPUS set, and otherwise requires the
// fuzzer's committed seeds.
func TestCorpus(t *testing.T) {
	good := newSigner(testKey).sign(nil, Datagram{Flags: QEMUAlive, Domain: testDomain, Epoch: 1 << 63, Sender: 1, Sequence: 1<<64 - 1})
	for name, b := range map[string][]byte{
		"good": good, "short": good[:Size-1], "long": append(bytes.Clone(good), 0),
		"version-2": append([]byte("FTHB\x02"), good[5:]...), "reserved": append([]byte("FTHB\x01\x01\x01\x00"), good[8:]...),
		"zeroes": make([]byte, Size), "empty": nil,
	} {
		path := filepath.Join("testdata", "fuzz", "FuzzDecode", name)
		want := "go test fuzz v1\n[]byte(" + strconv.Quote(string(b)) + ")\n"
		if os.Getenv("FTVIRT_WRITE_CORPUS") != "" {
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(want), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		} else if string(got) != want {
			t.Errorf("%s is\n%swant\n%s", path, got, want)
		}
	}
}
