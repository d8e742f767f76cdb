// SPDX-License-Identifier: Apache-2.0

package pair

import (
	"errors"
	"fmt"

	"ftvirt.org/ftvirt/plugin"
)

// check tells what must hold after every step.
func (m *Machine) check() error {
	var errs []error
	must := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: %s", m.Status(), what))
		}
	}
	must(m.state != Live || m.won, "live without having won")
	must(m.state != Live || m.part == plugin.RolePrimary, "live in another role than primary")
	must(m.state != GoingLive || m.asking || m.won, "waits for an answer that nobody asked for")
	must(m.state != GoingLive || m.part != plugin.RolePrimary || m.switched, "primary asks for an epoch without recording")
	must(m.state != GoingLive || m.part != plugin.RoleBackup || m.entitled(), "backup goes live without being entitled")
	must(m.state != GoingLive || !m.won || m.promote > 0 || m.paused, "promotion without a limit")
	must(m.state != GoingLive || !m.paused || m.resumeAgain > 0, "a paused copy is held and not resumed")
	must(m.state != Protected || m.part != plugin.RolePrimary || m.switched, "protected primary does not record")
	must(m.state != Protected || m.part != plugin.RoleBackup || m.entitled() && m.running, "protected backup does not replay")
	must(!m.asking || m.askAgain > 0, "asks the arbiter only once")
	must(!m.sessionLost || m.grace > 0, "a broken session is waited for without a limit")
	must(m.state != Cloning || m.part != plugin.RolePrimary || !m.switched || m.settle > 0, "switched clone without a limit")
	must(m.state != Cloning || m.stall > 0 || m.settle > 0, "clone without a limit")
	must(m.removing == 0 || m.removeAgain > 0, "removal is ordered only once")
	must(m.state != Cloning || m.stall > 0 || m.settle > 0, "clone without a limit")
	must(m.removing == 0 || m.state == Failed || m.state == Unprotected, "a copy is removed that still counts")
	must((m.request == 0) == (m.probing == 0), "a user's request without a limit")
	must(!m.ended || m.state == Unprotected && m.part == plugin.RoleBackup, "replicas are kept beside a copy that counts")
	must(!m.ended || m.asking || m.claimIn > 0, "replicas are kept, and nobody asks whose they are")
	must(m.epoch > 0 || m.state == Unprotected, "state without an epoch")
	return errors.Join(errs...)
}
