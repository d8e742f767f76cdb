// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	rulesDir  = "../../contrib/prometheus"
	dashboard = "../../contrib/grafana/ftvirt.json"
)

// promtool runs Prometheus' own checker, which make unit-test gets.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := filepath.Abs("../../build/tools/promtool")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v; make it by 'make build/tools/promtool'", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, path, args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

var metricName = regexp.MustCompile(`\bftvirt_[a-z_]+`)

// unknownNames gives the metrics in an expression that do not exist.
func unknownNames(text string) []string {
	known := map[string]bool{}
	for _, m := range Table() {
		if m.Kind != Hist {
			known[m.Name] = true
			continue
		}
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			known[m.Name+suffix] = true
		}
	}
	return slices.DeleteFunc(metricName.FindAllString(text, -1), func(n string) bool { return known[n] })
}

func TestUnknownNames(t *testing.T) {
	t.Parallel()
	got := unknownNames(`rate(ftvirt_domain_lag_seconds[5m]) / ftvirt_nothing_total + ftvirt_domain_output_delay_seconds`)
	if !slices.Equal(got, []string{"ftvirt_nothing_total", "ftvirt_domain_output_delay_seconds"}) {
		t.Errorf("got %v", got)
	}
}

// The rules are well-formed, use what exists, and fire when they should.
func TestRules(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(rulesDir, "ftvirt.rules.yml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(text), "\n") {
		if strings.Contains(line, "description:") || strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		if bad := unknownNames(line); len(bad) > 0 {
			t.Errorf("%v do not exist: %s", bad, line)
		}
	}
	promtool(t, "check", "rules", filepath.Join(rulesDir, "ftvirt.rules.yml"))
	promtool(t, "test", "rules", filepath.Join(rulesDir, "ftvirt.rules.test.yml"))
}

// grafana is what of a dashboard matters here.
type grafana struct {
	UID, Title string
	Panels     []struct {
		ID          int
		Title       string
		Description string
		Type        string
		GridPos     struct{ X, Y, W, H int }
		Targets     []struct {
			RefID, Expr string
		}
	}
}

// Each panel of the dashboard asks for what exists, in a language that
// Prometheus understands, and has a place of its own.
func TestDashboard(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(dashboard)
	if err != nil {
		t.Fatal(err)
	}
	var d grafana
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if d.UID == "" || d.Title == "" || len(d.Panels) == 0 {
		t.Fatalf("it is empty: %+v", d)
	}
	var rules strings.Builder
	rules.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	used, ids, cells := map[string]bool{}, map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.Title == "" || p.Description == "" || ids[p.ID] || len(p.Targets) == 0 {
			t.Errorf("panel %d %q lacks a title, a description, an id of its own or a query", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" {
					t.Fatalf("panel %q lies on %q", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		for _, target := range p.Targets {
			if bad := unknownNames(target.Expr); len(bad) > 0 {
				t.Errorf("panel %q: %v do not exist", p.Title, bad)
			}
			for _, n := range metricName.FindAllString(target.Expr, -1) {
				used[n] = true
			}
			// promtool has no check for an expression alone.
			expr := strings.NewReplacer("$__rate_interval", "5m", "$domain", ".*").Replace(target.Expr)
			fmt.Fprintf(&rules, "      - record: dashboard:panel%d:%s\n        expr: %q\n", p.ID, target.RefID, expr)
		}
	}
	for _, n := range []string{
		"ftvirt_domain_state", "ftvirt_domain_lag_seconds", "ftvirt_domain_output_delay_seconds_bucket", "ftvirt_domain_log_bytes_total",
		"ftvirt_domain_failovers_total",
	} {
		if !used[n] {
			t.Errorf("no panel shows %s", n)
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
