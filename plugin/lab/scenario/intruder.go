// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/pki"
)

// intruder is a channel.Transport of somebody who trusts everybody, with an
// address of its own on the logging network.
type intruder struct {
	node *lab.Node
	from netip.Addr
	tls  *tls.Config // nil for plaintext
}

// kind of an intruder that has no certificate.
type kind int

const (
	noCertificate kind = iota
	plaintext
)

// newSource gives the attacker another address, so that what the log says of each
// attack can be told apart.
func (s *siege) newSource(ctx context.Context) (netip.Addr, error) {
	s.sources++
	addr := lab.LoggingNet.Addr().As4()
	addr[3] = byte(100 + s.sources)
	from := netip.AddrFrom4(addr)
	_, err := s.c.Exec(ctx, "ip", "addr", "add", fmt.Sprintf("%s/%d", from, lab.LoggingNet.Bits()), "dev", "log0")
	return from, err
}

func (s *siege) intruder(h *pki.Host) (*intruder, error) {
	pair, err := tls.X509KeyPair(h.ClientCert, h.ClientKey)
	if err != nil {
		return nil, err
	}
	i := s.bare(noCertificate)
	i.tls.Certificates = []tls.Certificate{pair}
	return i, nil
}

func (s *siege) bare(k kind) *intruder {
	i := &intruder{node: s.c.Node}
	if k != plaintext {
		i.tls = &tls.Config{InsecureSkipVerify: true}
	}
	// An address that cannot be had shows when it is used.
	i.from, _ = s.newSource(context.Background())
	return i
}

// outdated is the same with TLS 1.2.
func (i *intruder) outdated() *intruder {
	i.tls.MinVersion, i.tls.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	return i
}

// raw opens a TCP connection.
func (i *intruder) raw(ctx context.Context, address string) (net.Conn, error) {
	var conn net.Conn
	err := i.node.InNetwork(func() (err error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: i.from.AsSlice()}}
		conn, err = d.DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

// Dial implements channel.Transport.
func (i *intruder) Dial(ctx context.Context, address, _ string) (net.Conn, error) {
	conn, err := i.raw(ctx, address)
	if err != nil || i.tls == nil {
		return conn, err
	}
	secured := tls.Client(conn, i.tls)
	if err := secured.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secured, nil
}

// Listen implements channel.Transport.
func (i *intruder) Listen(context.Context, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

// Authenticate implements channel.Transport.
func (i *intruder) Authenticate(net.Conn, string) error { return nil }

// oldVersion says HELLO in another version of the protocol, see
// plugin/channel/PROTOCOL.md.
func (i *intruder) oldVersion(ctx context.Context, address, host string) error {
	const refuse, codeVersion = 3, 1
	conn, err := i.Dial(ctx, address, host)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(agentTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("\x01\x00\x00\x00\x06FTVC\x00\x00")); err != nil {
		return err
	}
	var answer [9]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("%w: no answer: %w", ErrSecurity, err)
	}
	if answer[0] != refuse || binary.BigEndian.Uint16(answer[7:]) != codeVersion {
		return fmt.Errorf("%w: answered with % x", ErrSecurity, answer)
	}
	return nil
}

// floods are garbage on the ports that the network reaches.
func (s *siege) floods() []attack {
	return []attack{
		{fmt.Sprintf("%d connections with garbage to the channel", flood), func(ctx context.Context) (string, error) {
			i := s.bare(plaintext)
			told, err := floodWith(ctx, flood, func(ctx context.Context) (net.Conn, error) { return i.raw(ctx, s.channelOf(s.b)) })
			if err != nil {
				return "", err
			}
			return told, s.loggedOnce(ctx, i)
		}},
		{fmt.Sprintf("%d datagrams of garbage to the heartbeats", flood), func(ctx context.Context) (string, error) {
			return s.floodHeartbeats(ctx)
		}},
		{"heartbeats said again", func(ctx context.Context) (string, error) {
			replay, err := s.captured.replay(ctx, s.c, s.b)
			if err != nil {
				return "", err
			}
			defer replay.stop()
			err = Pause(ctx, time.Second)
			return fmt.Sprintf("%d times", replay.count()), err
		}},
	}
}

// garbage is a mixture: nothing, noise, and beginnings of what is expected.
func garbage() []byte {
	b := make([]byte, rand.IntN(600))
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	switch rand.IntN(4) {
	case 0:
		return nil
	case 1:
		return append([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), b...) // a TLS client
	case 2:
		return append([]byte("\x01\x00\x00\x00\x06FTVC\x00\x01"), b...)
	default:
		return b
	}
}

// floodWith opens connections and sends garbage. One in ten stays open for as long
// as the others come.
func floodWith(ctx context.Context, n int, dial func(context.Context) (net.Conn, error)) (string, error) {
	began := time.Now()
	var opened atomic.Int64
	var workers sync.WaitGroup
	var mu sync.Mutex
	var held []net.Conn
	var failed error
	const parallel = 16
	for w := range parallel {
		workers.Go(func() {
			for i := w; i < n && ctx.Err() == nil; i += parallel {
				conn, err := dial(ctx)
				if err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
					continue
				}
				opened.Add(1)
				_ = conn.SetDeadline(time.Now().Add(time.Second))
				_, _ = conn.Write(garbage()) // it may be closed already
				if i/parallel%10 != 0 {
					_ = conn.Close()
					continue
				}
				mu.Lock()
				held = append(held, conn)
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	for _, c := range held {
		_ = c.Close()
	}
	took := time.Since(began)
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if opened.Load() < int64(n)*9/10 {
		return "", fmt.Errorf("only %d connections could be made: %w", opened.Load(), failed)
	}
	return fmt.Sprintf("%d connections in %.1f s, %d of them held open", opened.Load(), took.Seconds(), len(held)), nil
}

func floodUnix(ctx context.Context, path string, n int) (string, error) {
	return floodWith(ctx, n, func(ctx context.Context) (net.Conn, error) {
		for {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			// Linux does not let one wait for room in the queue.
			if !errors.Is(err, unix.EAGAIN) {
				return conn, err
			}
			if err := Pause(ctx, time.Millisecond); err != nil {
				return nil, err
			}
		}
	})
}

// falsePlugin says HELLO for the guest, as its plugin does, from a process that is
// not its QEMU.
func (s *siege) falsePlugin(ctx context.Context) (string, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.b.Path(config.Default().Agent.PluginSocket))
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	// See plugin/qemu/PROTOCOL.md: an idle primary of the guest.
	hello := binary.BigEndian.AppendUint16(nil, 1)
	hello = append(hello, 0, 1)
	hello = append(hello, s.vm.UUID[:]...)
	hello = append(hello, make([]byte, 8+8+8+8+4)...)
	hello = append(hello, 10, 0, 0, 0, 0x40, 0, 0)
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(hello))), 1)
	_, _ = conn.Write(append(frame, hello...)) // it may be closed already
	if err := conn.SetReadDeadline(time.Now().Add(agentTimeout)); err != nil {
		return "", err
	}
	n, err := io.Copy(io.Discard, conn)
	if n != 0 || errors.Is(err, unix.ETIMEDOUT) {
		return "", breach(err, "it was answered by %d bytes", n)
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return "", fmt.Errorf("%w: the connection was left open", ErrSecurity)
	}
	return "the connection was closed", nil
}

// heartbeats are what a host received of another's, as they were on the wire.
type heartbeats struct {
	fd   int
	wg   sync.WaitGroup
	end  atomic.Bool
	mu   sync.Mutex
	list [][]byte
}

// captureHeartbeats listens until stop.
func captureHeartbeats(at *lab.Host, from netip.Addr) (*heartbeats, error) {
	h := &heartbeats{}
	err := at.InNetwork(func() error {
		link, err := net.InterfaceByName("log0")
		if err != nil {
			return err
		}
		h.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		patience := unix.Timeval{Usec: 50_000}
		return errors.Join(unix.SetsockoptTimeval(h.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
			unix.Bind(h.fd, &unix.SockaddrLinklayer{Protocol: lab.NetworkOrder(unix.ETH_P_IP), Ifindex: link.Index}))
	})
	if err != nil {
		return nil, fmt.Errorf("listen to log0 of %s: %w", at.Name, err)
	}
	h.wg.Go(func() { h.run(from) })
	return h, nil
}

func (h *heartbeats) run(from netip.Addr) {
	const most = 4096
	buf := make([]byte, 2048)
	for !h.end.Load() {
		n, _, err := unix.Recvfrom(h.fd, buf, 0)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		// IPv4 without options, UDP.
		const ip, udp = 20, 8
		b := buf[:n]
		if n < ip+udp || b[0] != 0x45 || b[9] != unix.IPPROTO_UDP || netip.AddrFrom4([4]byte(b[12:16])) != from {
			continue
		}
		payload := b[ip+udp:]
		if len(payload) < 4 || string(payload[:4]) != "FTHB" {
			continue
		}
		h.mu.Lock()
		if len(h.list) < most {
			h.list = append(h.list, append([]byte(nil), payload...))
		}
		h.mu.Unlock()
	}
}

func (h *heartbeats) running() bool { return !h.end.Load() }

func (h *heartbeats) stop() {
	if !h.end.Swap(true) {
		h.wg.Wait()
		_ = unix.Close(h.fd)
	}
}

func (h *heartbeats) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.list)
}

// replaying says captured heartbeats again, the newest too, until it is stopped.
type replaying struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	sent   atomic.Int64
}

func (h *heartbeats) replay(ctx context.Context, from, to *lab.Host) (*replaying, error) {
	conn, err := dialUDP(from, to)
	if err != nil {
		return nil, err
	}
	if h.count() == 0 {
		_ = conn.Close()
		return nil, errors.New("no heartbeat was captured")
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &replaying{cancel: cancel}
	r.wg.Go(func() {
		defer func() { _ = conn.Close() }()
		for i := 0; ctx.Err() == nil; i++ {
			h.mu.Lock()
			old, newest := h.list[i%len(h.list)], h.list[len(h.list)-1]
			h.mu.Unlock()
			for _, d := range [][]byte{old, newest} {
				if _, err := conn.Write(d); err == nil {
					r.sent.Add(1)
				}
			}
			_ = Pause(ctx, time.Millisecond)
		}
	})
	return r, nil
}

func (r *replaying) count() int { return int(r.sent.Load()) }

func (r *replaying) stop() {
	r.cancel()
	r.wg.Wait()
}

// dialUDP makes a socket towards a host's heartbeats.
func dialUDP(from, to *lab.Host) (net.Conn, error) {
	var conn net.Conn
	err := from.InNetwork(func() (err error) {
		conn, err = net.Dial("udp", to.LoggingAddr().String()+config.Default().Heartbeat.Listen)
		return err
	})
	return conn, err
}

func (s *siege) floodHeartbeats(ctx context.Context) (string, error) {
	conn, err := dialUDP(s.c, s.b)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	began := time.Now()
	sent := 0
	for i := range flood {
		b := garbage()
		if i%2 == 0 && s.captured.count() > 0 {
			// A true one, with some bits turned.
			s.captured.mu.Lock()
			b = append([]byte(nil), s.captured.list[len(s.captured.list)-1]...)
			s.captured.mu.Unlock()
			b[rand.IntN(len(b))] ^= byte(1 + rand.IntN(255))
		}
		if _, err := conn.Write(b); err == nil {
			sent++
		}
		if i%100 == 99 {
			if err := Pause(ctx, time.Millisecond); err != nil {
				return "", err
			}
		}
	}
	return fmt.Sprintf("%d datagrams in %.1f s, half of them true ones with bits turned", sent, time.Since(began).Seconds()), nil
}

var _ channel.Transport = (*intruder)(nil)
