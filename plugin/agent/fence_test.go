// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
)

// A backup's host lets nobody begin or go on with an epoch that the arbiter does
// not hold open for exactly these two hosts.
func TestChannelIsFenced(t *testing.T) {
	t.Parallel()
	id, decided := plugin.UUID{0xf7, 1}, plugin.UUID{0xf7, 2}
	arb := arbitertest.NewMemory()
	for _, domain := range []plugin.UUID{id, decided} {
		first, err := arb.Open(t.Context(), domain, "hosta", "hostb")
		if err == nil {
			err = arb.Acquire(t.Context(), domain, first, "hosta")
		}
		if err == nil {
			_, err = arb.Open(t.Context(), domain, "hosta", "hostb")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const newest = 2
	if err := arb.Acquire(t.Context(), decided, newest, "hosta"); err != nil {
		t.Fatal(err)
	}
	a := &Agent{cfg: config.Config{Host: "hostb"}, arbiter: arb, started: time.Now().Add(-time.Hour)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- channel.Serve(ctx, channel.Plain(), ln, channel.DefaultConfig(), func(ctx context.Context, in *channel.Incoming) {
			// It has the replica of the newest epoch, from host A.
			d := &domain{a: a, id: in.Hello.Domain}
			if in.Hello.Purpose != channel.PurposeSession || in.Hello.Target != "" {
				d.backup = &backup{d: d, epoch: newest, peer: "hosta"}
			}
			d.serve(ctx, in)
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	session := channel.Hello{Purpose: channel.PurposeSession, From: "hosta", To: "hostb", Domain: id, Epoch: newest}
	for name, change := range map[string]func(*channel.Hello){
		"a session of a past epoch":          func(h *channel.Hello) { h.Epoch-- },
		"a session of an epoch to come":      func(h *channel.Hello) { h.Epoch++ },
		"a session of a decided epoch":       func(h *channel.Hello) { h.Domain = decided },
		"a session from a third host":        func(h *channel.Hello) { h.From = "hostc" },
		"going on with a past epoch":         func(h *channel.Hello) { h.Target, h.Epoch = "x", h.Epoch-1 },
		"going on from a third host":         func(h *channel.Hello) { h.Target, h.From = "x", "hostc" },
		"a tunnel of a past epoch":           func(h *channel.Hello) { h.Purpose, h.Epoch = channel.PurposeNBD, h.Epoch-1 },
		"a tunnel of an epoch to come":       func(h *channel.Hello) { h.Purpose, h.Epoch = channel.PurposeNBD, h.Epoch+1 },
		"a tunnel of the epoch from a third": func(h *channel.Hello) { h.Purpose, h.From = channel.PurposeNBD, "hostc" },
	} {
		t.Run(name, func(t *testing.T) {
			hello := session
			change(&hello)
			conn, _, err := channel.Dial(t.Context(), channel.Plain(), ln.Addr().String(), hello, channel.DefaultConfig())
			if err == nil {
				_ = conn.Close()
			}
			if e, ok := errors.AsType[*channel.RefusedError](err); !ok || e.Code != channel.RefuseEpoch {
				t.Errorf("got %v, want a refusal of the epoch", err)
			}
		})
	}
}
