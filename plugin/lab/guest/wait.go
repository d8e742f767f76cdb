// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"time"
)

const pollInterval = 50 * time.Millisecond

// pause waits one polling interval, or until ctx ends.
func pause(ctx context.Context) error {
	timer := time.NewTimer(pollInterval)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
