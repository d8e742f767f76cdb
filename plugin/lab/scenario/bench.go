// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab/bench"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// benchmark is one run of 'make bench'.
type benchmark struct {
	*run
	report *bench.Report
	// tracks are what the agents told of protected guests while they worked.
	tracks []*track
}

// benchParts are run one after the other, each with guests of its own. Only the
// long benchmark runs all of them.
var benchParts = []struct {
	name  string
	quick bool
	run   func(context.Context, *benchmark) error
}{
	{"work", true, benchWork},
	{"pgbench", false, benchPgbench},
	{"delay", false, benchDelay},
	{"clone", true, benchClone},
	{"failover", true, benchFailover},
	{"colo", false, benchCOLO},
	{"pairs", false, benchPairs},
}

// errPart is returned for the name of no part.
var errPart = errors.New("no such part of the benchmark")

// Bench measures what protection costs, and what a user would run instead. What
// is compared is measured in turn, so that it meets the same noise.
func Bench(ctx context.Context, o Options) error {
	var names []string
	for _, p := range benchParts {
		names = append(names, p.name)
	}
	for _, p := range o.Parts {
		if !slices.Contains(names, p) {
			return fmt.Errorf("%w: %q; there are %s", errPart, p, strings.Join(names, ", "))
		}
	}
	manual := func(c *config.Config) { c.Protect.Auto = false }
	r := &run{Options: o, configure: manual, start: time.Now()}
	artifacts, err := guest.BuildBench(ctx, o.GuestDir, o.Sources)
	if err != nil {
		return err
	}
	r.guest = &artifacts
	return r.run(ctx, "bench", benchmarkAll)
}

func benchmarkAll(ctx context.Context, r *run) (string, error) {
	b := &benchmark{run: r, report: &bench.Report{Started: r.start, Quick: r.Quick, Machine: machine(), Configs: configs}}
	for _, p := range benchParts {
		if len(r.Parts) > 0 && !slices.Contains(r.Parts, p.name) || len(r.Parts) == 0 && r.Quick && !p.quick {
			continue
		}
		r.say("---- %s", p.name)
		if err := p.run(ctx, b); err != nil {
			return "", fmt.Errorf("%s: %w", p.name, err)
		}
	}
	b.compare()
	b.report.Seconds = time.Since(r.start).Seconds()
	if err := b.save(); err != nil {
		return "", err
	}
	return b.result(), nil
}

// machine is what the figures are of.
func machine() string {
	model := "unknown CPU"
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%d x %s", runtime.NumCPU(), model)
}

// save writes the report and shows its tables.
func (b *benchmark) save() error {
	if err := os.MkdirAll(b.Report, 0o755); err != nil {
		return err
	}
	for name, write := range map[string]func(*os.File) error{
		"bench.json": func(f *os.File) error { return b.report.WriteJSON(f) },
		"bench.txt":  func(f *os.File) error { return b.report.WriteTables(f) },
	} {
		if err := writeTo(filepath.Join(b.Report, name), write); err != nil {
			return err
		}
	}
	for name, plot := range b.plots() {
		if err := writeTo(filepath.Join(b.Report, name+".svg"), func(f *os.File) error { return plot.WriteSVG(f) }); err != nil {
			return err
		}
	}
	var text strings.Builder
	if err := b.report.WriteTables(&text); err != nil {
		return err
	}
	_, err := fmt.Fprintf(b.Out, "\n%s\n%s; tables, JSON and plots are in %s\n", text.String(), b.report.Machine, b.Report)
	return err
}

func writeTo(path string, write func(*os.File) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}
