// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/web"
)

func TestTimelines(t *testing.T) {
	t.Parallel()
	var past timelines
	id := plugin.UUID{1}
	for i := range 2 * samplesKept {
		past.sample([]Status{{UUID: id, Lag: float64(i)}, {UUID: plugin.UUID{2}}})
	}
	if l := past.of(id).lag; len(l) != samplesKept || l[samplesKept-1] != 2*samplesKept-1 {
		t.Errorf("%d values are kept, the newest %v", len(l), l[len(l)-1])
	}
	past.sample([]Status{{UUID: id}})
	if len(past.domains) != 1 || past.of(plugin.UUID{2}).lag != nil {
		t.Error("a domain that is gone is kept")
	}
}

// The page and the metrics are served where the configuration says.
func TestServeHTTP(t *testing.T) {
	t.Parallel()
	a := testAgent(t)
	d := newDomain(a, plugin.UUID{1})
	a.domains[d.id] = d
	d.name = "web"
	d.publish(pair.Status{Role: plugin.RolePrimary, State: pair.Live, Reason: pair.BackupLost, Epoch: 3, Peer: "hostb"})
	d.record(pair.Protected, pair.ReasonNone, 3)
	d.record(pair.Live, pair.BackupLost, 3)
	a.past.sample(a.Status())
	for path, handler := range map[string]http.Handler{"/": web.Handler(a.page), "/metrics": a.metrics()} {
		l, err := listenHTTP(t.Context(), "test", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- serveHTTP(ctx, l, handler) }()
		r, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if err != nil || r.StatusCode != http.StatusOK || !strings.Contains(string(text), "live") {
			t.Errorf("%s: %s, %v", path, r.Status, err)
		}
		if path == "/" && strings.Index(string(text), ">live<") > strings.LastIndex(string(text), ">protected<") {
			t.Error("the newest event is not the first")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: it ends with %v", path, err)
		}
	}
	if l, err := listenHTTP(t.Context(), "test", ""); l != nil || err != nil {
		t.Errorf("without an address: %v, %v", l, err)
	}
	if _, err := listenHTTP(t.Context(), "metrics.listen", "192.0.2.1:1"); err == nil || !strings.Contains(err.Error(), "metrics.listen") {
		t.Errorf("an address that is not ours: %v", err)
	}
}
