// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"io"
	"net"
	"sync"
)

// Splice copies both ways between a and b until both have ended, one fails, or
// ctx ends. The end of one direction is passed on as a half-close, so the other
// direction goes on; a connection that cannot be half-closed is closed. Both
// are closed when Splice returns. It returns the first error, ctx's if ctx
// ended it.
func Splice(ctx context.Context, a, b net.Conn) error {
	var (
		once  sync.Once
		first error
		both  sync.WaitGroup
	)
	closeBoth := func() {
		_ = a.Close()
		_ = b.Close()
	}
	stop := context.AfterFunc(ctx, closeBoth)
	pump := func(dst, src net.Conn) {
		_, err := io.Copy(dst, src)
		if err == nil {
			err = closeWrite(dst)
		}
		if err != nil {
			once.Do(func() {
				first = err
				closeBoth()
			})
		}
	}
	both.Go(func() { pump(a, b) })
	both.Go(func() { pump(b, a) })
	both.Wait()
	stop()
	closeBoth()
	if first != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return first
}

// closeWrite passes the end of a direction on.
func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
