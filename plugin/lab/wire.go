// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"container/heap"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Weather is what a bad cable does to the frames of one direction.
type Weather struct {
	// Cut loses all of them, while both ends have their carrier.
	Cut bool
	// Delay is what each takes longer, and Jitter what it may take longer still.
	Delay  time.Duration
	Jitter time.Duration
	// Drop is the share of frames, 0 to 1, that are lost.
	Drop float64
	// Reorder lets frames overtake each other by Jitter.
	Reorder bool
	// NoTCP loses what is TCP, as a firewall that forgot its connections does,
	// while all else passes.
	NoTCP bool
	// Largest, unless 0, loses IP packets of more bytes, and tells nobody: the
	// black hole of a path with a smaller MTU than its ends believe.
	Largest int
}

func (w Weather) String() string {
	if w == (Weather{}) {
		return "fine"
	}
	var words []string
	if w.Cut {
		words = append(words, "cut")
	}
	if w.Delay > 0 || w.Jitter > 0 {
		words = append(words, fmt.Sprintf("%v to %v late", w.Delay, w.Delay+w.Jitter))
	}
	if w.Reorder {
		words = append(words, "out of order")
	}
	if w.NoTCP {
		words = append(words, "without TCP")
	}
	if w.Largest > 0 {
		words = append(words, fmt.Sprintf("packets of more than %d bytes lost", w.Largest))
	}
	if w.Drop > 0 {
		words = append(words, fmt.Sprintf("%.0f %% lost", 100*w.Drop))
	}
	return strings.Join(words, ", ")
}

// Wire is a bad cable between a host and the switch. The kernels of test
// machines often lack netem, so frames go through this process: out of the
// host's port, which leaves the bridge meanwhile, and into a port of the wire's
// own that takes its place.
type Wire struct {
	lab        *Lab
	port, bore string // the host's port; the wire's, and with "b" its bridged end
	network    Network
	index      int
	cancel     context.CancelFunc
	wg         sync.WaitGroup
}

// frameSize holds what the kernel's segmentation offload passes at once, with
// the header that says so.
const frameSize = 10 + 14 + 1<<16

// wireBuffer is what a socket may hold while this process does not run.
const wireBuffer = 8 << 20

// Disturb puts a bad cable between the host and a network until the wire is
// closed. A host has at most one for each network.
func (h *Host) Disturb(ctx context.Context, network Network, out, in Weather) (_ *Wire, err error) {
	w := &Wire{lab: h.lab, port: port(h.Name, network), bore: port(h.Name, network) + "w", network: network}
	if err := h.lab.switchBatch(ctx,
		fmt.Sprintf("link add %[1]s type veth peer name %[1]sb", w.bore),
		fmt.Sprintf("link set %s up", w.bore),
		fmt.Sprintf("link set %sb master %s up", w.bore, network)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.restore(context.WithoutCancel(ctx)))
		}
	}()
	var host, bridge int
	err = h.lab.sw.InNetwork(func() (err error) {
		if host, w.index, err = openWire(w.port); err != nil {
			return err
		}
		if bridge, _, err = openWire(w.bore); err != nil {
			_ = unix.Close(host)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("disturb %s of %s: %w", network, h.Name, err)
	}
	if err := h.lab.switchBatch(ctx, "link set "+w.port+" nomaster"); err != nil {
		_, _ = unix.Close(host), unix.Close(bridge)
		return nil, err
	}
	running, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	var directions sync.WaitGroup
	directions.Go(func() { carryFrames(running, host, bridge, out) })
	directions.Go(func() { carryFrames(running, bridge, host, in) })
	w.wg.Go(func() {
		directions.Wait()
		_, _ = unix.Close(host), unix.Close(bridge)
	})
	return w, nil
}

// Close puts the good cable back. Frames on their way are lost. It is no error
// if the host has crashed or was booted meanwhile.
func (w *Wire) Close(ctx context.Context) error {
	w.cancel()
	w.wg.Wait()
	return w.restore(ctx)
}

func (w *Wire) restore(ctx context.Context) error {
	err := w.lab.switchBatch(ctx, "link del "+w.bore)
	present := false
	if lookup := w.lab.sw.InNetwork(func() error {
		// A host that was booted has a new port, in the bridge already.
		link, err := net.InterfaceByName(w.port)
		present = err == nil && link.Index == w.index
		return nil
	}); lookup != nil {
		return errors.Join(err, lookup)
	}
	if !present {
		return err
	}
	return errors.Join(err, w.lab.switchBatch(ctx, fmt.Sprintf("link set %s master %s", w.port, w.network)))
}

// openWire opens an interface for whole frames with their offload headers: a
// frame whose checksum is still to be made must get it at the other end.
func openWire(name string) (fd, index int, err error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, 0, err
	}
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err
	}
	// Reads end now and then, so that Close is noticed.
	patience := unix.Timeval{Usec: 50_000}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, wireBuffer),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: NetworkOrder(unix.ETH_P_ALL), Ifindex: link.Index}))
	if err != nil {
		_ = unix.Close(fd)
		return 0, 0, fmt.Errorf("%s: %w", name, err)
	}
	return fd, link.Index, nil
}

// NetworkOrder is htons.
func NetworkOrder(v uint16) uint16 { return v<<8 | v>>8 }

// carryFrames takes frames of one direction until ctx ends.
func carryFrames(ctx context.Context, from, to int, w Weather) {
	q := newFrameQueue(w, rand.Float64)
	arrived := make(chan struct{}, 1)
	var mu sync.Mutex
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			mu.Lock()
			frame, rest := q.pop(time.Now())
			mu.Unlock()
			if frame != nil {
				// One that does not fit is lost, as on a cable.
				_, _ = unix.Write(to, frame)
				continue
			}
			timer := time.NewTimer(rest)
			select {
			case <-arrived:
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			timer.Stop()
		}
	})
	buf := make([]byte, frameSize)
	for ctx.Err() == nil {
		n, err := unix.Read(from, buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			return
		}
		mu.Lock()
		q.push(buf[:n], time.Now())
		mu.Unlock()
		select {
		case arrived <- struct{}{}:
		default:
		}
	}
}

// frameQueue decides which frames pass and when.
type frameQueue struct {
	weather Weather
	random  func() float64
	frames  frameHeap
	number  int
	last    time.Time
}

func newFrameQueue(w Weather, random func() float64) *frameQueue {
	return &frameQueue{weather: w, random: random}
}

// Where things are in a frame with its offload header, see virtio_net_hdr and
// virtio's section 5.1.6.
const (
	offloadHeader = 10
	etherHeader   = 14
	segmented     = 1 // not 0 if the kernel left the cutting of segments to the card
	headersSize   = 2 // of each such segment
	segmentSize   = 4 // of what each carries behind its headers
)

// loses tells what does not depend on chance.
func (w Weather) loses(frame []byte) bool {
	if w.Cut {
		return true
	}
	if len(frame) < offloadHeader+etherHeader {
		return false
	}
	packet := frame[offloadHeader+etherHeader:]
	size := len(packet)
	if frame[segmented] != 0 {
		size = int(binary.NativeEndian.Uint16(frame[headersSize:])) - etherHeader + int(binary.NativeEndian.Uint16(frame[segmentSize:]))
	}
	var protocol int
	switch ether := binary.BigEndian.Uint16(frame[offloadHeader+etherHeader-2:]); {
	case ether == unix.ETH_P_IP && len(packet) >= 20:
		protocol = int(packet[9])
	case ether == unix.ETH_P_IPV6 && len(packet) >= 40:
		protocol = int(packet[6])
	default:
		return false // no IP
	}
	return w.NoTCP && protocol == unix.IPPROTO_TCP || w.Largest > 0 && size > w.Largest
}

// push takes a copy of a frame, or loses it.
func (q *frameQueue) push(frame []byte, now time.Time) {
	if q.weather.loses(frame) || q.weather.Drop > 0 && q.random() < q.weather.Drop {
		return
	}
	due := now.Add(q.weather.Delay)
	if q.weather.Jitter > 0 {
		due = due.Add(time.Duration(q.random() * float64(q.weather.Jitter)))
	}
	if !q.weather.Reorder && due.Before(q.last) {
		due = q.last
	}
	q.last = due
	q.number++
	heap.Push(&q.frames, dueFrame{due, q.number, append([]byte(nil), frame...)})
}

// pop gives the next frame if it is due, else how long to wait.
func (q *frameQueue) pop(now time.Time) ([]byte, time.Duration) {
	if len(q.frames) == 0 {
		return nil, time.Hour
	}
	if rest := q.frames[0].due.Sub(now); rest > 0 {
		return nil, rest
	}
	return heap.Pop(&q.frames).(dueFrame).data, 0
}

type dueFrame struct {
	due    time.Time
	number int
	data   []byte
}

type frameHeap []dueFrame

func (h frameHeap) Len() int { return len(h) }
func (h frameHeap) Less(i, j int) bool {
	if h[i].due.Equal(h[j].due) {
		return h[i].number < h[j].number
	}
	return h[i].due.Before(h[j].due)
}
func (h frameHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *frameHeap) Push(v any)   { *h = append(*h, v.(dueFrame)) }
func (h *frameHeap) Pop() any {
	old := *h
	v := old[len(old)-1]
	*h = old[:len(old)-1]
	return v
}
