// SPDX-License-Identifier: Apache-2.0

// Package client talks to the agent of a host through its admin socket. It
// needs neither libvirt nor the agent's code, so that any program can use it.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
)

// Errors that callers tell apart.
var (
	// ErrNoAgent: nothing answers at the admin socket.
	ErrNoAgent = errors.New("the agent cannot be reached; is 'ftvirt agent' running on this host?")
	// ErrNoDomain is wrapped by an *Error about a domain that the host lacks.
	ErrNoDomain = errors.New("no such domain")
)

// Status is what a host tells of one domain. Durations are in milliseconds,
// positions in bytes of the epoch's log, rates in bytes per second. See the
// agent's Status for what each field means.
type Status struct {
	Domain string       `json:"domain" yaml:"domain"`
	UUID   plugin.UUID  `json:"uuid" yaml:"uuid"`
	Host   string       `json:"host" yaml:"host"`
	Role   plugin.Role  `json:"role" yaml:"role"`
	State  string       `json:"state" yaml:"state"`
	Reason string       `json:"reason" yaml:"reason"`
	Epoch  plugin.Epoch `json:"epoch" yaml:"epoch"`
	Peer   string       `json:"peer,omitempty" yaml:"peer,omitempty"`
	Mode   string       `json:"mode" yaml:"mode"`

	Position       plugin.Position `json:"position" yaml:"position"`
	Acked          plugin.Position `json:"acked" yaml:"acked"`
	Lag            float64         `json:"lag_ms" yaml:"lag_ms"`
	LogRate        float64         `json:"log_rate" yaml:"log_rate"`
	OutputDelay    float64         `json:"output_delay_ms" yaml:"output_delay_ms"`
	OutputDelayMax float64         `json:"output_delay_max_ms" yaml:"output_delay_max_ms"`
	OutputQueue    uint64          `json:"output_queue" yaml:"output_queue"`
	OutputDropped  uint64          `json:"output_dropped" yaml:"output_dropped"`
	Instructions   uint64          `json:"instructions" yaml:"instructions"`

	ClonePhase       string  `json:"clone_phase,omitempty" yaml:"clone_phase,omitempty"`
	CloneTransferred int64   `json:"clone_transferred,omitempty" yaml:"clone_transferred,omitempty"`
	CloneRemaining   int64   `json:"clone_remaining,omitempty" yaml:"clone_remaining,omitempty"`
	ClonePause       float64 `json:"clone_pause_ms" yaml:"clone_pause_ms"`
	Failure          string  `json:"failure,omitempty" yaml:"failure,omitempty"`
}

// String is the line that messages show: who, what and why.
func (s Status) String() string {
	text := fmt.Sprintf("%s on %s: %s %s, reason %s, epoch %d, plugin %s", s.Domain, s.Host, s.Role, s.State, s.Reason, s.Epoch, s.Mode)
	if s.ClonePhase != "" {
		text += fmt.Sprintf(", clone %s, %d bytes remain", s.ClonePhase, s.CloneRemaining)
	}
	if s.Failure != "" {
		text += ", failure: " + s.Failure
	}
	return text
}

// Event is one change of a domain's state on one host.
type Event struct {
	Time   time.Time    `json:"time" yaml:"time"`
	Host   string       `json:"host" yaml:"host"`
	Domain string       `json:"domain" yaml:"domain"`
	UUID   plugin.UUID  `json:"uuid" yaml:"uuid"`
	Epoch  plugin.Epoch `json:"epoch" yaml:"epoch"`
	State  string       `json:"state" yaml:"state"`
	Reason string       `json:"reason,omitempty" yaml:"reason,omitempty"`
}

// Error is the agent's refusal, in its words.
type Error struct {
	Message string
	// Problems are those of a domain that cannot be protected.
	Problems []hooks.Problem
	missing  bool
}

func (e *Error) Error() string { return e.Message }

// Is makes errors.Is find ErrNoDomain.
func (e *Error) Is(target error) bool { return target == ErrNoDomain && e.missing }

// Client asks one agent. It may be used by several goroutines.
type Client struct {
	socket string
	http   *http.Client
}

// New gives a client of the agent that listens at the unix socket.
func New(socket string) *Client {
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		// Connections are not kept: an agent that was restarted is found again.
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}}
}

// Status tells about all domains of the host that have to do with ftvirt.
func (c *Client) Status(ctx context.Context) ([]Status, error) {
	var list []Status
	return list, c.call(ctx, http.MethodGet, "/v1/status", nil, &list)
}

// StatusOf tells about one domain, by name or UUID.
func (c *Client) StatusOf(ctx context.Context, domain string) (Status, error) {
	var s Status
	return s, c.call(ctx, http.MethodGet, "/v1/status/"+url.PathEscape(domain), nil, &s)
}

// Check tells what keeps a domain from being protected by peer; an empty peer
// checks the domain alone.
func (c *Client) Check(ctx context.Context, domain, peer string) ([]hooks.Problem, error) {
	path := "/v1/check/" + url.PathEscape(domain)
	if peer != "" {
		path += "?peer=" + url.QueryEscape(peer)
	}
	var problems []hooks.Problem
	return problems, c.call(ctx, http.MethodGet, path, nil, &problems)
}

type enableRequest struct {
	Domain string `json:"domain"`
	Peer   string `json:"peer,omitempty"`
}

// Prepare makes the definition of a domain that is not running ready for a
// backup on peer.
func (c *Client) Prepare(ctx context.Context, domain, peer string) error {
	return c.call(ctx, http.MethodPost, "/v1/prepare", enableRequest{domain, peer}, nil)
}

// Enable protects a running domain with a backup on peer. It returns when the
// clone has begun; Status tells how it goes on.
func (c *Client) Enable(ctx context.Context, domain, peer string) error {
	return c.call(ctx, http.MethodPost, "/v1/enable", enableRequest{domain, peer}, nil)
}

// Disable takes protection away; the domain runs on.
func (c *Client) Disable(ctx context.Context, domain string) error {
	return c.call(ctx, http.MethodPost, "/v1/disable", enableRequest{Domain: domain}, nil)
}

// Events calls f with the events that the agent keeps, oldest first, and with
// those to come if follow is set, until ctx ends or f fails.
func (c *Client) Events(ctx context.Context, follow bool, f func(Event) error) error {
	path := "/v1/events"
	if follow {
		path += "?follow=1"
	}
	r, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }()
	for dec := json.NewDecoder(r.Body); ; {
		var e Event
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return c.wrap(ctx, err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	r, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(r.Body).Decode(out); err != nil {
		return c.wrap(ctx, err)
	}
	return nil
}

// do sends a request. The answer is one of success, or turned into an error.
func (c *Client) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return nil, err
	}
	r, err := c.http.Do(req)
	if err != nil {
		return nil, c.wrap(ctx, err)
	}
	if r.StatusCode == http.StatusOK {
		return r, nil
	}
	defer func() { _ = r.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(r.Body, maxError))
	if err != nil {
		return nil, c.wrap(ctx, err)
	}
	var answer struct {
		Error    string          `json:"error"`
		Problems []hooks.Problem `json:"problems"`
	}
	// An older agent answers an unknown path with plain text.
	if json.Unmarshal(text, &answer) != nil || answer.Error == "" {
		return nil, &Error{Message: fmt.Sprintf("the agent answered %s to %s %s: %s", r.Status, method, path, bytes.TrimSpace(text))}
	}
	return nil, &Error{Message: answer.Error, Problems: answer.Problems, missing: r.StatusCode == http.StatusNotFound}
}

// maxError bounds what is read of an answer that tells an error.
const maxError = 1 << 20

func (c *Client) wrap(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("agent at %s: %w", c.socket, ctx.Err())
	}
	return fmt.Errorf("%w (%s: %w)", ErrNoAgent, c.socket, err)
}
