// SPDX-License-Identifier: Apache-2.0

package checkpoint

import (
	"encoding/binary"
)

// A delta is what changed of a page: again and again the number of words of 8
// bytes that did not, the number that did, and those, until nothing is left. What
// is not told at the end did not change.
const word = 8

// appendDelta appends the delta that makes now of before, both of the same length,
// a multiple of 8; false if it would be longer than most bytes.
func appendDelta(b, before, now []byte, most int) ([]byte, bool) {
	start := len(b)
	for at := 0; at < len(now); {
		same := at
		for same < len(now) && binary.NativeEndian.Uint64(before[same:]) == binary.NativeEndian.Uint64(now[same:]) {
			same += word
		}
		if same == len(now) {
			break
		}
		other := same
		for other < len(now) && binary.NativeEndian.Uint64(before[other:]) != binary.NativeEndian.Uint64(now[other:]) {
			other += word
		}
		b = binary.AppendUvarint(b, uint64(same-at)/word)
		b = binary.AppendUvarint(b, uint64(other-same)/word)
		if len(b)-start+other-same > most {
			return b[:start], false
		}
		b = append(b, now[same:other]...)
		at = other
	}
	return b, true
}

// applyDelta changes page as a delta says; false if that is none of its length.
func applyDelta(page, delta []byte) bool {
	at := uint64(0)
	size := uint64(len(page)) / word
	for len(delta) > 0 {
		same, n := binary.Uvarint(delta)
		if n <= 0 {
			return false
		}
		delta = delta[n:]
		other, n := binary.Uvarint(delta)
		if n <= 0 {
			return false
		}
		delta = delta[n:]
		if same > size-at || other == 0 || other > size-at-same || other*word > uint64(len(delta)) {
			return false
		}
		at += same
		copy(page[at*word:(at+other)*word], delta)
		delta = delta[other*word:]
		at += other
	}
	return true
}
