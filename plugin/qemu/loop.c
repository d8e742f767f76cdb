/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's event loops, kept off the vCPU. While it replays, QEMU wakes the main
 * loop and the monitors' at the end of each piece of instructions, of which
 * there are thousands a second: replay_advance_current_icount() and
 * icount_notify_aio_contexts() do, and the main loop that was woken kicks the
 * vCPU in turn (icount_start_warp_timer). Nothing of that is needed while the
 * next event of the log is the vCPU's. So the loops wait where QEMU does not
 * find them: aio_notify() writes only to one that polls. The monitors' does so
 * on a primary too, whose vCPU wakes it with each of the guest's timers.
 */
#define _GNU_SOURCE
#include <time.h>

#include "ftvirt.h"

/* For how long the loops do not look at their files: what comes in for a monitor
 * or from a disk waits for so long, unless the log waits for it. */
#define MAIN_NS INT64_C(2000000)
#define MONITOR_MS 10

/* replay/replay-internal.h: EVENT_EXCEPTION, of those up to which only a vCPU
 * takes. */
#define LAST_VCPU_KIND 2

/*
 * Whether the vCPU goes on without the main loop from an event of that kind. A
 * disk's completion is the main loop's to fetch. The caller holds the replay
 * mutex.
 */
static bool goes_on(uint8_t kind)
{
    if (kind <= LAST_VCPU_KIND) {
        return !q.all_cpu_threads_idle();
    }
    return kind != FT_BLOCK_KIND && ft_for_vcpu(kind);
}

/* An event of the log is next; in either thread, with the replay mutex held. */
void ft_loop_next(uint8_t kind)
{
    if (goes_on(kind)) {
        return;
    }
    pthread_mutex_lock(&ft.lock);
    ft_loop_wake();
    pthread_mutex_unlock(&ft.lock);
}

/* The lock is held. */
void ft_loop_wake(void)
{
    ft.main_wanted = true;
    pthread_cond_signal(&ft.turn);
}

/*
 * The main loop is about to poll, with both of QEMU's locks held, which it lets
 * go of for that anyway.
 */
void ft_loop_wait(void)
{
    struct timespec until;

    if (*q.replay_mode != Q_REPLAY_PLAY || !q.replay_mutex_locked() ||
        !q.replay_state->has_unread_data || !q.runstate_is_running() ||
        !goes_on(q.replay_state->data_kind)) {
        return;
    }
    pthread_mutex_lock(&ft.lock);
    if (!ft.loaded || ft.promote || ft.yielding || ft.yielded) {
        pthread_mutex_unlock(&ft.lock);
        return;
    }
    ft.main_wanted = false;
    pthread_mutex_unlock(&ft.lock);
    /* The log goes on only when the replay mutex is free: no event is missed. */
    q.bql_unlock();
    q.replay_mutex_unlock();
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += MAIN_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&ft.lock);
    while (!ft.main_wanted &&
           pthread_cond_clockwait(&ft.turn, &ft.lock, CLOCK_MONOTONIC,
                                  &until) == 0) {
    }
    pthread_mutex_unlock(&ft.lock);
    q.replay_mutex_lock();
    q_bql_lock();
}

/* glib/gmain.h: GSourceFuncs, and the first part of GSource. */
struct source_funcs {
    int (*prepare)(void *source, int *timeout_ms);
    void *others[5];
};

struct source {
    void *callback_data, *callback_funcs;
    const struct source_funcs *funcs;
};

static const struct source_funcs *aio_funcs;

/* What the context itself does here is to say that it polls. */
static int prepare(void *source, int *timeout_ms)
{
    if (__atomic_load_n(q.replay_mode, __ATOMIC_RELAXED) == Q_REPLAY_NONE) {
        return aio_funcs->prepare(source, timeout_ms);
    }
    *timeout_ms = MONITOR_MS;
    return false;
}

/* Once there are monitors: makes the loop of theirs one that looks now and then
 * as long as this is one of a pair. */
void ft_loop_init(void)
{
    static struct source_funcs funcs;
    struct source *source;

    if (!*q.mon_iothread) {
        return;
    }
    source = q.aio_get_g_source(q.iothread_get_aio_context(*q.mon_iothread));
    if (ft_in_qemu(source->funcs) && ft_in_qemu(source->funcs->prepare)) {
        aio_funcs = source->funcs;
        funcs = *aio_funcs;
        funcs.prepare = prepare;
        __atomic_store_n(&source->funcs, &funcs, __ATOMIC_RELEASE);
    } else {
        ft_report("the monitors' loop is left as it is: GSource lies otherwise");
    }
    q.g_source_unref(source);
}
