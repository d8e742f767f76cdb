// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
)

// minKey is the least length of a shared key, in bytes.
const minKey = 32

// Headers of the witness protocol. A request carries a nonce, and the reply is
// bound to it, so that no reply can be played again. Requests can; but a
// witness gives the same answer to one that comes twice or late, which is what
// the algorithm expects of a network anyway.
const (
	headerNonce = "Ftvirt-Nonce"
	headerMAC   = "Ftvirt-Mac"
)

// key is the secret that a host and a witness share.
type key []byte

// request authenticates what a host asks of one witness about a domain.
func (k key) request(witness, nonce, path string, body []byte) string {
	return k.mac("ftvirt witness request 1", witness, nonce, path, string(body))
}

// reply authenticates a witness's answer to the request with the nonce.
func (k key) reply(witness, nonce string, status int, body []byte) string {
	return k.mac("ftvirt witness reply 1", witness, nonce, fmt.Sprint(status), string(body))
}

// mac is over the parts with their lengths, so that none can run into another.
func (k key) mac(parts ...string) string {
	h := hmac.New(sha256.New, k)
	for _, p := range parts {
		_, _ = fmt.Fprintf(h, "%d:", len(p)) // a hash never fails
		_, _ = io.WriteString(h, p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func equalMAC(a, b string) bool { return hmac.Equal([]byte(a), []byte(b)) }
