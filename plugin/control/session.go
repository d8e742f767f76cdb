// SPDX-License-Identifier: Apache-2.0

// Package control is the agent's end of the connection to ftvirt.so, the
// plugin inside a domain's QEMU. The plugin connects to the agent's unix
// socket, says hello, and then ships its log (primary) or consumes what it is
// fed (backup). plugin/qemu/PROTOCOL.md describes the frames.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// Time limits. The plugin's thread takes no lock of QEMU, so it answers
// whatever QEMU does; one that does not is dead or stopped.
const (
	helloTimeout = 5 * time.Second
	writeTimeout = 5 * time.Second
)

// ErrPlugin is what the plugin answers to a command that it cannot follow.
var ErrPlugin = errors.New("plugin refused")

// Handler is told what the plugin says, one call at a time, in order. A nil
// field ignores that frame. Log's bytes are valid during the call only; a call
// that blocks holds back the primary (flow control).
type Handler struct {
	Log      func(pos plugin.Position, p []byte) error
	State    func(State)
	Consumed func(Consumed)
	Stats    func(Stats)
	Diverged func(Diverged)
	Digest   func(Digest)
	Memory   func(Memory)
	Looked   func(Looked)
	Refused  func(error) // wraps ErrPlugin
	// Of the checkpoint method.
	Blocks  func(Blocks)
	Staged  func(Staged)
	Applied func(uint64)
}

// Session is one connection of one domain's plugin.
type Session struct {
	conn  net.Conn
	r     *bufio.Reader
	hello Hello
	// staging is what came with HELLO of a plugin of the checkpoint method.
	staging *os.File
	qemu    *os.Process
	user    int

	mu  sync.Mutex // writes
	buf []byte
}

// Hello is what the plugin said of itself when it connected.
func (s *Session) Hello() Hello { return s.hello }

// User is the uid that QEMU runs as.
func (s *Session) User() int { return s.user }

// Alive tells whether the QEMU of this session still exists. One that only
// waits for its parent to take note of its end does not.
func (s *Session) Alive() bool {
	if errors.Is(s.qemu.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.qemu.Pid))
	if err != nil {
		return true
	}
	// proc_pid_stat(5): the state follows the name, which is in parentheses.
	_, state, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// Kill ends the QEMU of this session at once, without asking libvirt or QEMU.
func (s *Session) Kill() error {
	if err := s.qemu.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("QEMU of %s: %w", s.hello.Domain, err)
	}
	return nil
}

// Close ends the connection; the plugin connects again by itself.
func (s *Session) Close() error {
	if s.staging != nil {
		_ = s.staging.Close()
	}
	return s.conn.Close()
}

func (s *Session) send(t frameType, fields ...uint64) error {
	return s.sendBytes(t, nil, fields...)
}

func (s *Session) sendBytes(t frameType, tail []byte, fields ...uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := append(s.buf[:0], 0, 0, 0, 0, byte(t))
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, f)
	}
	b = append(b, tail...)
	binary.BigEndian.PutUint32(b, uint32(len(b)-headerSize))
	s.buf = b
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("to plugin of %s: %w", s.hello.Domain, err)
	}
	if _, err := s.conn.Write(b); err != nil {
		return fmt.Errorf("to plugin of %s: %w", s.hello.Domain, err)
	}
	return nil
}

// Welcome accepts the connection. A recording plugin sends its log again from
// resume, and what lies below is acknowledged by it; a backup learns its epoch.
func (s *Session) Welcome(epoch plugin.Epoch, resume plugin.Position) error {
	var p [18]byte
	binary.BigEndian.PutUint16(p[0:], Protocol)
	binary.BigEndian.PutUint64(p[2:], uint64(epoch))
	binary.BigEndian.PutUint64(p[10:], uint64(resume))
	return s.sendBytes(frameWelcome, p[:])
}

// Arm makes the next migration that completes the clone of epoch: the VM then
// records from position 0, and resumes.
func (s *Session) Arm(epoch plugin.Epoch) error { return s.send(frameArm, uint64(epoch)) }

// Disarm takes Arm back.
func (s *Session) Disarm() error { return s.send(frameDisarm) }

// Ack tells the primary that the backup holds the log up to pos. Outputs of
// before pos may leave (the paper, section 2.2).
func (s *Session) Ack(pos plugin.Position) error { return s.send(frameAck, uint64(pos)) }

// Feed gives the backup whole events that begin at pos.
func (s *Session) Feed(pos plugin.Position, p []byte) error {
	for len(p) > MaxFrame-8 {
		if err := s.sendBytes(frameFeed, p[:MaxFrame-8], uint64(pos)); err != nil {
			return err
		}
		p, pos = p[MaxFrame-8:], pos+MaxFrame-8
	}
	return s.sendBytes(frameFeed, p, uint64(pos))
}

// Promote makes the backup go live when it has consumed all that it was fed.
// Only the winner of the arbiter may send it.
func (s *Session) Promote(epoch plugin.Epoch) error { return s.send(framePromote, uint64(epoch)) }

// Open lets the primary go on alone: outputs pass, the log is thrown away.
// Only the winner of the arbiter may send it.
func (s *Session) Open(epoch plugin.Epoch) error { return s.send(frameOpen, uint64(epoch)) }

// Idle leaves record or live at a short stop, so that the VM can be cloned.
func (s *Session) Idle() error { return s.send(frameIdle) }

// Configure sets after how long without progress a backup counts as diverged,
// and how often at least a primary logs something. Both in whole milliseconds.
func (s *Session) Configure(diverged, tick time.Duration) error {
	return s.send(frameConfig, uint64(diverged.Milliseconds())<<32|uint64(tick.Milliseconds()))
}

// PaceMost is the largest part of its time that a vCPU can be made to pause.
const PaceMost = 0.9

// Pace makes a recording VM's vCPU pause for a part of its time, 0 to
// [PaceMost], in thousandths. Each epoch begins with 0.
func (s *Session) Pace(part float64) error {
	return s.sendBytes(framePace, binary.BigEndian.AppendUint16(nil, uint16(1000*min(max(part, 0), PaceMost))))
}

// Check asks a backup for its Digest where the event that ends at pos is
// consumed. It has to be sent before the log that leads there is fed.
func (s *Session) Check(pos plugin.Position) error { return s.send(frameCheck, uint64(pos)) }

// Hold makes a recording VM stand still for at most limit, from when it has no
// disk request in flight; its State says [Held] then. 0 lets it go on.
func (s *Session) Hold(limit time.Duration) error {
	return s.sendBytes(frameHold, binary.BigEndian.AppendUint32(nil, uint32(limit.Milliseconds())))
}

// Held is the text of the State of a VM that stands still by Hold.
const Held = "held"

// Look asks for hashes of memory, in chunks, and for the registers of where the
// VM stands: Memory again and again, then Looked. Images on disk are complete
// then. A Look ends the answer to the one before; that with the id 0 does
// nothing else.
func (s *Session) Look(id uint64, chunk uint32) error {
	return s.sendBytes(frameLook, binary.BigEndian.AppendUint32(nil, chunk), id)
}

// Run reads what the plugin says until the connection ends or ctx does. It
// returns io.EOF when the plugin went away, as it does when QEMU ends.
func (s *Session) Run(ctx context.Context, h Handler) error {
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var buf []byte
	for {
		t, p, err := readFrame(s.r, &buf)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, net.ErrClosed) || isReset(err) {
				return io.EOF
			}
			return err
		}
		if err := h.dispatch(t, p); err != nil {
			return err
		}
	}
}

func (h *Handler) dispatch(t frameType, p []byte) error {
	var err error
	switch t {
	case frameLog:
		if len(p) < 8 {
			err = ErrMalformed
		} else if h.Log != nil {
			return h.Log(plugin.Position(binary.BigEndian.Uint64(p)), p[8:])
		}
	case frameState:
		err = deliver(p, parseState, h.State)
	case frameConsumed:
		err = deliver(p, parseConsumed, h.Consumed)
	case frameStats:
		err = deliver(p, parseStats, h.Stats)
	case frameDiverged:
		err = deliver(p, parseDiverged, h.Diverged)
	case frameDigest:
		err = deliver(p, parseDigest, h.Digest)
	case frameMemory:
		err = deliver(p, parseMemory, h.Memory)
	case frameLooked:
		err = deliver(p, parseLooked, h.Looked)
	case frameBlocks:
		err = deliver(p, parseBlocks, h.Blocks)
	case frameStaged:
		err = deliver(p, parseStaged, h.Staged)
	case frameApplied:
		err = deliver(p, parseApplied, h.Applied)
	case frameError:
		if len(p) < 1 {
			err = ErrMalformed
		} else if h.Refused != nil {
			h.Refused(fmt.Errorf("%w command %d: %s", ErrPlugin, p[0], p[1:]))
		}
	default:
		err = ErrUnknown
	}
	if err != nil {
		return &FrameError{Type: uint8(t), Length: len(p), Err: err}
	}
	return nil
}

func deliver[T any](p []byte, parse func([]byte) (T, error), to func(T)) error {
	v, err := parse(p)
	if err == nil && to != nil {
		to(v)
	}
	return err
}

// ErrOwner: a process speaks for a domain that is not its own.
var ErrOwner = errors.New("not the QEMU of that domain")

// Listener accepts plugins on a unix socket.
type Listener struct {
	// Owner tells whose QEMU a process is, or why it is none. It is asked before
	// anything is read: any user of the host can connect. Nil believes HELLO.
	Owner func(pid int) (plugin.UUID, error)

	l net.Listener
}

// Listen makes the socket. It must be reachable by the user that QEMU runs as,
// libvirt-qemu on Debian: mode 0666, in a directory that guards it.
func Listen(path string) (*Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("plugin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("plugin socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("plugin socket: %w", err)
	}
	return &Listener{l: l}, nil
}

// Close ends Serve.
func (l *Listener) Close() error { return l.l.Close() }

// Serve calls handle in a goroutine of its own for each plugin that connects
// and says hello; the session is closed when handle returns. report is told of
// those that do not. Serve returns when the listener is closed.
func (l *Listener) Serve(handle func(*Session), report func(error)) error {
	for {
		conn, err := l.l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM):
			// It passes; the plugins come again.
			report(fmt.Errorf("plugin socket: %w", err))
			<-time.After(acceptPause)
			continue
		case err != nil:
			return fmt.Errorf("plugin socket: %w", err)
		}
		// Strangers get no further than here, one after the other: there may be
		// thousands.
		s, owner, err := l.admit(conn)
		if err != nil {
			_ = conn.Close()
			report(err)
			continue
		}
		go func() {
			defer func() { _ = s.Close() }()
			if err := s.greet(); err != nil {
				report(err)
				return
			}
			if l.Owner != nil && s.hello.Domain != owner {
				report(fmt.Errorf("plugin hello for %s from the QEMU of %s: %w", s.hello.Domain, owner, ErrOwner))
				return
			}
			handle(s)
		}()
	}
}

// acceptPause is between tries to accept while the machine lacks what it takes.
const acceptPause = 100 * time.Millisecond

// admit finds out who is at the other end, as the kernel names it: the pid in
// HELLO may be of another namespace, or a lie.
func (l *Listener) admit(conn net.Conn) (*Session, plugin.UUID, error) {
	var owner plugin.UUID
	cred, err := credentials(conn)
	if err != nil {
		return nil, owner, fmt.Errorf("plugin: %w", err)
	}
	pid, user := int(cred.Pid), int(cred.Uid)
	if l.Owner != nil {
		if owner, err = l.Owner(pid); err != nil {
			return nil, owner, fmt.Errorf("plugin: process %d of user %d: %w", pid, user, err)
		}
	}
	// On Linux this holds a pidfd, so that a later process with the same number is
	// not taken for this one.
	qemu, err := os.FindProcess(pid)
	if err != nil {
		return nil, owner, fmt.Errorf("plugin: %w", err)
	}
	return &Session{conn: conn, qemu: qemu, user: user}, owner, nil
}

func credentials(conn net.Conn) (*syscall.Ucred, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("not a socket: %T", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}

// greet reads HELLO.
func (s *Session) greet() error {
	if err := s.conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return fmt.Errorf("plugin hello: %w", err)
	}
	in := passed{}
	var r io.Reader = s.conn
	if u, ok := s.conn.(*net.UnixConn); ok {
		in.conn, r = u, &in
	}
	s.r = bufio.NewReaderSize(r, 256<<10)
	var buf []byte
	t, p, err := readFrame(s.r, &buf)
	s.staging = in.file
	if err != nil {
		return fmt.Errorf("plugin hello: %w", err)
	}
	if t != frameHello {
		return fmt.Errorf("plugin hello: %w", &FrameError{Type: uint8(t), Length: len(p), Err: ErrUnknown})
	}
	if s.hello, err = parseHello(p); err != nil {
		return fmt.Errorf("plugin hello: %w", err)
	}
	return s.conn.SetReadDeadline(time.Time{})
}
