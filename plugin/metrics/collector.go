// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"ftvirt.org/ftvirt/plugin"
)

// Kind is what Prometheus calls the type of a metric.
type Kind string

// The kinds in use.
const (
	Counter Kind = "counter"
	Gauge   Kind = "gauge"
	Hist    Kind = "histogram"
)

// sample is one value of a metric, with its labels besides "domain".
type sample struct {
	value  float64
	labels []string
	hist   distribution
}

// Metric is one row of the table of all metrics.
type Metric struct {
	Name   string
	Kind   Kind
	Labels []string
	Help   string

	host   func(Host) []sample
	domain func(*Collector, Domain) []sample
}

func one(v float64, labels ...string) []sample { return []sample{{value: v, labels: labels}} }

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// set gives 1 to the one that is, and 0 to the others.
func set(all []string, is string) []sample {
	var list []sample
	for _, s := range all {
		list = append(list, sample{value: truth(s == is), labels: []string{s}})
	}
	return list
}

var roles = []string{string(plugin.RoleNone), string(plugin.RolePrimary), string(plugin.RoleBackup)}

// ofLog, ofOutput and ofClone adapt what reads a part that may not be there.
func ofLog(f func(*Log) float64) func(*Collector, Domain) []sample {
	return func(_ *Collector, d Domain) []sample {
		if d.Log == nil {
			return nil
		}
		return one(f(d.Log))
	}
}

func ofOutput(f func(*Output) float64) func(*Collector, Domain) []sample {
	return func(_ *Collector, d Domain) []sample {
		if d.Output == nil {
			return nil
		}
		return one(f(d.Output))
	}
}

func ofClone(f func(*Clone) int64) func(*Collector, Domain) []sample {
	return func(_ *Collector, d Domain) []sample {
		if d.Clone == nil {
			return nil
		}
		return one(float64(f(d.Clone)))
	}
}

func ofDomain(f func(Domain) float64) func(*Collector, Domain) []sample {
	return func(_ *Collector, d Domain) []sample { return one(f(d)) }
}

// table is all there is. Metrics of domains have the label "domain" first.
var table = []Metric{
	{Name: "ftvirt_domain_info", Kind: Gauge, Labels: []string{"uuid", "peer"},
		Help:   "Always 1; tells a domain's UUID and the host of its other copy.",
		domain: func(_ *Collector, d Domain) []sample { return one(1, d.UUID.String(), d.Peer) }},
	{Name: "ftvirt_domain_role", Kind: Gauge, Labels: []string{"role"},
		Help:   "1 for the role that this host plays for the domain, 0 for the others.",
		domain: func(_ *Collector, d Domain) []sample { return set(roles, string(d.Role)) }},
	{Name: "ftvirt_domain_state", Kind: Gauge, Labels: []string{"state"},
		Help:   "1 for the state of the domain's pair as this host sees it, 0 for the others.",
		domain: func(c *Collector, d Domain) []sample { return set(c.states, d.State) }},
	{Name: "ftvirt_domain_epoch", Kind: Gauge,
		Help:   "The newest epoch that this host took part in.",
		domain: ofDomain(func(d Domain) float64 { return float64(d.Epoch) })},
	{Name: "ftvirt_domain_session_connected", Kind: Gauge,
		Help:   "Whether the session with the peer's agent is up.",
		domain: ofDomain(func(d Domain) float64 { return truth(d.Connected) })},
	{Name: "ftvirt_domain_running", Kind: Gauge,
		Help:   "Whether the copy here runs: 0 if it is paused, as by a full disk or by hand, if its QEMU does not run, or if there is none.",
		domain: ofDomain(func(d Domain) float64 { return truth(d.Running) })},
	{Name: "ftvirt_domain_backup_failing", Kind: Gauge,
		Help:   "Whether the newest try to give the domain a backup failed; it runs without one.",
		domain: ofDomain(func(d Domain) float64 { return truth(d.Failing) })},
	{Name: "ftvirt_domain_peer_silence_seconds", Kind: Gauge,
		Help: "How long neither a heartbeat nor log nor an ack came from the peer; while there is a pair.",
		domain: func(_ *Collector, d Domain) []sample {
			if d.Silence == nil {
				return nil
			}
			return one(d.Silence.Seconds())
		}},
	{Name: "ftvirt_domain_instructions_total", Kind: Counter,
		Help: "Instructions that the guest executed, as this host's copy counts them.",
		domain: func(_ *Collector, d Domain) []sample {
			if d.Instructions == 0 {
				return nil // there is no QEMU
			}
			return one(float64(d.Instructions))
		}},

	{Name: "ftvirt_domain_log_bytes_total", Kind: Counter,
		Help:   "Bytes of the epoch's log: logged on the primary, replayed on the backup. Each epoch begins at 0.",
		domain: ofLog(func(l *Log) float64 { return float64(l.Position) })},
	{Name: "ftvirt_domain_log_acknowledged_bytes_total", Kind: Counter,
		Help:   "Bytes of the epoch's log that the backup's agent acknowledged. Each epoch begins at 0.",
		domain: ofLog(func(l *Log) float64 { return float64(l.Acked) })},
	{Name: "ftvirt_domain_lag_seconds", Kind: Gauge,
		Help:   "How far the backup's execution is behind the log that it has, at the worst of the last tenth of a second.",
		domain: ofLog(func(l *Log) float64 { return l.Lag.Seconds() })},
	{Name: "ftvirt_domain_slowed_ratio", Kind: Gauge,
		Help:   "Part of its time that the primary pauses so that the backup keeps up.",
		domain: ofLog(func(l *Log) float64 { return l.Slowed })},
	{Name: "ftvirt_domain_log_held_seconds", Kind: Gauge,
		Help:   "How long the primary's guest has been waiting for room in the log; 0 if it is not.",
		domain: ofLog(func(l *Log) float64 { return l.Held.Seconds() })},
	{Name: "ftvirt_domain_ack_latency_seconds", Kind: Hist,
		Help: "How long pieces of the log waited for the backup's ack, from the primary's agent; since it was started.",
		domain: func(_ *Collector, d Domain) []sample {
			if d.Ack == nil {
				return nil
			}
			return []sample{{hist: d.Ack.read()}}
		}},

	{Name: "ftvirt_domain_output_delay_seconds", Kind: Hist,
		Help: "How long packets of the primary waited in the output gate for the ack of what led to them; since its QEMU was started.",
		domain: func(_ *Collector, d Domain) []sample {
			if d.Output == nil || len(d.Output.Delays) == 0 {
				return nil
			}
			return []sample{{hist: distribution{d.Output.Bounds, d.Output.Delays, d.Output.Delay}}}
		}},
	{Name: "ftvirt_domain_output_delay_max_seconds", Kind: Gauge,
		Help:   "The longest wait of a packet that left the output gate in the last tenth of a second.",
		domain: ofOutput(func(o *Output) float64 { return o.DelayMax.Seconds() })},
	{Name: "ftvirt_domain_output_queue_packets", Kind: Gauge,
		Help:   "Packets that wait in the output gate.",
		domain: ofOutput(func(o *Output) float64 { return float64(o.Queued) })},
	{Name: "ftvirt_domain_output_released_packets_total", Kind: Counter,
		Help:   "Packets that left the output gate, since the primary's QEMU was started.",
		domain: ofOutput(func(o *Output) float64 { return float64(o.Released) })},
	{Name: "ftvirt_domain_output_dropped_packets_total", Kind: Counter,
		Help:   "Packets that were lost because the output gate was full, since the primary's QEMU was started.",
		domain: ofOutput(func(o *Output) float64 { return float64(o.Dropped) })},

	{Name: "ftvirt_domain_clone_transferred_bytes", Kind: Gauge,
		Help:   "Bytes that the phase of the clone under way has transferred.",
		domain: ofClone(func(c *Clone) int64 { return c.Transferred })},
	{Name: "ftvirt_domain_clone_remaining_bytes", Kind: Gauge,
		Help:   "Bytes that the phase of the clone under way has still to transfer.",
		domain: ofClone(func(c *Clone) int64 { return c.Remaining })},
	{Name: "ftvirt_domain_clone_pause_seconds", Kind: Gauge,
		Help:   "How long the newest clone from this host stopped the guest; 0 before the first.",
		domain: ofDomain(func(d Domain) float64 { return d.ClonePause.Seconds() })},
	{Name: "ftvirt_domain_clones_total", Kind: Counter, Labels: []string{"result"},
		Help: "Clones that made a pair (done) or did not (failed), as this host's agent saw it since it was started.",
		domain: func(_ *Collector, d Domain) []sample {
			return append(one(float64(d.Events.ClonesDone), "done"), one(float64(d.Events.ClonesFailed), "failed")...)
		}},
	{Name: "ftvirt_domain_failovers_total", Kind: Counter,
		Help:   "How often a backup on this host went live, since its agent was started.",
		domain: ofDomain(func(d Domain) float64 { return float64(d.Events.Failovers) })},
	{Name: "ftvirt_domain_backups_lost_total", Kind: Counter,
		Help:   "How often the primary on this host went on alone, on request or not, since its agent was started.",
		domain: ofDomain(func(d Domain) float64 { return float64(d.Events.BackupsLost) })},
	{Name: "ftvirt_domain_divergences_total", Kind: Counter,
		Help:   "Backups that left the primary's execution, as this host's agent saw it since it was started.",
		domain: ofDomain(func(d Domain) float64 { return float64(d.Events.Divergences) })},
	{Name: "ftvirt_domain_arbiter_answers_total", Kind: Counter, Labels: []string{"answer"},
		Help: "Answers of the arbiter to this host's wish to go on alone (won, lost or unavailable), since its agent was started.",
		domain: func(_ *Collector, d Domain) []sample {
			e := d.Events
			return slices.Concat(one(float64(e.ArbiterWon), "won"), one(float64(e.ArbiterLost), "lost"), one(float64(e.ArbiterAbsent), "unavailable"))
		}},

	{Name: "ftvirt_heartbeats_sent_total", Kind: Counter,
		Help: "Heartbeats that the agent sent since it was started.",
		host: func(h Host) []sample { return one(float64(h.Heartbeats.Sent)) }},
	{Name: "ftvirt_heartbeats_send_errors_total", Kind: Counter,
		Help: "Heartbeats that the agent could not send since it was started.",
		host: func(h Host) []sample { return one(float64(h.Heartbeats.SendErrors)) }},
	{Name: "ftvirt_heartbeats_received_total", Kind: Counter,
		Help: "Heartbeats of peers that the agent accepted since it was started.",
		host: func(h Host) []sample { return one(float64(h.Heartbeats.Received)) }},
	{Name: "ftvirt_heartbeats_refused_total", Kind: Counter, Labels: []string{"why"},
		Help: "Datagrams that were refused: no heartbeat (garbage), of no pair here (unknown), with a wrong key (forged), or seen before (replayed).",
		host: func(h Host) []sample {
			b := h.Heartbeats
			return slices.Concat(one(float64(b.Garbage), "garbage"), one(float64(b.Unknown), "unknown"),
				one(float64(b.Forged), "forged"), one(float64(b.Replayed), "replayed"))
		}},
}

// Table lists all metrics of this package, in the order of the documentation.
func Table() []Metric {
	list := slices.Clone(table)
	for i := range list {
		list[i].Labels = list[i].labels()
	}
	return list
}

// labels are all of a metric's.
func (m Metric) labels() []string {
	if m.domain == nil {
		return m.Labels
	}
	return append([]string{"domain"}, m.Labels...)
}

// Collector implements [prometheus.Collector].
type Collector struct {
	states []string
	host   func() Host
	descs  []*prometheus.Desc // of table
}

// New makes a collector that asks host each time. States are all names that a
// domain's state can have.
func New(states []string, host func() Host) *Collector {
	c := &Collector{states: states, host: host}
	for _, m := range table {
		c.descs = append(c.descs, prometheus.NewDesc(m.Name, m.Help, m.labels(), nil))
	}
	return c
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		to <- d
	}
}

// Collect implements [prometheus.Collector].
func (c *Collector) Collect(to chan<- prometheus.Metric) {
	h := c.host()
	for i, m := range table {
		if m.host != nil {
			for _, s := range m.host(h) {
				to <- s.metric(c.descs[i], m.Kind, s.labels)
			}
			continue
		}
		seen := map[string]bool{}
		for _, d := range h.Domains {
			// Two that have one name, as when one was undefined and another
			// made, must not spoil the whole answer.
			d.Name, d.Peer = strings.ToValidUTF8(d.Name, "?"), strings.ToValidUTF8(d.Peer, "?")
			if seen[d.Name] {
				continue
			}
			seen[d.Name] = true
			for _, s := range m.domain(c, d) {
				to <- s.metric(c.descs[i], m.Kind, append([]string{d.Name}, s.labels...))
			}
		}
	}
}

func (s sample) metric(d *prometheus.Desc, k Kind, labels []string) prometheus.Metric {
	switch k {
	case Hist:
		count, buckets := s.hist.cumulative()
		return prometheus.MustNewConstHistogram(d, count, s.hist.sum.Seconds(), buckets, labels...)
	case Counter:
		return prometheus.MustNewConstMetric(d, prometheus.CounterValue, s.value, labels...)
	}
	return prometheus.MustNewConstMetric(d, prometheus.GaugeValue, s.value, labels...)
}

// Registry has the collector's metrics, and those of Go and of the process.
func (c *Collector) Registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Handler answers GET /metrics.
func (c *Collector) Handler() http.Handler {
	return promhttp.HandlerFor(c.Registry(), promhttp.HandlerOpts{Timeout: answerTimeout, MaxRequestsInFlight: maxInFlight})
}

const (
	// answerTimeout is below the ten seconds after which Prometheus gives up.
	answerTimeout = 5 * time.Second
	maxInFlight   = 4
)
