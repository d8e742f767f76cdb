// SPDX-License-Identifier: Apache-2.0

package control

import (
	"errors"
	"syscall"
)

// isReset tells whether the other end vanished, as it does on kill -9.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
