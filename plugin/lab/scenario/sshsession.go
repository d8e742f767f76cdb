// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// ErrSession is wrapped when an ssh session with a guest broke or did wrong.
var ErrSession = errors.New("ssh session")

// sessionInterval is between two lines of work.
const sessionInterval = 500 * time.Millisecond

// sessionWork is what the session's shell does: what it answers to a line
// follows from all lines before, so it shows that it is the same shell, and it
// keeps what it answered in a file.
const sessionWork = `state=
while read -r line; do
	state=$(printf '%s %s' "$state" "$line" | sha256sum)
	state=${state%% *}
	echo "$line $state" >>/root/session
	echo "$line $state"
done
echo end`

// Session is an ssh session that works all the time.
type Session struct {
	progress
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	cancel context.CancelFunc // of the work
	kill   context.CancelFunc // of ssh
	wg     sync.WaitGroup
	said   bytes.Buffer // what ssh has to say of itself
	answer string       // all of them
}

// StartSession begins with an ssh command that has yet to be given the shell's
// work.
func StartSession(ctx context.Context, ssh func(context.Context, string) *exec.Cmd) (*Session, error) {
	s := &Session{}
	ctx, s.kill = context.WithCancel(ctx)
	work, stop := context.WithCancel(ctx)
	s.cancel = stop
	s.cmd = ssh(ctx, sessionWork)
	s.cmd.Stderr = &s.said
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	s.stdin = stdin
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.wg.Go(func() {
		if err := s.run(work, bufio.NewReader(stdout)); err != nil {
			s.fail(err)
		}
	})
	return s, nil
}

func (s *Session) run(ctx context.Context, r *bufio.Reader) error {
	// Also the end of a shell that did wrong.
	defer func() { _ = s.stdin.Close() }()
	var state string
	for Pause(ctx, sessionInterval) == nil {
		line := fmt.Sprintf("work %d", s.Count()+1)
		state = sessionState(state, line)
		want := line + " " + state + "\n"
		if _, err := io.WriteString(s.stdin, line+"\n"); err != nil {
			return fmt.Errorf("%w: %w", ErrSession, err)
		}
		got, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("%w: %w", ErrSession, err)
		}
		if got != want {
			return fmt.Errorf("%w: it answered %q instead of %q", ErrSession, got, want)
		}
		s.answer += got
		s.advance()
	}
	if err := s.stdin.Close(); err != nil {
		return fmt.Errorf("%w: %w", ErrSession, err)
	}
	rest, err := io.ReadAll(r)
	if err == nil && string(rest) != "end\n" {
		err = fmt.Errorf("it ended with %q", rest)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSession, err)
	}
	return nil
}

func sessionState(state, line string) string {
	sum := sha256.Sum256([]byte(state + " " + line))
	return hex.EncodeToString(sum[:])
}

// Stop lets the session end in its own time, up to a limit, and returns all of
// its answers.
func (s *Session) Stop() (string, error) {
	defer s.kill()
	s.cancel()
	late := time.AfterFunc(realReplyLimit, s.kill)
	defer late.Stop()
	s.wg.Wait()
	err := s.cmd.Wait()
	if err != nil {
		err = fmt.Errorf("%w: %w: %s", ErrSession, err, strings.TrimSpace(s.said.String()))
	}
	return s.answer, errors.Join(s.Err(), err)
}
