// SPDX-License-Identifier: Apache-2.0

package cli

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
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin/agent"
)

const (
	// requestTimeout is longer than the agent's own limit, so that its reason
	// is shown rather than ours.
	requestTimeout = 40 * time.Second
	// maxReply bounds an answer; libvirt's own limit for XML is 16 MiB.
	maxReply = 64 << 20
)

// client asks the agent of this host.
type client struct {
	socket string
	http   *http.Client
}

// agentError: the agent could not be reached at all.
type agentError struct {
	socket string
	err    error
}

func (e *agentError) Error() string {
	switch {
	case errors.Is(e.err, fs.ErrPermission):
		return fmt.Sprintf("the agent's socket %s belongs to root: permission denied; run this as root", e.socket)
	case errors.Is(e.err, fs.ErrNotExist):
		return fmt.Sprintf("the agent does not run: there is no socket %s; start 'ftvirt agent', or name its socket with --socket", e.socket)
	case errors.Is(e.err, syscall.ECONNREFUSED):
		return fmt.Sprintf("the agent does not run: nobody listens on %s; start 'ftvirt agent', or name its socket with --socket", e.socket)
	}
	return fmt.Sprintf("the agent at %s does not answer: %v; is 'ftvirt agent' running?", e.socket, e.err)
}

func (e *agentError) Unwrap() error { return e.err }

// refusal is what the agent answered instead of doing it.
type refusal struct {
	text     string
	problems []hooks.Problem
	code     int
}

func (e *refusal) Error() string {
	if len(e.problems) == 0 {
		if e.code == http.StatusNotFound {
			return e.text + "; see 'virsh list --all' for those that this host has"
		}
		return e.text
	}
	// The text repeats the problems in one long line.
	head, _, _ := strings.Cut(e.text, e.problems[0].String())
	var b strings.Builder
	b.WriteString(strings.TrimSpace(head))
	for _, p := range e.problems {
		b.WriteString("\n" + p.String())
	}
	return b.String()
}

// connect makes the client for a command; it does not dial yet.
func connect(c *cli.Context) (*client, error) {
	socket := c.String("socket")
	if socket == "" {
		cfg, err := load(c, true)
		if err != nil {
			return nil, err
		}
		socket = cfg.Agent.AdminSocket
	}
	return newClient(socket), nil
}

func newClient(socket string) *client {
	var d net.Dialer
	return &client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}}
}

func domainPath(prefix, name string) string { return prefix + url.PathEscape(name) }

func (c *client) get(ctx context.Context, path string, out any) error {
	return c.call(ctx, http.MethodGet, path, nil, out)
}

func (c *client) post(ctx context.Context, path string, in agent.EnableRequest) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, path, body, nil)
}

func (c *client) call(ctx context.Context, method, path string, body []byte, out any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	reply, err := c.open(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer func() { _ = reply.Close() }()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(reply, maxReply)).Decode(out); err != nil {
		return &agentError{c.socket, fmt.Errorf("its answer to %s: %w", path, err)}
	}
	return nil
}

// open sends a request and gives the body of the answer.
func (c *client) open(ctx context.Context, method, path string, body []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // without the made-up URL
		}
		return nil, &agentError{c.socket, err}
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var e agent.ErrorReply
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(&e); err != nil || e.Error == "" {
		return nil, &agentError{c.socket, fmt.Errorf("it answered %s %q", path, resp.Status)}
	}
	return nil, &refusal{e.Error, e.Problems, resp.StatusCode}
}
