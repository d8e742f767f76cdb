// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// maxKeyFile bounds what is read of a key file, in bytes.
const maxKeyFile = 4 << 10

// MakeKey writes a new secret for the majority backend to a file that only its
// owner can read. It does not overwrite one, since whoever has the old one
// would be locked out.
func MakeKey(path string) error { return makeKey(path, nil) }

// makeKey writes a file of another name first, so that no half of a secret is
// ever there, whatever ends this process. fault comes before each step.
func makeKey(path string, fault FaultFunc) error {
	step := func(op Op, path string, f func() error) error {
		if fault != nil {
			if err := fault(Fault{Op: op, Path: path}); err != nil {
				return err
			}
		}
		return f()
	}
	temp := path + ".new"
	var f *os.File
	err := step(OpCreate, temp, func() (err error) {
		// One that an interrupted attempt left is worth nothing.
		if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f, err = os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return fmt.Errorf("making a witness key: %w", err)
	}
	secret := make([]byte, minKey)
	_, _ = rand.Read(secret) // never fails
	err = step(OpWrite, temp, func() error { _, err := fmt.Fprintln(f, hex.EncodeToString(secret)); return err })
	if err == nil {
		err = step(OpSync, temp, f.Sync)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = step(OpLink, path, func() error { return os.Link(temp, path) })
	}
	err = errors.Join(err, step(OpRemove, temp, func() error { return os.Remove(temp) }))
	if err != nil {
		return fmt.Errorf("making a witness key: %w", err)
	}
	return nil
}

// ReadKey reads what MakeKey wrote: the secret in hexadecimal digits, in a file
// that nobody but its owner may use. It wraps ErrInvalid unless it is one.
func ReadKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("witness key: %w; copy it from another host, or make it with 'ftvirt witness key'", err)
	}
	if err != nil {
		return nil, fmt.Errorf("witness key: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("witness key: %w", err)
	}
	if mode := info.Mode(); !mode.IsRegular() || mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: witness key %s has mode %v; nobody but its owner may use it: chmod 600 it", ErrInvalid, path, mode)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("witness key: %w", err)
	}
	text = bytes.TrimSpace(text)
	secret := make([]byte, hex.DecodedLen(len(text)))
	if _, err := hex.Decode(secret, text); err != nil || len(secret) < minKey {
		return nil, fmt.Errorf("%w: witness key %s is not %d or more hexadecimal digits; make one with 'ftvirt witness key'", ErrInvalid, path, 2*minKey)
	}
	return secret, nil
}
