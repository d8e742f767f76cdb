// SPDX-License-Identifier: Apache-2.0

package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/agent"
	"ftvirt.org/ftvirt/plugin/agent/client"
)

// serve answers at a unix socket and returns a client of it.
func serve(t *testing.T, handler http.Handler) *client.Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	return client.New(socket)
}

func answer(code int, text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = w.Write([]byte(text))
	})
}

// TestSameFields makes sure that nothing of what the agent tells is lost.
func TestSameFields(t *testing.T) {
	for _, pair := range [][2]any{
		{agent.Status{}, client.Status{}},
		{agent.Entry{}, client.Event{}},
		{agent.DomainInfo{}, client.DomainInfo{}},
		{agent.DomainXML{}, client.DomainXML{}},
	} {
		theirs, ours := tags(pair[0]), tags(pair[1])
		if !reflect.DeepEqual(theirs, ours) {
			t.Errorf("%T has %v\n%T has %v", pair[0], theirs, pair[1], ours)
		}
	}
}

func tags(v any) []string {
	var list []string
	for i := range reflect.TypeOf(v).NumField() {
		list = append(list, reflect.TypeOf(v).Field(i).Tag.Get("json"))
	}
	return list
}

func TestStatus(t *testing.T) {
	c := serve(t, answer(http.StatusOK, `{"domain":"g","state":"protected","reason":"none","role":"primary","epoch":3,
		"uuid":"11111111-2222-3333-4444-555555555555","lag_ms":4.5}`))
	s, err := c.StatusOf(t.Context(), "g")
	if err != nil || s.State != "protected" || s.Epoch != 3 || s.Lag != 4.5 {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestErrors(t *testing.T) {
	c := serve(t, answer(http.StatusConflict, `{"error":"cannot","problems":[{"code":"kvm","reason":"r","remedy":"m"}]}`))
	err := c.Enable(t.Context(), "g", "hostb")
	var refusal *client.Error
	if !errors.As(err, &refusal) || refusal.Message != "cannot" || len(refusal.Problems) != 1 || errors.Is(err, client.ErrNoDomain) {
		t.Errorf("got %v", err)
	}
	c = serve(t, answer(http.StatusNotFound, `{"error":"no domain x"}`))
	if _, err := c.StatusOf(t.Context(), "x"); !errors.Is(err, client.ErrNoDomain) {
		t.Errorf("got %v, want ErrNoDomain", err)
	}
	c = serve(t, answer(http.StatusNotFound, "404 page not found\n"))
	if err := c.Disable(t.Context(), "x"); err == nil || errors.Is(err, client.ErrNoDomain) {
		t.Errorf("got %v", err)
	}
	c = serve(t, answer(http.StatusOK, `{"domain":`))
	if _, err := c.Domain(t.Context(), "g"); !errors.Is(err, client.ErrNoAgent) || !strings.Contains(err.Error(), "/v1/domains/g") {
		t.Errorf("an answer cut short: %v", err)
	}
}

func TestNoAnswer(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	for socket, says := range map[string]string{filepath.Join(dir, "none"): "no socket", dead: "nobody listens"} {
		_, err := client.New(socket).Status(t.Context())
		var noAnswer *client.NoAnswerError
		if !errors.As(err, &noAnswer) || !noAnswer.NotRunning() || !errors.Is(err, client.ErrNoAgent) ||
			!strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s: %v", socket, err)
		}
	}
	denied := &client.NoAnswerError{Socket: dead, Err: os.NewSyscallError("connect", os.ErrPermission)}
	if denied.NotRunning() || !errors.Is(denied, client.ErrNoAgent) || !strings.Contains(denied.Error(), "root") {
		t.Error(denied)
	}
	// Who does not wait knows nothing of the agent.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.New(dead).Status(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, client.ErrNoAgent) {
		t.Errorf("given up: %v", err)
	}
}

// TestRequests makes sure that each call asks for what its name says.
func TestRequests(t *testing.T) {
	var asked string
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked = strings.TrimSpace(r.Method + " " + r.URL.String() + " " + string(body))
		_, _ = w.Write([]byte("null"))
	}))
	ctx := t.Context()
	second := func(_ any, err error) error { return err }
	for want, call := range map[string]func() error{
		"GET /v1/status":                                  func() error { return second(c.Status(ctx)) },
		"GET /v1/status/a%20%2Fb":                         func() error { return second(c.StatusOf(ctx, "a /b")) },
		"GET /v1/domains":                                 func() error { return second(c.Domains(ctx)) },
		"GET /v1/domains/a%20%2Fb":                        func() error { return second(c.Domain(ctx, "a /b")) },
		"GET /v1/xml/a%20%2Fb":                            func() error { return second(c.XML(ctx, "a /b")) },
		"GET /v1/check/a%20%2Fb":                          func() error { return second(c.Check(ctx, "a /b", "")) },
		"GET /v1/check/g?peer=host+b":                     func() error { return second(c.Check(ctx, "g", "host b")) },
		`POST /v1/disable {"domain":"g"}`:                 func() error { return c.Disable(ctx, "g") },
		`POST /v1/restore {"domain":"g"}`:                 func() error { return c.Restore(ctx, "g") },
		`POST /v1/enable {"domain":"g","peer":"h"}`:       func() error { return c.Enable(ctx, "g", "h") },
		`POST /v1/prepare-next {"domain":"g","peer":"h"}`: func() error { return c.PrepareNext(ctx, "g", "h") },
		`POST /v1/prepare {"domain":"g","peer":"h"}`:      func() error { return c.Prepare(ctx, "g", "h") },
	} {
		if err := call(); err != nil || asked != want {
			t.Errorf("asked %q, want %q, %v", asked, want, err)
		}
	}
}

func TestEventsFollow(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"state":"cloning"}` + "\n" + `{"state":"protected"}` + "\n"))
		_ = http.NewResponseController(w).Flush()
		if r.URL.Query().Get("follow") != "" {
			<-r.Context().Done()
		}
	}))
	var states []string
	collect := func(e client.Event) error { states = append(states, e.State); return nil }
	if err := c.Events(t.Context(), false, collect); err != nil || len(states) != 2 || states[1] != "protected" {
		t.Errorf("%v, %v", states, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := c.Events(ctx, true, func(e client.Event) error {
		if e.State == "protected" {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	c = serve(t, answer(http.StatusOK, `{"state":"live"}`))
	if err := c.Events(t.Context(), true, collect); !errors.Is(err, client.ErrNoAgent) {
		t.Errorf("an agent that ended: %v", err)
	}
}
