// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// ErrPostgres is wrapped when the database of a guest is not as it should be.
var ErrPostgres = errors.New("PostgreSQL")

// queryLimit bounds a query, on a guest that may be failing over meanwhile.
const queryLimit = 60 * time.Second

// commitInterval is between a commit and the next.
const commitInterval = 100 * time.Millisecond

// postgres is a connection to a guest's PostgreSQL, by as much of its protocol
// as simple queries need. The server trusts the client.
type postgres struct {
	conn net.Conn
	r    *bufio.Reader
}

func dialPostgres(ctx context.Context, dial guest.DialFunc, addr netip.Addr) (*postgres, error) {
	ctx, cancel := context.WithTimeout(ctx, queryLimit)
	defer cancel()
	conn, err := dial(ctx, netip.AddrPortFrom(addr, guest.PortPostgres))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPostgres, err)
	}
	p := &postgres{conn, bufio.NewReader(conn)}
	const version = 3 << 16
	startup := binary.BigEndian.AppendUint32(nil, version)
	startup = append(startup, "user\x00postgres\x00database\x00postgres\x00\x00"...)
	if _, err := p.exchange(ctx, framed(startup)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return p, nil
}

// framed puts the length, its own included, before a message.
func framed(text []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(4+len(text))), text...)
}

// Query runs a statement and returns the rows. A commit is acknowledged when it
// returns without an error.
func (p *postgres) Query(ctx context.Context, sql string) ([][]string, error) {
	ctx, cancel := context.WithTimeout(ctx, queryLimit)
	defer cancel()
	rows, err := p.exchange(ctx, append([]byte{'Q'}, framed(append([]byte(sql), 0))...))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", sql, err)
	}
	return rows, nil
}

// exchange sends a message and reads up to the server's being ready for the
// next, which is after the end of the transaction.
func (p *postgres) exchange(ctx context.Context, message []byte) (rows [][]string, err error) {
	stop := context.AfterFunc(ctx, func() { _ = p.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := p.conn.Write(message); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPostgres, err)
	}
	var failure error
	for {
		kind, body, err := p.read()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrPostgres, err)
		}
		switch kind {
		case 'D':
			row, err := fields(body)
			if err != nil {
				return nil, err
			}
			rows = append(rows, row)
		case 'E':
			failure = fmt.Errorf("%w: %s", ErrPostgres, strings.ReplaceAll(strings.TrimRight(string(body), "\x00"), "\x00", " "))
		case 'R':
			if len(body) < 4 || binary.BigEndian.Uint32(body) != 0 {
				return nil, fmt.Errorf("%w: it wants a password", ErrPostgres)
			}
		case 'Z':
			return rows, failure
		}
	}
}

func (p *postgres) read() (kind byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return 0, nil, err
	}
	const most = 1 << 20
	n := binary.BigEndian.Uint32(head[1:])
	if n < 4 || n > most {
		return 0, nil, fmt.Errorf("a message of %d bytes", n)
	}
	body = make([]byte, n-4)
	_, err = io.ReadFull(p.r, body)
	return head[0], body, err
}

// fields reads a row. A null is an empty text.
func fields(body []byte) ([]string, error) {
	short := fmt.Errorf("%w: a row that is cut", ErrPostgres)
	if len(body) < 2 {
		return nil, short
	}
	row := make([]string, binary.BigEndian.Uint16(body))
	body = body[2:]
	for i := range row {
		if len(body) < 4 {
			return nil, short
		}
		n := int(int32(binary.BigEndian.Uint32(body)))
		body = body[4:]
		if n > len(body) {
			return nil, short
		}
		if n > 0 {
			row[i], body = string(body[:n]), body[n:]
		}
	}
	return row, nil
}

func (p *postgres) Close() { _ = p.conn.Close() }

// Commits is a client that inserts numbered rows into the table ledger, one
// transaction each, and knows which of them the server has acknowledged.
type Commits struct {
	progress
	db     *postgres
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// StartCommits connects and begins with row 1.
func StartCommits(ctx context.Context, dial guest.DialFunc, addr netip.Addr) (*Commits, error) {
	db, err := dialPostgres(ctx, dial, addr)
	if err != nil {
		return nil, err
	}
	c := &Commits{db: db}
	ctx, c.cancel = context.WithCancel(ctx)
	c.wg.Go(func() {
		for Pause(ctx, commitInterval) == nil {
			// Not by ctx: what was begun is to be ended, or it would be neither
			// acknowledged nor refused.
			n := c.Count() + 1
			if _, err := db.Query(context.WithoutCancel(ctx), fmt.Sprintf("INSERT INTO ledger VALUES (%d, '%s')", n, note(n))); err != nil {
				c.fail(fmt.Errorf("commit %d: %w", n, err))
				return
			}
			c.advance()
		}
	})
	return c, nil
}

// note is what goes with a row, so that a row tells whether it is the right one.
func note(n int) string { return fmt.Sprintf("%016x", check(uint64(n))) }

// Stop ends the client after the commit that it is at.
func (c *Commits) Stop() error {
	c.cancel()
	c.wg.Wait()
	c.db.Close()
	return c.Err()
}

// missing tells how many of the first so many rows are not there as they were
// acknowledged. That there is nothing else is demanded as well.
func missing(rows [][]string, acked int) (lost int, err error) {
	found := map[int]bool{}
	for _, row := range rows {
		if len(row) != 2 {
			return acked, fmt.Errorf("%w: a row of the ledger is %q", ErrPostgres, row)
		}
		n, convert := strconv.Atoi(row[0])
		switch {
		case convert != nil || n < 1 || n > acked:
			err = errors.Join(err, fmt.Errorf("%w: the ledger has row %q, which nobody inserted", ErrPostgres, row))
		case row[1] == note(n):
			found[n] = true
		}
	}
	if lost = acked - len(found); lost > 0 {
		err = errors.Join(err, fmt.Errorf("%w: of %d acknowledged commits %d are lost", ErrPostgres, acked, lost))
	}
	return lost, err
}
