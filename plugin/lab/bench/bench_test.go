// SPDX-License-Identifier: Apache-2.0

package bench_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/lab/bench"
)

func TestFigures(t *testing.T) {
	for _, c := range []struct {
		figures     bench.Figures
		median, p99 float64
		text        string
	}{
		{bench.Figures{3}, 3, 3, "3.00"},
		{bench.Figures{30, 10, 20}, 20, 30, "20.0 (10.0..30.0)"},
		{bench.Figures{4, 1, 3, 2}, 2.5, 4, "2.50 (1.00..4.00)"},
		{bench.Figures{1234.5, 0.01234, 0.01234}, 0.01234, 1234.5, "0.012 (0.012..1234)"},
	} {
		if m, p := c.figures.Median(), c.figures.Quantile(0.99); m != c.median || p != c.p99 || c.figures.String() != c.text {
			t.Errorf("%v: median %v, p99 %v, %q; want %v, %v, %q", []float64(c.figures), m, p, c.figures, c.median, c.p99, c.text)
		}
	}
	if none := (bench.Figures)(nil); !math.IsNaN(none.Median()) || none.String() != "-" {
		t.Errorf("no figures have the median %v, %q", none.Median(), none)
	}
}

// report has a work of which the candidate does twice as much, one that takes it
// twice as long, and one that it cannot do.
func report() *bench.Report {
	r := &bench.Report{Configs: []string{"base", "candidate"}}
	for round := range 3 {
		r.Add("rate", "base", "Mbit/s", true, float64(10+round))
		r.Add("rate", "candidate", "Mbit/s", true, float64(20+2*round))
		r.Add("time", "base", "s", false, 1)
		r.Add("time", "candidate", "s", false, 2)
	}
	r.Add("odd", "base", "s", false, 1)
	r.Skip("odd", "candidate", "it has no oddity")
	r.Compare("candidate", "base")
	r.AtLeast("twice the rate", "", 2, r.Speed("rate", "candidate", "base").Median())
	r.AtLeast("as fast", "", 0.9, r.Speed("time", "candidate", "base").Median())
	r.AtMost("not slow", "s", 3, r.Figures("time", "candidate").Median())
	r.AtMost("odd", "s", 3, r.Figures("odd", "candidate").Median())
	r.NotRun("other", "nobody knows how")
	return r
}

func TestReport(t *testing.T) {
	r := report()
	if got := r.Speed("rate", "candidate", "base"); len(got) != 3 || got.Median() != 2 {
		t.Errorf("rate: speed %v, want 2 in each of 3 rounds", got)
	}
	if got := r.Speed("time", "candidate", "base").Median(); got != 0.5 {
		t.Errorf("time: speed %v, want 0.5", got)
	}
	if got := r.Speed("odd", "candidate", "base"); len(got) != 0 {
		t.Errorf("odd: speed %v without figures", got)
	}
	if met, of := r.Met(); met != 2 || of != 3 {
		t.Errorf("%d of %d targets are met, want 2 of 3", met, of)
	}

	var table bytes.Buffer
	if err := r.WriteTables(&table); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(table.String(), "\n")
	for _, want := range [][]string{
		{"rate", "Mbit/s", "11.0 (10.0..12.0)", "22.0 (20.0..24.0)"},
		{"odd", "not run [1]"},
		{"[1] it has no oddity"},
		{"as fast", ">= 0.900", "0.500", "NOT MET"},
		{"twice the rate", ">= 2.00", "2.00", "met"},
		{"other", "NOT RUN: nobody knows how"},
	} {
		if !hasLine(lines, want) {
			t.Errorf("no line has %q in\n%s", want, &table)
		}
	}

	var text bytes.Buffer
	if err := r.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	var back bench.Report
	if err := json.Unmarshal(text.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if met, of := back.Met(); met != 2 || of != 3 || len(back.Find("rate", "base").Figures) != 3 {
		t.Errorf("JSON has %d of %d targets, rates %v", met, of, back.Figures("rate", "base"))
	}
}

func hasLine(lines, words []string) bool {
	for _, line := range lines {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			return true
		}
	}
	return false
}

func TestSVG(t *testing.T) {
	for name, p := range map[string]bench.Plot{
		"two": {Title: "a < b & c", X: "s", Y: "ms", Curves: []bench.Curve{
			{Name: "one", Points: [][2]float64{{0, 0}, {1, 12}, {2.5, 7}}}, {Name: "two", Points: [][2]float64{{1, 3}}}, {Name: "none"},
		}},
		"empty": {Title: "nothing"},
	} {
		var out bytes.Buffer
		if err := p.WriteSVG(&out); err != nil {
			t.Fatal(err)
		}
		curves, d := 0, xml.NewDecoder(bytes.NewReader(out.Bytes()))
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v in\n%s", name, err, &out)
			}
			if e, ok := token.(xml.StartElement); ok && e.Name.Local == "polyline" {
				curves++
			}
		}
		want := 0
		for _, c := range p.Curves {
			if len(c.Points) > 0 {
				want++
			}
		}
		if curves != want || strings.Contains(out.String(), "NaN") || strings.Contains(out.String(), "Inf") {
			t.Errorf("%s: %d curves, want %d:\n%s", name, curves, want, &out)
		}
	}
}
