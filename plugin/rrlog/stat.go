// SPDX-License-Identifier: Apache-2.0

package rrlog

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// KindStat counts the events of one kind.
type KindStat struct {
	Kind   Kind   `json:"kind"`
	Events uint64 `json:"events"`
	Bytes  uint64 `json:"bytes"`
}

// Stat sums a log up.
type Stat struct {
	// Events and Bytes are those of whole events.
	Events uint64 `json:"events"`
	Bytes  uint64 `json:"bytes"`
	// Instructions is how many the guest executed.
	Instructions uint64 `json:"instructions"`
	// BytesPer1000Instructions is 0 for a log without instructions.
	BytesPer1000Instructions float64 `json:"bytes_per_1000_instructions"`
	// Trailing counts the bytes of an event cut by the end of the input.
	Trailing uint64 `json:"trailing_bytes"`
	// Ended tells whether the log was closed by the event END. A log that was
	// cut short by a crash is not.
	Ended bool `json:"ended"`
	// Kinds has each kind that occurs, in the order of [Kind].
	Kinds []KindStat `json:"kinds"`
}

// Kind gives the counts of one kind, zero if it does not occur.
func (s Stat) Kind(k Kind) KindStat {
	for _, ks := range s.Kinds {
		if ks.Kind == k {
			return ks
		}
	}
	return KindStat{Kind: k}
}

// StatReader sums up a log: a bare stream, or a file with QEMU's header. On
// error the Stat covers what was read before. A log cut in the middle of an
// event is no error.
func StatReader(r io.Reader, l Layout, opts ...Option) (Stat, error) {
	var counts [kindCount]KindStat
	sc := NewScanner(r, l, opts...)
	for sc.Scan() {
		ev := sc.Event()
		counts[ev.Kind].Events++
		counts[ev.Kind].Bytes += ev.Length
	}
	d := sc.Decoder()
	s := Stat{
		Events:       d.Events(),
		Instructions: d.Instructions(),
		Trailing:     d.Trailing(),
		Ended:        d.Ended(),
		Kinds:        []KindStat{},
	}
	for k, c := range counts {
		if c.Events == 0 {
			continue
		}
		c.Kind = Kind(k)
		s.Kinds = append(s.Kinds, c)
		s.Bytes += c.Bytes
	}
	if s.Instructions > 0 {
		s.BytesPer1000Instructions = float64(s.Bytes) * 1000 / float64(s.Instructions)
	}
	return s, sc.Err()
}

// WriteTable writes the sums for people.
func (s Stat) WriteTable(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	// tabwriter keeps its first error for Flush.
	_, _ = fmt.Fprint(tw, "kind\tevents\tbytes\t\n")
	for _, k := range s.Kinds {
		_, _ = fmt.Fprintf(tw, "%v\t%d\t%d\t\n", k.Kind, k.Events, k.Bytes)
	}
	_, _ = fmt.Fprintf(tw, "total\t%d\t%d\t\n", s.Events, s.Bytes)
	if err := tw.Flush(); err != nil {
		return err
	}
	end := "open: no END event, as after a crash"
	if s.Ended {
		end = "closed by END"
	}
	_, err := fmt.Fprintf(w, "instructions: %d\nbytes per 1000 instructions: %.3f\nlog: %s\n",
		s.Instructions, s.BytesPer1000Instructions, end)
	if err == nil && s.Trailing > 0 {
		_, err = fmt.Fprintf(w, "trailing: %d bytes of a cut event\n", s.Trailing)
	}
	return err
}
