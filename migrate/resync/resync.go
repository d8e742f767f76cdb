// SPDX-License-Identifier: Apache-2.0

// Package resync brings an old replica of a disk up to date without sending
// what it has already, as DRBD's checksum-based resynchronisation does
// (drbd.conf(5), csums-alg).
//
// QEMU mirrors the whole disk to an NBD server that is [Send]. For each chunk
// that it writes, Send sends the SHA-256 of the data only; [Receive], beside the
// QEMU that has the replica, reads the chunk there and asks for the data if it
// differs. What the replica holds is looked at when it is to be overwritten, so
// nothing is believed of how it came about or of what was kept about it.
//
// Between them they speak NBD with simple replies, without its handshake:
// Receive begins with the size of the disk (u64) and the transmission flags
// (u16) of the replica's server. One command is added, compare (0x4654): a
// header with offset and length, at most [Chunk], and 32 bytes of SHA-256; it
// is answered with 0 for equal, or with EILSEQ (84) for "write it".
package resync

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// Chunk is the most that is compared at once, in bytes. It is what QEMU's mirror
// copies at least.
const Chunk = 64 << 10

// The command that is added to NBD's, and its answer.
const (
	cmdCompare  = 0x4654
	codeDiffers = 84 // EILSEQ
)

// window bounds the data of requests that are not yet answered, in bytes. A
// mirror has at most 16 of them under way, of 1 MiB.
const window = 2 * maxLength

// Stats counts what a replica was written, in bytes. It may be read at any time.
type Stats struct {
	Equal atomic.Int64 // was there already
	Sent  atomic.Int64 // went over the network
}

// conn is a connection whose writes never make its reader wait: they are queued.
// Two sides that did both in one goroutine could wait for each other.
type conn struct {
	net.Conn
	r *bufio.Reader

	left atomic.Bool // by the client, in good order

	mu     sync.Mutex
	filled *sync.Cond
	queue  net.Buffers
	size   int  // of the queue, bytes
	closed bool // nothing is queued any more
}

func newConn(c net.Conn) *conn {
	q := &conn{Conn: c, r: bufio.NewReaderSize(c, 256<<10)}
	q.filled = sync.NewCond(&q.mu)
	return q
}

// next reads a request. The end of the connection is as good as the request for it.
func (c *conn) next() (request, error) {
	r, err := readRequest(c.r)
	if errors.Is(err, io.EOF) {
		r, err = request{kind: cmdDisconnect}, nil
	}
	if err == nil && r.kind == cmdDisconnect {
		c.left.Store(true)
	}
	return r, err
}

// data reads what comes with a request or a reply.
func (c *conn) data(length uint32) ([]byte, error) {
	p := make([]byte, length)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return nil, cut(err)
	}
	return p, nil
}

// push queues what is to be written. The windows of both sides bound that; who
// reads nothing and asks for more is left.
func (c *conn) push(parts ...[]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	for _, p := range parts {
		c.size += len(p)
	}
	if c.size > 4*window {
		c.closed = true
		_ = c.Close()
	}
	c.queue = append(c.queue, parts...)
	c.filled.Signal()
}

// finish lets drain end once everything is written.
func (c *conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.filled.Signal()
}

// drain writes what is queued, until finish.
func (c *conn) drain() error {
	for {
		c.mu.Lock()
		for len(c.queue) == 0 && !c.closed {
			c.filled.Wait()
		}
		batch := c.queue
		c.queue, c.size = nil, 0
		c.mu.Unlock()
		if len(batch) == 0 {
			return nil
		}
		if _, err := batch.WriteTo(c.Conn); err != nil {
			return err
		}
	}
}

// run runs both halves of a side and the writers of its connections until the
// client is gone and everything is answered, one of them fails, or ctx ends.
// Then both connections are closed.
func run(ctx context.Context, from, to *conn, requests, replies func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	closeBoth := func() {
		_ = from.Close()
		_ = to.Close()
		from.finish()
		to.finish()
	}
	stop := context.AfterFunc(ctx, closeBoth)
	defer stop()
	defer closeBoth()
	g.Go(func() error {
		err := requests(ctx)
		to.finish()
		return err
	})
	g.Go(func() error {
		err := replies(ctx)
		if errors.Is(err, io.EOF) && from.left.Load() {
			err = nil
		}
		from.finish()
		return cut(err)
	})
	g.Go(from.drain)
	g.Go(to.drain)
	return g.Wait()
}

// Options of [Send].
type Options struct {
	Stats *Stats
	// Limit is of the data that is sent, in bytes per second; nil is none.
	Limit *rate.Limiter
}

// NewLimit gives a limit of so many bytes per second; 0 is none.
func NewLimit(bytes int64) *rate.Limiter {
	if bytes <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytes), maxLength)
}

// Send serves QEMU's mirror as the NBD server of the replica, whose Receive is
// at the other end of peer. It returns when QEMU hangs up, and closes both.
func Send(ctx context.Context, qemu, peer net.Conn, o Options) error {
	s := &sender{
		qemu: newConn(qemu), peer: newConn(peer), o: o,
		pieces: map[uint64]*piece{}, room: semaphore.NewWeighted(window),
	}
	stop := context.AfterFunc(ctx, func() {
		_ = qemu.Close()
		_ = peer.Close()
	})
	var p [exportLength]byte
	_, err := io.ReadFull(s.peer.r, p[:])
	ok := false
	if err == nil {
		ok, err = accept(struct {
			io.Reader
			io.Writer
		}{s.qemu.r, qemu}, decodeExport(p[:]))
	}
	stop()
	if err != nil || !ok {
		_ = qemu.Close()
		_ = peer.Close()
		return cut(err)
	}
	return run(ctx, s.qemu, s.peer, s.requests, s.replies)
}

// write is a request of QEMU that is under way.
type write struct {
	request
	pending int    // pieces not yet answered
	code    uint32 // of the first that failed
	weight  int64
}

// piece is what the peer is asked for one request, or a part of it.
type piece struct {
	whole   *write
	request        // as it goes to the peer
	data    []byte // to be written
}

type sender struct {
	qemu, peer *conn
	o          Options
	room       *semaphore.Weighted

	mu     sync.Mutex
	pieces map[uint64]*piece // by cookie
	last   uint64            // cookie
}

func (s *sender) requests(ctx context.Context) error {
	for {
		r, err := s.qemu.next()
		if err != nil {
			return err
		}
		w := &write{request: r, weight: 1}
		var data []byte
		switch r.kind {
		case cmdDisconnect:
			s.peer.push(r.encode())
			return nil
		case cmdWrite:
			w.weight += int64(r.length)
		case cmdRead, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes:
		default:
			return fmt.Errorf("%w: command %d", ErrProtocol, r.kind)
		}
		if err := s.room.Acquire(ctx, w.weight); err != nil {
			return err
		}
		if r.kind == cmdWrite {
			if data, err = s.qemu.data(r.length); err != nil {
				return err
			}
		}
		if r.kind == cmdWrite && r.length >= Chunk && r.flags == 0 {
			s.compare(w, data)
			continue
		}
		// What is small is the guest's own; it comes while QEMU copies.
		w.pending = 1
		s.send(&piece{whole: w, request: r, data: data})
	}
}

// compare asks for each chunk whether the replica has it.
func (s *sender) compare(w *write, data []byte) {
	var list []*piece
	for at := w.offset; len(data) > 0; {
		n := min(Chunk-at%Chunk, uint64(len(data)))
		list = append(list, &piece{whole: w, data: data[:n], request: request{kind: cmdCompare, offset: at, length: uint32(n)}})
		at, data = at+n, data[n:]
	}
	w.pending = len(list)
	for _, p := range list {
		s.send(p)
	}
}

// send asks the peer for a piece, under a cookie of its own.
func (s *sender) send(p *piece) {
	data := p.data
	if p.kind == cmdCompare {
		sum := sha256.Sum256(p.data)
		data = sum[:]
	} else {
		s.o.Stats.Sent.Add(int64(len(data)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	p.cookie = s.last
	s.pieces[p.cookie] = p
	s.peer.push(p.encode(), data)
}

// sendData sends the data of a chunk that the replica does not have.
func (s *sender) sendData(p *piece) {
	var wait time.Duration
	if s.o.Limit != nil {
		wait = s.o.Limit.ReserveN(time.Now(), len(p.data)).Delay()
	}
	time.AfterFunc(wait, func() {
		s.o.Stats.Sent.Add(int64(len(p.data)))
		s.peer.push(p.encode(), p.data)
	})
}

func (s *sender) replies(context.Context) error {
	for {
		r, err := readReply(s.peer.r)
		if err != nil {
			return err
		}
		s.mu.Lock()
		p := s.pieces[r.cookie]
		if p != nil && p.kind == cmdCompare && r.code == codeDiffers {
			p.kind = cmdWrite
			s.mu.Unlock()
			s.sendData(p)
			continue
		}
		delete(s.pieces, r.cookie)
		s.mu.Unlock()
		if p == nil {
			return fmt.Errorf("%w: a reply to nothing", ErrProtocol)
		}
		var data []byte
		if p.kind == cmdRead && r.code == 0 {
			if data, err = s.peer.data(p.length); err != nil {
				return err
			}
		}
		if p.kind == cmdCompare && r.code == 0 {
			s.o.Stats.Equal.Add(int64(len(p.data)))
		}
		s.answer(p.whole, r.code, data)
	}
}

// answer notes the end of one piece of a request, and answers QEMU at the last.
func (s *sender) answer(w *write, code uint32, data []byte) {
	if w.code == 0 {
		w.code = code
	}
	w.pending--
	if w.pending > 0 {
		return
	}
	s.room.Release(w.weight)
	if len(data) > 0 {
		s.qemu.push(reply{w.code, w.cookie}.encode(), data)
		return
	}
	s.qemu.push(reply{w.code, w.cookie}.encode())
}
