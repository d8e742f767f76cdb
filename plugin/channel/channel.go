// SPDX-License-Identifier: Apache-2.0

// Package channel is the logging channel between two agents: how connections
// are made, what is said first on each, the frames of a session, and the
// backup's memory of the log ([Store]).
//
// A connection is opened by [Dial] and accepted by [Serve], and by nothing
// else; what secures it is the [Transport]'s business. PROTOCOL.md beside this
// file specifies the bytes.
package channel

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// ProtocolVersion is what this package speaks. Both sides must be equal.
const ProtocolVersion uint16 = 2

// Sentinels of the channel. The typed errors of this package wrap them.
var (
	// ErrClosed: the connection is closed or broken. See [ClosedError].
	ErrClosed = errors.New("channel closed")
	// ErrMagic: the peer does not speak ftvirt's protocol at all.
	ErrMagic = errors.New("not an ftvirt channel")
	// ErrVersion: the peer speaks another version. See [VersionError].
	ErrVersion = errors.New("channel protocol version mismatch")
	// ErrFrameTooLong: a frame exceeds the limit. See [FrameError].
	ErrFrameTooLong = errors.New("channel frame too long")
	// ErrMalformed: a frame is not what its type promises. See [FrameError].
	ErrMalformed = errors.New("malformed channel frame")
	// ErrRefused: the peer refused the connection. See [RefusedError].
	ErrRefused = errors.New("peer refused the connection")
	// ErrOverloaded: the peer sends requests faster than it reads the answers.
	ErrOverloaded = errors.New("too many requests from the peer")
)

// ClosedError is what every waiter gets when a connection ends.
// It wraps [ErrClosed] and Cause.
type ClosedError struct {
	// Cause is why; nil if this side called Close, io.EOF if the peer closed.
	Cause error
}

func (e *ClosedError) Error() string {
	if e.Cause == nil {
		return ErrClosed.Error()
	}
	return fmt.Sprintf("%v: %v", ErrClosed, e.Cause)
}

func (e *ClosedError) Unwrap() []error {
	if e.Cause == nil {
		return []error{ErrClosed}
	}
	return []error{ErrClosed, e.Cause}
}

// VersionError tells both versions. It wraps [ErrVersion].
type VersionError struct {
	Ours, Theirs uint16
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%v: ours is %d, the peer's %d; install the same ftvirt on both hosts", ErrVersion, e.Ours, e.Theirs)
}

func (e *VersionError) Unwrap() error { return ErrVersion }

// FrameError tells which frame was wrong. It wraps [ErrFrameTooLong] or
// [ErrMalformed].
type FrameError struct {
	Type   FrameType
	Length uint32
	Err    error
}

func (e *FrameError) Error() string {
	return fmt.Sprintf("%v: %v of %d bytes", e.Err, e.Type, e.Length)
}

func (e *FrameError) Unwrap() error { return e.Err }

// Config bounds what a connection may take. The zero value is not usable:
// start from [DefaultConfig].
type Config struct {
	// HandshakeTimeout bounds everything up to the answer to HELLO.
	HandshakeTimeout time.Duration
	// WriteTimeout is how long a write may make no progress before the
	// connection counts as broken. A peer that is slow but reads is not broken.
	WriteTimeout time.Duration
	// MaxFrame is the largest payload of a frame, in bytes, either way.
	MaxFrame int
	// QueueBytes bounds what is queued for sending; a Send beyond it blocks.
	QueueBytes int
	// MaxRequests bounds the peer's requests handled at once; more are
	// answered with an error of code [CodeBusy].
	MaxRequests int
	// MaxHandshakes bounds the connections in handshake at once, in [Serve]; for
	// one more, the oldest of the address that has the most is closed.
	MaxHandshakes int
	// Logger gets what no caller is told, such as failed handshakes.
	Logger *slog.Logger
}

// DefaultConfig suits a session that carries a busy guest's log.
func DefaultConfig() Config {
	return Config{
		HandshakeTimeout: 10 * time.Second,
		WriteTimeout:     10 * time.Second,
		MaxFrame:         1 << 20,
		QueueBytes:       4 << 20,
		MaxRequests:      16,
		MaxHandshakes:    32,
		Logger:           slog.New(slog.DiscardHandler),
	}
}

// ErrConfig is wrapped by what [Config.Validate] returns.
var ErrConfig = errors.New("invalid channel configuration")

// minFrame lets every HELLO and every error response fit.
const minFrame = 8 << 10

// Validate checks the values and how they relate.
func (c Config) Validate() error {
	switch {
	case c.HandshakeTimeout <= 0 || c.WriteTimeout <= 0:
		return fmt.Errorf("%w: timeouts must be positive", ErrConfig)
	case c.MaxFrame < minFrame || c.MaxFrame > 1<<30:
		return fmt.Errorf("%w: frame limit %d is not within %d and 1 GiB", ErrConfig, c.MaxFrame, minFrame)
	case c.QueueBytes < c.MaxFrame+frameHeader:
		return fmt.Errorf("%w: a queue of %d bytes cannot hold a frame of %d", ErrConfig, c.QueueBytes, c.MaxFrame)
	case c.MaxRequests < 1 || c.MaxHandshakes < 1:
		return fmt.Errorf("%w: at least one request and one handshake must be allowed", ErrConfig)
	case c.Logger == nil:
		return fmt.Errorf("%w: no logger", ErrConfig)
	}
	return nil
}
