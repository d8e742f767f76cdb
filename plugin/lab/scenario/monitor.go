// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// errMonitor is wrapped by what QEMU refuses.
var errMonitor = errors.New("QEMU refuses")

// monitor speaks QMP with a QEMU that libvirt does not know.
type monitor struct {
	conn net.Conn
	in   *json.Decoder
}

// openMonitor waits for the socket and greets.
func openMonitor(ctx context.Context, path string) (*monitor, error) {
	var conn net.Conn
	err := poll(ctx, commandTimeout, func(ctx context.Context) (bool, error) {
		var err error
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", path)
		return err == nil, nil
	})
	if err != nil {
		return nil, fmt.Errorf("monitor %s: %w", path, err)
	}
	m := &monitor{conn: conn, in: json.NewDecoder(conn)}
	if err := m.run(ctx, "qmp_capabilities", nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() { _ = m.conn.Close() }

// run executes a command.
func (m *monitor) run(ctx context.Context, command string, args arguments) error {
	_, err := m.query(ctx, command, args)
	return err
}

// query executes a command and returns its answer. Events are passed over.
func (m *monitor) query(ctx context.Context, command string, args arguments) (json.RawMessage, error) {
	fail := func(err error) (json.RawMessage, error) { return nil, fmt.Errorf("monitor: %s: %w", command, err) }
	deadline := time.Now().Add(commandTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := m.conn.SetDeadline(deadline); err != nil {
		return fail(err)
	}
	text, err := json.Marshal(struct {
		Execute   string    `json:"execute"`
		Arguments arguments `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fail(err)
	}
	if _, err := m.conn.Write(text); err != nil {
		return fail(err)
	}
	for {
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := m.in.Decode(&answer); err != nil {
			return fail(err)
		}
		switch {
		case answer.Error != nil:
			return fail(fmt.Errorf("%w: %s", errMonitor, answer.Error.Desc))
		case answer.Return != nil:
			return answer.Return, nil
		}
	}
}
