// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin/agent/client"
	"ftvirt.org/ftvirt/plugin/config"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// Deadlines with a guest that is a whole system, of which each copy takes a core.
const (
	realBootTimeout = 8 * time.Minute
	realWholeLimit  = 5 * time.Minute
	realReplyLimit  = time.Minute
	realCheckLimit  = 5 * time.Minute
)

// ErrReal is wrapped when a real guest is not what it was.
var ErrReal = errors.New("the guest")

// Real protects a Debian server that has databases, files and people to serve,
// and kills its primary again and again. Agents give it new backups by themselves.
func Real(ctx context.Context, o Options) error {
	debian, err := guest.BuildDebian(ctx, o.DebianDir)
	if err != nil {
		return err
	}
	r := &run{Options: o, configure: func(*config.Config) {}, start: time.Now(), guest: &debian.Artifacts}
	return r.run(ctx, "real", func(ctx context.Context, r *run) (string, error) {
		s := &server{run: r, debian: debian}
		err := s.serve(ctx)
		return fmt.Sprintf("failovers=%d ssh_alive=%d pg_consistent=%d tx_lost=%d", s.failovers, digit(s.alive), digit(s.consistent), s.lost), err
	})
}

func digit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// server is a run with a Debian guest, and what is known of it.
type server struct {
	*run
	debian guest.Debian
	vm     *VM
	pair   *storm // of which only the questions about the pair are asked
	ssh    func(context.Context, string) *exec.Cmd

	witness *Witness
	commits *Commits
	pgbench *Pgbench
	web     *Web
	session *Session

	failovers         int
	alive, consistent bool
	lost              int
}

func (s *server) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.boot(ctx); err != nil {
		return err
	}
	defer s.witness.Close()
	if err := s.load(ctx); err != nil {
		return err
	}
	s.say("clients are at work: commits, pgbench with %d connections, a browser, an ssh session", pgbenchClients)
	if whole, err := s.pair.waitWhole(ctx, time.Now(), realWholeLimit); err != nil {
		return err
	} else if whole > 0 {
		s.say("protected after %.1f s more", whole.Seconds())
	}
	for s.failovers < s.Rounds {
		if err := s.failOver(ctx); err != nil {
			return fmt.Errorf("failover %d: %w", s.failovers+1, err)
		}
		s.failovers++
	}
	return s.judge(ctx)
}

// boot defines the domain as an operator would, asks for its protection, and
// waits until its services answer. It is cloned while it still boots.
func (s *server) boot(ctx context.Context) error {
	const name = "debian"
	a, b := s.Pair()
	d, err := a.GuestDomain(ctx, 0, name, "qcow2")
	if err != nil {
		return err
	}
	addr := d.Address.Addr()
	s.debian.Adapt(&d)
	if s.vm, err = s.DefineDomain(ctx, a, d, addr, nil); err != nil {
		return err
	}
	s.pair = &storm{run: s.run, vm: s.vm}
	if err := s.sshTo(addr); err != nil {
		return err
	}
	if s.witness, err = s.vm.Witness(ctx, a); err != nil {
		return err
	}
	if err := s.ftvirt(ctx, a, "enable", name, "--peer", b.Name); err != nil {
		return err
	}
	began := time.Now()
	if _, err := a.Virsh(ctx, "start", name); err != nil {
		return err
	}
	s.say("%s boots on %s", name, a.Name)
	if err := waitPostgres(ctx, s.Client.Dial, addr); err != nil {
		return err
	}
	out, err := s.command(ctx, "systemctl is-system-running --wait; systemctl --failed --no-legend")
	if err != nil {
		return fmt.Errorf("%w: %w: %s", ErrReal, err, out)
	}
	s.say("%s has booted within %.0f s: %s", name, time.Since(began).Seconds(), strings.TrimSpace(out))
	return nil
}

// waitPostgres waits until a Debian guest that boots has its database.
func waitPostgres(ctx context.Context, dial guest.DialFunc, addr netip.Addr) error {
	var last error
	err := poll(ctx, realBootTimeout, func(ctx context.Context) (bool, error) {
		attempt, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		var db *postgres
		if db, last = dialPostgres(attempt, dial, addr); last == nil {
			db.Close()
			return true, nil
		}
		return false, Pause(ctx, time.Second)
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// sshTo prepares ssh commands to the guest, whose key is known.
func (s *server) sshTo(addr netip.Addr) error {
	key, err := os.ReadFile(s.debian.HostKey)
	if err != nil {
		return err
	}
	known := filepath.Join(s.Dir(), "known_hosts")
	if err := os.WriteFile(known, fmt.Appendf(nil, "%s %s", addr, key), 0o600); err != nil {
		return err
	}
	s.ssh = func(ctx context.Context, script string) *exec.Cmd {
		return s.Client.Command(ctx, "ssh", "-F", "none", "-i", s.debian.Key, "-o", "UserKnownHostsFile="+known,
			"-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "root@"+addr.String(), script)
	}
	return nil
}

// command runs a script in the guest by an ssh connection of its own.
func (s *server) command(ctx context.Context, script string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, realCheckLimit)
	defer cancel()
	out, err := s.ssh(ctx, script).CombinedOutput()
	return string(out), err
}

// load connects all clients.
func (s *server) load(ctx context.Context) (err error) {
	addr := s.vm.Guest.Address
	content, err := os.ReadFile(s.debian.Content)
	if err != nil {
		return err
	}
	if s.session, err = StartSession(ctx, s.ssh); err != nil {
		return err
	}
	if s.commits, err = StartCommits(ctx, s.Client.Dial, addr); err != nil {
		return err
	}
	s.web = StartWeb(ctx, s.Client.Dial, netip.AddrPortFrom(addr, guest.PortHTTP), guest.ContentPath, content)
	s.pgbench = StartPgbench(ctx, s.pgbenchOf(s.debian, addr))
	return s.await(ctx)
}

// await waits until each client that works step by step has got on.
func (s *server) await(ctx context.Context) error {
	return errors.Join(
		s.session.await(ctx, "work by ssh", realReplyLimit),
		s.commits.await(ctx, "commits", realReplyLimit),
		s.web.await(ctx, "requests to nginx", realReplyLimit),
		s.pgbench.Err())
}

// failOver kills the primary, looks whether all clients get on, and waits until
// there is a backup again.
func (s *server) failOver(ctx context.Context) error {
	if err := Pause(ctx, time.Second+rand.N(2*steady)); err != nil {
		return err
	}
	before, err := s.pair.pair(ctx)
	if err != nil {
		return err
	}
	lag, err := s.vm.Lag(ctx, before.primary)
	if err != nil {
		return err
	}
	s.commits.forgetGap()
	killed, err := s.vm.KillQEMU(ctx, before.primary)
	if err != nil {
		return err
	}
	live, err := s.live(ctx, before)
	if err != nil {
		return err
	}
	if err := s.await(ctx); err != nil {
		return err
	}
	gap := s.commits.Gap()
	whole, err := s.pair.waitWhole(ctx, killed, realWholeLimit)
	if err != nil {
		return err
	}
	s.say("failover %d/%d ok: %s -> %s, lag_ms=%s live_ms=%s longest gap between commits %s ms, protected again after %.1f s; commits=%d requests=%d ssh=%d",
		s.failovers+1, s.Rounds, before.primary.Name, before.backup.Name, ms(lag), ms(live.Sub(killed)), ms(gap), whole.Seconds(),
		s.commits.Count(), s.web.Count(), s.session.Count())
	_, split := s.witness.Verdict()
	return errors.Join(split, s.diverged(ctx), s.session.Err(), s.commits.Err(), s.web.Err(), s.pgbench.Err())
}

// live waits until the backup has noted that it is live, and returns when.
func (s *server) live(ctx context.Context, pair couple) (at time.Time, err error) {
	err = poll(ctx, liveTimeout, func(ctx context.Context) (bool, error) {
		events, err := s.vm.Events(ctx, pair.backup, pair.epoch)
		for _, e := range events {
			if e.State == stateLive {
				at = e.Time
			}
		}
		return !at.IsZero(), err
	})
	if err != nil {
		err = fmt.Errorf("waiting for %s to go live on %s: %w", s.vm.Name, pair.backup.Name, err)
	}
	return at, err
}

// diverged fails if a backup has ever been another guest than its primary: it
// would have been made anew, and nothing else would tell.
func (s *server) diverged(ctx context.Context) error {
	for _, h := range s.Hosts() {
		var found []client.Event
		err := s.Agent(h).Events(ctx, false, func(e client.Event) error {
			if e.UUID == s.vm.UUID && e.Reason == reasonDivergence {
				found = append(found, e)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return fmt.Errorf("%w: %s noted it in epoch %d", errDiverged, h.Name, found[0].Epoch)
		}
	}
	return nil
}

// judge ends the clients and holds what they saw against what the guest has.
func (s *server) judge(ctx context.Context) error {
	answers, broken := s.session.Stop()
	done, failed := s.pgbench.Stop()
	err := errors.Join(broken, failed, s.commits.Stop(), s.web.Stop())
	s.say("clients are done: %d commits, %d transactions of pgbench in %d runs, %d requests to nginx, %d lines by ssh",
		s.commits.Count(), done, s.pgbench.Count(), s.web.Count(), s.session.Count())
	s.alive = broken == nil
	kept, failure := s.command(ctx, "cat /root/session")
	if failure == nil && kept != answers {
		failure = fmt.Errorf("%w: the guest kept %d bytes of the answers, %d were given", ErrSession, len(kept), len(answers))
	}
	if failure != nil {
		s.alive = false
	}
	// In this order, each whatever the one before found.
	return errors.Join(err, failure, s.judgeDatabase(ctx, done), s.judgeKernel(ctx), s.judgePair(ctx), s.judgeDisk(ctx))
}

// totals are what pgbench's tables must agree on, and how many transactions and
// accounts there are.
const totals = `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
	(SELECT sum(bbalance) FROM pgbench_branches), coalesce(sum(delta), 0), count(*),
	(SELECT count(*) FROM pgbench_accounts) FROM pgbench_history`

// accounts is what pgbench makes for a scale of 1.
const accounts = "100000"

func (s *server) judgeDatabase(ctx context.Context, done int) error {
	db, err := dialPostgres(ctx, s.Client.Dial, s.vm.Guest.Address)
	if err != nil {
		return err
	}
	defer db.Close()
	rows, err := db.Query(ctx, "SELECT id, note FROM ledger")
	if err != nil {
		return err
	}
	lost, wrong := missing(rows, s.commits.Count())
	s.lost += lost
	rows, err = db.Query(ctx, totals)
	if err != nil {
		return errors.Join(wrong, err)
	}
	lost, unequal := balanced(rows, done)
	s.lost += lost
	out, err := s.command(ctx, "runuser -u postgres -- /usr/lib/postgresql/*/bin/pg_amcheck --heapallindexed --parent-check postgres")
	if err != nil {
		err = fmt.Errorf("%w: pg_amcheck: %w: %s", ErrPostgres, err, out)
	}
	err = errors.Join(wrong, unequal, err)
	if s.consistent = err == nil; s.consistent {
		s.say("pg_amcheck finds nothing; the totals of pgbench agree: %s", strings.Join(rows[0], " "))
	}
	return err
}

// balanced judges the totals after so many transactions, and tells how many of
// those are not there.
func balanced(rows [][]string, done int) (lost int, err error) {
	const columns = 6
	if len(rows) != 1 || len(rows[0]) != columns {
		return done, fmt.Errorf("%w: the totals are %q", ErrPostgres, rows)
	}
	row := rows[0]
	count, err := strconv.Atoi(row[4])
	if err != nil {
		return done, fmt.Errorf("%w: %w", ErrPostgres, err)
	}
	if row[0] != row[1] || row[0] != row[2] || row[0] != row[3] || row[5] != accounts {
		err = fmt.Errorf("%w: sums of accounts, tellers, branches and history, transactions and accounts are %q", ErrPostgres, row)
	}
	if count != done {
		err = errors.Join(err, fmt.Errorf("%w: pgbench made %d transactions, its history has %d", ErrPostgres, done, count))
	}
	return max(done-count, 0), err
}

// judgeKernel asks the guest's kernel whether it saw anything that it should not.
func (s *server) judgeKernel(ctx context.Context) error {
	out, err := s.command(ctx, "dmesg --level=emerg,alert,crit,err; systemctl --failed --no-legend")
	if err != nil || strings.TrimSpace(out) != "" {
		return errors.Join(fmt.Errorf("%w saw errors: %s", ErrReal, strings.TrimSpace(out)), err)
	}
	return nil
}

// judgePair compares both copies of the guest at one instruction.
func (s *server) judgePair(ctx context.Context) error {
	if _, err := s.pair.waitWhole(ctx, time.Now(), realWholeLimit); err != nil {
		return err
	}
	pair, err := s.pair.pair(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, realCheckLimit)
	defer cancel()
	out, err := pair.primary.Exec(ctx, filepath.Join(lab.BinDir, "ftvirt"), "verify", s.vm.Name)
	if err != nil {
		return err
	}
	s.say("%s$ ftvirt verify %s\n%s", pair.primary.Name, s.vm.Name, out)
	return nil
}

// judgeDisk lets the guest power itself off, and looks at what is on the disk
// then.
func (s *server) judgeDisk(ctx context.Context) error {
	pair, err := s.pair.pair(ctx)
	if err != nil {
		return err
	}
	if out, err := s.command(ctx, "systemctl --no-block poweroff"); err != nil {
		return fmt.Errorf("%w: %w: %s", ErrReal, err, out)
	}
	for _, h := range []*lab.Host{pair.primary, pair.backup} {
		err := poll(ctx, realCheckLimit, func(ctx context.Context) (bool, error) {
			running, err := s.Running(ctx, h, s.vm.Name)
			return !running, err
		})
		if err != nil {
			return fmt.Errorf("waiting for the end of %s on %s: %w", s.vm.Name, h.Name, err)
		}
	}
	path, err := s.vm.DiskPath(ctx, pair.primary)
	if err != nil {
		return err
	}
	if err := guest.CheckDisk(ctx, path); err != nil {
		return err
	}
	s.say("%s has powered itself off, on both hosts; fsck finds nothing to repair on its disk", s.vm.Name)
	return nil
}
