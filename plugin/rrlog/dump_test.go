// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestStatReader(t *testing.T) {
	l := layout(t)
	log := sampleLog()
	for name, head := range map[string][]byte{
		"stream": nil, "finished file": AppendHeader(nil), "open file": make([]byte, HeaderSize),
	} {
		t.Run(name, func(t *testing.T) {
			s, err := StatReader(iotest.OneByteReader(bytes.NewReader(append(head, log...))), l)
			if err != nil {
				t.Fatal(err)
			}
			if s.Events != uint64(len(sample)) || s.Bytes != uint64(len(log)) || s.Instructions != 1234 || !s.Ended || s.Trailing != 0 {
				t.Errorf("got %+v", s)
			}
			if k := s.Kind(KindInput); k.Events != 6 || k.Bytes == 0 {
				t.Errorf("INPUT: %+v, want 6 events", k)
			}
		})
	}
}

func TestStatOfCutLog(t *testing.T) {
	s, err := StatReader(bytes.NewReader(pack(0, uint32(2000), 28, "abc")), layout(t))
	if err != nil {
		t.Fatal(err)
	}
	if s.Trailing != 4 || s.Ended || s.Events != 1 || s.BytesPer1000Instructions != 2.5 {
		t.Errorf("got %+v", s)
	}
	var b strings.Builder
	if err := s.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"INSTRUCTION", "instructions: 2000", "2.500", "open", "trailing: 4 bytes"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("table lacks %q:\n%s", want, b.String())
		}
	}
	empty, err := StatReader(strings.NewReader(""), layout(t))
	if err != nil || empty.Events != 0 {
		t.Errorf("empty log: %+v, %v", empty, err)
	}
}

func TestHeaderOfOtherVersion(t *testing.T) {
	_, err := StatReader(bytes.NewReader(append(pack(uint32(0x00e02008), uint64(0)), 1)), layout(t))
	var ve *VersionError
	if !errors.Is(err, ErrVersion) || !errors.As(err, &ve) || ve.Version != 0x00e02008 {
		t.Errorf("error %v, want one that names the version", err)
	}
}

func TestReadErrorIsPassedOn(t *testing.T) {
	broken := errors.New("disk on fire")
	r := io.MultiReader(bytes.NewReader(sampleLog()[:20]), iotest.ErrReader(broken))
	s, err := StatReader(r, layout(t))
	if !errors.Is(err, broken) || s.Events == 0 {
		t.Errorf("error %v after %d events", err, s.Events)
	}
}

func TestWriteDumpTable(t *testing.T) {
	var b strings.Builder
	in := append(AppendHeader(nil), pack(0, uint32(1000), 14, 9, 1, uint32(0), uint32(2), "hi", 28, "abc")...)
	if err := WriteDump(&b, bytes.NewReader(in), layout(t), DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	want := "    position           icount  event\n" +
		"           0             1000  INSTRUCTION count=1000\n" +
		"           5             1000  SHUTDOWN cause=HOST_SIGNAL\n" +
		"           6             1000  NET filter=1 flags=0 length=2\n" +
		"          18             1000  (4 bytes of a cut event)\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestWriteDumpJSON(t *testing.T) {
	var b bytes.Buffer
	in := append(sampleLog()[:len(sampleLog())-1], pack(0, uint16(1))...)
	if err := WriteDump(&b, bytes.NewReader(in), layout(t), DumpOptions{JSON: true}); err != nil {
		t.Fatal(err)
	}
	var recs []DumpRecord
	for dec := json.NewDecoder(&b); ; {
		var r DumpRecord
		if err := dec.Decode(&r); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		recs = append(recs, r)
	}
	if len(recs) != len(sample) {
		t.Fatalf("%d lines, want %d", len(recs), len(sample))
	}
	if last := recs[len(recs)-1]; last.Trailing != 3 || last.Kind != "" || last.Icount != 1234 {
		t.Errorf("last line %+v", last)
	}
	if first := recs[0]; first.Kind != "INSTRUCTION" || first.Details["count"] != 1000.0 || first.Length != 5 {
		t.Errorf("first line %+v", first)
	}
}

func TestWriteDumpRange(t *testing.T) {
	lines := func(o DumpOptions) int {
		var b strings.Builder
		if err := WriteDump(&b, bytes.NewReader(sampleLog()), layout(t), o); err != nil {
			t.Fatal(err)
		}
		return strings.Count(b.String(), "\n") - 1
	}
	if got := lines(DumpOptions{From: 5, To: 7}); got != 2 {
		t.Errorf("from 5 to 7: %d events, want 2", got)
	}
	if got := lines(DumpOptions{Limit: 3}); got != 3 {
		t.Errorf("limit 3: %d events", got)
	}
}

func TestWriteDumpOfDamagedLog(t *testing.T) {
	var b strings.Builder
	err := WriteDump(&b, bytes.NewReader(pack(1, 99)), layout(t), DumpOptions{})
	if !errors.Is(err, ErrUnknownKind) || !strings.Contains(b.String(), "INTERRUPT") {
		t.Errorf("error %v, output %q", err, b.String())
	}
}
