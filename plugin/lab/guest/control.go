// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// DialFunc opens a TCP connection to a guest, normally from the lab's client.
type DialFunc func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)

// ErrCommand is returned when the guest refuses a command.
var ErrCommand = errors.New("guest refused the command")

// Status is what the guest says of itself.
type Status struct {
	Uptime       time.Duration
	Lines        int // number of the last line on the disk
	LinesRunning bool
	LineErrors   int
	LoadOps      int
	LoadRunning  bool
	LoadErrors   int
	EchoBytes    int
	Boot         string // another one after each reboot
}

// Digest is what the guest holds at a quiesced point.
type Digest struct {
	Lines      int
	Bytes      int    // size of the lines' file
	CRC32      uint32 // IEEE, of the lines' file
	LineErrors int
	LoadOps    int
	LoadErrors int
}

// Client talks to the guest's control port. Each call is a connection of its
// own and ends with ctx.
type Client struct {
	Dial    DialFunc
	Address netip.Addr
}

// Status asks how the guest fares.
func (c Client) Status(ctx context.Context) (Status, error) {
	f, err := c.command(ctx, PortControl, "status")
	if err != nil {
		return Status{}, err
	}
	s := Status{
		Uptime: time.Duration(f.number("uptime_ms")) * time.Millisecond,
		Lines:  f.number("lines"), LinesRunning: f.number("lines_running") != 0, LineErrors: f.number("line_errors"),
		LoadOps: f.number("load_ops"), LoadRunning: f.number("load_running") != 0, LoadErrors: f.number("load_errors"),
		EchoBytes: f.number("echo_bytes"), Boot: f.values["boot"],
	}
	return s, f.err
}

// StartLines makes the guest write rate lines per second.
func (c Client) StartLines(ctx context.Context, rate int) error {
	_, err := c.command(ctx, PortControl, fmt.Sprintf("lines start %d", rate))
	return err
}

// StopLines stops the lines' writer after a whole line.
func (c Client) StopLines(ctx context.Context) error {
	_, err := c.command(ctx, PortControl, "lines stop")
	return err
}

// StartLoad makes the guest do rate disk operations per second.
func (c Client) StartLoad(ctx context.Context, rate int) error {
	_, err := c.command(ctx, PortControl, fmt.Sprintf("load start %d", rate))
	return err
}

// StopLoad stops the disk load after a whole operation.
func (c Client) StopLoad(ctx context.Context) error {
	_, err := c.command(ctx, PortControl, "load stop")
	return err
}

// PowerOff makes the guest unmount its disk and power off.
func (c Client) PowerOff(ctx context.Context) error {
	_, err := c.command(ctx, PortControl, "poweroff")
	return err
}

// Grow makes the guest write so many KiB, in the background, where its disk was
// never written, so that the disk's image must grow.
func (c Client) Grow(ctx context.Context, kib int) error {
	_, err := c.command(ctx, PortControl, fmt.Sprintf("grow %d", kib))
	return err
}

// Reboot makes the guest reboot at once, without syncing its disk, and returns
// how many lines were on that by then. The answer may get lost with all that the
// guest had in memory.
func (c Client) Reboot(ctx context.Context) (lines int, err error) {
	f, err := c.command(ctx, PortControl, "reboot")
	if err != nil {
		return 0, err
	}
	return f.number("lines"), f.err
}

// Quiesce stops the guest's writers, syncs its disk and returns what it holds.
// The writers stay stopped until started again.
func (c Client) Quiesce(ctx context.Context) (Digest, error) {
	f, err := c.command(ctx, PortHash, "")
	if err != nil {
		return Digest{}, err
	}
	d := Digest{
		Lines: f.number("lines"), Bytes: f.number("bytes"), LineErrors: f.number("line_errors"),
		LoadOps: f.number("load_ops"), LoadErrors: f.number("load_errors"),
	}
	crc, err := strconv.ParseUint(f.values["crc32"], 16, 32)
	if err != nil {
		return Digest{}, fmt.Errorf("guest's digest: crc32: %w", err)
	}
	d.CRC32 = uint32(crc)
	return d, f.err
}

// WaitReady polls until the guest answers, or ctx ends.
func (c Client) WaitReady(ctx context.Context) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := c.Status(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if pauseErr := pause(ctx); pauseErr != nil {
			return fmt.Errorf("guest %s does not answer: %w (last attempt: %w)", c.Address, pauseErr, err)
		}
	}
}

// command sends one line, none when empty, and reads the one that answers it.
func (c Client) command(ctx context.Context, port uint16, line string) (*fields, error) {
	conn, err := c.Dial(ctx, netip.AddrPortFrom(c.Address, port))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	// A deadline in the past ends a read or write that ctx ends.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a command that was given up must not come yet
		}
		return fmt.Errorf("guest %s: command %q: %w", c.Address, line, err)
	}
	if line != "" {
		if _, err := conn.Write([]byte(line + "\n")); err != nil {
			return nil, fail(err)
		}
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return nil, fail(err)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(answer), "ok")
	if !ok {
		return nil, fail(fmt.Errorf("%w: %s", ErrCommand, strings.TrimSpace(answer)))
	}
	f := &fields{values: map[string]string{}}
	for _, word := range strings.Fields(rest) {
		key, value, _ := strings.Cut(word, "=")
		f.values[key] = value
	}
	return f, nil
}

// fields are the key=value words of an answer; err is the first that was
// missing or no number.
type fields struct {
	values map[string]string
	err    error
}

func (f *fields) number(key string) int {
	n, err := strconv.Atoi(f.values[key])
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("guest's answer: %s: %w", key, err)
	}
	return n
}
