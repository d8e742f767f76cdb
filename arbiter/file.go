// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

// fileVersion is written into every file. A file of another version is
// refused, never guessed at.
const fileVersion = 1

// maxFile bounds what is read of a file that someone else may have written.
const maxFile = 64 << 10

// kind is the suffix of a file's name and says what its existence means.
type kind string

const (
	// kindMarker: the directory is an arbiter's, not an unmounted mount point.
	kindMarker kind = "marker"
	// kindWitness: the directory is a witness's.
	kindWitness kind = "witness"
	// kindOpen: the epoch exists, and these are its hosts.
	kindOpen kind = "open"
	// kindOwner: the epoch is decided.
	kindOwner kind = "owner"
	// kindClosed: the owner ended the epoch on purpose.
	kindClosed kind = "closed"
	// kindForgotten: this epoch and all before it are void.
	kindForgotten kind = "forgotten"
)

// contents is what a file says. Files are never changed once they have their
// name, so there is nothing to lock.
type contents struct {
	Version int          `json:"version"`
	Kind    kind         `json:"kind"`
	Domain  string       `json:"domain,omitempty"`
	Epoch   plugin.Epoch `json:"epoch,omitempty"`
	Primary string       `json:"primary,omitempty"`
	Backup  string       `json:"backup,omitempty"`
	// Host is who wrote the file; for kindOwner that is the owner.
	Host string    `json:"host,omitempty"`
	Time time.Time `json:"time"`
	// Token is random. It tells a writer whether the file is its own.
	Token string `json:"token"`
	// Checksum is the SHA-256 of this object encoded with Checksum empty.
	Checksum string `json:"checksum"`
}

func (c contents) sum() (string, error) {
	c.Checksum = ""
	text, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encoding arbiter record: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// encode gives c as file contents, with version and checksum.
func (c contents) encode() ([]byte, error) {
	c.Version = fileVersion
	// The time must survive the way through JSON unchanged, or the checksum
	// would not: no monotonic reading, no local zone.
	c.Time = c.Time.UTC().Round(0)
	sum, err := c.sum()
	if err != nil {
		return nil, err
	}
	c.Checksum = sum
	text, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encoding arbiter record: %w", err)
	}
	return append(text, '\n'), nil
}

// decode reads a file that should be of kind k for domain and epoch. The error
// is a *CorruptError naming path.
func decode(text []byte, path string, k kind, domain string, epoch plugin.Epoch) (contents, error) {
	corrupt := func(format string, args ...any) (contents, error) {
		return contents{}, &CorruptError{Path: path, Reason: fmt.Sprintf(format, args...)}
	}
	if len(text) == 0 {
		return corrupt("the file is empty")
	}
	if len(text) > maxFile {
		return corrupt("the file is larger than %d bytes", maxFile)
	}
	// A newer version may have fields that this one does not know, so the
	// version is looked at on its own first.
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return corrupt("%v", err)
	}
	if head.Version != fileVersion {
		return corrupt("format version %d, this ftvirt knows %d", head.Version, fileVersion)
	}
	var c contents
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return corrupt("%v", err)
	}
	sum, err := c.sum()
	switch {
	case err != nil:
		return corrupt("%v", err)
	case sum != c.Checksum:
		return corrupt("the checksum does not match")
	case c.Kind != k || c.Domain != domain || c.Epoch != epoch:
		return corrupt("it belongs to %s of epoch %d of domain %q", c.Kind, c.Epoch, c.Domain)
	case c.Token == "":
		return corrupt("no token")
	case k == kindOwner && c.Host == "":
		return corrupt("no owner")
	case k == kindOpen && checkHosts(c.Primary, c.Backup) != nil:
		return corrupt("no two hosts")
	}
	return c, nil
}

// fileName names the file of one kind of one epoch. The width only makes a
// listing pleasant to read: parsing takes any number of digits.
func fileName(epoch plugin.Epoch, k kind) string {
	return fmt.Sprintf("epoch-%08d.%s", uint64(epoch), k)
}

// parseName is the inverse of fileName. Only the exact name counts, so that no
// epoch can have two files of a kind.
func parseName(name string) (plugin.Epoch, kind, bool) {
	number, suffix, ok := strings.Cut(strings.TrimPrefix(name, "epoch-"), ".")
	if !ok {
		return 0, "", false
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n == 0 {
		return 0, "", false
	}
	epoch, k := plugin.Epoch(n), kind(suffix)
	switch k {
	case kindOpen, kindOwner, kindClosed, kindForgotten:
		return epoch, k, name == fileName(epoch, k)
	default:
		return 0, "", false
	}
}
