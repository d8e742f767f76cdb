// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/rrlog"
)

// Message is what [Conn.Receive] gives: a LOG, an ACK or a CONTROL.
type Message struct {
	// Type is FrameLog, FrameAck or FrameControl.
	Type FrameType
	// Position is that of the first byte of a LOG, or what an ACK acknowledges.
	Position plugin.Position
	// Kind is the kind of a CONTROL.
	Kind string
	// Data is a LOG's bytes, or a CONTROL's JSON object. It is valid until the
	// next call of Receive.
	Data []byte

	// buf is what Data lies in, for reuse.
	buf []byte
}

const (
	// writeChunk is what must be taken by the peer within a WriteTimeout.
	writeChunk = 64 << 10
	// readBuffer is how much is read from the connection at once.
	readBuffer = 64 << 10
	// inboxSlots bounds the frames read ahead of Receive. Beyond them the
	// reader stops, and so, through TCP, does the peer.
	inboxSlots = 4
	// overdraft is what answers of "busy" may take beyond the queue's limit, as
	// the reader must not wait for the writer.
	overdraft = 64 << 10
	// drainTimeout bounds the wait for each further frame once sending failed:
	// what a dead primary sent before it died is still to be had.
	drainTimeout = time.Second
	// logChunk splits a long LOG, so that other frames get in between, and is the
	// most that one may hold, unpacked.
	logChunk = 256 << 10
)

// Conn is a session between two agents: the log one way, acks the other,
// control entries and requests both ways. All methods may be called at once
// from several goroutines, except Receive, which is for one.
//
// Frames of one direction arrive in the order of the Sends, except that an ACK
// may overtake. A receiver that does not call Receive stops the peer's log, and
// with it all that the peer sends behind it, answers to calls included: give
// calls a deadline.
type Conn struct {
	nc       net.Conn
	cfg      Config
	handlers Handlers

	inbox chan Message
	spare chan []byte
	held  []byte // of the last message given out

	packMu   sync.Mutex      // pieces are packed in the order in which they are queued
	packer   *rrlog.Packer   // nil until there is a log to send
	packed   []byte          // for reuse
	unpacker *rrlog.Unpacker // the reader's, nil until a log comes

	ctx    context.Context // of the handlers; ends with the connection
	cancel context.CancelFunc
	tasks  sync.WaitGroup // reader and writer
	served sync.WaitGroup // handlers
	slots  chan struct{}

	mu      sync.Mutex
	queue   []byte // frames to send
	writing int    // bytes that the writer took from the queue and has not sent
	spareQ  []byte // the writer's other buffer
	ack     plugin.Position
	hasAck  bool
	work    signal // something to send, or failed
	room    signal // something was sent, or failed
	nextID  uint64
	calls   map[uint64]chan response
	err     error         // set once: why it ended
	done    chan struct{} // closed with err
	closing chan struct{} // closed by Close
	once    sync.Once     // of Close
}

type response struct {
	ok   bool
	body []byte
}

// NewConn makes a session of a connection of [PurposeSession] that [Dial] or
// [Incoming.Welcome] gave. The handlers serve the peer's requests; nil serves
// none. The Conn owns nc from now on. Call Close in the end.
func NewConn(nc net.Conn, cfg Config, handlers Handlers) (*Conn, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Conn{
		nc: nc, cfg: cfg, handlers: handlers,
		inbox: make(chan Message, inboxSlots),
		spare: make(chan []byte, inboxSlots+2),
		ctx:   ctx, cancel: cancel,
		slots: make(chan struct{}, cfg.MaxRequests),
		calls: make(map[uint64]chan response),
		done:  make(chan struct{}), closing: make(chan struct{}),
	}
	c.tasks.Go(c.read)
	c.tasks.Go(c.write)
	return c, nil
}

// Done is closed when the connection has failed or was closed. Receive may
// still have frames that arrived before.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err is nil while the connection works, then a [ClosedError].
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// RemoteAddr is the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// Close ends the connection at once, without sending what is queued (see
// [Conn.Flush]). All waiters get a [ClosedError]. It returns once the handlers
// of requests have returned, whose contexts it cancels; so no handler may call it.
func (c *Conn) Close() error {
	c.fail(nil)
	c.once.Do(func() { close(c.closing) })
	err := c.nc.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil // the reader was first
	}
	c.tasks.Wait()
	c.served.Wait()
	return err
}

// fail ends the connection for the first reason given.
func (c *Conn) fail(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = &ClosedError{Cause: cause}
	close(c.done)
	c.cancel()
	c.work.notify()
	c.room.notify()
	// Callers wait for done besides their channel, so none is left behind.
	clear(c.calls)
}

// SendLog sends bytes of the log, the first of which is at pos. It copies data,
// and blocks while the queue is full: that is the flow control. On error a part
// may have been queued; the peer's WELCOME on the next connection tells from
// where to go on.
func (c *Conn) SendLog(ctx context.Context, pos plugin.Position, data []byte) error {
	c.packMu.Lock()
	defer c.packMu.Unlock()
	if c.packer == nil {
		c.packer = rrlog.NewPacker()
	}
	var head [8]byte
	limit := min(logChunk, c.cfg.MaxFrame-len(head)-rrlog.PackOverhead)
	for len(data) > 0 {
		n := min(len(data), limit)
		binary.BigEndian.PutUint64(head[:], uint64(pos))
		c.packed = c.packer.Pack(c.packed[:0], data[:n])
		if err := c.send(ctx, FrameLog, head[:], c.packed); err != nil {
			c.packer.Reset() // the peer does not get this piece
			return err
		}
		pos, data = pos+plugin.Position(n), data[n:]
	}
	return nil
}

// SendAck tells the peer that all of the log below pos is held here. It never
// blocks: of the acks that wait to be sent only the newest is, and an ack that
// goes back is dropped. The error is that of a closed connection.
func (c *Conn) SendAck(pos plugin.Position) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if pos > c.ack {
		c.ack, c.hasAck = pos, true
		c.work.notify()
	}
	return nil
}

// DropAck takes back an ack that waits to be sent.
func (c *Conn) DropAck() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hasAck = false
}

// SendControl sends a control entry, which must marshal to a JSON object with a
// nonempty string "kind".
func (c *Conn) SendControl(ctx context.Context, entry any) error {
	body, err := json.Marshal(entry)
	if err != nil {
		return fmt.Errorf("marshaling a control entry: %w", err)
	}
	if _, err := parseControl(body); err != nil {
		return fmt.Errorf("control entry without kind: %w", err)
	}
	return c.send(ctx, FrameControl, nil, body)
}

// Queued is the number of bytes not yet written to the connection.
func (c *Conn) Queued() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.queue) + c.writing
}

// Flush waits until all that was queued, acks included, is written to the
// connection; the peer has then not necessarily read it.
func (c *Conn) Flush(ctx context.Context) error {
	for {
		c.mu.Lock()
		err := c.err
		idle := len(c.queue)+c.writing == 0 && !c.hasAck
		room := c.room.wait()
		c.mu.Unlock()
		switch {
		case err != nil:
			return err
		case idle:
			return nil
		}
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// send queues a frame whose payload is head, then body. It keeps neither.
func (c *Conn) send(ctx context.Context, t FrameType, head, body []byte) error {
	length := len(head) + len(body)
	if length > c.cfg.MaxFrame {
		return &FrameError{Type: t, Length: uint32(min(length, 1<<31)), Err: ErrFrameTooLong}
	}
	for {
		c.mu.Lock()
		if c.err != nil {
			c.mu.Unlock()
			return c.err
		}
		if len(c.queue)+c.writing+frameHeader+length <= c.cfg.QueueBytes {
			c.enqueue(t, head, body)
			c.mu.Unlock()
			return nil
		}
		room := c.room.wait()
		c.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// enqueue appends a frame to the queue. The mutex is held.
func (c *Conn) enqueue(t FrameType, head, body []byte) {
	c.queue = appendHeader(c.queue, t, len(head)+len(body))
	c.queue = append(c.queue, head...)
	c.queue = append(c.queue, body...)
	c.work.notify()
}

// write is the goroutine that sends. While it writes one buffer, frames gather
// in the other, so the batches grow with the load.
func (c *Conn) write() {
	for {
		batch, ok := c.nextBatch()
		if !ok {
			return
		}
		if err := c.writeBatch(batch); err != nil {
			c.fail(fmt.Errorf("sending: %w", err))
			// Wake a reader that waits on a peer that may never speak again;
			// the reader renews this while frames arrive.
			_ = c.nc.SetReadDeadline(time.Now().Add(drainTimeout))
			return
		}
	}
}

func (c *Conn) nextBatch() ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// The previous batch is out.
	c.writing = 0
	c.room.notify()
	for {
		if c.err != nil {
			return nil, false
		}
		if c.hasAck {
			c.queue = binary.BigEndian.AppendUint64(appendHeader(c.queue, FrameAck, 8), uint64(c.ack))
			c.hasAck = false
		}
		if len(c.queue) > 0 {
			batch := c.queue
			c.queue, c.spareQ = c.spareQ[:0], batch
			c.writing = len(batch)
			return batch, true
		}
		work := c.work.wait()
		c.mu.Unlock()
		<-work
		c.mu.Lock()
	}
}

// writeBatch renews the deadline for each chunk: slow is not dead.
func (c *Conn) writeBatch(batch []byte) error {
	for len(batch) > 0 {
		if err := c.nc.SetWriteDeadline(time.Now().Add(c.cfg.WriteTimeout)); err != nil {
			return err
		}
		n, err := c.nc.Write(batch[:min(len(batch), writeChunk)])
		if err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

// Receive gives the next LOG, ACK or CONTROL. After the connection failed it
// first gives all that had arrived, then a [ClosedError].
func (c *Conn) Receive(ctx context.Context) (Message, error) {
	if c.held != nil {
		select {
		case c.spare <- c.held:
		default:
		}
		c.held = nil
	}
	select {
	case m, ok := <-c.inbox:
		if !ok {
			return Message{}, c.Err()
		}
		c.held = m.buf
		return m, nil
	case <-ctx.Done():
		return Message{}, ctx.Err()
	}
}

// read is the goroutine that receives. It ends with the connection's bytes, not
// when sending fails.
func (c *Conn) read() {
	defer close(c.inbox)
	r := bufio.NewReaderSize(c.nc, readBuffer)
	var header [frameHeader]byte
	for {
		select {
		case <-c.done:
			_ = c.nc.SetReadDeadline(time.Now().Add(drainTimeout))
		default:
		}
		var buf []byte
		select {
		case buf = <-c.spare:
		default:
		}
		t, payload, err := readFrame(r, &header, buf, c.cfg.MaxFrame)
		if err == nil {
			err = c.dispatch(t, payload)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				err = fmt.Errorf("receiving: %w", err)
			}
			c.fail(err)
			// Nothing more can be understood: let the peer know at once.
			_ = c.nc.Close()
			return
		}
	}
}

// dispatch passes a frame on. What it does not give to the inbox, it recycles.
func (c *Conn) dispatch(t FrameType, payload []byte) error {
	m := Message{Type: t, buf: payload}
	var err error
	switch t {
	case FrameLog:
		if m, err = c.unpack(payload); err != nil {
			return err
		}
		c.recycle(payload)
	case FrameAck:
		m.Position, err = parseAck(payload)
	case FrameControl:
		m.Data = payload
		m.Kind, err = parseControl(payload)
	case FrameRequest:
		err = c.serve(payload)
		c.recycle(payload)
		return err
	case FrameResponse:
		err = c.resolve(payload)
		c.recycle(payload)
		return err
	default:
		return malformed(t, payload)
	}
	if err != nil {
		return err
	}
	return c.deliver(m)
}

// unpack gives a LOG as it was before it was packed.
func (c *Conn) unpack(payload []byte) (Message, error) {
	pos, packed, err := parseLog(payload)
	if err != nil {
		return Message{}, err
	}
	if c.unpacker == nil {
		c.unpacker = rrlog.NewUnpacker()
	}
	var buf []byte
	select {
	case buf = <-c.spare:
	default:
	}
	buf, err = c.unpacker.Unpack(buf[:0], packed, logChunk)
	if err != nil {
		return Message{}, fmt.Errorf("%w: %w", malformed(FrameLog, payload), err)
	}
	return Message{Type: FrameLog, Position: pos, Data: buf, buf: buf}, nil
}

// errAbandoned ends the reader of a connection that was closed on this side.
var errAbandoned = errors.New("closed on this side")

// deliver waits for Receive. After a failure the frame is still of use to a
// Receive to come; only Close gives it up.
func (c *Conn) deliver(m Message) error {
	select {
	case c.inbox <- m:
		return nil
	case <-c.closing:
		return errAbandoned
	}
}

func (c *Conn) recycle(buf []byte) {
	select {
	case c.spare <- buf:
	default:
	}
}
