// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/lab"
)

// ErrSplit is wrapped when two copies of a guest were seen.
var ErrSplit = errors.New("two live copies")

// Reign is a series of frames of a guest that came from one host, without any
// from another in between.
type Reign struct {
	Host        string
	First, Last time.Time
	Frames      int
}

func (r Reign) String() string {
	const layout = "15:04:05.000000"
	return fmt.Sprintf("%s %s..%s (%d frames)", r.Host, r.First.Format(layout), r.Last.Format(layout), r.Frames)
}

// Decision is that a host may go on with the guest, alone or as the primary.
type Decision struct {
	Epoch plugin.Epoch
	Host  string
	Time  time.Time
}

// reigns are what was seen, in order.
type reigns []Reign

func (r *reigns) see(host string, at time.Time) {
	if n := len(*r); n > 0 && (*r)[n-1].Host == host {
		last := &(*r)[n-1]
		last.Last, last.Frames = at, last.Frames+1
		return
	}
	*r = append(*r, Reign{host, at, at, 1})
}

// Splits holds what was seen against what the arbiter decided. Each reign must
// be of the host that the arbiter chose last, or of one that it chose since:
// whoever is seen after its successor's first frame, or without having been
// chosen, is a second copy. There is a line for each of those.
func Splits(seen []Reign, decided []Decision) []string {
	var splits []string
	at := 0
	for _, r := range seen {
		next := slices.IndexFunc(decided[min(at, len(decided)):], func(d Decision) bool {
			return d.Host == r.Host && !r.First.Before(d.Time)
		})
		if next < 0 {
			splits = append(splits, fmt.Sprintf("%s, which the arbiter had not chosen", r))
			continue
		}
		at += next
	}
	return splits
}

// Witness watches the service network and the arbiter, and so knows who was
// seen and who should have been.
type Witness struct {
	bed    *Bed
	vm     *VM
	fd     int
	names  map[int]string // of the switch's ports, by index
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	seen    reigns
	decided []Decision
	err     error
}

// Witness begins to watch a guest that runs on a host, before any pair.
func (vm *VM) Witness(ctx context.Context, on *lab.Host) (*Witness, error) {
	mac, err := net.ParseMAC(vm.MAC)
	if err != nil {
		return nil, err
	}
	dir, err := arbiter.NewDir(arbiter.DirConfig{Path: on.Path(lab.ArbiterDir)})
	if err != nil {
		return nil, err
	}
	w := &Witness{bed: vm.bed, vm: vm, names: map[int]string{}, decided: []Decision{{Host: on.Name}}}
	err = vm.bed.InSwitch(func() (err error) {
		w.fd, err = openWitness(mac)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at the switch: %w", err)
	}
	ctx, w.cancel = context.WithCancel(ctx)
	w.wg.Go(func() { w.listen(ctx) })
	w.wg.Go(func() { w.watchArbiter(ctx, dir) })
	return w, nil
}

// openWitness opens all of the switch's ports at once, so that the kernel puts
// their frames in order, for frames that the address sends.
func openWitness(mac net.HardwareAddr) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	word := func(b []byte) (v uint32) {
		for _, x := range b {
			v = v<<8 | uint32(x)
		}
		return v
	}
	const source = 6 // of an Ethernet frame
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: source},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: word(mac[:4])},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: source + 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: word(mac[4:])},
		{Code: unix.BPF_RET | unix.BPF_K, K: 64},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	patience := unix.Timeval{Usec: 50_000}
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: lab.NetworkOrder(unix.ETH_P_ALL)}))
	if err != nil {
		_ = unix.Close(fd)
	}
	return fd, err
}

func (w *Witness) listen(ctx context.Context) {
	buf, control := make([]byte, 64), make([]byte, 128)
	for ctx.Err() == nil {
		_, n, _, from, err := unix.Recvmsg(w.fd, buf, control, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			w.fail(fmt.Errorf("listen at the switch: %w", err))
			return
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		if host := w.hostOf(link.Ifindex); host != "" {
			w.mu.Lock()
			w.seen.see(host, stamp(control[:n]))
			w.mu.Unlock()
		}
	}
}

// stamp finds when the kernel got a frame.
func stamp(control []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return time.Now()
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
			t := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
			return time.Unix(t.Unix())
		}
	}
	return time.Now()
}

// hostOf tells whose service port an interface of the switch is; "" is none's.
// A host that was booted has a new one.
func (w *Witness) hostOf(index int) string {
	name, known := w.names[index]
	if !known {
		_ = w.bed.InSwitch(func() error {
			if link, err := net.InterfaceByIndex(index); err == nil {
				name = link.Name
			}
			return nil
		})
		w.names[index] = name
	}
	for _, h := range w.bed.Hosts() {
		if name == h.Port(lab.Service) {
			return h.Name
		}
	}
	return ""
}

// watchArbiter notes each decision as it is made: the arbiter forgets the
// older ones.
func (w *Witness) watchArbiter(ctx context.Context, dir *arbiter.Dir) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := dir.Lookup(ctx, w.vm.UUID)
		switch {
		case err == nil:
			w.note(r)
		case ctx.Err() == nil && !errors.Is(err, arbiter.ErrNoRecord) && !errors.Is(err, arbiter.ErrUnavailable):
			w.fail(fmt.Errorf("the arbiter: %w", err))
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// note adds what a record decides. That an epoch was opened tells who owned the
// one before, if that was missed.
func (w *Witness) note(r arbiter.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := func() Decision { return w.decided[len(w.decided)-1] }
	if r.Epoch > last().Epoch && r.Primary != last().Host {
		w.decided = append(w.decided, Decision{r.Epoch - 1, r.Primary, r.OpenedAt})
	}
	if r.Epoch > last().Epoch && r.Owner != "" && r.Owner != last().Host {
		w.decided = append(w.decided, Decision{r.Epoch, r.Owner, r.DecidedAt})
	}
}

func (w *Witness) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = errors.Join(w.err, err)
}

// Verdict tells how many second copies were seen so far, each with a line in
// the error.
func (w *Witness) Verdict() (int, error) {
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.err = errors.Join(w.err, err)
	} else if stats.Drops > 0 {
		w.err = errors.Join(w.err, fmt.Errorf("%d frames were missed", stats.Drops))
	}
	splits := Splits(w.seen, w.decided)
	if len(splits) > 0 {
		return len(splits), errors.Join(fmt.Errorf("%w: %s", ErrSplit, strings.Join(splits, "; ")), w.err)
	}
	return 0, w.err
}

// Host is who was seen last, and since when.
func (w *Witness) Host() (string, time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.seen) == 0 {
		return "", time.Time{}
	}
	last := w.seen[len(w.seen)-1]
	return last.Host, last.First
}

// History tells what was seen and decided, for people.
func (w *Witness) History() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var b strings.Builder
	for _, r := range w.seen {
		fmt.Fprintf(&b, "seen %s\n", r)
	}
	for _, d := range w.decided {
		fmt.Fprintf(&b, "decided for %s in epoch %d at %s\n", d.Host, d.Epoch, d.Time.Format("15:04:05.000000"))
	}
	return b.String()
}

// Failovers is how often the guest went on on another host.
func (w *Witness) Failovers() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return max(len(w.seen)-1, 0)
}

// Close ends the watch.
func (w *Witness) Close() {
	w.cancel()
	w.wg.Wait()
	_ = unix.Close(w.fd)
}
