/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The output rule (the paper, section 2.2): what the guest sends leaves only
 * after the backup has acknowledged the log up to the operation that sent it.
 * Packets of a recording guest pass the netdev's filter-replay; the gate sits
 * in that class's receive_iov. The guest never waits for it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "checkpoint/checkpoint.h"

static size_t size_of(const struct iovec *iov, int n)
{
    size_t size = 0;

    for (int i = 0; i < n; i++) {
        size += iov[i].iov_len;
    }
    return size;
}

static struct ft_packet *copy(const struct iovec *iov, int n, size_t size)
{
    struct ft_packet *p = malloc(sizeof(*p) + size);
    size_t at = 0;

    if (!p) {
        return NULL;
    }
    for (int i = 0; i < n; i++) {
        memcpy(p->data + at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    p->len = size;
    return p;
}

/* The gate's thread passes packets on without the replay mutex. A netdev that
 * answers from within (slirp) would log the answer: that is done later, in the
 * main loop, which holds the mutex. */
static __thread bool in_gate;

static void deliver(void *opaque)
{
    struct ft_packet *p = opaque;
    struct iovec iov = { p->data, p->len };

    if (!ft.filter_next(p->filter, p->sender, p->flags, &iov, 1, NULL)) {
        q.qemu_netfilter_pass_to_next(p->sender, p->flags, &iov, 1, p->filter);
    }
    free(p);
}

static ssize_t defer(void *nf, void *sender, unsigned flags,
                     const struct iovec *iov, int n)
{
    size_t size = size_of(iov, n);
    struct ft_packet *p = copy(iov, n, size);

    if (p) {
        p->filter = nf;
        p->sender = sender;
        p->flags = flags;
        q.aio_bh_schedule_oneshot_full(ft.main_context, deliver, p,
                                       "ftvirt-deliver");
    }
    return size;
}

/* Whether what the guest sends waits for the backup: from the switch on. The
 * lock is held. */
static bool gated(void)
{
    return ft.mode == FT_RECORD || (ft.mode == FT_CHECKPOINT && ck.number);
}

static bool may_leave(const struct ft_packet *p)
{
    return !gated() || p->pos <= ft.open_to;
}

/* Called by QEMU with the BQL held, and in record mode from an event of the
 * log, with the replay mutex held. */
static ssize_t gate_receive(void *nf, void *sender, unsigned flags,
                            const void *iov, int n, void *sent)
{
    struct q_netfilter_state *filter = nf;
    struct ft_packet *p;
    bool waits, lost;
    size_t size;

    pthread_mutex_lock(&ft.lock);
    waits = gated() || (ft.gate_count && ft.mode != FT_REPLAY);
    /* A paused guest's card would take it when it resumes; the backup's, which
     * does not pause, at once. It is lost, as in a switch. And what comes to a
     * backup that holds checkpoints is for its primary. */
    lost = ft.mode == FT_STANDBY ||
           (filter->netdev == sender && ft.mode == FT_RECORD && !ft.running);
    pthread_mutex_unlock(&ft.lock);
    if (lost) {
        return size_of(iov, n);
    }
    if (filter->netdev == sender && in_gate) {
        return defer(nf, sender, flags, iov, n);
    }
    if (filter->netdev == sender || !waits) {
        return ft.filter_next(nf, sender, flags, iov, n, sent);
    }
    if (q.replay_mutex_locked()) {
        q.replay_save_instructions();
    }
    size = size_of(iov, n);
    p = copy(iov, n, size);
    if (!p) {
        return size;
    }
    p->next = NULL;
    p->filter = nf;
    p->sender = sender;
    p->flags = flags;
    p->queued_ns = ft_now_ns();

    pthread_mutex_lock(&ft.lock);
    p->pos = ft.checkpoints ? ck.number + 1 : ft.ring.head;
    if (ft.gate_count >= FT_GATE_PACKETS ||
        ft.gate_bytes + size > FT_GATE_BYTES) {
        ft.gate_dropped++;
        pthread_mutex_unlock(&ft.lock);
        free(p);
        return size;
    }
    *ft.gate_tail = p;
    ft.gate_tail = &p->next;
    ft.gate_count++;
    ft.gate_bytes += size;
    if (may_leave(p)) {
        pthread_cond_broadcast(&ft.gate);
    } else if (ft.checkpoints) {
        ck_wanted();
    } else {
        ft.flush = true;
        ft_wake_io();
    }
    pthread_mutex_unlock(&ft.lock);
    return size;
}

void ft_gate_release(void)
{
    pthread_mutex_lock(&ft.lock);
    pthread_cond_broadcast(&ft.gate);
    pthread_mutex_unlock(&ft.lock);
}

/* Which class a delay belongs to. The last has no bound. */
static int class_of(uint64_t delay_ns)
{
    static const uint64_t most_us[FT_GATE_DELAYS - 1] = {
        500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000,
        1000000,
    };
    int i = 0;

    while (i < FT_GATE_DELAYS - 1 && delay_ns > most_us[i] * 1000) {
        i++;
    }
    return i;
}

/* Takes every packet off the queue that may leave; the lock is held. */
static struct ft_packet *take(void)
{
    struct ft_packet *first = ft.gate_head, **end = &first;
    int64_t now = ft_now_ns();

    while (*end && may_leave(*end)) {
        uint64_t delay = now - (*end)->queued_ns;

        ft.gate_released++;
        ft.gate_delay_ns += delay;
        ft.gate_delays[class_of(delay)]++;
        if (delay > ft.gate_delay_max_ns) {
            ft.gate_delay_max_ns = delay;
        }
        end = &(*end)->next;
    }
    ft.gate_head = *end;
    if (!ft.gate_head) {
        ft.gate_tail = &ft.gate_head;
    }
    *end = NULL;
    return first;
}

/* A thread of its own: it needs the BQL but, unlike the main loop, not the
 * replay mutex, which a busy vCPU holds for milliseconds. */
static void *gate_thread(void *unused)
{
    (void)unused;
    in_gate = true;
    pthread_mutex_lock(&ft.lock);
    for (;;) {
        struct ft_packet *p, *next;

        while (!ft.gate_head || !may_leave(ft.gate_head)) {
            pthread_cond_wait(&ft.gate, &ft.lock);
        }
        p = take();
        pthread_mutex_unlock(&ft.lock);
        q_bql_lock();
        for (; p; p = next) {
            struct iovec iov = { p->data, p->len };
            bool late;

            next = p->next;
            pthread_mutex_lock(&ft.lock);
            late = gated() &&
                   ft_boot_ns() - ft.open_ns > FT_SILENCE_NS;
            ft.gate_dropped += late;
            pthread_mutex_unlock(&ft.lock);
            if (!late) {
                q.qemu_netfilter_pass_to_next(p->sender, p->flags, &iov, 1,
                                              p->filter);
            }
            pthread_mutex_lock(&ft.lock);
            /* Counted until it has left, so that a later one queues up. */
            ft.gate_count--;
            ft.gate_bytes -= p->len;
            pthread_mutex_unlock(&ft.lock);
            free(p);
        }
        q.bql_unlock();
        pthread_mutex_lock(&ft.lock);
    }
    return NULL;
}

bool ft_in_qemu(const void *f)
{
    Dl_info of, qemu;

    return f && dladdr(f, &of) && dladdr((void *)q.qemu_notify_event, &qemu) &&
           of.dli_fbase == qemu.dli_fbase;
}

bool ft_gate_init(const char **why)
{
    struct q_netfilter_class *replay = q.object_class_by_name("filter-replay");
    struct q_netfilter_class *buffer = q.object_class_by_name("filter-buffer");

    /* filter-replay sets receive_iov alone, filter-buffer setup too; both
     * inherit handle_event. */
    if (!replay || !buffer || replay->setup || replay->cleanup ||
        replay->handle_event != buffer->handle_event ||
        !ft_in_qemu(replay->handle_event) ||
        !ft_in_qemu(replay->receive_iov) || !ft_in_qemu(buffer->receive_iov) ||
        !ft_in_qemu(buffer->setup) || !ft_in_qemu(buffer->cleanup)) {
        *why = "NetFilterClass lies otherwise in this QEMU";
        return false;
    }
    ft.gate_tail = &ft.gate_head;
    ft.filter_next = replay->receive_iov;
    if (!ft_thread(gate_thread, "ftvirt-gate")) {
        *why = "no thread";
        return false;
    }
    replay->receive_iov = gate_receive;
    return true;
}
