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
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/doctor"
)

const (
	// requestTimeout is longer than the agent's own limit, so that its reason
	// is told rather than ours.
	requestTimeout = 60 * time.Second
	// maxReply bounds an answer; libvirt's own limit for XML is 16 MiB.
	maxReply = 64 << 20
)

// Errors that callers tell apart.
var (
	// ErrNoAgent is wrapped by a *NoAnswerError, unless it was only the caller
	// who did not wait.
	ErrNoAgent = errors.New("the agent does not answer")
	// ErrNoDomain is wrapped by an *Error about a domain that the host lacks.
	ErrNoDomain = errors.New("no such domain")
)

// Status is what a host tells of one domain. Durations are in milliseconds,
// positions in bytes of the epoch's log, rates in bytes per second. See the
// agent's Status for what each field means. States and reasons are plain text
// here, so that a newer agent's can be shown as well.
type Status struct {
	Domain  string       `json:"domain" yaml:"domain"`
	UUID    plugin.UUID  `json:"uuid" yaml:"uuid"`
	Host    string       `json:"host" yaml:"host"`
	Role    plugin.Role  `json:"role" yaml:"role"`
	State   string       `json:"state" yaml:"state"`
	Reason  string       `json:"reason" yaml:"reason"`
	Epoch   plugin.Epoch `json:"epoch" yaml:"epoch"`
	Peer    string       `json:"peer,omitempty" yaml:"peer,omitempty"`
	Mode    string       `json:"mode" yaml:"mode"`
	Paused  string       `json:"paused,omitempty" yaml:"paused,omitempty"`
	Channel string       `json:"channel" yaml:"channel"`

	Position       plugin.Position `json:"position" yaml:"position"`
	Acked          plugin.Position `json:"acked" yaml:"acked"`
	Lag            float64         `json:"lag_ms" yaml:"lag_ms"`
	Slowed         float64         `json:"slowed" yaml:"slowed"`
	LogRate        float64         `json:"log_rate" yaml:"log_rate"`
	OutputDelay    float64         `json:"output_delay_ms" yaml:"output_delay_ms"`
	OutputDelayMax float64         `json:"output_delay_max_ms" yaml:"output_delay_max_ms"`
	OutputQueue    uint64          `json:"output_queue" yaml:"output_queue"`
	OutputDropped  uint64          `json:"output_dropped" yaml:"output_dropped"`
	Instructions   uint64          `json:"instructions" yaml:"instructions"`
	Compared       uint64          `json:"compared" yaml:"compared"`

	ClonePhase       string  `json:"clone_phase,omitempty" yaml:"clone_phase,omitempty"`
	CloneTransferred int64   `json:"clone_transferred,omitempty" yaml:"clone_transferred,omitempty"`
	CloneRemaining   int64   `json:"clone_remaining,omitempty" yaml:"clone_remaining,omitempty"`
	ClonePause       float64 `json:"clone_pause_ms" yaml:"clone_pause_ms"`
	CloneEqual       int64   `json:"clone_equal" yaml:"clone_equal"`
	Failure          string  `json:"failure,omitempty" yaml:"failure,omitempty"`
	Retry            float64 `json:"retry_s,omitempty" yaml:"retry_s,omitempty"`
	AnnotationError  string  `json:"annotation_error,omitempty" yaml:"annotation_error,omitempty"`
	Definition       string  `json:"definition,omitempty" yaml:"definition,omitempty"`
	DefinitionAge    float64 `json:"definition_age_s,omitempty" yaml:"definition_age_s,omitempty"`
}

// String is the line that messages show: who, what and why.
func (s Status) String() string {
	text := fmt.Sprintf("%s on %s: %s %s, reason %s, epoch %d, plugin %s", s.Domain, s.Host, s.Role, s.State, s.Reason, s.Epoch, s.Mode)
	if s.Paused != "" {
		text += ", paused: " + s.Paused
	}
	if s.ClonePhase != "" {
		text += fmt.Sprintf(", clone %s, %d bytes remain", s.ClonePhase, s.CloneRemaining)
	}
	if s.AnnotationError != "" {
		text += ", " + s.AnnotationError
	}
	if s.Definition != "" {
		text += fmt.Sprintf(", definition, for %.0f s: %s", s.DefinitionAge, s.Definition)
	}
	if s.Failure != "" {
		text += ", failure: " + s.Failure
	}
	if s.Retry > 0 {
		text += fmt.Sprintf(", next try in %.0f s", s.Retry)
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

// DomainInfo is what a host knows of any of libvirt's domains, protected or
// not. See the agent's DomainInfo for what each field means.
type DomainInfo struct {
	Domain  string      `json:"domain"`
	UUID    plugin.UUID `json:"uuid"`
	Host    string      `json:"host"`
	Running bool        `json:"running"`
	Role    plugin.Role `json:"role"`
	State   string      `json:"state"`
	Reason  string      `json:"reason"`
	Peer    string      `json:"peer,omitempty"`
	Wanted  string      `json:"wanted,omitempty"`
}

// DomainXML is a domain's definition, and what the host's hooks.Options for it
// are.
type DomainXML struct {
	Domain       string `json:"domain"`
	XML          string `json:"xml"`
	PluginFile   string `json:"plugin_file"`
	PluginSocket string `json:"plugin_socket"`
	ICountShift  int    `json:"icount_shift"`
}

// Error is the agent's refusal, in its words.
type Error struct {
	Message string
	// Problems are those of a domain that cannot be protected. The message
	// has them too, in one long line.
	Problems []hooks.Problem
	missing  bool
}

func (e *Error) Error() string { return e.Message }

// Is makes errors.Is find ErrNoDomain.
func (e *Error) Is(target error) bool { return target == ErrNoDomain && e.missing }

// NoAnswerError: no answer came through the socket, or none that an agent
// gives.
type NoAnswerError struct {
	Socket string
	Err    error
}

func (e *NoAnswerError) Error() string {
	switch {
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("the agent's socket %s belongs to root: permission denied; run this as root", e.Socket)
	case errors.Is(e.Err, fs.ErrNotExist):
		return fmt.Sprintf("the agent does not run: there is no socket %s; start 'ftvirt agent'", e.Socket)
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("the agent does not run: nobody listens on %s; start 'ftvirt agent'", e.Socket)
	}
	return fmt.Sprintf("the agent at %s does not answer: %v; is 'ftvirt agent' running?", e.Socket, e.Err)
}

func (e *NoAnswerError) Unwrap() error { return e.Err }

// Is makes errors.Is find ErrNoAgent. Who did not wait for the answer does not
// know whether there is an agent.
func (e *NoAnswerError) Is(target error) bool {
	return target == ErrNoAgent && !errors.Is(e.Err, context.Canceled) && !errors.Is(e.Err, context.DeadlineExceeded)
}

// NotRunning tells whether no agent has the socket at all.
func (e *NoAnswerError) NotRunning() bool {
	return errors.Is(e.Err, fs.ErrNotExist) || errors.Is(e.Err, syscall.ECONNREFUSED)
}

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
	return get[[]Status](ctx, c, "/v1/status")
}

// StatusOf tells about one domain, by name or UUID.
func (c *Client) StatusOf(ctx context.Context, domain string) (Status, error) {
	return get[Status](ctx, c, "/v1/status/"+url.PathEscape(domain))
}

// Domains lists all domains that libvirt has on the host, by name.
func (c *Client) Domains(ctx context.Context) ([]DomainInfo, error) {
	return get[[]DomainInfo](ctx, c, "/v1/domains")
}

// Domain tells what libvirt has of one domain, by name or UUID.
func (c *Client) Domain(ctx context.Context, domain string) (DomainInfo, error) {
	return get[DomainInfo](ctx, c, "/v1/domains/"+url.PathEscape(domain))
}

// XML gives the definition of a domain and how the host would transform it.
func (c *Client) XML(ctx context.Context, domain string) (DomainXML, error) {
	return get[DomainXML](ctx, c, "/v1/xml/"+url.PathEscape(domain))
}

// Check tells what keeps a domain from being protected by peer; an empty peer
// checks the domain alone.
func (c *Client) Check(ctx context.Context, domain, peer string) ([]hooks.Problem, error) {
	path := "/v1/check/" + url.PathEscape(domain)
	if peer != "" {
		path += "?peer=" + url.QueryEscape(peer)
	}
	return get[[]hooks.Problem](ctx, c, path)
}

// Doctor checks the host, and with a peer that host and what is between them.
func (c *Client) Doctor(ctx context.Context, peer string) ([]doctor.Finding, error) {
	path := "/v1/doctor"
	if peer != "" {
		path += "?peer=" + url.QueryEscape(peer)
	}
	return get[[]doctor.Finding](ctx, c, path)
}

type enableRequest struct {
	Domain string `json:"domain"`
	Peer   string `json:"peer,omitempty"`
}

// Prepare makes the definition of a domain that is not running ready for a
// backup on peer.
func (c *Client) Prepare(ctx context.Context, domain, peer string) error {
	return c.post(ctx, "/v1/prepare", enableRequest{domain, peer})
}

// PrepareNext does the same for a domain that may be running, for its next start.
func (c *Client) PrepareNext(ctx context.Context, domain, peer string) error {
	return c.post(ctx, "/v1/prepare-next", enableRequest{domain, peer})
}

// Restore gives a domain that is not running the definition back that it had
// before Prepare.
func (c *Client) Restore(ctx context.Context, domain string) error {
	return c.post(ctx, "/v1/restore", enableRequest{Domain: domain})
}

// Enable protects a running domain with a backup on peer. It returns when the
// clone has begun; Status tells how it goes on.
func (c *Client) Enable(ctx context.Context, domain, peer string) error {
	return c.post(ctx, "/v1/enable", enableRequest{domain, peer})
}

// Disable takes protection away; the domain runs on.
func (c *Client) Disable(ctx context.Context, domain string) error {
	return c.post(ctx, "/v1/disable", enableRequest{Domain: domain})
}

// Failover hands a domain that runs on the host over to its backup.
func (c *Client) Failover(ctx context.Context, domain string) error {
	return c.post(ctx, "/v1/failover", enableRequest{Domain: domain})
}

// HandoverDomain is what becomes of one domain when a host is handed over. See the
// agent's HandoverDomain for what each field means.
type HandoverDomain struct {
	Domain string      `json:"domain"`
	UUID   plugin.UUID `json:"uuid"`
	Open   bool        `json:"open"`
	Stays  bool        `json:"stays"`
	Text   string      `json:"text"`
}

// Handover clears the host of pairs, step by step: it is to be called until no
// domain is open.
func (c *Client) Handover(ctx context.Context) ([]HandoverDomain, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	body, err := c.do(ctx, http.MethodPost, "/v1/handover", nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	var reply struct {
		Domains []HandoverDomain `json:"domains"`
	}
	if err := json.NewDecoder(io.LimitReader(body, maxReply)).Decode(&reply); err != nil {
		return nil, c.noAnswer(ctx, fmt.Errorf("its answer: %w", err))
	}
	return reply.Domains, nil
}

// RestartBackup discards the backup of a domain that runs on the host and makes
// another, on peer unless that is empty.
func (c *Client) RestartBackup(ctx context.Context, domain, peer string) error {
	return c.post(ctx, "/v1/restart-backup", enableRequest{domain, peer})
}

// Suspend takes protection away until Resume, which brings it back as it was.
func (c *Client) Suspend(ctx context.Context, domain string) error {
	return c.post(ctx, "/v1/suspend", enableRequest{Domain: domain})
}

// Resume undoes Suspend.
func (c *Client) Resume(ctx context.Context, domain string) error {
	return c.post(ctx, "/v1/resume", enableRequest{Domain: domain})
}

// Diagnose writes an archive of all that the host knows of a domain, a tar file
// compressed by gzip.
func (c *Client) Diagnose(ctx context.Context, domain string, w io.Writer) error {
	return c.copy(ctx, "/v1/diagnosis/"+url.PathEscape(domain), w)
}

// copy writes an answer as it comes.
func (c *Client) copy(ctx context.Context, path string, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	body, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	if _, err := io.Copy(w, body); err != nil {
		return c.noAnswer(ctx, err)
	}
	return nil
}

// Metrics writes the host's metrics, in the text format of Prometheus.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	return c.copy(ctx, "/metrics", w)
}

// VerifyPlan tells what Verify would read, in bytes.
type VerifyPlan struct {
	Domain string `json:"domain"`
	Peer   string `json:"peer"`
	Memory int64  `json:"memory"`
	Disks  int64  `json:"disks"`
}

// Verification is what a comparison of both sides found. See the agent's
// Verification for what each field means.
type Verification struct {
	Domain       string          `json:"domain"`
	UUID         plugin.UUID     `json:"uuid"`
	Epoch        plugin.Epoch    `json:"epoch"`
	Primary      string          `json:"primary"`
	Backup       string          `json:"backup"`
	Position     plugin.Position `json:"position"`
	Instructions uint64          `json:"instructions"`
	Pause        float64         `json:"pause_ms"`
	Equal        bool            `json:"equal"`
	Discarded    bool            `json:"discarded"`
	Parts        []VerifyPart    `json:"parts"`
}

// VerifyPart is the comparison of one block of memory, one disk, or the
// registers.
type VerifyPart struct {
	Kind      string        `json:"kind"`
	Name      string        `json:"name"`
	Size      int64         `json:"size"`
	Equal     bool          `json:"equal"`
	Different int64         `json:"different,omitempty"`
	Ranges    []VerifyRange `json:"ranges,omitempty"`
	Detail    []string      `json:"detail,omitempty"`
}

// VerifyRange is where a part differs, in bytes.
type VerifyRange struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
}

// VerifyPlan tells what Verify would read.
func (c *Client) VerifyPlan(ctx context.Context, domain string) (VerifyPlan, error) {
	return get[VerifyPlan](ctx, c, "/v1/verify/"+url.PathEscape(domain))
}

// Verify compares both sides of a domain that runs on the host. It stands still
// for at most limit. A backup that differs is discarded unless keep is set.
func (c *Client) Verify(ctx context.Context, domain string, limit time.Duration, keep bool) (Verification, error) {
	ctx, cancel := context.WithTimeout(ctx, limit+requestTimeout)
	defer cancel()
	var out Verification
	text, err := json.Marshal(struct {
		Domain string `json:"domain"`
		Limit  int64  `json:"limit_ms"`
		Keep   bool   `json:"keep"`
	}{domain, limit.Milliseconds(), keep})
	if err != nil {
		return out, err
	}
	body, err := c.do(ctx, http.MethodPost, "/v1/verify", text)
	if err != nil {
		return out, err
	}
	defer func() { _ = body.Close() }()
	if err := json.NewDecoder(io.LimitReader(body, maxReply)).Decode(&out); err != nil {
		return out, c.noAnswer(ctx, fmt.Errorf("its answer: %w", err))
	}
	return out, nil
}

// Events calls f with the events that the agent keeps, oldest first, and with
// those to come if follow is set, until ctx ends or f fails. An agent that ends
// while it is followed is a *NoAnswerError.
func (c *Client) Events(ctx context.Context, follow bool, f func(Event) error) error {
	path := "/v1/events"
	if follow {
		path += "?follow=1"
	}
	body, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	for dec := json.NewDecoder(body); ; {
		var e Event
		err := dec.Decode(&e)
		switch {
		case errors.Is(err, io.EOF) && !follow:
			return nil
		case errors.Is(err, io.EOF):
			return c.noAnswer(ctx, errors.New("it ended"))
		case err != nil || ctx.Err() != nil:
			return c.noAnswer(ctx, err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var out T
	body, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return out, err
	}
	defer func() { _ = body.Close() }()
	if err := json.NewDecoder(io.LimitReader(body, maxReply)).Decode(&out); err != nil {
		return out, c.noAnswer(ctx, fmt.Errorf("its answer to %s: %w", path, err))
	}
	return out, nil
}

func (c *Client) post(ctx context.Context, path string, in enableRequest) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	text, err := json.Marshal(in)
	if err != nil {
		return err
	}
	body, err := c.do(ctx, http.MethodPost, path, text)
	if err != nil {
		return err
	}
	return body.Close()
}

// do sends a request and gives the body of the answer. An answer that is not
// one of success is turned into an error.
func (c *Client) do(ctx context.Context, method, path string, body []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r, err := c.http.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // without the made-up URL
		}
		return nil, c.noAnswer(ctx, err)
	}
	if r.StatusCode == http.StatusOK {
		return r.Body, nil
	}
	defer func() { _ = r.Body.Close() }()
	var answer struct {
		Error    string          `json:"error"`
		Problems []hooks.Problem `json:"problems"`
	}
	// Who answers with something else is not the agent.
	if err := json.NewDecoder(io.LimitReader(r.Body, maxReply)).Decode(&answer); err != nil || answer.Error == "" {
		return nil, c.noAnswer(ctx, fmt.Errorf("it answered %s %q", path, r.Status))
	}
	return nil, &Error{Message: answer.Error, Problems: answer.Problems, missing: r.StatusCode == http.StatusNotFound}
}

// noAnswer says why there is none; the end of ctx is a reason before others.
func (c *Client) noAnswer(ctx context.Context, err error) error {
	if end := ctx.Err(); end != nil && !errors.Is(err, end) {
		err = end
	}
	return &NoAnswerError{c.socket, err}
}
