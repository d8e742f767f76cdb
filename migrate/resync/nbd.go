// SPDX-License-Identifier: Apache-2.0

package resync

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// What is used here of NBD, in its words and big-endian; see doc/proto.md of
// the NetworkBlockDevice project. Neither side offers structured replies or
// extended headers.
const (
	nbdMagic     = 0x4e42444d41474943 // "NBDMAGIC"
	optionMagic  = 0x49484156454f5054 // "IHAVEOPT"
	answerMagic  = 0x0003e889045565a9
	requestMagic = 0x25609513
	replyMagic   = 0x67446698

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optAbort = 2
	optInfo  = 6
	optGo    = 7

	answerAck         = 1
	answerInfo        = 3
	answerUnsupported = 1<<31 | 1

	infoExport = 0

	// Of an export: bit 7 is about structured replies.
	exportSendDF = 1 << 7

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6

	cmdFlagFUA = 1 << 0

	// maxLength bounds what a request carries, as QEMU does (NBD_MAX_BUFFER_SIZE).
	maxLength = 32 << 20
	// maxOption bounds the data of an option; an export's name is at most 4096.
	maxOption = 8 << 10
	// maxOptions bounds how long a handshake may go on.
	maxOptions = 64
)

// Errors of a connection.
var (
	ErrProtocol = errors.New("NBD protocol violated")
	ErrExport   = errors.New("the NBD server does not offer the disk")
)

// export is what an NBD server tells of a disk.
type export struct {
	size  uint64 // bytes
	flags uint16
}

// exportLength is that of an encoded export.
const exportLength = 10

func (e export) encode() []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, e.size), e.flags)
}

func decodeExport(p []byte) export {
	return export{size: binary.BigEndian.Uint64(p), flags: binary.BigEndian.Uint16(p[8:])}
}

// request is the header of a request.
type request struct {
	flags, kind    uint16
	cookie, offset uint64
	length         uint32
}

const requestLength = 28

func (r request) encode() []byte {
	b := make([]byte, 0, requestLength)
	b = binary.BigEndian.AppendUint32(b, requestMagic)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, r.kind)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

func readRequest(r io.Reader) (request, error) {
	var b [requestLength]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return request{}, err
	}
	q := request{
		flags: binary.BigEndian.Uint16(b[4:]), kind: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]), length: binary.BigEndian.Uint32(b[24:]),
	}
	switch {
	case binary.BigEndian.Uint32(b[:]) != requestMagic:
		return q, fmt.Errorf("%w: no request", ErrProtocol)
	case (q.kind == cmdRead || q.kind == cmdWrite) && q.length > maxLength:
		return q, fmt.Errorf("%w: a request of %d bytes", ErrProtocol, q.length)
	}
	return q, nil
}

// reply is the header of a simple reply.
type reply struct {
	code   uint32 // 0, or an error of NBD, which are Linux's errno
	cookie uint64
}

func (r reply) encode() []byte {
	b := make([]byte, 0, replyLength)
	b = binary.BigEndian.AppendUint32(b, replyMagic)
	b = binary.BigEndian.AppendUint32(b, r.code)
	return binary.BigEndian.AppendUint64(b, r.cookie)
}

const replyLength = 16

func readReply(r io.Reader) (reply, error) {
	var b [replyLength]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return reply{}, err
	}
	if binary.BigEndian.Uint32(b[:]) != replyMagic {
		return reply{}, fmt.Errorf("%w: no reply", ErrProtocol)
	}
	return reply{code: binary.BigEndian.Uint32(b[4:]), cookie: binary.BigEndian.Uint64(b[8:])}, nil
}

func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// connect is the client's part of the handshake: it asks for the disk by name.
func connect(rw io.ReadWriter, name string) (export, error) {
	var greeting [18]byte
	if _, err := io.ReadFull(rw, greeting[:]); err != nil {
		return export{}, cut(err)
	}
	flags := binary.BigEndian.Uint16(greeting[16:])
	if binary.BigEndian.Uint64(greeting[:]) != nbdMagic || binary.BigEndian.Uint64(greeting[8:]) != optionMagic || flags&flagFixedNewstyle == 0 {
		return export{}, fmt.Errorf("%w: no NBD server", ErrProtocol)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes)))
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint32(b, optGo)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(name)+2))
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, 0) // no information wanted but the export's
	if _, err := rw.Write(b); err != nil {
		return export{}, err
	}
	var e export
	known := false
	for range maxOptions {
		var head [20]byte
		if _, err := io.ReadFull(rw, head[:]); err != nil {
			return e, cut(err)
		}
		kind, length := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if binary.BigEndian.Uint64(head[:]) != answerMagic || binary.BigEndian.Uint32(head[8:]) != optGo || length > maxOption {
			return e, fmt.Errorf("%w: no answer to an option", ErrProtocol)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(rw, data); err != nil {
			return e, cut(err)
		}
		switch {
		case kind == answerAck && known:
			return e, nil
		case kind == answerInfo && length >= 2+exportLength && binary.BigEndian.Uint16(data) == infoExport:
			e, known = decodeExport(data[2:]), true
		case kind == answerInfo:
		default:
			return e, fmt.Errorf("%w: answer %#x: %q", ErrExport, kind, data)
		}
	}
	return e, fmt.Errorf("%w: the handshake does not end", ErrProtocol)
}

// accept is the server's part of the handshake: it offers one disk, whatever the
// client calls it. It returns false if the client leaves.
func accept(rw io.ReadWriter, e export) (bool, error) {
	b := binary.BigEndian.AppendUint64(nil, nbdMagic)
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := rw.Write(b); err != nil {
		return false, err
	}
	var flags [4]byte
	if _, err := io.ReadFull(rw, flags[:]); err != nil {
		return false, cut(err)
	}
	if binary.BigEndian.Uint32(flags[:]) != flagFixedNewstyle|flagNoZeroes {
		return false, fmt.Errorf("%w: client flags %x", ErrProtocol, flags)
	}
	for range maxOptions {
		var head [16]byte
		if _, err := io.ReadFull(rw, head[:]); err != nil {
			return false, cut(err)
		}
		option, length := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if binary.BigEndian.Uint64(head[:]) != optionMagic || length > maxOption {
			return false, fmt.Errorf("%w: no option", ErrProtocol)
		}
		if _, err := io.CopyN(io.Discard, rw, int64(length)); err != nil {
			return false, cut(err)
		}
		answer := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, answerMagic)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := rw.Write(append(b, data...))
			return err
		}
		var err error
		switch option {
		case optGo, optInfo:
			e.flags &^= exportSendDF
			err = errors.Join(
				answer(answerInfo, append(binary.BigEndian.AppendUint16(nil, infoExport), e.encode()...)),
				answer(answerAck, nil))
			if err == nil && option == optGo {
				return true, nil
			}
		case optAbort:
			return false, answer(answerAck, nil)
		default:
			err = answer(answerUnsupported, nil)
		}
		if err != nil {
			return false, err
		}
	}
	return false, fmt.Errorf("%w: the handshake does not end", ErrProtocol)
}
