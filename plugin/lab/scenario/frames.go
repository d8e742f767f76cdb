// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
)

// serviceLink is the host's end of its cable to the service network.
const serviceLink = "svc0"

// Frames counts the frames that a guest on a host sends to the service network:
// whether a copy of it is seen from outside, whatever libvirt says of it.
type Frames struct {
	count     atomic.Int64
	announced atomic.Int64
	fd        int
	wg        sync.WaitGroup
}

// Frames starts to count on a host.
func (vm *VM) Frames(h *lab.Host) (*Frames, error) {
	mac, err := net.ParseMAC(vm.MAC)
	if err != nil {
		return nil, err
	}
	f := &Frames{}
	err = h.InNetwork(func() error {
		link, err := net.InterfaceByName(serviceLink)
		if err != nil {
			return err
		}
		f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		// Reads end now and then, so that Stop is noticed.
		patience := unix.Timeval{Usec: 50_000}
		return errors.Join(
			unix.SetsockoptTimeval(f.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
			unix.Bind(f.fd, &unix.SockaddrLinklayer{Protocol: lab.NetworkOrder(unix.ETH_P_ALL), Ifindex: link.Index}))
	})
	if err != nil {
		return nil, fmt.Errorf("listen to %s of %s: %w", serviceLink, h.Name, err)
	}
	f.wg.Go(func() { f.run(mac) })
	return f, nil
}

// run counts until Stop.
func (f *Frames) run(mac net.HardwareAddr) {
	buf := make([]byte, 64)
	for f.count.Load() >= 0 {
		n, from, err := unix.Recvfrom(f.fd, buf, 0)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		// Frames of a copy on another host come in here; only those that go
		// out are this host's.
		link, ok := from.(*unix.SockaddrLinklayer)
		if ok && link.Pkttype == unix.PACKET_OUTGOING && n >= 12 && bytes.Equal(buf[6:12], mac) {
			f.count.Add(1)
			if n >= 14 && binary.BigEndian.Uint16(buf[12:]) == unix.ETH_P_RARP {
				f.announced.Add(1)
			}
		}
	}
}

// Count tells how many frames there were so far.
func (f *Frames) Count() int { return int(f.count.Load()) }

// Announced tells how many of them only said where the guest is.
func (f *Frames) Announced() int { return int(f.announced.Load()) }

// Stop ends the counting.
func (f *Frames) Stop() {
	f.count.Store(-1 << 62)
	f.wg.Wait()
	_ = unix.Close(f.fd)
}
