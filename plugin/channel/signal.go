// SPDX-License-Identifier: Apache-2.0

package channel

// signal wakes everyone who waits for a change. It is guarded by the mutex of
// what changes, and costs nothing while nobody waits.
type signal struct{ ch chan struct{} }

// wait gives a channel that is closed at the next change.
func (s *signal) wait() <-chan struct{} {
	if s.ch == nil {
		s.ch = make(chan struct{})
	}
	return s.ch
}

// notify announces a change.
func (s *signal) notify() {
	if s.ch != nil {
		close(s.ch)
		s.ch = nil
	}
}
