// SPDX-License-Identifier: Apache-2.0

// Package pair is the state machine of one domain on one host: is it protected,
// is it about to go live, may it. It follows the paper, sections 2.2 and 2.3.
//
// The machine is pure. Step takes an Event and returns Actions; there is no
// I/O, no clock and no goroutine in it, and time is EventTick. The agent is the
// shell: it turns what happens into events, one at a time, and executes the
// actions in the order in which they come.
//
// Two machines make a pair, one for each host. They need not agree on anything
// but the arbiter: a side goes live only after EventArbiterWon for its epoch.
//
// # When the backup may take over
//
// A backup may go live only once it is entitled: it has loaded all of the
// primary's state (EventCloneLoaded) and was told that the primary records from
// exactly there (EventPrimarySwitched, sent by the primary's machine as
// NotifySwitched). A primary that has not switched can therefore abort a clone
// and run on at once; one that has switched must win at the arbiter first.
//
// # Duties of the agent
//
//   - Events that come from the peer carry the epoch they were sent in.
//   - AcquireArbiter is answered by one of the arbiter events. While one call
//     for the same epoch runs, a further one may be dropped.
//   - CloseEpoch and Forget are retried by the agent until they are decided.
//   - KillLocalVM, DiscardBackup and EndBackup come again until EventQEMUDied tells that
//     the QEMU process is gone; also for one that never ran.
//   - EventPeerPoweredOff is stepped once the backup has replayed the log to
//     its end, so that both replicas of the disks have all writes, or with
//     Behind once it was given up waiting for.
//   - The end of a QEMU by a signal, other than an operator's, is EventQEMUDied
//     on the primary's host, and the backup does not replay it.
package pair
