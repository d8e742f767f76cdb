// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrWeb is wrapped when a web server did not answer as it should.
var ErrWeb = errors.New("web server")

const (
	webInterval = 250 * time.Millisecond
	// webLimit bounds a request, on a guest that may be failing over meanwhile.
	webLimit = 30 * time.Second
	// webReuse is how many requests are made by one connection.
	webReuse = 8
)

// Web is a client that gets a file again and again, and demands the right
// content each time.
type Web struct {
	progress
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// StartWeb begins to get the file, which has this content.
func StartWeb(ctx context.Context, dial guest.DialFunc, addr netip.AddrPort, path string, content []byte) *Web {
	w := &Web{}
	work, stop := context.WithCancel(ctx)
	w.cancel = stop
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, addr) }}
	c := http.Client{Transport: transport, Timeout: webLimit}
	w.wg.Go(func() {
		defer transport.CloseIdleConnections()
		for Pause(work, webInterval) == nil {
			if err := get(ctx, &c, "http://"+addr.String()+path, content); err != nil {
				w.fail(fmt.Errorf("%w: request %d: %w", ErrWeb, w.Count()+1, err))
				return
			}
			w.advance()
			if w.Count()%webReuse == 0 {
				transport.CloseIdleConnections()
			}
		}
	})
	return w
}

func get(ctx context.Context, c *http.Client, url string, content []byte) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := c.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(io.LimitReader(response.Body, int64(len(content))+1))
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK || !bytes.Equal(got, content) {
		return fmt.Errorf("%s with %d bytes, which are not the %d of the file", response.Status, len(got), len(content))
	}
	return nil
}

// Stop ends the client after the request that it is at.
func (w *Web) Stop() error {
	w.cancel()
	w.wg.Wait()
	return w.Err()
}
