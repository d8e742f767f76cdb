/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Disk requests that failed on a backup, as for want of room. The log has their
 * completions, which were taken; the devices keep the requests, the VM is
 * paused, and when it is resumed they are submitted once more. On the primary
 * nothing was: so they get numbers that no request of the log has, and the log
 * gets completions of ours, where it stands. Until they have completed nothing
 * is executed, and what the guest does next is what it did on the primary: the
 * log stands still from the failure on, before the guest can have noticed.
 */
#include "ftvirt.h"

#define FIRST_ID (UINT64_C(1) << 62)
/* Bottom halves that are scheduled by bottom halves. */
#define POLLS 3

/* Whether a request has just failed. QEMU tells it once, so it is told again. */
bool ft_disk_failed(void)
{
    int state;

    if (q.runstate_check(Q_RUN_STATE_IO_ERROR)) {
        return true;
    }
    if (!q.qemu_vmstop_requested(&state)) {
        return false;
    }
    q.qemu_system_vmstop_request_prepare();
    q.qemu_system_vmstop_request(state);
    return state == Q_RUN_STATE_IO_ERROR;
}

/* Last of all handlers when the VM starts, in the main loop: the devices have
 * scheduled what submits their requests. */
void ft_retry(void)
{
    static uint64_t next_id = FIRST_ID;
    uint64_t of_log = q.replay_state->block_request_id;
    unsigned count = 0;

    if (ft.mode != FT_REPLAY || !q.replay_mutex_locked()) {
        return;
    }
    if (ft.stop_state == Q_RUN_STATE_IO_ERROR) {
        q.replay_state->block_request_id = next_id;
        for (int i = 0; i < POLLS; i++) {
            q.aio_poll(q.qemu_get_aio_context(), false);
        }
        count = q.replay_state->block_request_id - next_id;
        q.replay_state->block_request_id = of_log;
    }
    if (!ft_replay_go_on(next_id, count)) {
        ft_report("%u disk requests failed at once: the backup cannot go on",
                  count);
    }
    next_id += count;
}
