// SPDX-License-Identifier: Apache-2.0

package arbiter

// Op names one step that a backend takes on its storage.
type Op string

// The steps, in the order in which Acquire takes them.
const (
	OpReadMarker Op = "read-marker"
	OpList       Op = "list"
	OpRead       Op = "read"
	OpMkdir      Op = "mkdir"
	OpCreate     Op = "create" // the temporary file
	OpWrite      Op = "write"
	OpSync       Op = "sync" // of the temporary file
	OpLink       Op = "link" // to the final name: the test-and-set
	OpStat       Op = "stat"
	OpSyncDir    Op = "sync-dir"
	OpRemove     Op = "remove"
)

// OpRename gives a witness's new record its name.
const OpRename Op = "rename"

// The steps of the majority backend: its requests to each witness.
const (
	OpAsk     Op = "ask"
	OpPrepare Op = "prepare"
	OpAccept  Op = "accept" // by a majority: the test-and-set
)

// Fault is a point at which a test can interfere with a backend.
type Fault struct {
	Op Op
	// Path is what the step works on: a file or directory, for OpLink the
	// final name; a witness's address.
	Path string
	// After is false before the step is taken, true once it succeeded.
	After bool
}

// FaultFunc interferes: an error makes the step fail, blocking makes it hang,
// ending the process is a crash. An error after the step is a lie, such as NFS
// tells when the answer to a request was lost and the request repeated.
type FaultFunc func(Fault) error
