// SPDX-License-Identifier: Apache-2.0

package storagetest

import (
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter/arbitertest"
)

// contendersOn starts two contenders in a machine, for one host of the races.
func contendersOn(t testing.TB, m *machine, host string, b arbitertest.Backend, target string) []*arbitertest.Contender {
	t.Helper()
	var contenders []*arbitertest.Contender
	for range 2 {
		conn := m.connect(t, request{
			Args: []string{"/bin/storagetest"}, Env: arbitertest.ContenderEnv(b, target), Plain: true,
		})
		if err := conn.SetDeadline(time.Now().Add(2 * time.Minute * time.Duration(*soak))); err != nil {
			t.Fatal(err)
		}
		contenders = append(contenders, arbitertest.NewContender(conn, host))
	}
	return contenders
}

// server is what serves the storage.
type server interface {
	process() *os.Process
	// kill ends it as a crash of its host would, restart brings it back.
	kill()
	restart(t testing.TB)
}

// shortly waits for a moment within a decision.
func shortly() { <-time.After(rand.N(15 * time.Millisecond)) }

// race lets contenders race while all is well, while the server hangs in the
// middle of each race, and, if it is mortal, while it dies there and comes back.
func race(t *testing.T, s server, rounds int, mortal bool, contenders []*arbitertest.Contender) {
	// Contenders that failed once may still answer what they were asked then.
	_ = t.Run("well", func(t *testing.T) { arbitertest.Race(t, contenders, rounds**soak, nil) }) &&
		t.Run("hung", func(t *testing.T) {
			signal := func(sig os.Signal) {
				if err := s.process().Signal(sig); err != nil {
					t.Error(err)
				}
			}
			arbitertest.Race(t, contenders, *soak, func(int) {
				shortly()
				signal(syscall.SIGSTOP)
				// Longer than an attempt waits.
				<-time.After(2500 * time.Millisecond)
				signal(syscall.SIGCONT)
			})
		}) &&
		mortal &&
		t.Run("dead", func(t *testing.T) {
			arbitertest.Race(t, contenders, *soak, func(int) {
				shortly()
				s.kill()
				<-time.After(500 * time.Millisecond)
				s.restart(t)
			})
		})
}
