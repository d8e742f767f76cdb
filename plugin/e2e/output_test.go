// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// TestOutputRule: "the primary VM may not send an output to the external world,
// until the backup VM has received and acknowledged the log entry associated
// with the operation producing the output" (FT paper, section 2.2). Acks pass a
// relay that delays and then holds them; heartbeats do not, so that the pair
// stays protected.
func TestOutputRule(t *testing.T) {
	b, hosta, hostb := bed(t)
	const ackDelay = 200 * time.Millisecond
	_, channelPort, _ := strings.Cut(config.Default().Channel.Listen, ":")
	backup, err := netip.ParseAddrPort(hostb.LoggingAddr().String() + ":" + channelPort)
	must(t, err)
	front := netip.AddrPortFrom(hosta.LoggingAddr(), 7799)
	relay, err := scenario.StartRelay(t.Context(), hosta.Node, front, backup)
	must(t, err)
	t.Cleanup(relay.Close)
	patient := func(c *config.Config) {
		c.Heartbeat.Timeout, c.Channel.ReconnectGrace = 20*time.Second, 10*time.Second
		if p, ok := c.Peers[hostb.Name]; ok {
			p.Channel = front.String()
			c.Peers[hostb.Name] = p
		}
	}
	configured(t, b, hosta, patient)
	configured(t, b, hostb, patient)

	vm, traffic := protected(t, b, hosta, hostb)
	since := time.Now()
	rate, err := vm.LinesPerSecond(t.Context(), hosta, 3*time.Second)
	must(t, err)
	plain := median(traffic.RoundTrips(since))
	t.Logf("undisturbed: replies take %v, the guest writes %.1f lines a second", plain, rate)
	if plain >= ackDelay {
		t.Errorf("replies take %v even without a delay", plain)
	}

	relay.Delay(ackDelay)
	// What was sent before may have been acknowledged before.
	must(t, scenario.Pause(t.Context(), time.Second))
	since = time.Now()
	delayedRate, err := vm.LinesPerSecond(t.Context(), hosta, 3*time.Second)
	must(t, err)
	delayed := traffic.RoundTrips(since)
	if len(delayed) < 50 {
		t.Fatalf("%d replies in three seconds", len(delayed))
	}
	t.Logf("acks delayed by %v: %d replies take %v to %v, median %v; the guest writes %.1f lines a second",
		ackDelay, len(delayed), slices.Min(delayed), slices.Max(delayed), median(delayed), delayedRate)
	if least := slices.Min(delayed); least < ackDelay {
		t.Errorf("a reply left %v after its request, before its ack", least)
	}
	if most := median(delayed); most > 2*ackDelay+plain {
		t.Errorf("replies take %v, far longer than the acks", most)
	}
	if delayedRate < 0.8*rate {
		t.Errorf("the guest writes %.1f lines a second while acks are delayed, %.1f before", delayedRate, rate)
	}

	relay.Hold(true)
	// Acks on their way have arrived by then, and what they release has left.
	must(t, scenario.Pause(t.Context(), 500*time.Millisecond))
	frames, err := vm.Frames(hosta)
	must(t, err)
	defer frames.Stop()
	before, _, _ := traffic.Counts()
	heldRate, err := vm.LinesPerSecond(t.Context(), hosta, 3*time.Second)
	must(t, err)
	after, _, _ := traffic.Counts()
	if n := frames.Count(); n != 0 || after != before {
		t.Errorf("with acks held, %d frames left the host and %d replies came", n, after-before)
	}
	if heldRate < 0.8*rate {
		t.Errorf("the guest writes %.1f lines a second while acks are held, %.1f before", heldRate, rate)
	}
	s, err := b.Agent(hosta).StatusOf(t.Context(), vm.Name)
	must(t, err)
	t.Logf("acks held: the guest writes %.1f lines a second; %s; %d packets wait", heldRate, s, s.OutputQueue)
	if s.State != "protected" {
		t.Errorf("the pair is %s", s)
	}

	relay.Delay(0)
	relay.Hold(false)
	_, err = traffic.WaitReply(t.Context(), time.Now(), 15*time.Second)
	must(t, err)
	if frames.Count() == 0 {
		t.Error("no frame was counted when they leave, so the count above means nothing")
	}
	must(t, traffic.Stop())
}

func median(list []time.Duration) time.Duration {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[len(list)/2]
}
