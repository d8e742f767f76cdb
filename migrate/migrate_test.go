// SPDX-License-Identifier: Apache-2.0

package migrate_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
)

const domain = `<domain type='qemu'><name>guest</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/guest.qcow2' index='1'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>`

// qemu is a primary's QEMU whose disk is being copied, for as long as its
// connection to the replica holds.
type qemu struct {
	ready   bool
	copying chan struct{} // closed when the copy has begun
	broken  chan struct{} // closed when its connection has ended
	once    sync.Once
}

func (q *qemu) XML(context.Context, plugin.UUID, bool) (string, error) { return domain, nil }

func (q *qemu) Monitor(ctx context.Context, _ plugin.UUID, command string, args, out any) error {
	answer := func(text string) error { return json.Unmarshal([]byte(text), out) }
	switch command {
	case "query-named-block-nodes":
		return answer(`[{"node-name":"libvirt-1-format","image":{"virtual-size":4096}},
			{"node-name":"ftvirt-rr-0","image":{"virtual-size":4096}}]`)
	case "blockdev-add":
		server, _ := args.(map[string]any)["server"].(map[string]any)
		path, _ := server["path"].(string)
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
			close(q.broken)
		}()
	case "query-block-jobs":
		select {
		case <-q.broken:
			return answer(`[]`)
		default:
		}
		q.once.Do(func() { close(q.copying) })
		if q.ready {
			return answer(`[{"device":"ftvirt-seed-0","ready":true,"actively-synced":true}]`)
		}
		return answer(`[{"device":"ftvirt-seed-0","len":4096,"offset":0}]`)
	case "block-job-cancel", "blockdev-del":
		// Like QEMU, it waits for the requests that are under way, whoever
		// waits for it.
		select {
		case <-q.broken:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

var errLost = errors.New("session lost")

// silent is a peer that has died: nothing is refused, and nothing answered.
type silent struct{ tunnel net.Conn }

func (s silent) Call(ctx context.Context, method string, _, _ any) error {
	if method == migrate.MethodPrepare {
		return nil
	}
	return errLost
}

func (s silent) Tunnel(context.Context, string, string) (net.Conn, error) { return s.tunnel, nil }

type idle struct{}

func (idle) Arm(plugin.Epoch) error { return nil }
func (idle) Disarm() error          { return nil }
func (idle) Recording(context.Context, plugin.Epoch) (time.Duration, error) {
	return 0, errors.New("not armed")
}

// The same holds when it is the peer's refusal that ends the clone.
func TestFailedCallEndsTheTunnels(t *testing.T) {
	q := &qemu{copying: make(chan struct{}), broken: make(chan struct{}), ready: true}
	near, far := net.Pipe()
	defer func() { _ = far.Close() }()
	source := migrate.Source{Local: q, Peer: silent{near}, Plugin: idle{}}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := source.Clone(ctx, migrate.Options{Epoch: 1, Dir: filepath.Join(t.TempDir(), "clone"), QEMUUser: os.Getuid()})
	if !errors.Is(err, errLost) || ctx.Err() != nil {
		t.Errorf("got %v, want %v", err, errLost)
	}
}

// A guest's write to a mirrored disk waits for the replica's. When the peer has
// died, only the end of the connection lets QEMU go on: it must not wait for
// anything that QEMU has to answer first.
func TestDeadPeerDoesNotHoldTheGuest(t *testing.T) {
	q := &qemu{copying: make(chan struct{}), broken: make(chan struct{})}
	near, far := net.Pipe()
	defer func() { _ = far.Close() }()
	source := migrate.Source{Local: q, Peer: silent{near}, Plugin: idle{}}
	ctx, abort := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := source.Clone(ctx, migrate.Options{
			Epoch: 1, Dir: filepath.Join(t.TempDir(), "clone"), QEMUUser: os.Getuid(),
		})
		result <- err
	}()
	const limit = 5 * time.Second
	wait := func(what string, c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(limit):
			t.Fatalf("no %s within %v", what, limit)
		}
	}
	wait("copy of the disk", q.copying)
	abort()
	wait("end of the connection to the replica", q.broken)
	select {
	case err := <-result:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	case <-time.After(limit):
		t.Fatalf("the clone has not ended after %v", limit)
	}
}
