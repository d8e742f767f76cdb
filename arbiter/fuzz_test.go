// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

var fuzzDomain = plugin.UUID{0xf7, 15: 1}

func fuzzState() state {
	t := time.UnixMilli(1_700_000_000_000).UTC()
	return state{
		floor: 3, token: "token",
		rec: Record{Domain: fuzzDomain, Epoch: 7, Primary: "hosta", Backup: "hostb", Owner: "hostb", Closed: true, OpenedAt: t, DecidedAt: t, ClosedAt: t},
	}
}

// FuzzBlock: of a LUN's block nothing is believed but what a host wrote.
func FuzzBlock(f *testing.F) {
	for _, size := range []int{512, 4096} {
		raw, err := blockOf(fuzzDomain, fuzzState()).encode(size)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, byte(blockRecord), false)
		raw[100] ^= 1
		f.Add(raw, byte(blockRecord), true)
	}
	f.Add(make([]byte, 512), byte(blockHeader), false)
	f.Add([]byte("FTVA\x01\x02"), byte(blockMark), true)
	f.Fuzz(func(t *testing.T, raw []byte, kind byte, seal bool) {
		if seal && len(raw) >= blockNames+sha256.Size {
			// A checksum that is right lets the fuzzer behind it.
			raw = reseal(raw)
		}
		b, err := decodeBlock(raw, "p", blockKind(kind))
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v is not ErrCorrupt", err)
			}
			return
		}
		if blockKind(kind) != blockRecord {
			return
		}
		s, err := b.state("p")
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v is not ErrCorrupt", err)
			}
			return
		}
		if s.rec.Epoch == 0 {
			return
		}
		again, err := blockOf(b.domain, s).encode(len(raw))
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeBlock(again, "p", blockRecord)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := back.state("p"); err != nil || !reflect.DeepEqual(got, s) {
			t.Fatalf("%+v came back as %+v, %v", s, got, err)
		}
	})
}

// FuzzState: the same of the state as witnesses keep it.
func FuzzState(f *testing.F) {
	good, err := fuzzState().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1,"floor":9}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := decodeState(text, "p", fuzzDomain)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v is not ErrCorrupt", err)
			}
			return
		}
		if s.rec.Epoch != 0 && s.flaw(fuzzDomain) != "" {
			t.Fatalf("accepted %q", text)
		}
	})
}

// FuzzWitness: whatever a request holds, with the key or without, the witness
// answers, and answers only its own hosts with more than an error.
func FuzzWitness(f *testing.F) {
	secret := key(strings.Repeat("k", minKey))
	path := witnessPath + fuzzDomain.String()
	f.Add(path, []byte(`{}`), true)
	f.Add(path, []byte(`{"ballot":{"round":1,"host":"a"},"phase":1}`), true)
	f.Add(path, []byte(`{"value":"AAAA"}`), false)
	f.Add(witnessPath+"../../x", []byte(`[]`), true)
	dir := f.TempDir()
	if _, err := InitWitness(context.Background(), dir); err != nil {
		f.Fatal(err)
	}
	w, err := OpenWitness(context.Background(), WitnessConfig{Path: dir, Key: secret, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = w.Close() })
	f.Fuzz(func(t *testing.T, path string, body []byte, knows bool) {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(string(body)))
		r.URL.Path = path
		r.Header.Set(headerNonce, "n")
		if knows {
			r.Header.Set(headerMAC, secret.request(w.ID(), "n", path, body))
		}
		answer := httptest.NewRecorder()
		w.ServeHTTP(answer, r)
		if !knows && answer.Code != http.StatusUnauthorized && answer.Code != http.StatusBadRequest {
			t.Fatalf("a stranger got %d", answer.Code)
		}
		if answer.Code == http.StatusOK {
			if _, err := w.load(context.Background(), fuzzDomain); err != nil && path == witnessPath+fuzzDomain.String() {
				t.Fatalf("what it stored cannot be read: %v", err)
			}
		}
	})
}

// reseal gives a copy of a block with the checksum of what it holds.
func reseal(raw []byte) []byte {
	out := append([]byte(nil), raw...)
	end := len(out) - sha256.Size
	sum := sha256.Sum256(out[:end])
	copy(out[end:], sum[:])
	return out
}
