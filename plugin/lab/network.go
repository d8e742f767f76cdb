// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"strings"
)

// Network is one of the lab's two networks.
type Network string

// The networks, as the switch's bridges are called.
const (
	// Service joins the client, the hosts' br-service and so the guests.
	Service Network = "service"
	// Logging joins the hosts only: logging channel and heartbeats.
	Logging Network = "logging"
)

// port names the switch's end of a host's link. Interface names have at most 15
// bytes.
func port(node string, network Network) string { return node + "-" + string(network)[:3] }

// ipBatch runs ip commands, one per line, on a node.
func (n *Node) ipBatch(ctx context.Context, commands ...string) error {
	_, err := n.execInput(ctx, strings.Join(commands, "\n")+"\n", "ip", "-batch", "-")
	return err
}

// Bridges forward from the start and do not take part in any protocol: a port
// of a real access switch would not delay a failover either.
const quietBridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"

// makeSwitch makes the bridges and connects the client.
func (l *Lab) makeSwitch(ctx context.Context) error {
	client, err := l.Client.process()
	if err != nil {
		return err
	}
	name := port(clientName, Service)
	// The switch's process table does not show the client; --net alone keeps
	// the machine's numbers valid in "netns".
	err = l.switchBatch(ctx,
		"link add service "+quietBridge, "link set service up",
		"link add logging "+quietBridge, "link set logging up",
		fmt.Sprintf("link add %s type veth peer name eth0 netns %d", name, client.PID),
		fmt.Sprintf("link set %s master service up", name))
	if err != nil {
		return err
	}
	return l.Client.ipBatch(ctx, "link set lo up", "link set eth0 up",
		fmt.Sprintf("addr add %s/%d dev eth0", ClientAddr, ServiceNet.Bits()))
}

// connect gives a host its links, addresses and service bridge.
func (h *Host) connect(ctx context.Context) error {
	p, err := h.process()
	if err != nil {
		return err
	}
	service, logging := port(h.Name, Service), port(h.Name, Logging)
	err = h.lab.switchBatch(ctx,
		fmt.Sprintf("link add %s type veth peer name svc0 netns %d", service, p.PID),
		fmt.Sprintf("link set %s master service up", service),
		fmt.Sprintf("link add %s type veth peer name log0 netns %d", logging, p.PID),
		fmt.Sprintf("link set %s master logging up", logging))
	if err != nil {
		return err
	}
	return h.ipBatch(ctx,
		"link set lo up",
		// With an address of its own the bridge does not take over a tap's.
		fmt.Sprintf("link add %s address 52:54:00:77:00:%02x %s", ServiceBridge, h.index, quietBridge),
		"link set svc0 master "+ServiceBridge+" up",
		"link set "+ServiceBridge+" up",
		fmt.Sprintf("addr add %s/%d dev %s", h.ServiceAddr(), ServiceNet.Bits(), ServiceBridge),
		"link set log0 up",
		fmt.Sprintf("addr add %s/%d dev log0", h.LoggingAddr(), LoggingNet.Bits()))
}

// CutLink pulls the host's cable of a network out of the switch: both ends lose
// their carrier, and nothing gets through in either direction.
func (h *Host) CutLink(ctx context.Context, network Network) error {
	return h.setLink(ctx, network, "down")
}

// RestoreLink undoes CutLink.
func (h *Host) RestoreLink(ctx context.Context, network Network) error {
	return h.setLink(ctx, network, "up")
}

func (h *Host) setLink(ctx context.Context, network Network, to string) error {
	if network != Service && network != Logging {
		return fmt.Errorf("%s: unknown network %q", h.Name, network)
	}
	return h.lab.switchBatch(ctx, fmt.Sprintf("link set %s %s", port(h.Name, network), to))
}

// Port names the switch's end of the host's link to a network.
func (h *Host) Port(network Network) string { return port(h.Name, network) }

// InSwitch calls f on a thread that is in the switch's network, as InNetwork
// does in a node's.
func (l *Lab) InSwitch(f func() error) error { return l.sw.InNetwork(f) }
