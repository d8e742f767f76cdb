// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab"
)

// nameServer answers questions for names of hosts, late.
type nameServer struct {
	conn   net.PacketConn
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// resolveSlowly lets a host find the names of the others by a server alone that
// takes so long, or with 0 for ever, and returns what undoes that.
func (b *Bed) resolveSlowly(ctx context.Context, h *lab.Host, delay time.Duration) (undo func(context.Context) error, err error) {
	names := map[string]netip.Addr{}
	for _, other := range b.Hosts() {
		names[other.Name] = other.LoggingAddr()
	}
	s := &nameServer{}
	err = h.InNetwork(func() (err error) {
		s.conn, err = new(net.ListenConfig).ListenPacket(ctx, "udp4", netip.AddrPortFrom(h.LoggingAddr(), 53).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("on %s: %w", h.Name, err)
	}
	ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.wg.Go(func() { s.serve(ctx, names, delay) })
	var undos []func() error
	undo = func(context.Context) error {
		s.cancel()
		errs := []error{s.conn.Close()}
		s.wg.Wait()
		for _, f := range undos {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	for path, text := range map[string]string{
		"/etc/resolv.conf": fmt.Sprintf("nameserver %s\n", h.LoggingAddr()),
		"/etc/hosts":       "127.0.0.1 localhost\n",
	} {
		back, err := replaceFile(h.Path(path), text)
		if err != nil {
			return nil, errors.Join(err, undo(ctx))
		}
		undos = append(undos, back)
	}
	return undo, nil
}

// replaceFile puts another file in the place of one, which is put back by what it
// returns. What the old one links to stays as it is.
func replaceFile(path, text string) (back func() error, err error) {
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := os.Rename(path, path+".before"); err != nil {
		return nil, err
	}
	back = func() error { return os.Rename(path+".before", path) }
	if err := os.Rename(path+".new", path); err != nil {
		return nil, errors.Join(err, back())
	}
	return back, nil
}

func (s *nameServer) serve(ctx context.Context, names map[string]netip.Addr, delay time.Duration) {
	buf := make([]byte, 1500)
	for {
		n, from, err := s.conn.ReadFrom(buf)
		if err != nil {
			return // it was closed
		}
		if delay == 0 {
			continue
		}
		if answer := answerName(buf[:n], names); answer != nil {
			s.wg.Go(func() {
				if Pause(ctx, delay) == nil {
					_, _ = s.conn.WriteTo(answer, from)
				}
			})
		}
	}
}

// answerName answers a question for one name, see RFC 1035, section 4. It gives
// nothing if it is none.
func answerName(question []byte, names map[string]netip.Addr) []byte {
	const header, typeA, noSuchName = 12, 1, 3
	if len(question) < header || binary.BigEndian.Uint16(question[4:]) != 1 {
		return nil
	}
	var labels []string
	at := header
	for {
		if at >= len(question) {
			return nil
		}
		size := int(question[at])
		at++
		if size == 0 {
			break
		}
		if size > 63 || at+size > len(question) {
			return nil
		}
		labels = append(labels, string(question[at:at+size]))
		at += size
	}
	if at+4 > len(question) {
		return nil
	}
	addr, known := names[strings.Join(labels, ".")]
	wantsA := binary.BigEndian.Uint16(question[at:]) == typeA
	answer := append([]byte(nil), question[:at+4]...)
	answer[2], answer[3] = 0x84|question[2]&1, 0x80 // an answer, by who knows
	copy(answer[6:], make([]byte, 6))
	switch {
	case !known:
		answer[3] |= noSuchName
	case wantsA:
		answer[7] = 1
		// The name is the one at the header's end; class IN, for a second.
		answer = append(answer, 0xc0, header, 0, typeA, 0, 1, 0, 0, 0, 1, 0, 4)
		answer = append(answer, addr.AsSlice()...)
	}
	return answer
}
