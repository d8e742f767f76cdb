// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"

	"ftvirt.org/ftvirt/plugin"
)

// FrameType is the first byte of a frame.
type FrameType uint8

// The types of frames. HELLO, WELCOME and REFUSE occur in the handshake only,
// the others in a session only.
const (
	FrameHello FrameType = iota + 1
	FrameWelcome
	FrameRefuse
	FrameLog
	FrameAck
	FrameControl
	FrameRequest
	FrameResponse
)

func (t FrameType) String() string {
	names := [...]string{
		FrameHello: "HELLO", FrameWelcome: "WELCOME", FrameRefuse: "REFUSE", FrameLog: "LOG", FrameAck: "ACK",
		FrameControl: "CONTROL", FrameRequest: "REQUEST", FrameResponse: "RESPONSE",
	}
	if t >= FrameHello && int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprintf("frame type %d", uint8(t))
}

// frameHeader is the type and the length.
const frameHeader = 1 + 4

// ackFrame is an ACK with its header.
const ackFrame = frameHeader + 8

// appendHeader begins a frame.
func appendHeader(dst []byte, t FrameType, length int) []byte {
	return binary.BigEndian.AppendUint32(append(dst, byte(t)), uint32(length))
}

// readFrame reads one frame into buf, which grows as needed, and returns the
// payload. It reads not a byte more. io.EOF means that no frame began.
func readFrame(r io.Reader, header *[frameHeader]byte, buf []byte, limit int) (FrameType, []byte, error) {
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, buf[:0], err
	}
	t := FrameType(header[0])
	n := binary.BigEndian.Uint32(header[1:])
	if t < FrameHello || t > FrameResponse {
		return t, buf[:0], &FrameError{Type: t, Length: n, Err: ErrMalformed}
	}
	if uint64(n) > uint64(limit) {
		return t, buf[:0], &FrameError{Type: t, Length: n, Err: ErrFrameTooLong}
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		return t, buf[:0], noEOF(err)
	}
	return t, buf, nil
}

func malformed(t FrameType, payload []byte) error {
	return &FrameError{Type: t, Length: uint32(min(uint64(len(payload)), math.MaxUint32)), Err: ErrMalformed}
}

func parseLog(payload []byte) (plugin.Position, []byte, error) {
	if len(payload) < 8 {
		return 0, nil, malformed(FrameLog, payload)
	}
	return plugin.Position(binary.BigEndian.Uint64(payload)), payload[8:], nil
}

func parseAck(payload []byte) (plugin.Position, error) {
	if len(payload) != 8 {
		return 0, malformed(FrameAck, payload)
	}
	return plugin.Position(binary.BigEndian.Uint64(payload)), nil
}

// parseControl checks that the payload is a JSON object that says its kind.
func parseControl(payload []byte) (string, error) {
	var head struct {
		Kind string `json:"kind"`
	}
	if err := json.Unmarshal(payload, &head); err != nil || head.Kind == "" {
		return "", malformed(FrameControl, payload)
	}
	return head.Kind, nil
}

func parseRequest(payload []byte) (id uint64, method string, body []byte, err error) {
	if len(payload) < 8+2 {
		return 0, "", nil, malformed(FrameRequest, payload)
	}
	id = binary.BigEndian.Uint64(payload)
	n := int(binary.BigEndian.Uint16(payload[8:]))
	if n == 0 || len(payload) < 10+n {
		return 0, "", nil, malformed(FrameRequest, payload)
	}
	return id, string(payload[10 : 10+n]), payload[10+n:], nil
}

// The status byte of a RESPONSE.
const (
	statusOK = iota
	statusError
)

func parseResponse(payload []byte) (id uint64, ok bool, body []byte, err error) {
	if len(payload) < 8+1 || payload[8] > statusError {
		return 0, false, nil, malformed(FrameResponse, payload)
	}
	return binary.BigEndian.Uint64(payload), payload[8] == statusOK, payload[9:], nil
}
