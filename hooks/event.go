// SPDX-License-Identifier: Apache-2.0

package hooks

// Event is what the libvirt hook tells the agent: one line of JSON for each
// connection to the hook's socket. It is best effort. An agent that was away
// learns the same from libvirt.
type Event struct {
	// Op and SubOp are libvirt's words, such as "stopped" and "end".
	Op    string `json:"op"`
	SubOp string `json:"subop"`
	// UUID and Name are the domain's. UUID is empty if libvirt gave no XML.
	UUID string `json:"uuid"`
	Name string `json:"name"`
}
