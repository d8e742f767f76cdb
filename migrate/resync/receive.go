// SPDX-License-Identifier: Apache-2.0

package resync

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sync/semaphore"
)

// Receive writes what the Send at the other end of peer sends to the disk name
// of the NBD server qemu. The seed, which may be nil, is an older copy of the
// disk: what is right in there is not sent either. It is never written to.
// Receive returns when the peer hangs up, and closes both connections.
func Receive(ctx context.Context, peer, qemu net.Conn, name string, seed io.ReaderAt) error {
	stop := context.AfterFunc(ctx, func() {
		_ = qemu.Close()
		_ = peer.Close()
	})
	r := &receiver{
		peer: newConn(peer), qemu: newConn(qemu), seed: seed,
		asked: map[uint64]question{}, room: semaphore.NewWeighted(window),
	}
	e, err := connect(struct {
		io.Reader
		io.Writer
	}{r.qemu.r, qemu}, name)
	if err == nil {
		_, err = peer.Write(e.encode())
	}
	stop()
	if err != nil {
		_ = qemu.Close()
		_ = peer.Close()
		return err
	}
	return run(ctx, r.peer, r.qemu, r.requests, r.replies)
}

// question is a request of the peer that QEMU is asked about.
type question struct {
	request
	weight int64             // in the window
	sum    [sha256.Size]byte // of a comparison
	seeded bool              // written from the seed
	zeroes bool              // to be written, if they are not there
}

type receiver struct {
	peer, qemu *conn
	seed       io.ReaderAt
	room       *semaphore.Weighted

	mu    sync.Mutex
	asked map[uint64]question // by cookie
}

// maxLook bounds the zeroes that are looked for before they are written, bytes.
const maxLook = 1 << 20

func (r *receiver) requests(ctx context.Context) error {
	for {
		head, err := r.peer.next()
		if err != nil {
			return err
		}
		q := question{request: head, weight: 1}
		var data []byte
		switch q.kind {
		case cmdDisconnect:
			r.qemu.push(q.encode())
			return nil
		case cmdCompare:
			q.weight += int64(q.length)
			if q.length > Chunk {
				return fmt.Errorf("%w: %d bytes to compare", ErrProtocol, q.length)
			}
			if _, err := io.ReadFull(r.peer.r, q.sum[:]); err != nil {
				return cut(err)
			}
		case cmdWriteZeroes:
			// Written zeroes take room on many filesystems, holes do not.
			if q.zeroes = q.length <= maxLook && q.flags&cmdFlagFUA == 0; q.zeroes {
				q.weight += int64(q.length)
			}
		case cmdRead, cmdWrite:
			q.weight += int64(q.length)
		case cmdFlush, cmdTrim, cmdCache:
		default:
			return fmt.Errorf("%w: command %d", ErrProtocol, q.kind)
		}
		if err := r.room.Acquire(ctx, q.weight); err != nil {
			return err
		}
		if q.kind == cmdWrite {
			if data, err = r.peer.data(q.length); err != nil {
				return err
			}
		}
		r.mu.Lock()
		_, twice := r.asked[q.cookie]
		r.asked[q.cookie] = q
		r.mu.Unlock()
		switch {
		case twice:
			return fmt.Errorf("%w: cookie %d is used twice", ErrProtocol, q.cookie)
		case q.kind == cmdCompare || q.zeroes:
			r.qemu.push(request{kind: cmdRead, cookie: q.cookie, offset: q.offset, length: q.length}.encode())
		case len(data) > 0:
			r.qemu.push(q.encode(), data)
		default:
			r.qemu.push(q.encode())
		}
	}
}

func (r *receiver) replies(context.Context) error {
	for {
		head, err := readReply(r.qemu.r)
		if err != nil {
			return err
		}
		r.mu.Lock()
		q, ok := r.asked[head.cookie]
		r.mu.Unlock()
		if !ok {
			return fmt.Errorf("%w: QEMU replies to nothing", ErrProtocol)
		}
		var data []byte
		if head.code == 0 && (q.kind == cmdRead || q.kind == cmdCompare && !q.seeded || q.zeroes) {
			if data, err = r.qemu.data(q.length); err != nil {
				return err
			}
		}
		switch {
		case q.kind == cmdCompare && !q.seeded:
			if head.code == 0 && sha256.Sum256(data) == q.sum {
				break
			}
			if p := r.fromSeed(q); p != nil {
				w := request{kind: cmdWrite, cookie: q.cookie, offset: q.offset, length: q.length}
				q.seeded = true
				r.again(q)
				r.qemu.push(w.encode(), p)
				continue
			}
			head.code = codeDiffers // what failed is told when it is written
		case q.kind == cmdCompare && head.code != 0:
			head.code = codeDiffers
		case q.zeroes && (head.code != 0 || !zero(data)):
			q.zeroes = false
			r.again(q)
			r.qemu.push(q.encode())
			continue
		}
		r.mu.Lock()
		delete(r.asked, head.cookie)
		r.mu.Unlock()
		r.room.Release(q.weight)
		if q.kind == cmdRead && head.code == 0 {
			r.peer.push(head.encode(), data)
			continue
		}
		r.peer.push(head.encode())
	}
}

// again notes that a question was put to QEMU in other words.
func (r *receiver) again(q question) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked[q.cookie] = q
}

// fromSeed gives the data that was asked for, if the seed has it.
func (r *receiver) fromSeed(q question) []byte {
	if r.seed == nil {
		return nil
	}
	p := make([]byte, q.length)
	if _, err := r.seed.ReadAt(p, int64(q.offset)); err != nil || sha256.Sum256(p) != q.sum {
		return nil // the peer sends it, then
	}
	return p
}

func zero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// Flush makes an NBD server write the disk name to storage, with whatever its
// format keeps in memory.
func Flush(ctx context.Context, qemu net.Conn, name string) error {
	stop := context.AfterFunc(ctx, func() { _ = qemu.Close() })
	defer stop()
	defer func() { _ = qemu.Close() }()
	if _, err := connect(qemu, name); err != nil {
		return err
	}
	if _, err := qemu.Write(request{kind: cmdFlush, cookie: 1}.encode()); err != nil {
		return err
	}
	r, err := readReply(qemu)
	if err == nil && r.code != 0 {
		err = fmt.Errorf("flush of %s: %w", name, syscall.Errno(r.code))
	}
	if err != nil {
		return err
	}
	_, err = qemu.Write(request{kind: cmdDisconnect}.encode())
	return err
}
