// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/config"
)

// The arbiter is asked by a process of its own. The kernel ends no process of which
// a thread hangs in a system call, as on a LUN whose path is dead, and libvirt would
// wait for it: for its end, and for that of the pipes that it has from libvirt.

// askArg makes this program the one that asks.
const askArg = "--ask-arbiter"

// flushTime is for what was seen of the arbiter to be kept.
const flushTime = 200 * time.Millisecond

// question is what the child is asked on its standard input.
type question struct {
	Host       string           `json:"host"`
	StateDir   string           `json:"state_dir"`
	Arbiter    config.Arbiter   `json:"arbiter"`
	Domain     plugin.UUID      `json:"domain"`
	Annotation hooks.Annotation `json:"annotation"`
}

// maxQuestion bounds a question, in bytes.
const maxQuestion = 1 << 20

var errHangs = errors.New("it hangs")

// askChild asks the arbiter by a child, which is left behind if it hangs.
func askChild(ctx context.Context, cfg config.Config, id plugin.UUID, a hooks.Annotation) error {
	text, err := json.Marshal(question{cfg.Host, cfg.Agent.StateDir, cfg.Arbiter, id, a})
	if err != nil {
		return unanswered(err)
	}
	self, err := os.Executable()
	if err != nil {
		return unanswered(err)
	}
	cmd := exec.Command(self, askArg)
	var reason bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(text), &reason
	if err := cmd.Start(); err != nil {
		return unanswered(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	var exit *exec.ExitError
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done:
		case <-time.After(reserve / 2): // it may be about to say why
			_ = cmd.Process.Kill()
			return unanswered(errHangs)
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() == 1 && reason.Len() > 0:
		return errors.New(strings.TrimSpace(reason.String()))
	}
	return unanswered(fmt.Errorf("%w: %s", err, strings.TrimSpace(reason.String())))
}

// answer is the child: it gives the exit status, and says on stderr why it is 1.
func answer(ctx context.Context, stdin io.Reader, stderr io.Writer) int {
	var q question
	err := json.NewDecoder(io.LimitReader(stdin, maxQuestion)).Decode(&q)
	if err == nil {
		err = ask(ctx, q)
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, err)
	}
	return exitStatus(err != nil)
}

func ask(ctx context.Context, q question) error {
	cfg := config.Config{Host: q.Host, Arbiter: q.Arbiter}
	cfg.Agent.StateDir = q.StateDir
	arb, seen, err := backend.Open(cfg, 0, nil)
	if err != nil {
		return fmt.Errorf("it is protected, and the arbiter cannot be asked: %w", err)
	}
	kept, err := keptEpoch(cfg.Agent.KeptDefinition(q.Domain.String()))
	if err != nil {
		return err
	}
	err = decide(ctx, arb, q.Domain, q.Host, q.Annotation, kept)
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
	defer cancel()
	seen.Flush(flush)
	return err
}

// keptEpoch is the epoch of the definition that the agent keeps, 0 if none.
func keptEpoch(path string) (plugin.Epoch, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	var k struct {
		Epoch plugin.Epoch `json:"epoch"`
	}
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil {
		return 0, fmt.Errorf("the definition that ftvirt's agent keeps of it is damaged: %s: %w; see its log", path, err)
	}
	return k.Epoch, nil
}
