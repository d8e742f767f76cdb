// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"
)

// Report is all that one run of a benchmark found.
type Report struct {
	Started      time.Time      `json:"started"`
	Seconds      float64        `json:"seconds"`
	Machine      string         `json:"machine"`
	Quick        bool           `json:"quick"`
	Configs      []string       `json:"configs"` // in the order of the table's columns
	Measurements []*Measurement `json:"measurements"`
	Comparisons  []Comparison   `json:"comparisons"`
	Targets      []Target       `json:"targets"`
	// Lost tells why each pair was lost that nobody wanted to lose.
	Lost []string `json:"lost,omitempty"`
}

// Comparison is how fast one configuration is, compared with another.
type Comparison struct {
	Workload  string  `json:"workload"`
	Candidate string  `json:"candidate"`
	Baseline  string  `json:"baseline"`
	Speed     Figures `json:"speed"`
}

// Target is what was aimed at.
type Target struct {
	Name string `json:"name"`
	Unit string `json:"unit,omitempty"`
	// Limit is the least that Value may be, or with AtMost the most.
	Limit  float64 `json:"limit"`
	AtMost bool    `json:"at_most"`
	// Value is nil if nothing was measured; Note may say why.
	Value *float64 `json:"value"`
	Met   bool     `json:"met"`
	Note  string   `json:"note,omitempty"`
}

// Add notes one figure of a measurement.
func (r *Report) Add(workload, config, unit string, rate bool, value float64) {
	m := r.of(workload, config)
	m.Unit, m.Rate, m.Figures = unit, rate, append(m.Figures, value)
}

// Skip notes why a workload has no figures in a configuration.
func (r *Report) Skip(workload, config, why string) {
	r.of(workload, config).Note = why
}

func (r *Report) of(workload, config string) *Measurement {
	m := r.Find(workload, config)
	if m == nil {
		m = &Measurement{Workload: workload, Config: config}
		r.Measurements = append(r.Measurements, m)
	}
	return m
}

// Find returns a measurement, or nil.
func (r *Report) Find(workload, config string) *Measurement {
	for _, m := range r.Measurements {
		if m.Workload == workload && m.Config == config {
			return m
		}
	}
	return nil
}

// Figures returns those of a measurement, none if there is none.
func (r *Report) Figures(workload, config string) Figures {
	if m := r.Find(workload, config); m != nil {
		return m.Figures
	}
	return nil
}

// Compare notes how fast each workload that both have is in the candidate's
// configuration.
func (r *Report) Compare(candidate, baseline string) {
	for _, c := range r.Measurements {
		if c.Config != candidate {
			continue
		}
		if speed := Speed(c, r.Find(c.Workload, baseline)); len(speed) > 0 {
			r.Comparisons = append(r.Comparisons, Comparison{c.Workload, candidate, baseline, speed})
		}
	}
}

// Speed returns what Compare noted.
func (r *Report) Speed(workload, candidate, baseline string) Figures {
	for _, c := range r.Comparisons {
		if c.Workload == workload && c.Candidate == candidate && c.Baseline == baseline {
			return c.Speed
		}
	}
	return nil
}

// AtLeast and AtMost judge a value, NaN being none.
func (r *Report) AtLeast(name, unit string, limit, value float64) {
	r.judge(Target{Name: name, Unit: unit, Limit: limit}, value)
}

// AtMost is the opposite of AtLeast.
func (r *Report) AtMost(name, unit string, limit, value float64) {
	r.judge(Target{Name: name, Unit: unit, Limit: limit, AtMost: true}, value)
}

// NotRun notes a target for which nothing was measured, and why.
func (r *Report) NotRun(name, why string) {
	r.Targets = append(r.Targets, Target{Name: name, Note: why})
}

func (r *Report) judge(t Target, value float64) {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		t.Note = "not measured"
	} else {
		t.Value = &value
		t.Met = value >= t.Limit
		if t.AtMost {
			t.Met = value <= t.Limit
		}
	}
	r.Targets = append(r.Targets, t)
}

// Met counts the targets that are met, and all that were measured.
func (r *Report) Met() (met, of int) {
	for _, t := range r.Targets {
		if t.Value != nil {
			of++
		}
		if t.Met {
			met++
		}
	}
	return met, of
}

// WriteTables writes what people read.
func (r *Report) WriteTables(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(cells ...string) {
		for i, c := range cells {
			if i > 0 {
				_, _ = fmt.Fprint(t, "\t")
			}
			_, _ = fmt.Fprint(t, c)
		}
		_, _ = fmt.Fprintln(t)
	}
	row(append([]string{"median (least..greatest)", "unit"}, r.Configs...)...)
	var notes []string
	for _, workload := range r.workloads() {
		cells := []string{workload, ""}
		for _, config := range r.Configs {
			m := r.Find(workload, config)
			cell := ""
			switch {
			case m == nil:
			case len(m.Figures) == 0:
				notes = append(notes, m.Note)
				cell = fmt.Sprintf("not run [%d]", len(notes))
			default:
				cells[1], cell = m.Unit, m.Figures.String()
			}
			cells = append(cells, cell)
		}
		row(cells...)
	}
	row()
	row("speed, 1 is equal", "", "")
	for _, c := range r.Comparisons {
		row(c.Workload, c.Candidate+"/"+c.Baseline, c.Speed.String())
	}
	row()
	row("target", "wanted", "measured", "")
	for _, g := range r.Targets {
		sign, met, value := ">=", "NOT MET", "-"
		if g.AtMost {
			sign = "<="
		}
		if g.Value != nil {
			value = short(*g.Value)
		}
		wanted := fmt.Sprintf("%s %s %s", sign, short(g.Limit), g.Unit)
		switch {
		case g.Value == nil:
			met = "NOT RUN"
			if g.Limit == 0 {
				wanted = ""
			}
		case g.Met:
			met = "met"
		}
		if g.Note != "" {
			met += ": " + g.Note
		}
		row(g.Name, wanted, value, met)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for i, n := range notes {
		_, _ = fmt.Fprintf(w, "[%d] %s\n", i+1, n)
	}
	for _, why := range r.Lost {
		_, _ = fmt.Fprintf(w, "lost: %s\n", why)
	}
	return nil
}

// WriteJSON writes all of it.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// workloads are in the order in which they were first measured.
func (r *Report) workloads() []string {
	var list []string
	for _, m := range r.Measurements {
		if !slices.Contains(list, m.Workload) {
			list = append(list, m.Workload)
		}
	}
	return list
}
