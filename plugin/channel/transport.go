// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"fmt"
	"net"
)

// Transport makes the byte streams that everything else here runs over, and
// knows who is at the other end.
type Transport interface {
	// Dial connects to the agent of a host at an address, host:port, within ctx.
	// What answers is proven to be that host.
	Dial(ctx context.Context, address, host string) (net.Conn, error)
	// Listen waits for connections at an address.
	Listen(ctx context.Context, address string) (net.Listener, error)
	// Authenticate tells whether an accepted connection, from which bytes were
	// read already, comes from the host that it says it does.
	Authenticate(conn net.Conn, host string) error
}

// Plain is TCP without protection, for a network that only the hosts share: it
// believes what it is told.
func Plain() Transport { return plain{} }

type plain struct{}

func (plain) Dial(ctx context.Context, address, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connecting to the agent at %s: %w", address, err)
	}
	return conn, nil
}

func (plain) Listen(ctx context.Context, address string) (net.Listener, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for agents at %s: %w", address, err)
	}
	return ln, nil
}

func (plain) Authenticate(net.Conn, string) error { return nil }

// setNoDelay sends each small frame at once: an ack that waits in the kernel
// delays the guest's packets. TLS connections are looked into.
func setNoDelay(conn net.Conn) error {
	if wrapped, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = wrapped.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		return tcp.SetNoDelay(true)
	}
	return nil
}
