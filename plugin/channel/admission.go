// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"net"
	"net/netip"
	"sync"
)

// admission holds the connections that have not said who they are. There is room
// for a few; when it is full, the oldest of the address that has the most makes
// room. So strangers who connect and say nothing push each other out, and an
// agent, which is done within milliseconds, gets through.
type admission struct {
	mu      sync.Mutex
	most    int
	waiting []waiting // oldest first
}

type waiting struct {
	conn net.Conn
	from netip.Addr
}

// enter takes a connection in, and closes another if need be.
func (a *admission) enter(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = append(a.waiting, waiting{conn, origin(conn)})
	if len(a.waiting) <= a.most {
		return
	}
	count := map[netip.Addr]int{}
	for _, w := range a.waiting {
		count[w.from]++
	}
	victim := 0
	for i, w := range a.waiting {
		if count[w.from] > count[a.waiting[victim].from] {
			victim = i
		}
	}
	evicted := a.waiting[victim].conn
	a.remove(victim)
	_ = abort(evicted)
}

// leave tells that a connection said who it is, or ended.
func (a *admission) leave(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, w := range a.waiting {
		if w.conn == conn {
			a.remove(i)
			return
		}
	}
}

func (a *admission) remove(i int) { a.waiting = append(a.waiting[:i], a.waiting[i+1:]...) }

// abort closes a connection without a word to the peer.
func abort(conn net.Conn) error {
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = wrapped.NetConn()
	}
	return conn.Close()
}

// origin is the address that a connection comes from, without its port.
func origin(conn net.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
