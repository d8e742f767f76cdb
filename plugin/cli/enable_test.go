// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ftvirt.org/ftvirt/plugin/agent"
	"ftvirt.org/ftvirt/plugin/agent/client"
)

const (
	statusPath = "GET /v1/status/6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001"
	webText    = "6d1f0a0e-2a6c-4b0e-8f55-1f6ad1a3c001"
)

func TestEnableAndDisable(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		args    string
		running bool
		posts   string
		says    string
	}{
		{"enable web --peer hostb", true, "POST /v1/enable " + webText + " hostb", "is being cloned to hostb"},
		{"enable web --peer hostb", false, "POST /v1/prepare " + webText + " hostb", "after its start"},
		{"enable web --peer hostb --at-next-boot", true, "POST /v1/prepare-next " + webText + " hostb", "a reboot included"},
		{"enable web --peer hostb --at-next-boot", false, "POST /v1/prepare-next " + webText + " hostb", "start it"},
		{"disable web", true, "POST /v1/disable " + webText, "no longer protected"},
		{"disable web", false, "POST /v1/restore " + webText, "ordinary definition"},
	} {
		f := serve(t, map[string]any{
			"GET /v1/domains/web": agent.DomainInfo{Domain: "web", UUID: webID, Running: tc.running},
			statusPath:            client.Status{Domain: "web", UUID: webID, State: "unprotected", Reason: "not-enabled"},
			"POST /v1/enable":     struct{}{}, "POST /v1/disable": struct{}{}, "POST /v1/prepare": struct{}{}, "POST /v1/prepare-next": struct{}{}, "POST /v1/restore": struct{}{},
		})
		r := run(t, "", append(strings.Fields(tc.args), "--socket", f.socket)...)
		if r.code != exitOK || !strings.Contains(r.out, tc.says) {
			t.Errorf("%s: %+v", tc.args, r)
		}
		var posts []string
		for _, q := range f.requests() {
			if strings.HasPrefix(q, "POST ") {
				posts = append(posts, q)
			}
		}
		if !slices.Equal(posts, []string{tc.posts}) {
			t.Errorf("%s: asked %q, want %q", tc.args, posts, tc.posts)
		}
	}
}

func TestWaitProtected(t *testing.T) {
	t.Parallel()
	at := func(state, reason string, epoch int) client.Status {
		s := protected()
		s.State, s.Reason, s.Epoch = state, reason, 2
		if epoch > 0 {
			s.Epoch = 3
		}
		return s
	}
	idle, clone := at("unprotected", "not-enabled", 0), at("cloning", "initialising", 1)
	failed := at("unprotected", "clone-failed", 1)
	failed.Failure = "host hostb has no room"
	gone := errors.New("gone")
	for name, tc := range map[string]struct {
		before client.Status
		seen   []any // a status each, or an error
		shown  int
		err    error
		says   string
	}{
		"protected":             {idle, []any{idle, clone, clone, at("protected", "none", 1)}, 2, nil, ""},
		"at once":               {idle, []any{at("protected", "none", 1)}, 0, nil, ""},
		"failed":                {idle, []any{clone, failed}, 1, errNotProtected, "no room"},
		"failed too fast":       {idle, []any{failed}, 0, errNotProtected, "no room"},
		"failed before":         {failed, []any{failed, clone, at("protected", "none", 1)}, 1, nil, ""},
		"enabled when live":     {at("live", "backup-lost", 0), []any{at("live", "backup-lost", 0), clone, at("protected", "none", 1)}, 1, nil, ""},
		"broken after switch":   {idle, []any{clone, at("going-live", "backup-lost", 1), at("live", "backup-lost", 1)}, 1, errNotProtected, "live (backup-lost)"},
		"protected already":     {at("protected", "none", 1), []any{at("protected", "none", 1)}, 0, nil, ""},
		"begun already":         {clone, []any{clone, at("protected", "none", 1)}, 1, nil, ""},
		"agent ended":           {idle, []any{clone, gone}, 1, gone, ""},
		"never taken up":        {idle, []any{idle}, 0, context.DeadlineExceeded, ""},
		"never comes to an end": {idle, []any{clone}, -1, context.DeadlineExceeded, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				asked, shown := 0, 0
				_, err := waitProtected(ctx, tc.before, func(client.Status) { shown++ }, func(context.Context) (client.Status, error) {
					next := tc.seen[min(asked, len(tc.seen)-1)]
					asked++
					if err, ok := next.(error); ok {
						return client.Status{}, err
					}
					return next.(client.Status), nil
				})
				if !errors.Is(err, tc.err) || err != nil && !strings.Contains(err.Error(), tc.says) {
					t.Errorf("got %v, want %v", err, tc.err)
				}
				if tc.shown >= 0 && shown != tc.shown {
					t.Errorf("shown %d times, want %d", shown, tc.shown)
				}
			})
		})
	}
}

func TestEnableWait(t *testing.T) {
	t.Parallel()
	idle := protected()
	idle.State = "unprotected"
	f := serve(t, map[string]any{
		"GET /v1/domains/web": agent.DomainInfo{Domain: "web", UUID: webID, Running: true},
		statusPath:            idle,
		"POST /v1/enable":     struct{}{},
	})
	// The status never changes, as if the agent did not take the wish up.
	r := run(t, "", "enable", "web", "--peer", "hostb", "--wait", "--timeout", "20ms", "--socket", f.socket)
	if r.code != exitFailure || r.out != "" || !strings.Contains(r.errors, "20ms") || !strings.Contains(r.errors, "ftvirt status web") {
		t.Errorf("%+v", r)
	}
}

func TestProgress(t *testing.T) {
	t.Parallel()
	var plain, screen bytes.Buffer
	lines, bar := newProgress(&plain), &progress{w: &screen, terminal: true}
	for _, done := range []int64{0, 3, 31, 38, 100} {
		s := client.Status{Domain: "web", Peer: "hostb", ClonePhase: "memory", CloneTransferred: done, CloneRemaining: 100 - done}
		lines.show(s)
		bar.show(s)
	}
	lines.done()
	bar.done()
	want := "cloning web to hostb: memory 0 %\ncloning web to hostb: memory 30 %\ncloning web to hostb: memory 100 %\n"
	if plain.String() != want {
		t.Errorf("lines:\n%s", plain.String())
	}
	if s := screen.String(); strings.Count(s, "\n") != 1 || !strings.HasSuffix(s, "["+strings.Repeat("#", barWidth)+"] 100 % memory\n") {
		t.Errorf("bar: %q", s)
	}
	for _, s := range []client.Status{{}, {CloneTransferred: -1, CloneRemaining: 5}, {CloneTransferred: 1, CloneRemaining: -1}} {
		if percent(s) != 0 {
			t.Errorf("%+v is %d %%", s, percent(s))
		}
	}
}
