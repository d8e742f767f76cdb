/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Resets of devices. A disk that is reset waits for its requests, and their
 * completions wait for the log, which they are put into or taken from by a vCPU
 * that executes. That is paused when the machine is reset, and when the guest
 * resets the disk, it is the one that waits: it would be for ever. Both sides
 * have the same requests in flight, so before a disk waits they take as many
 * completions here, at the same place in the log.
 */
#include <string.h>
#include <time.h>

#include "ftvirt.h"

/* How long to wait for a disk, or for the log, before looking again. */
#define POLL_NS 100000
/* include/hw/virtio/virtio.h: VIRTIO_LEGACY_FEATURES, and how far into a
 * VirtioDeviceClass they may lie. */
#define LEGACY_FEATURES UINT64_C(0x49000000)
#define CLASS_WORDS 40

/*
 * Completes all disk requests, and marks in the log where that was done by a
 * CHECKPOINT_RESET, of which QEMU itself makes no use after its start. The caller
 * holds the replay mutex. A log that ends meanwhile goes live in events(), and
 * what is left completes as this side's own.
 */
static void complete_requests(void (*events)(void))
{
    const struct timespec moment = { .tv_nsec = POLL_NS };
    bool in_flight;

    ft_disks_quiesce();
    for (;;) {
        events();
        in_flight = ft_disks_busy();
        if (!in_flight && q.replay_checkpoint(Q_CHECKPOINT_RESET)) {
            break;
        }
        if (!q.aio_poll(q.qemu_get_aio_context(), false)) {
            nanosleep(&moment, NULL);
        }
    }
    ft_disks_resume();
}

static bool in_lockstep(void)
{
    return ft.started && *q.replay_mode != Q_REPLAY_NONE &&
           q.replay_mutex_locked();
}

static void machine_events(void)
{
    if (q.runstate_is_running()) {
        q.icount_account_warp_timer(); /* and events, as below */
    } else {
        q.replay_async_events();
    }
}

/*
 * First of all reset handlers. Nor may it be left to the paused vCPU thread
 * whether the time for which the guest was idle is added to its clock before the
 * devices are reset, which set their timers by that clock, or after: the
 * checkpoint tells what belongs before.
 */
static void reset_machine(void *opaque)
{
    (void)opaque;
    if (in_lockstep()) {
        complete_requests(machine_events);
    }
}

static void vcpu_events(void)
{
    /* The log says at which instruction they are due: this one. */
    q.replay_account_executed_instructions();
    q.replay_async_events();
}

static void (*reset_next)(void *vdev);

/* A virtio disk is reset: by its guest, in the vCPU's thread, or with the whole
 * machine, when there is nothing left to complete. */
static void reset_disk(void *vdev)
{
    if (in_lockstep() && ft_disks_in_flight()) {
        complete_requests(vcpu_events);
    }
    reset_next(vdev);
}

/*
 * include/hw/virtio/virtio.h: struct VirtioDeviceClass, whose size of a parent
 * depends on the version: get_config, set_config, reset, set_status, queue_reset,
 * queue_enable, legacy_features.
 */
static bool find_reset(void ***reset)
{
    static const char *const names[] = { "virtio-device", "virtio-blk-device",
                                         "virtio-net-device" };
    /* Which of the six functions are there. */
    static const char *const has[] = { "000000", "111100", "111111" };
    void **class[3];
    size_t at = 0;

    for (int i = 0; i < 3; i++) {
        class[i] = q.object_class_by_name(names[i]);
        if (!class[i]) {
            return false;
        }
    }
    while (at < CLASS_WORDS && (uint64_t)class[0][at] != LEGACY_FEATURES) {
        at++;
    }
    if (at < 6 || at == CLASS_WORDS ||
        (uint64_t)class[1][at] != LEGACY_FEATURES) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 6; k++) {
            void *f = class[i][at - 6 + k];

            if (has[i][k] == '0' ? f != NULL : !ft_in_qemu(f)) {
                return false;
            }
        }
    }
    *reset = class[1] + at - 4;
    return true;
}

bool ft_reset_init(const char **why)
{
    void **reset;

    if (!find_reset(&reset)) {
        *why = "VirtioDeviceClass lies otherwise in this QEMU";
        return false;
    }
    memcpy(&reset_next, reset, sizeof(reset_next));
    *reset = (void *)reset_disk;
    q.qemu_register_reset(reset_machine, NULL);
    return true;
}
