// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"ftvirt.org/ftvirt/plugin"
)

var update = flag.Bool("update", false, "rewrite the table in the documentation")

var states = []string{"unprotected", "cloning", "protected", "going-live", "live", "failed"}

// full has every part that a domain can have.
func full() Domain {
	silence := 40 * time.Millisecond
	ack := NewHistogram([]time.Duration{time.Millisecond, time.Second})
	ack.Observe(time.Millisecond)
	ack.Observe(2 * time.Second)
	return Domain{
		Name: "web", UUID: plugin.UUID{1}, Role: plugin.RolePrimary, State: "protected", Peer: "hostb", Epoch: 3, Connected: true, Failing: true,
		Silence: &silence, Instructions: 1000, Ack: ack, ClonePause: 80 * time.Millisecond,
		Log: &Log{Position: 500, Acked: 400, Lag: 12 * time.Millisecond, Slowed: 0.25, Held: time.Second},
		Output: &Output{
			Queued: 2, Released: 7, Dropped: 1, Delay: 3 * time.Second, DelayMax: 2 * time.Second,
			Bounds: []time.Duration{time.Millisecond, time.Second}, Delays: []uint64{4, 2, 1},
		},
		Clone:  &Clone{Transferred: 10, Remaining: 20},
		Events: Events{Failovers: 1, BackupsLost: 2, Divergences: 3, ClonesDone: 4, ClonesFailed: 5, ArbiterWon: 6, ArbiterLost: 7, ArbiterAbsent: 8},
	}
}

func collector(domains ...Domain) *Collector {
	return New(states, func() Host {
		return Host{Heartbeats: Heartbeats{Sent: 1, SendErrors: 2, Received: 3, Garbage: 4, Unknown: 5, Forged: 6, Replayed: 7}, Domains: domains}
	})
}

// TestLint holds names, units and help against Prometheus' own rules.
func TestLint(t *testing.T) {
	t.Parallel()
	problems, err := testutil.GatherAndLint(collector(full()).Registry())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// A metric that is in the table and never comes is a promise that is not kept.
func TestEachMetricComes(t *testing.T) {
	t.Parallel()
	families, err := collector(full()).Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "ftvirt_") {
			got = append(got, f.GetName())
		}
	}
	var want []string
	for _, m := range Table() {
		want = append(want, m.Name)
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%v\nwant\n%v", got, want)
	}
}

func TestValues(t *testing.T) {
	t.Parallel()
	const want = `
# HELP ftvirt_domain_ack_latency_seconds How long pieces of the log waited for the backup's ack, from the primary's agent; since it was started.
# TYPE ftvirt_domain_ack_latency_seconds histogram
ftvirt_domain_ack_latency_seconds_bucket{domain="web",le="0.001"} 1
ftvirt_domain_ack_latency_seconds_bucket{domain="web",le="1"} 1
ftvirt_domain_ack_latency_seconds_bucket{domain="web",le="+Inf"} 2
ftvirt_domain_ack_latency_seconds_sum{domain="web"} 2.001
ftvirt_domain_ack_latency_seconds_count{domain="web"} 2
# HELP ftvirt_domain_lag_seconds How far the backup's execution is behind the log that it has, at the worst of the last tenth of a second.
# TYPE ftvirt_domain_lag_seconds gauge
ftvirt_domain_lag_seconds{domain="web"} 0.012
# HELP ftvirt_domain_output_delay_seconds How long packets of the primary waited in the output gate for the ack of what led to them; since its QEMU was started.
# TYPE ftvirt_domain_output_delay_seconds histogram
ftvirt_domain_output_delay_seconds_bucket{domain="web",le="0.001"} 4
ftvirt_domain_output_delay_seconds_bucket{domain="web",le="1"} 6
ftvirt_domain_output_delay_seconds_bucket{domain="web",le="+Inf"} 7
ftvirt_domain_output_delay_seconds_sum{domain="web"} 3
ftvirt_domain_output_delay_seconds_count{domain="web"} 7
# HELP ftvirt_domain_role 1 for the role that this host plays for the domain, 0 for the others.
# TYPE ftvirt_domain_role gauge
ftvirt_domain_role{domain="web",role="backup"} 0
ftvirt_domain_role{domain="web",role="none"} 0
ftvirt_domain_role{domain="web",role="primary"} 1
# HELP ftvirt_domain_clones_total Clones that made a pair (done) or did not (failed), as this host's agent saw it since it was started.
# TYPE ftvirt_domain_clones_total counter
ftvirt_domain_clones_total{domain="web",result="done"} 4
ftvirt_domain_clones_total{domain="web",result="failed"} 5
`
	err := testutil.CollectAndCompare(collector(full()), strings.NewReader(want), "ftvirt_domain_lag_seconds", "ftvirt_domain_role",
		"ftvirt_domain_ack_latency_seconds", "ftvirt_domain_output_delay_seconds", "ftvirt_domain_clones_total")
	if err != nil {
		t.Error(err)
	}
}

// What is not known is not shown, rather than shown as 0, and no name spoils the
// answer.
func TestOddDomains(t *testing.T) {
	t.Parallel()
	bare := Domain{Name: "bare", Role: plugin.RoleBackup, State: "cloning"}
	c := collector(bare, full(), full(), Domain{Name: "\xff", Peer: "\xff"}, Domain{Name: "a\"b\nc"}, Domain{})
	families, err := c.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "domain" && l.GetValue() == "bare" && (strings.Contains(f.GetName(), "_log_") || strings.Contains(f.GetName(), "_output_")) {
					t.Errorf("%s is made up", f.GetName())
				}
			}
		}
	}
}

func TestHandler(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(collector(full()).Handler())
	defer s.Close()
	r, err := http.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK || !strings.Contains(string(text), `ftvirt_domain_epoch{domain="web"} 3`) {
		t.Errorf("%s, %v: %.500s", r.Status, err, text)
	}
}

const (
	docs       = "../../contrib/docs/metrics.md"
	tableBegin = "<!-- table: go test ./plugin/metrics -run TestDocumentation -update -->\n"
	tableEnd   = "<!-- end of the table -->\n"
)

// TestDocumentation holds the table that people read against the one of the code.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), tableBegin)
	old, tail, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no table", docs)
	}
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
	for _, m := range Table() {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Kind, strings.Join(m.Labels, ", "), m.Help)
	}
	if b.String() == old {
		return
	}
	if !*update {
		t.Fatalf("the table in %s is old; run: go test ./plugin/metrics -run TestDocumentation -update", docs)
	}
	if err := os.WriteFile(docs, []byte(head+tableBegin+b.String()+tableEnd+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}
