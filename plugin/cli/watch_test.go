// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
)

func TestSparkline(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		values []float64
		width  int
		want   string
	}{
		{nil, 5, ""},
		{[]float64{0, 0}, 5, "▁▁"},
		{[]float64{0, 1, 2, 4, 8}, 5, "▁▂▃▅█"},
		{[]float64{9, 9, 1, 8}, 2, "▂█"},
		{[]float64{-1, 1}, 5, "▁█"},
	} {
		if got := sparkline(tc.values, tc.width); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.values, got, tc.want)
		}
	}
}

func TestWatchFrame(t *testing.T) {
	t.Parallel()
	v := newWatch("")
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	s := protected()
	for i := range 2 * watchKept {
		s.Lag = float64(i % 16)
		v.add([]client.Status{s, cloning()})
	}
	if h := v.past[webID.String()]; len(h.lag) != watchKept {
		t.Errorf("%d values are kept", len(h.lag))
	}
	golden(t, "watch.text", v.frame("hosta", []client.Status{cloning(), live(), s}, nil, now, 80))
	for _, l := range strings.Split(v.frame("hosta", []client.Status{live(), s}, nil, now, 30), "\n") {
		if n := len([]rune(l)); n > 30 {
			t.Errorf("a line of %d cells on a terminal of 30: %q", n, l)
		}
	}
	if text := v.frame("hosta", []client.Status{s}, errors.New("the agent\ndoes not answer"), now, 80); !strings.Contains(text, "the agent does not answer") || !strings.Contains(text, "web") {
		t.Errorf("while the agent is away: %s", text)
	}
	if text := v.frame("hosta", nil, nil, now, 80); !strings.Contains(text, "no domain") {
		t.Errorf("without domains: %s", text)
	}
	if v.add(nil); len(v.past) != 0 {
		t.Error("domains that are gone are kept")
	}
}

// cancelling ends a context when something was written.
type cancelling struct {
	text   bytes.Buffer
	cancel context.CancelFunc
}

func (c *cancelling) Write(b []byte) (int, error) {
	defer c.cancel()
	return c.text.Write(b)
}

func TestWatchEnds(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{"GET /v1/status": []client.Status{protected()}, "GET /v1/status/web": protected()})
	for _, domain := range []string{"", "web"} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out := &cancelling{cancel: cancel}
		if err := newWatch(domain).run(ctx, out, client.New(f.socket)); err != nil || !strings.Contains(out.text.String(), "web  protected") {
			t.Errorf("%v: %q", err, out.text.String())
		}
		if strings.Contains(out.text.String(), "\x1b") {
			t.Error("control sequences on what is no terminal")
		}
		cancel()
	}
	if r := run(t, "", "status", "--watch", "--socket", "/nonexistent/a.sock"); r.code != exitAgent {
		t.Errorf("without an agent: %+v", r)
	}
	if r := run(t, "", "status", "--watch", "-o", "json", "--socket", f.socket); r.code != exitUsage {
		t.Errorf("two formats: %+v", r)
	}
}

func TestStatusCSV(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{
		"GET /v1/status": []client.Status{cloning(), live(), protected()}, "GET /v1/status/web": protected(),
	})
	r := run(t, "", "status", "-o", "csv", "--socket", f.socket)
	golden(t, "status.csv", r.out)
	rows, err := csv.NewReader(strings.NewReader(r.out)).ReadAll()
	if err != nil || len(rows) != 4 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	// The same keys as JSON has.
	text, err := json.Marshal(client.Status{Peer: "x", ClonePhase: "x", CloneTransferred: 1, CloneRemaining: 1, Failure: "x", Retry: 1})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]any{}
	if err := json.Unmarshal(text, &keys); err != nil {
		t.Fatal(err)
	}
	if len(rows[0]) != len(keys) {
		t.Errorf("columns %v, keys %v", rows[0], keys)
	}
	for _, k := range rows[0] {
		if _, ok := keys[k]; !ok {
			t.Errorf("column %q is no key", k)
		}
	}
	if r := run(t, "", "status", "web", "-o", "csv", "--socket", f.socket); r.code != exitOK || strings.Count(r.out, "\n") != 2 {
		t.Errorf("one domain: %+v", r)
	}
}

func TestStatusTemplate(t *testing.T) {
	t.Parallel()
	f := serve(t, map[string]any{
		"GET /v1/status": []client.Status{cloning(), live(), protected()}, "GET /v1/status/web": protected(),
	})
	r := run(t, "", "status", "--format", "{{.domain}}\t{{.state}} {{.position}}{{with .failure}} {{.}}{{end}}", "--socket", f.socket)
	if want := "mail\tcloning 0\ndatabase\tlive 0 migrate: connection lost\nweb\tprotected 1048576\n"; r.code != exitOK || r.out != want {
		t.Errorf("%+v, want %q", r, want)
	}
	if r := run(t, "", "status", "web", "--format", "{{json .}}", "--socket", f.socket); r.code != exitOK || !json.Valid([]byte(r.out)) {
		t.Errorf("json: %+v", r)
	}
	for _, bad := range []string{"{{", "{{.nothing}}", "{{nothing}}"} {
		if r := run(t, "", "status", "--format", bad, "--socket", f.socket); r.code != exitUsage || r.out != "" {
			t.Errorf("%s: %+v", bad, r)
		}
	}
}
