/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Disk requests that failed on a backup, as for want of room. The log has their
 * completions, which were taken; the devices keep the requests, the VM is
 * paused, and when it is resumed they are submitted once more. On the primary
 * nothing was: so they get numbers that no request of the log has, and the log
 * gets completions of ours, where it stands. Until they have completed nothing
 * is executed, and what the guest does next is what it did on the primary.
 */
#include "ftvirt.h"

#define FIRST_ID (UINT64_C(1) << 62)
/* Bottom halves that are scheduled by bottom halves. */
#define POLLS 3

/* Last of all handlers when the VM starts, in the main loop: the devices have
 * scheduled what submits their requests. */
void ft_retry(void)
{
    static uint64_t next_id = FIRST_ID;
    uint64_t of_log = q.replay_state->block_request_id;
    unsigned count;

    if (ft.mode != FT_REPLAY || ft.stop_state != Q_RUN_STATE_IO_ERROR ||
        !q.replay_mutex_locked()) {
        return;
    }
    q.replay_state->block_request_id = next_id;
    for (int i = 0; i < POLLS; i++) {
        q.aio_poll(q.qemu_get_aio_context(), false);
    }
    count = q.replay_state->block_request_id - next_id;
    q.replay_state->block_request_id = of_log;
    if (!ft_replay_insert(next_id, count)) {
        ft_report("%u disk requests failed at once: the backup cannot go on",
                  count);
    }
    next_id += count;
}
