// SPDX-License-Identifier: Apache-2.0

package detect

import (
	"errors"
	"testing"
	"time"
)

const ms = time.Millisecond

// action is something that happens to a monitor at a time.
type action struct {
	at   time.Duration
	what string // "tick", "beat" or "progress"
	want Liveness
}

// every ticks each interval in (from, to].
func every(interval, from, to time.Duration, want Liveness) []action {
	var as []action
	for at := from + interval; at <= to; at += interval {
		as = append(as, action{at, "tick", want})
	}
	return as
}

func TestMonitor(t *testing.T) {
	for _, c := range []struct {
		name  string
		steps [][]action
	}{
		{"never heard is never dead", [][]action{every(50*ms, 0, 10*time.Second, Unknown)}},
		{"dead after 500 ms of silence on both", [][]action{
			{{0, "beat", Alive}},
			every(50*ms, 0, 150*ms, Alive),
			every(50*ms, 150*ms, 450*ms, Suspected),
			every(50*ms, 450*ms, 5*time.Second, Dead),
			{{5001 * ms, "beat", Alive}, {5050 * ms, "tick", Alive}},
		}},
		{"log alone keeps alive", [][]action{
			{{0, "beat", Alive}},
			every(50*ms, 0, 150*ms, Alive),
			{{160 * ms, "progress", Alive}},
			every(50*ms, 150*ms, 300*ms, Alive),
			{{310 * ms, "progress", Alive}},
			every(50*ms, 300*ms, 500*ms, Alive),
			every(50*ms, 500*ms, 800*ms, Suspected),
			{{850 * ms, "tick", Dead}},
		}},
		{"heartbeats alone keep alive", [][]action{
			{{0, "progress", Alive}},
			every(50*ms, 0, 150*ms, Alive),
			{{190 * ms, "beat", Alive}},
			every(50*ms, 150*ms, 350*ms, Alive),
		}},
		{"suspicion is taken back", [][]action{
			{{0, "beat", Alive}},
			every(50*ms, 0, 150*ms, Alive),
			{{200 * ms, "tick", Suspected}, {230 * ms, "progress", Alive}, {250 * ms, "tick", Alive}},
		}},
		{"a clock that is put forward by an hour accuses nobody", [][]action{
			{{0, "beat", Alive}},
			every(50*ms, 0, 100*ms, Alive),
			{{time.Hour + 150*ms, "tick", Alive}, {time.Hour + 160*ms, "beat", Alive}},
			every(50*ms, time.Hour+150*ms, time.Hour+300*ms, Alive),
		}},
		{"one that is put back by an hour acquits nobody", [][]action{
			{{time.Hour, "tick", Unknown}, {time.Hour, "beat", Alive}},
			every(50*ms, time.Hour, time.Hour+100*ms, Alive),
			{{150 * ms, "tick", Alive}},
			every(50*ms, 150*ms, 200*ms, Alive),
			every(50*ms, 200*ms, 500*ms, Suspected),
			every(50*ms, 500*ms, 2*time.Second, Dead),
		}},
		{"an agent that was stopped for 10 s accuses nobody", [][]action{
			{{0, "beat", Alive}},
			every(50*ms, 0, 100*ms, Alive),
			{{10100 * ms, "tick", Alive}, {10101 * ms, "beat", Alive}, {10150 * ms, "tick", Alive}},
		}},
		{"nor does one whose ticks all come a second late", [][]action{
			{{0, "beat", Alive}},
			every(time.Second, 0, 2*time.Second, Alive),
			every(time.Second, 2*time.Second, 6*time.Second, Suspected),
			{{7 * time.Second, "tick", Dead}},
		}},
		{"ticks that come in a burst do not add up", [][]action{
			{{0, "beat", Alive}},
			{{300 * ms, "tick", Alive}, {300 * ms, "tick", Alive}, {300 * ms, "tick", Alive}, {300 * ms, "tick", Alive}},
		}},
		{"a clock that goes back adds nothing", [][]action{
			{{0, "beat", Alive}},
			{{150 * ms, "tick", Alive}, {-time.Hour, "tick", Alive}, {-time.Hour + 50*ms, "tick", Alive}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			m, err := NewMonitor(DefaultConfig(), start)
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range c.steps {
				for _, a := range part {
					switch a.what {
					case "tick":
						if got := m.Tick(start.Add(a.at)); got != m.Liveness() {
							t.Fatalf("at %v: tick says %v, then %v", a.at, got, m.Liveness())
						}
					case "beat":
						m.Heartbeat(start.Add(a.at))
					case "progress":
						m.Progress(start.Add(a.at))
					}
					if got := m.Liveness(); got != a.want {
						t.Fatalf("at %v, after %s: %v (silence %v), want %v", a.at, a.what, got, m.Silence(), a.want)
					}
				}
			}
		})
	}
}

func TestMonitorLateness(t *testing.T) {
	start := time.Unix(0, 0)
	m, err := NewMonitor(DefaultConfig(), start)
	if err != nil {
		t.Fatal(err)
	}
	m.Tick(start.Add(60 * ms))
	if m.Lateness() != 0 {
		t.Errorf("lateness %v after a tick that was on time", m.Lateness())
	}
	m.Tick(start.Add(1060 * ms))
	if want := 925 * ms; m.Lateness() != want {
		t.Errorf("lateness %v, want %v", m.Lateness(), want)
	}
}

// TestMonitorForever: silence does not overflow.
func TestMonitorForever(t *testing.T) {
	m, err := NewMonitor(DefaultConfig(), time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	m.Heartbeat(time.Unix(0, 0))
	m.heartbeat.silence, m.progress.silence = 1<<62, 1<<62
	for i := range 10 {
		if got := m.Tick(time.Unix(int64(i), 0)); got != Dead || m.Silence() < 0 {
			t.Fatalf("%v, silence %v", got, m.Silence())
		}
	}
}

func TestConfig(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no interval":            func(c *Config) { c.Interval = 0 },
		"suspect at one loss":    func(c *Config) { c.Suspect = 60 * ms },
		"timeout before suspect": func(c *Config) { c.Timeout = 150 * ms },
		"timeout too near":       func(c *Config) { c.Suspect, c.Timeout = 100*ms, 150*ms },
	} {
		c := DefaultConfig()
		change(&c)
		if err := c.Validate(); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
		if _, err := NewMonitor(c, time.Time{}); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: NewMonitor: %v", name, err)
		}
	}
}
