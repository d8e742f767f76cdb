// SPDX-License-Identifier: Apache-2.0

package arbiter

import "fmt"

// Decision answers whether a host may start a domain.
type Decision uint8

const (
	// StartRefused: starting here could make a second live copy.
	StartRefused Decision = iota
	// StartAllowed: nothing speaks against it.
	StartAllowed
	// StartAfterAcquire: allowed once Acquire for the record's epoch gave nil.
	StartAfterAcquire
)

func (d Decision) String() string {
	switch d {
	case StartAllowed:
		return "allowed"
	case StartAfterAcquire:
		return "after acquire"
	default:
		return "refused"
	}
}

// Verdict is a Decision with its reason, as a person should read it.
type Verdict struct {
	Decision Decision
	Reason   string
}

// MayStart answers "may host start the domain of rec?", from the newest record
// alone. The zero Record means that there is none. asBackup tells that the
// copy to be started replays a primary's log and cannot be seen from outside.
//
// The zero Verdict refuses.
func MayStart(rec Record, host string, asBackup bool) Verdict {
	switch {
	case rec.Epoch == 0:
		return Verdict{StartAllowed, "the domain is not protected"}
	case rec.Closed && host == rec.Primary:
		return Verdict{StartAllowed, fmt.Sprintf("epoch %d was closed; this host has its newest disks", rec.Epoch)}
	case rec.Closed:
		return Verdict{StartRefused, fmt.Sprintf(
			"epoch %d was closed, and host %s has its newest disks. Start the domain there, or give its copy up with 'ftvirt arbiter forget %s'",
			rec.Epoch, rec.Primary, rec.Domain)}
	case rec.Owner != "" && rec.Owner == host:
		return Verdict{StartAllowed, fmt.Sprintf("this host owns the domain since epoch %d", rec.Epoch)}
	case rec.Owner != "":
		return Verdict{StartRefused, fmt.Sprintf(
			"host %s owns the domain since epoch %d; the copy here is stale. Start it there, or give that copy up with 'ftvirt arbiter forget %s'",
			rec.Owner, rec.Epoch, rec.Domain)}
	case asBackup && host != "" && host == rec.Backup:
		return Verdict{StartAllowed, fmt.Sprintf("this host is the backup of epoch %d", rec.Epoch)}
	case !rec.Member(host):
		return Verdict{StartRefused, fmt.Sprintf(
			"epoch %d is undecided between hosts %s and %s; this host is neither", rec.Epoch, rec.Primary, rec.Backup)}
	case host == rec.Backup:
		return Verdict{StartRefused, fmt.Sprintf(
			"this host was the backup of epoch %d, and does not own it. If it was left the disks of a domain that was powered off, its agent acquires the epoch "+
				"in a few seconds: try again. Else start the domain on host %s, or give its copy up with 'ftvirt arbiter forget %s'",
			rec.Epoch, rec.Primary, rec.Domain)}
	default:
		return Verdict{StartAfterAcquire, fmt.Sprintf(
			"epoch %d is undecided between hosts %s and %s; it must be acquired first", rec.Epoch, rec.Primary, rec.Backup)}
	}
}
