// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"

	"ftvirt.org/ftvirt/plugin"
)

// DumpOptions selects what [WriteDump] writes.
type DumpOptions struct {
	// JSON writes one object a line instead of a table.
	JSON bool
	// From skips events that begin below it.
	From plugin.Position
	// To, if not 0, stops before the first event that begins at or above it.
	To plugin.Position
	// Limit, if not 0, is the greatest number of events to write.
	Limit uint64
}

// DumpRecord is one line of a JSON dump: an event, or as the last line what is
// left of one that the input's end cuts, with only Position and Trailing set.
type DumpRecord struct {
	Position plugin.Position `json:"position"`
	Icount   uint64          `json:"icount"`
	Kind     string          `json:"kind,omitempty"`
	Length   uint64          `json:"length,omitempty"`
	Details  map[string]any  `json:"details,omitempty"`
	Trailing uint64          `json:"trailing_bytes,omitempty"`
}

// WriteDump writes one line per event of a log: its position, the number of
// instructions up to and with it, its kind and what its payload says. The
// input is a bare stream, or a file with QEMU's header. A log cut in the
// middle of an event ends in a line that says so and is no error; at a
// [FormatError] all events before it have been written.
func WriteDump(w io.Writer, r io.Reader, l Layout, o DumpOptions, opts ...Option) error {
	bw := bufio.NewWriter(w)
	write := writeDumpLine
	if o.JSON {
		enc := json.NewEncoder(bw)
		write = func(_ *bufio.Writer, ev *Event, l Layout) error { return enc.Encode(record(ev, l)) }
	} else if _, err := fmt.Fprintf(bw, "%12s %16s  %s\n", "position", "icount", "event"); err != nil {
		return err
	}
	sc := NewScanner(r, l, opts...)
	var written uint64
	cut := true
	for sc.Scan() {
		ev := sc.Event()
		if ev.Position < o.From {
			continue
		}
		if (o.To > 0 && ev.Position >= o.To) || (o.Limit > 0 && written == o.Limit) {
			cut = false
			break
		}
		if err := write(bw, ev, l); err != nil {
			return err
		}
		written++
	}
	if err := sc.Err(); err != nil {
		// What precedes the damage is what one dumps a damaged log for.
		if ferr := bw.Flush(); ferr != nil {
			return ferr
		}
		return err
	}
	if n := sc.Trailing(); cut && n > 0 {
		if err := writeDumpTrailing(bw, sc.Decoder(), o.JSON); err != nil {
			return err
		}
	}
	return bw.Flush()
}

func writeDumpLine(bw *bufio.Writer, ev *Event, l Layout) error {
	if _, err := fmt.Fprintf(bw, "%12d %16d  %v", ev.Position, ev.Icount, ev.Kind); err != nil {
		return err
	}
	for _, d := range ev.Details(l) {
		if _, err := fmt.Fprintf(bw, " %s=%v", d.Name, d.Value); err != nil {
			return err
		}
	}
	return bw.WriteByte('\n')
}

func writeDumpTrailing(bw *bufio.Writer, d *Decoder, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(bw).Encode(DumpRecord{
			Position: d.Boundary(), Icount: d.Instructions(), Trailing: d.Trailing(),
		})
	}
	_, err := fmt.Fprintf(bw, "%12d %16d  (%d bytes of a cut event)\n", d.Boundary(), d.Instructions(), d.Trailing())
	return err
}

func record(ev *Event, l Layout) DumpRecord {
	rec := DumpRecord{Position: ev.Position, Icount: ev.Icount, Kind: ev.Kind.String(), Length: ev.Length}
	if details := ev.Details(l); len(details) > 0 {
		rec.Details = make(map[string]any, len(details))
		for _, d := range details {
			rec.Details[d.Name] = d.Value
		}
	}
	return rec
}
