// SPDX-License-Identifier: Apache-2.0

package rrlog

import "fmt"

// Kind is what an event is. Its numeric value is ours and the same for every
// QEMU; a [Layout] maps a log's codes to kinds.
type Kind uint8

// The kinds, in the order of enum ReplayEvents in QEMU's replay-internal.h.
// All shutdown causes share one kind; see [Event.Code].
const (
	KindInstruction Kind = iota
	KindInterrupt
	KindException
	KindBH
	KindBHOneshot
	KindInput
	KindInputSync
	KindCharRead
	KindBlock
	KindNet
	KindShutdown
	KindCharWrite
	KindCharReadAll
	KindCharReadAllError
	KindAudioOut
	KindAudioIn
	KindRandom
	KindClockHost
	KindClockVirtualRT
	KindCheckpointClockWarpStart
	KindCheckpointClockWarpAccount
	KindCheckpointResetRequested
	KindCheckpointSuspendRequested
	KindCheckpointClockVirtual
	KindCheckpointClockHost
	KindCheckpointClockVirtualRT
	KindCheckpointInit
	KindCheckpointReset
	KindEnd

	kindCount = int(KindEnd) + 1
)

var kindNames = [kindCount]string{
	KindInstruction:                "INSTRUCTION",
	KindInterrupt:                  "INTERRUPT",
	KindException:                  "EXCEPTION",
	KindBH:                         "BH",
	KindBHOneshot:                  "BH_ONESHOT",
	KindInput:                      "INPUT",
	KindInputSync:                  "INPUT_SYNC",
	KindCharRead:                   "CHAR_READ",
	KindBlock:                      "BLOCK",
	KindNet:                        "NET",
	KindShutdown:                   "SHUTDOWN",
	KindCharWrite:                  "CHAR_WRITE",
	KindCharReadAll:                "CHAR_READ_ALL",
	KindCharReadAllError:           "CHAR_READ_ALL_ERROR",
	KindAudioOut:                   "AUDIO_OUT",
	KindAudioIn:                    "AUDIO_IN",
	KindRandom:                     "RANDOM",
	KindClockHost:                  "CLOCK_HOST",
	KindClockVirtualRT:             "CLOCK_VIRTUAL_RT",
	KindCheckpointClockWarpStart:   "CHECKPOINT_CLOCK_WARP_START",
	KindCheckpointClockWarpAccount: "CHECKPOINT_CLOCK_WARP_ACCOUNT",
	KindCheckpointResetRequested:   "CHECKPOINT_RESET_REQUESTED",
	KindCheckpointSuspendRequested: "CHECKPOINT_SUSPEND_REQUESTED",
	KindCheckpointClockVirtual:     "CHECKPOINT_CLOCK_VIRTUAL",
	KindCheckpointClockHost:        "CHECKPOINT_CLOCK_HOST",
	KindCheckpointClockVirtualRT:   "CHECKPOINT_CLOCK_VIRTUAL_RT",
	KindCheckpointInit:             "CHECKPOINT_INIT",
	KindCheckpointReset:            "CHECKPOINT_RESET",
	KindEnd:                        "END",
}

// String gives QEMU's name without the prefix EVENT_ or ASYNC_EVENT_.
func (k Kind) String() string {
	if int(k) < kindCount {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Checkpoint reports whether the main loop, not the vCPU, consumes the event.
func (k Kind) Checkpoint() bool {
	return k >= KindCheckpointClockWarpStart && k <= KindCheckpointReset
}

// MarshalText implements encoding.TextMarshaler with the name of the kind.
func (k Kind) MarshalText() ([]byte, error) {
	if int(k) >= kindCount {
		return nil, fmt.Errorf("%w: %d", ErrUnknownKind, uint8(k))
	}
	return []byte(kindNames[k]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *Kind) UnmarshalText(text []byte) error {
	for i, name := range kindNames {
		if name == string(text) {
			*k = Kind(i)
			return nil
		}
	}
	return fmt.Errorf("%w: %q", ErrUnknownKind, text)
}

// shape says what follows an event's code.
type shape uint8

const (
	// shapeFixed: fixed bytes and no more.
	shapeFixed shape = iota
	// shapeArray: the fixed bytes end in a length, which the data follow.
	shapeArray
	// shapeInput: the fixed bytes depend on those read so far.
	shapeInput
	// shapeAudioIn: the fixed bytes begin with the number of frames that follow.
	shapeAudioIn
)

// spec gives each kind's shape and the number of fixed bytes, which for
// shapeInput is only the first step.
var spec = [kindCount]struct {
	fixed uint8
	shape shape
}{
	KindInstruction:      {fixed: 4},
	KindBH:               {fixed: 8},
	KindBHOneshot:        {fixed: 8},
	KindInput:            {fixed: 4, shape: shapeInput},
	KindCharRead:         {fixed: 1 + 4, shape: shapeArray},
	KindBlock:            {fixed: 8},
	KindNet:              {fixed: 1 + 4 + 4, shape: shapeArray},
	KindCharWrite:        {fixed: 4 + 4},
	KindCharReadAll:      {fixed: 4, shape: shapeArray},
	KindCharReadAllError: {fixed: 4},
	KindAudioOut:         {fixed: 8},
	KindAudioIn:          {fixed: 8 + 8, shape: shapeAudioIn},
	KindRandom:           {fixed: 4 + 4, shape: shapeArray},
	KindClockHost:        {fixed: 8},
	KindClockVirtualRT:   {fixed: 8},
	// All others are their code alone.
}

// The values of QEMU's InputEventKind and KeyValueKind.
const (
	inputKey = iota
	inputBtn
	inputRel
	inputAbs
	inputMtt
)

const (
	keyNumber = iota
	keyQcode
)

// maxFixed is the longest run of fixed bytes: a multi-touch INPUT.
const maxFixed = 4 + 4 + 8 + 8 + 4 + 8

// audioFrame is the size of one frame of AUDIO_IN: left and right, 8 bytes each.
const audioFrame = 16
