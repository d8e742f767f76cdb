// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/control"
	"ftvirt.org/ftvirt/plugin/metrics"
	"ftvirt.org/ftvirt/plugin/pair"
)

func TestTally(t *testing.T) {
	t.Parallel()
	type change struct {
		to       pair.State
		reason   pair.Reason
		epoch    plugin.Epoch
		promoted bool
	}
	for name, tc := range map[string]struct {
		changes []change
		want    metrics.Events
	}{
		"a backup goes live": {
			[]change{
				{pair.Cloning, pair.Initialising, 1, true}, {pair.Protected, pair.ReasonNone, 1, true},
				{pair.GoingLive, pair.LostConnection, 1, true}, {pair.GoingLive, pair.ArbiterUnavailable, 1, true},
				{pair.Live, pair.LostConnection, 1, true},
			},
			metrics.Events{ClonesDone: 1, Failovers: 1},
		},
		"a backup diverges twice": {
			[]change{
				{pair.Cloning, pair.Initialising, 1, false}, {pair.Protected, pair.ReasonNone, 1, false},
				{pair.GoingLive, pair.Divergence, 1, false}, {pair.Live, pair.Divergence, 1, false},
				{pair.Cloning, pair.Initialising, 2, false}, {pair.Protected, pair.ReasonNone, 2, false},
				{pair.GoingLive, pair.Divergence, 2, false}, {pair.Live, pair.Divergence, 2, false},
			},
			metrics.Events{ClonesDone: 2, BackupsLost: 2, Divergences: 2},
		},
		"a clone fails": {
			[]change{{pair.Cloning, pair.Initialising, 1, false}, {pair.Unprotected, pair.CloneFailed, 1, false}},
			metrics.Events{ClonesFailed: 1},
		},
		"protection is taken away": {
			[]change{
				{pair.Cloning, pair.Initialising, 1, false}, {pair.Protected, pair.ReasonNone, 1, false},
				{pair.GoingLive, pair.UserRequest, 1, false}, {pair.Live, pair.UserRequest, 1, false},
				{pair.Unprotected, pair.UserRequest, 1, false},
			},
			metrics.Events{ClonesDone: 1},
		},
		"an agent that was restarted finds a copy alone": {
			[]change{{pair.GoingLive, pair.AgentRestarted, 4, false}, {pair.Live, pair.AgentRestarted, 4, false}},
			metrics.Events{},
		},
	} {
		var got tally
		for _, c := range tc.changes {
			got.happened(c.to, c.reason, c.epoch, c.promoted)
		}
		if got.read() != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got.read(), tc.want)
		}
	}
}

// Each piece is observed once, when the ack reaches its end.
func TestAckTimer(t *testing.T) {
	t.Parallel()
	h := metrics.NewHistogram(control.DelayBounds[:])
	count := func() uint64 {
		host := func() metrics.Host { return metrics.Host{Domains: []metrics.Domain{{Name: "web", Ack: h}}} }
		families, err := metrics.New(nil, host).Registry().Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "ftvirt_domain_ack_latency_seconds" {
				return f.GetMetric()[0].GetHistogram().GetSampleCount()
			}
		}
		t.Fatal("there is no histogram")
		return 0
	}
	var timer ackTimer
	now := time.Unix(1000, 0)
	for i := range 3 {
		timer.send(plugin.Position(10*(i+1)), now)
	}
	for _, step := range []struct {
		ack  plugin.Position
		want uint64
	}{{9, 0}, {10, 1}, {10, 1}, {29, 2}, {30, 3}, {99, 3}} {
		if timer.ack(step.ack, now.Add(time.Millisecond), h); count() != step.want {
			t.Errorf("after the ack of %d: %d observed, want %d", step.ack, count(), step.want)
		}
	}
	for range 2 * timedPieces {
		timer.send(100, now)
	}
	if len(timer.sent) != timedPieces {
		t.Errorf("%d pieces are kept", len(timer.sent))
	}
	timer.reset()
	if timer.ack(100, now, h); count() != 3 {
		t.Error("a piece of a session that broke is timed")
	}
}

// What the agent shows is well-formed, also before anything has happened.
func TestMeasure(t *testing.T) {
	t.Parallel()
	a := testAgent(t)
	d := newDomain(a, plugin.UUID{1})
	a.domains[d.id] = d
	d.name = "web"
	d.publish(pair.Status{Role: plugin.RolePrimary, State: pair.Protected, Epoch: 3, Peer: "hostb"})
	h := a.measure()
	if len(h.Domains) != 1 || h.Domains[0].State != "protected" || h.Domains[0].Epoch != 3 || h.Domains[0].Log != nil {
		t.Fatalf("measured %+v", h)
	}
	var states []string
	for _, s := range pair.States() {
		states = append(states, s.String())
	}
	problems, err := testutil.GatherAndLint(metrics.New(states, a.measure).Registry())
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}
