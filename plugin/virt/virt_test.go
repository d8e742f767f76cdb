// SPDX-License-Identifier: Apache-2.0

package virt

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"libvirt.org/go/libvirt"
)

// A libvirtd that hangs while it is connected to holds up nobody for longer than
// he waits, and what he gave up is not done when it goes on.
func TestLateCalls(t *testing.T) {
	t.Parallel()
	c, err := Open("test:///default", Events{})
	if err != nil {
		t.Fatal(err)
	}
	c.connecting <- struct{}{} // as by a call that hangs in there
	var late atomic.Int32
	for range 2 * maxStuck {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := call(ctx, c, "late", func(*libvirt.Connect) (struct{}, error) {
			late.Add(1)
			return struct{}{}, nil
		})
		cancel()
		if !errors.Is(err, ErrTimeout) && !errors.Is(err, ErrBusy) {
			t.Fatalf("got %v", err)
		}
	}
	closed := make(chan struct{})
	go func() {
		c.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close waits for libvirtd")
	}
	c.mu.Lock()
	c.closed = false
	c.mu.Unlock()
	<-c.connecting
	// All slots are free again.
	for deadline := time.Now().Add(10 * time.Second); len(c.stuck) > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%d calls are stuck", len(c.stuck))
		}
		<-time.After(time.Millisecond)
	}
	if _, err := c.List(t.Context()); err != nil {
		t.Error(err)
	}
	c.Close()
	if n := late.Load(); n != 0 {
		t.Errorf("%d calls were made after they had been given up", n)
	}
	if _, err := c.List(t.Context()); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Keep tells of libvirt's absence once.
func TestKeep(t *testing.T) {
	t.Parallel()
	c, err := Open("qemu+unix:///system?socket=/nonexistent", Events{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*keepPeriod)
	defer cancel()
	var told []error
	c.Keep(ctx, func(err error) { told = append(told, err) })
	if len(told) != 1 || told[0] == nil {
		t.Errorf("told %v", told)
	}
}
