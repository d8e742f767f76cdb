// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// magic begins the payload of a HELLO.
const magic = "FTVC"

// Purpose is what a connection is for.
type Purpose uint8

// The purposes of connections.
const (
	// PurposeSession carries frames: log, acks, control entries and requests.
	PurposeSession Purpose = iota + 1
	// PurposeMigrate carries QEMU's migration stream.
	PurposeMigrate
	// PurposeNBD carries NBD for one disk, named by the target.
	PurposeNBD
	// PurposeResync carries what package resync speaks, for one disk.
	PurposeResync
)

func (p Purpose) String() string {
	switch p {
	case PurposeSession:
		return "session"
	case PurposeMigrate:
		return "migrate"
	case PurposeNBD:
		return "nbd"
	case PurposeResync:
		return "resync"
	default:
		return fmt.Sprintf("purpose %d", uint8(p))
	}
}

// Hello is what the dialing side says first.
type Hello struct {
	Purpose Purpose
	// From and To are host names as in the configuration. The dialing side says
	// whom it means to reach, so that a wrong address is found out.
	From, To string
	Domain   plugin.UUID
	Epoch    plugin.Epoch
	// Target names a part of the domain, such as a disk for [PurposeNBD] and
	// [PurposeResync].
	Target string
}

// maxName bounds each string of a HELLO, in bytes.
const maxName = 1024

// The places of what no version of the protocol may move: magic and version.
const (
	helloVersion = len(magic)
	helloFixed   = len(magic) + 2
	helloBody    = 1 + 8 + 16
)

func encodeHello(h Hello) ([]byte, error) {
	length := helloFixed + helloBody
	for _, s := range []string{h.From, h.To, h.Target} {
		if len(s) > maxName {
			return nil, fmt.Errorf("%w: name of %d bytes, at most %d", ErrMalformed, len(s), maxName)
		}
		length += 2 + len(s)
	}
	dst := appendHeader(nil, FrameHello, length)
	dst = append(dst, magic...)
	dst = binary.BigEndian.AppendUint16(dst, ProtocolVersion)
	dst = append(dst, byte(h.Purpose))
	dst = binary.BigEndian.AppendUint64(dst, uint64(h.Epoch))
	dst = append(dst, h.Domain[:]...)
	for _, s := range []string{h.From, h.To, h.Target} {
		dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
		dst = append(dst, s...)
	}
	return dst, nil
}

func parseHello(p []byte) (Hello, error) {
	var h Hello
	if len(p) < helloFixed || string(p[:len(magic)]) != magic {
		return h, ErrMagic
	}
	if v := binary.BigEndian.Uint16(p[helloVersion:]); v != ProtocolVersion {
		return h, &VersionError{Ours: ProtocolVersion, Theirs: v}
	}
	rest := p[helloFixed:]
	if len(rest) < helloBody {
		return h, malformed(FrameHello, p)
	}
	h.Purpose = Purpose(rest[0])
	h.Epoch = plugin.Epoch(binary.BigEndian.Uint64(rest[1:]))
	copy(h.Domain[:], rest[9:])
	rest = rest[helloBody:]
	for _, s := range []*string{&h.From, &h.To, &h.Target} {
		if len(rest) < 2 {
			return h, malformed(FrameHello, p)
		}
		n := int(binary.BigEndian.Uint16(rest))
		if n > maxName || len(rest) < 2+n {
			return h, malformed(FrameHello, p)
		}
		*s, rest = string(rest[2:2+n]), rest[2+n:]
	}
	if len(rest) != 0 || h.Purpose < PurposeSession || h.Purpose > PurposeResync {
		return h, malformed(FrameHello, p)
	}
	return h, nil
}

// RefuseCode tells the peer's program why it was refused.
type RefuseCode uint16

// The reasons for a refusal.
const (
	RefuseVersion RefuseCode = iota + 1
	RefuseMalformed
	RefuseHost     // the peer meant, or is, another host
	RefuseDomain   // the domain is not known here
	RefuseEpoch    // the epoch is not the current one
	RefuseBusy     // such a connection exists or there is no room
	RefuseInternal // something failed here
)

// RefusedError is the peer's refusal. It wraps [ErrRefused].
type RefusedError struct {
	Code RefuseCode
	Text string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("%v: %s (code %d)", ErrRefused, e.Text, e.Code)
}

func (e *RefusedError) Unwrap() error { return ErrRefused }

// maxRefusal bounds the text of a REFUSE, in bytes.
const maxRefusal = 4096

func appendRefuse(dst []byte, code RefuseCode, text string) []byte {
	text = text[:min(len(text), maxRefusal)]
	dst = appendHeader(dst, FrameRefuse, 2+2+len(text))
	dst = binary.BigEndian.AppendUint16(dst, ProtocolVersion)
	dst = binary.BigEndian.AppendUint16(dst, uint16(code))
	return append(dst, text...)
}

func appendWelcome(dst []byte, resume plugin.Position) []byte {
	dst = appendHeader(dst, FrameWelcome, 2+8)
	dst = binary.BigEndian.AppendUint16(dst, ProtocolVersion)
	return binary.BigEndian.AppendUint64(dst, uint64(resume))
}

// parseAnswer reads the payload of a WELCOME or REFUSE.
func parseAnswer(t FrameType, p []byte) (plugin.Position, error) {
	if len(p) < 2 {
		return 0, malformed(t, p)
	}
	version := binary.BigEndian.Uint16(p)
	switch t {
	case FrameWelcome:
		if version != ProtocolVersion {
			return 0, &VersionError{Ours: ProtocolVersion, Theirs: version}
		}
		if len(p) != 2+8 {
			return 0, malformed(t, p)
		}
		return plugin.Position(binary.BigEndian.Uint64(p[2:])), nil
	case FrameRefuse:
		if len(p) < 2+2 || len(p) > 2+2+maxRefusal {
			return 0, malformed(t, p)
		}
		code := RefuseCode(binary.BigEndian.Uint16(p[2:]))
		if code == RefuseVersion && version != ProtocolVersion {
			return 0, &VersionError{Ours: ProtocolVersion, Theirs: version}
		}
		return 0, &RefusedError{Code: code, Text: string(p[4:])}
	default:
		return 0, malformed(t, p)
	}
}

// bound makes a connection's I/O end at a timeout or with ctx. The returned
// function lifts the bound, given the error of that I/O, and returns what
// caused it: ctx's error if that struck.
func bound(ctx context.Context, conn net.Conn, timeout time.Duration) func(error) error {
	// A deadline that has passed interrupts what is under way.
	past := time.Unix(1, 0)
	_ = conn.SetDeadline(time.Now().Add(timeout))
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetDeadline(past)
		close(done)
	})
	return func(err error) error {
		if !stop() {
			<-done
			return ctx.Err()
		}
		if rerr := conn.SetDeadline(time.Time{}); err == nil {
			err = rerr
		}
		return err
	}
}

// Dial opens a connection to a peer agent and introduces itself. The returned
// connection is raw: for [PurposeSession] give it to [NewConn]. The position is
// from where the peer wants the log.
//
// Errors: [RefusedError], [VersionError], [FrameError], those of the transport.
func Dial(ctx context.Context, t Transport, address string, h Hello, cfg Config) (net.Conn, plugin.Position, error) {
	if err := cfg.Validate(); err != nil {
		return nil, 0, err
	}
	hello, err := encodeHello(h)
	if err != nil {
		return nil, 0, err
	}
	dialCtx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	conn, err := t.Dial(dialCtx, address, h.To)
	if err != nil {
		return nil, 0, err
	}
	resume, err := introduce(ctx, conn, hello, cfg)
	if err != nil {
		_ = conn.Close()
		return nil, 0, fmt.Errorf("%v channel to %s: %w", h.Purpose, address, err)
	}
	return conn, resume, nil
}

func introduce(ctx context.Context, conn net.Conn, hello []byte, cfg Config) (plugin.Position, error) {
	if err := setNoDelay(conn); err != nil {
		return 0, err
	}
	release := bound(ctx, conn, cfg.HandshakeTimeout)
	resume, err := exchange(conn, hello)
	return resume, release(err)
}

func exchange(conn net.Conn, hello []byte) (plugin.Position, error) {
	if _, err := conn.Write(hello); err != nil {
		return 0, err
	}
	// Unbuffered: what follows the answer belongs to the connection's user.
	var header [frameHeader]byte
	t, payload, err := readFrame(conn, &header, nil, minFrame)
	if err != nil {
		return 0, noEOF(err)
	}
	return parseAnswer(t, payload)
}

// noEOF makes a peer that hangs up where it owes bytes an error of its own.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Incoming is a connection whose HELLO was read, and which comes from the host
// that it names. Its user calls either [Incoming.Welcome] or [Incoming.Refuse],
// once; if it calls neither, the connection is refused when the handler returns.
type Incoming struct {
	Hello  Hello
	conn   net.Conn
	server *server
	once   sync.Once
}

// RemoteAddr is the peer's address.
func (in *Incoming) RemoteAddr() net.Addr { return in.conn.RemoteAddr() }

// Welcome accepts the connection and hands it over, raw; closing it is then the
// caller's. The peer is told to send the log from resume on.
func (in *Incoming) Welcome(ctx context.Context, resume plugin.Position) (net.Conn, error) {
	var err error = &ClosedError{}
	in.once.Do(func() { err = in.answer(ctx, appendWelcome(nil, resume)) })
	if err != nil {
		_ = in.conn.Close()
		return nil, fmt.Errorf("welcoming %s: %w", in.Hello.From, err)
	}
	return in.conn, nil
}

// Refuse tells the peer why not, and closes the connection. A refusal that says
// that the peer is no peer is logged as well.
func (in *Incoming) Refuse(ctx context.Context, code RefuseCode, text string) error {
	var err error = &ClosedError{}
	in.once.Do(func() {
		if code == RefuseVersion || code == RefuseMalformed || code == RefuseHost {
			in.server.warn("a connection was refused", in.conn, "says_it_is", in.Hello.From, "error", text)
		}
		err = errors.Join(in.answer(ctx, appendRefuse(nil, code, text)), in.conn.Close())
	})
	return err
}

func (in *Incoming) answer(ctx context.Context, frame []byte) error {
	release := bound(ctx, in.conn, in.server.cfg.HandshakeTimeout)
	_, err := in.conn.Write(frame)
	return release(err)
}

// server is one call of [Serve].
type server struct {
	transport Transport
	cfg       Config
	admission
	complaints Complaints
}

func (s *server) warn(text string, conn net.Conn, args ...any) {
	s.complaints.Warn(s.cfg.Logger, origin(conn), text, append([]any{"peer", conn.RemoteAddr()}, args...)...)
}

// Serve accepts connections of a transport's listener until ctx ends, then
// returns ctx's error once all handlers have returned. The listener is closed.
// Each connection is read and handled in its own goroutine, so that a peer that
// stalls delays no other.
func Serve(ctx context.Context, t Transport, ln net.Listener, cfg Config, handle func(context.Context, *Incoming)) error {
	if err := cfg.Validate(); err != nil {
		_ = ln.Close()
		return err
	}
	s := &server{transport: t, cfg: cfg, admission: admission{most: cfg.MaxHandshakes}}
	ctx, cancel := context.WithCancel(ctx)
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer func() {
		if stop() {
			_ = ln.Close()
		}
	}()
	for {
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = abort(conn)
			}
			return ctx.Err()
		case passes(err):
			cfg.Logger.ErrorContext(ctx, "cannot accept agents", "error", err)
			if err := pause(ctx, acceptPause); err != nil {
				return err
			}
			continue
		case err != nil:
			return fmt.Errorf("accepting agents: %w", err)
		}
		s.enter(conn)
		handlers.Go(func() {
			in, err := s.accept(ctx, conn)
			s.leave(conn)
			if err != nil {
				return
			}
			handle(ctx, in)
			// No-op if the handler answered.
			_ = in.Refuse(ctx, RefuseInternal, "the agent did not take the connection")
		})
	}
}

// acceptPause is between tries to accept while the machine lacks what it takes.
const acceptPause = time.Second

// passes tells whether accepting failed for a reason that goes away.
func passes(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// accept reads a HELLO and finds out whether it is true. On error the peer was
// told what it can be told, and the connection is closed.
func (s *server) accept(ctx context.Context, conn net.Conn) (*Incoming, error) {
	in := &Incoming{conn: conn, server: s}
	err := setNoDelay(conn)
	if err == nil {
		release := bound(ctx, conn, s.cfg.HandshakeTimeout)
		in.Hello, err = readHello(conn)
		err = release(err)
	}
	if err == nil {
		err = s.transport.Authenticate(conn, in.Hello.From)
	}
	switch {
	case err == nil:
		return in, nil
	case errors.Is(err, ErrIdentity):
		_ = in.Refuse(ctx, RefuseHost, err.Error())
	case errors.Is(err, ErrVersion):
		_ = in.Refuse(ctx, RefuseVersion, err.Error())
	case errors.Is(err, ErrMalformed) && !errors.Is(err, ErrMagic):
		_ = in.Refuse(ctx, RefuseMalformed, err.Error())
	default:
		// Whoever lacks the magic would not understand a refusal.
		s.warn("channel handshake failed", conn, "error", err)
		_ = conn.Close()
	}
	return nil, err
}

func readHello(conn net.Conn) (Hello, error) {
	var header [frameHeader]byte
	t, payload, err := readFrame(conn, &header, nil, minFrame)
	if err != nil {
		if t != FrameHello && t != 0 {
			return Hello{}, fmt.Errorf("%w: %w", ErrMagic, err)
		}
		return Hello{}, noEOF(err)
	}
	if t != FrameHello {
		return Hello{}, ErrMagic
	}
	return parseHello(payload)
}
