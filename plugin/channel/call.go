// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
)

// Handler serves a request of the peer. What it returns is marshaled to JSON.
// To tell the peer's program what kind of error it is, return a [RemoteError]
// with a code; any other error arrives with [CodeFailed]. The context ends with
// the connection.
type Handler func(ctx context.Context, params json.RawMessage) (any, error)

// Handlers serve requests by method.
type Handlers map[string]Handler

// The codes of errors that this package itself answers with.
const (
	CodeFailed        = "failed"
	CodeBusy          = "busy"
	CodeUnknownMethod = "unknown-method"
)

// RemoteError is an error that the peer's handler returned.
type RemoteError struct {
	Method string `json:"-"`
	Code   string `json:"code"`
	Text   string `json:"text"`
}

func (e *RemoteError) Error() string {
	if e.Method == "" {
		return fmt.Sprintf("%s (%s)", e.Text, e.Code)
	}
	return fmt.Sprintf("peer's answer to %s: %s (%s)", e.Method, e.Text, e.Code)
}

// maxErrorText bounds what is told of an error, in bytes. Each may take six as
// JSON, and the answer must fit into every peer's smallest frame.
const maxErrorText = 1024

// Call sends a request and waits for the response, which it unmarshals into
// out unless that is nil. in is marshaled to JSON. The error is a [RemoteError]
// if the peer's handler failed, a [ClosedError] if the connection ends before
// the response, or that of ctx; the request may then have been served or not.
func (c *Conn) Call(ctx context.Context, method string, in, out any) error {
	if method == "" || len(method) > math.MaxUint16 {
		return fmt.Errorf("%w: method name of %d bytes", ErrMalformed, len(method))
	}
	params, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("marshaling the request %s: %w", method, err)
	}
	answer := make(chan response, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("request %s: %w", method, c.err)
	}
	c.nextID++
	id := c.nextID
	c.calls[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.calls, id)
	}()

	head := binary.BigEndian.AppendUint64(nil, id)
	head = binary.BigEndian.AppendUint16(head, uint16(len(method)))
	head = append(head, method...)
	if err := c.send(ctx, FrameRequest, head, params); err != nil {
		return fmt.Errorf("request %s: %w", method, err)
	}
	select {
	case r := <-answer:
		return r.decode(method, out)
	case <-ctx.Done():
		return fmt.Errorf("request %s: %w", method, ctx.Err())
	case <-c.done:
		// The answer may have come just before the end.
		select {
		case r := <-answer:
			return r.decode(method, out)
		default:
			return fmt.Errorf("request %s: %w", method, c.Err())
		}
	}
}

func (r response) decode(method string, out any) error {
	if !r.ok {
		remote := &RemoteError{Method: method}
		if err := json.Unmarshal(r.body, remote); err != nil {
			return fmt.Errorf("error response to %s: %w: %w", method, ErrMalformed, err)
		}
		return remote
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(r.body, out); err != nil {
		return fmt.Errorf("response to %s: %w: %w", method, ErrMalformed, err)
	}
	return nil
}

// resolve hands a response to its call, if that still waits.
func (c *Conn) resolve(payload []byte) error {
	id, ok, body, err := parseResponse(payload)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, waits := c.calls[id]; waits {
		delete(c.calls, id)
		answer <- response{ok: ok, body: append([]byte(nil), body...)}
	}
	return nil
}

// serve starts the handler of a request. It runs in the reader, so it must not
// wait.
func (c *Conn) serve(payload []byte) error {
	id, method, body, err := parseRequest(payload)
	if err != nil {
		return err
	}
	handle, known := c.handlers[method]
	if !known {
		return c.rejectNow(id, &RemoteError{Code: CodeUnknownMethod, Text: "no such method"})
	}
	select {
	case c.slots <- struct{}{}:
	default:
		return c.rejectNow(id, &RemoteError{Code: CodeBusy, Text: "too many requests at once"})
	}
	params := json.RawMessage(append([]byte(nil), body...))
	c.served.Go(func() {
		defer func() { <-c.slots }()
		out, err := handle(c.ctx, params)
		status, body := byte(statusOK), []byte(nil)
		if err == nil {
			body, err = json.Marshal(out)
		}
		if err == nil && len(body) > c.cfg.MaxFrame-responseHead {
			err = fmt.Errorf("response of %d bytes: %w", len(body), ErrFrameTooLong)
		}
		if err != nil {
			status, body = statusError, errorBody(err)
		}
		if err := c.send(c.ctx, FrameResponse, appendResponseHead(id, status), body); err != nil {
			c.cfg.Logger.Debug("response not sent", "method", method, "error", err)
		}
	})
	return nil
}

// responseHead is the length of what precedes a response's body.
const responseHead = 8 + 1

func appendResponseHead(id uint64, status byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, id), status)
}

// rejectNow answers a request from the reader, which must not wait for room.
func (c *Conn) rejectNow(id uint64, why *RemoteError) error {
	body := errorBody(why)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil // nothing can be answered; the reader goes on for the log
	}
	if len(c.queue)+c.writing+len(body) > c.cfg.QueueBytes+overdraft {
		return ErrOverloaded
	}
	c.enqueue(FrameResponse, appendResponseHead(id, statusError), body)
	return nil
}

func errorBody(err error) []byte {
	told := RemoteError{Code: CodeFailed, Text: err.Error()}
	if remote := (*RemoteError)(nil); errors.As(err, &remote) && remote.Code != "" {
		told.Code = remote.Code
	}
	told.Text = told.Text[:min(len(told.Text), maxErrorText)]
	body, merr := json.Marshal(told)
	if merr != nil {
		// A struct of two strings always marshals.
		return []byte(`{"code":"failed","text":"unprintable error"}`)
	}
	return body
}
