/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's replay_file as a stream in memory. In record mode QEMU writes to a
 * ring that holds what the backup has not acknowledged; in replay mode it
 * reads from the same ring what the agent fed. Every position is exact: no byte
 * hides in stdio, but for the rest of a packet that is being read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ftvirt.h"

/* An event kind that no code path of QEMU waits for, EVENT_AUDIO_OUT: handed
 * out between the load of the state and the start of the VM, so that no event
 * of the log is consumed while the VM is still stopped. On the primary none
 * was: it logs from within vm_start. And handed out for a while when there is
 * no log and the main loop has something else to do. */
#define PLACEHOLDER_KIND 25
/* EVENT_ASYNC + REPLAY_ASYNC_EVENT_BH, and _BH_ONESHOT. */
#define BH_KIND 3
#define BH_ONESHOT_KIND 4
/* The number of a request or bottom half. */
#define ID_BYTES 8
/* EVENT_INSTRUCTION, and the count that follows. */
#define INSTRUCTION_KIND 0
#define INSTRUCTION_BYTES 4
/* EVENT_ASYNC + REPLAY_ASYNC_EVENT_NET: the card, flags, the size, the packet. */
#define NET_KIND 9
#define NET_HEADER_BYTES 9
/* What the read at the end of the log returns at go-live: EVENT_INTERRUPT.
 * In record mode nobody looks at it. */
#define LAST_KIND 1
/* Kinds that the main loop must see: asynchronous events and shutdowns, for
 * which it wakes a halted vCPU, and checkpoints, which are its own but for two.
 * Kinds are those of QEMU 9.1 to 10.x, see rrlog/FORMAT.md. */
#define FIRST_ASYNC_KIND 3
#define LAST_ASYNC_KIND 9
#define LAST_SHUTDOWN_KIND 21
#define FIRST_CHECKPOINT_KIND 30
#define CHECKPOINT_WARP_ACCOUNT_KIND 31
#define CHECKPOINT_VIRTUAL_KIND 34

#define REPLAY_CLOCK_VIRTUAL_RT 1

#define READ_BUFFER (64u << 10)

int64_t ft_now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

int64_t ft_boot_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

bool ft_stream_init(size_t ring_size)
{
    ft.ring.size = ring_size;
    ft.ring.buf = malloc(ring_size);
    return ft.ring.buf != NULL;
}

void ft_ring_reset(uint64_t pos)
{
    ft.ring.head = ft.ring.tail = pos;
    ft.acked = ft.open_to = ft.doubt = ft.sent = pos;
    ft.flush = ft.ended = false;
    ft.full_since_ns = 0;
}

void ft_ring_copy(uint64_t pos, uint8_t *to, size_t len)
{
    size_t at = pos & (ft.ring.size - 1);
    size_t first = ft.ring.size - at < len ? ft.ring.size - at : len;

    memcpy(to, ft.ring.buf + at, first);
    memcpy(to + first, ft.ring.buf, len - first);
}

void ft_ring_put(const uint8_t *from, size_t len)
{
    size_t at = ft.ring.head & (ft.ring.size - 1);
    size_t first = ft.ring.size - at < len ? ft.ring.size - at : len;

    memcpy(ft.ring.buf + at, from, first);
    memcpy(ft.ring.buf, from + first, len - first);
    ft.ring.head += len;
}

/* How often the vCPU's time is looked at, the least pause that is worth a
 * system call, and the longest for which the main loop may be kept waiting. */
#define PACE_LOOK_NS INT64_C(200000)
#define PACE_LEAST_NS INT64_C(500000)
#define PACE_MOST_NS INT64_C(10000000)

/*
 * Makes the vCPU pause for a part of its time, so that a backup that is slower
 * does not fall behind. It holds the replay mutex here, as always while it
 * executes: for the main loop it is a vCPU that takes longer.
 */
static void pace(unsigned part, int64_t now)
{
    static int64_t looked_ns, used_ns, owed_ns;
    struct timespec t;
    int64_t used, pause;

    if (now - looked_ns < PACE_LOOK_NS) {
        return;
    }
    looked_ns = now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    used = t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
    owed_ns += (used - used_ns) * part / (1000 - part);
    used_ns = used;
    if (owed_ns < PACE_LEAST_NS) {
        return;
    }
    pause = owed_ns < PACE_MOST_NS ? owed_ns : PACE_MOST_NS;
    /* What one pause cannot make up for is forgotten. */
    owed_ns = 0;
    t = (struct timespec){ .tv_nsec = pause };
    nanosleep(&t, NULL);
}

/* Called by QEMU with the replay mutex held, in record mode. */
static ssize_t record_write(void *cookie, const char *buf, size_t size)
{
    size_t left = size;
    unsigned part;
    int64_t now;

    (void)cookie;
    pthread_mutex_lock(&ft.lock);
    now = ft_now_ns();
    while (left && ft.mode == FT_RECORD && !ft.ended) {
        size_t room = ft.ring.size - (ft.ring.head - ft.ring.tail);
        size_t n = left < room ? left : room;

        if (!n) {
            /* Flow control: the backup does not keep up or is gone. The
             * guest waits; the agent sees it in STATS. */
            if (!ft.full_since_ns) {
                ft.full_since_ns = now;
            }
            ft.flush = true;
            ft_wake_io();
            pthread_cond_wait(&ft.space, &ft.lock);
            now = ft_now_ns();
            continue;
        }
        ft.full_since_ns = 0;
        if (ft.sent == ft.ring.head) {
            ft_wake_io();
        }
        if (ft_in_vcpu) {
            ft_digest_logged((const uint8_t *)buf, size, now);
        }
        ft_ring_put((const uint8_t *)buf + size - left, n);
        left -= n;
    }
    ft.last_log_ns = now;
    part = ft.mode == FT_RECORD ? ft.pace : 0;
    pthread_mutex_unlock(&ft.lock);
    if (part && ft_in_vcpu) {
        pace(part, now);
    }
    return size;
}

static ssize_t null_write(void *cookie, const char *buf, size_t size)
{
    (void)cookie;
    (void)buf;
    return size;
}

/*
 * replay_finish() rewinds to write the file's header after the last event:
 * from there on nothing belongs to the log. It runs at exit, so the rest of
 * the log is given a moment to reach the agent.
 */
static int record_seek(void *cookie, off64_t *offset, int whence)
{
    (void)cookie;
    (void)whence;
    *offset = 0;
    pthread_mutex_lock(&ft.lock);
    if (ft.mode == FT_RECORD && !ft.ended) {
        struct timespec until;

        ft.ended = true;
        ft.flush = true;
        ft_wake_io();
        /* Not by the wall's clock, which may be set while this waits. */
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += 1;
        while (ft.connected && ft.sent != ft.ring.head &&
               pthread_cond_clockwait(&ft.space, &ft.lock, CLOCK_MONOTONIC,
                                      &until) == 0) {
        }
    }
    pthread_mutex_unlock(&ft.lock);
    return 0;
}

/* Consumes one byte run; the lock is held and data or promote is there. */
static ssize_t take(char *buf, size_t size)
{
    size_t have = ft.ring.head - ft.ring.tail;
    size_t n = size < have ? size : have;

    ft_ring_copy(ft.ring.tail, (uint8_t *)buf, n);
    ft.ring.tail += n;
    return n;
}

/*
 * Where in an event the reader is. What it reads is handed out byte by byte,
 * so that no byte of the next event hides in stdio, but for packets, which are
 * most of a log that has any.
 */
static struct {
    size_t count_left;  /* bytes of the count of instructions: QEMU has no
                         * unread event yet while it reads that */
    size_t header_left; /* bytes of a packet's header */
    size_t id_left;     /* bytes of the number of a request or bottom half */
    /* Whether a disk request has failed is to be found out: QEMU reads what
     * comes next, and only then completes the request. */
    enum { FINE, READS_ON, CHECK } disk;
    /* One has: the log stands still. */
    enum { GOES_ON, AT_KIND, AT_ID } stalled;
    bool block; /* it is the completion of a request */
    uint32_t packet_left;
} event;

/* What goes before what is left of the log, see retry.c: events of ours, and what
 * QEMU had read of the one that comes next. */
#define INSERTED_MOST 256
static struct {
    uint8_t bytes[(1 + ID_BYTES) * (INSERTED_MOST + 2)];
    size_t len, at;
} inserted;

/* Puts something before the rest of it. */
static bool insert(const uint8_t *bytes, size_t n)
{
    size_t rest = inserted.len - inserted.at;

    if (n > sizeof(inserted.bytes) - rest) {
        return false;
    }
    memmove(inserted.bytes + n, inserted.bytes + inserted.at, rest);
    memcpy(inserted.bytes, bytes, n);
    inserted.len = n + rest;
    inserted.at = 0;
    return true;
}

static size_t encode(uint8_t *to, uint8_t kind, uint64_t v, size_t bytes)
{
    *to++ = kind;
    for (size_t i = bytes; i--; ) {
        *to++ = (uint8_t)(v >> (8 * i));
    }
    return 1 + bytes;
}

/*
 * The VM is stopped, and nobody reads. The event that comes next is put back, as
 * far as it was read: the main loop, which runs on, would else take what is its
 * own, and do other than it does while the VM runs.
 */
void ft_replay_hold(void)
{
    struct q_replay_state *s = q.replay_state;
    uint8_t put_back[1 + ID_BYTES];
    size_t n;

    if (event.stalled == AT_KIND || !s->has_unread_data) {
        return;
    }
    if (s->data_kind == INSTRUCTION_KIND) {
        n = encode(put_back, INSTRUCTION_KIND, s->instruction_count,
                   INSTRUCTION_BYTES);
    } else if (event.stalled == GOES_ON && s->read_event_id != UINT64_MAX) {
        n = encode(put_back, s->data_kind, s->read_event_id, ID_BYTES);
    } else {
        n = encode(put_back, s->data_kind, 0, 0);
    }
    if (!insert(put_back, n)) {
        return;
    }
    s->data_kind = PLACEHOLDER_KIND;
    s->instruction_count = 0;
    s->read_event_id = UINT64_MAX;
    event.stalled = AT_KIND;
}

/*
 * Lets a log that stands still go on, after completions of disk requests, whose
 * numbers begin at id. Nobody reads now. false if they are too many.
 */
bool ft_replay_go_on(uint64_t id, unsigned count)
{
    uint8_t completions[(1 + ID_BYTES) * INSERTED_MOST];
    size_t n = 0;
    bool fits;

    if (event.stalled != AT_KIND) {
        return !count;
    }
    for (unsigned i = 0; i < count && i < INSERTED_MOST; i++) {
        n += encode(completions + n, FT_BLOCK_KIND, id + i, ID_BYTES);
    }
    fits = count <= INSERTED_MOST && insert(completions, n);
    event.stalled = GOES_ON;
    event.disk = FINE;
    q.replay_state->has_unread_data = false;
    q.replay_fetch_data_kind();
    return fits;
}

/* Whether the event that comes next is known, and is none that code which is being
 * executed takes for granted, such as the clock that it asks for. */
static bool may_wait(void)
{
    bool known = true;
    uint8_t kind = 0;

    if (inserted.at < inserted.len) {
        kind = inserted.bytes[inserted.at];
    } else {
        pthread_mutex_lock(&ft.lock);
        known = ft.ring.head != ft.ring.tail;
        if (known) {
            ft_ring_copy(ft.ring.tail, &kind, 1);
        }
        pthread_mutex_unlock(&ft.lock);
    }
    return known && (kind <= LAST_ASYNC_KIND || kind >= FIRST_CHECKPOINT_KIND);
}

/*
 * A disk request that failed stops the VM, but not at once. Until then the log
 * stands still, or the guest would see what the primary's did not: QEMU is given
 * an event, or a number of one, for which nothing is done.
 */
static bool stall(bool kind, char *buf)
{
    bool id = event.id_left == ID_BYTES && !kind;

    if (event.stalled == AT_ID) {
        *buf = (char)0xfe; /* a number that is none */
        return true;
    }
    if (event.disk != CHECK || event.count_left || (!kind && !id)) {
        return false;
    }
    if (!ft_disk_failed()) {
        event.disk = FINE;
        return false;
    }
    if (kind && !may_wait()) {
        return false;
    }
    event.stalled = kind ? AT_KIND : AT_ID;
    *buf = kind ? PLACEHOLDER_KIND : (char)0xfe;
    return true;
}

static size_t wanted(bool kind, size_t size)
{
    if (kind || event.count_left || event.header_left || !event.packet_left) {
        return 1;
    }
    return size < event.packet_left ? size : event.packet_left;
}

static void follow(bool kind, const uint8_t *buf, size_t n)
{
    if (kind) {
        if (event.disk == READS_ON) {
            event.disk = CHECK;
        }
        event.id_left = *buf == FT_BLOCK_KIND || *buf == BH_KIND ||
                        *buf == BH_ONESHOT_KIND ? ID_BYTES : 0;
        event.block = *buf == FT_BLOCK_KIND;
        event.count_left = *buf == INSTRUCTION_KIND ? INSTRUCTION_BYTES : 0;
        event.header_left = *buf == NET_KIND ? NET_HEADER_BYTES : 0;
        event.packet_left = 0;
    } else if (event.count_left) {
        event.count_left--;
    } else if (event.id_left) {
        event.id_left--;
        if (!event.id_left && event.block) {
            event.disk = READS_ON;
        }
    } else if (event.header_left) {
        /* The last four are the size. */
        event.header_left--;
        event.packet_left = event.packet_left << 8 | *buf;
    } else if (event.packet_left) {
        event.packet_left -= n;
    }
}

static bool for_main_loop(uint8_t kind)
{
    return (kind >= FIRST_ASYNC_KIND && kind <= LAST_SHUTDOWN_KIND) ||
           kind >= FIRST_CHECKPOINT_KIND;
}

/* What the vCPU's thread takes by itself before it executes anything else,
 * unless the vCPU is halted. Each change of threads that is spared counts. */
bool ft_for_vcpu(uint8_t kind)
{
    return ((kind >= FIRST_ASYNC_KIND && kind <= LAST_ASYNC_KIND) ||
            kind == CHECKPOINT_WARP_ACCOUNT_KIND ||
            kind == CHECKPOINT_VIRTUAL_KIND) &&
           !q.all_cpu_threads_idle();
}

/* Called by QEMU with the replay mutex held, in replay mode. */
static ssize_t replay_read(void *cookie, char *buf, size_t size)
{
    bool kind = !q.replay_state->has_unread_data && !event.count_left;
    ssize_t n;

    (void)cookie;
    if (stall(kind, buf)) {
        return 1;
    }
    pthread_mutex_lock(&ft.lock);
    if (!ft.loaded) {
        pthread_mutex_unlock(&ft.lock);
        *buf = PLACEHOLDER_KIND;
        return 1;
    }
    if (inserted.at < inserted.len) {
        pthread_mutex_unlock(&ft.lock);
        *buf = (char)inserted.bytes[inserted.at++];
        n = 1;
        goto given;
    }
    if (kind) {
        ft_digest_consumed();
    }
    while (ft.ring.head == ft.ring.tail && !ft.promote) {
        if (kind && ft.yielding) {
            ft.yielded = true;
            ft.starving = false;
            pthread_mutex_unlock(&ft.lock);
            *buf = PLACEHOLDER_KIND;
            return 1;
        }
        ft.starving = true;
        ft_wake_io();
        pthread_cond_wait(&ft.data, &ft.lock);
    }
    ft.starving = false;
    ft.progress_ns = ft_now_ns();
    ft.icount = q.replay_state->current_icount;
    if (ft.ring.head == ft.ring.tail) {
        /* The agent feeds whole events only, so the end is where the next
         * event's kind is read. */
        pthread_mutex_unlock(&ft.lock);
        ft_go_live();
        *buf = LAST_KIND;
        return 1;
    }
    n = take(buf, wanted(kind, size));
    pthread_mutex_unlock(&ft.lock);
given:
    follow(kind, (const uint8_t *)buf, n);
    if (kind && for_main_loop(*buf) && (ft_in_main || !ft_for_vcpu(*buf))) {
        /* It may sleep without a time limit, and nothing else wakes it: the
         * backup would lag, or at the end of the log never go live. */
        q.qemu_notify_event();
    }
    if (kind) {
        ft_loop_next(*buf);
    }
    return n;
}

/* replay_post_load() seeks to where the primary's file was: the load of the
 * state is at its "replay" section. */
static int replay_seek(void *cookie, off64_t *offset, int whence)
{
    (void)cookie;
    (void)whence;
    *offset = 0;
    return 0;
}

/* The VM starts: from here on the events are those of the log. Called in
 * vm_start, before any other handler of it. */
void ft_replay_begin(void)
{
    pthread_mutex_lock(&ft.lock);
    ft.loaded = true;
    ft.progress_ns = ft_now_ns();
    pthread_mutex_unlock(&ft.lock);
    q.replay_state->current_icount = q.replay_get_current_icount();
    q.replay_state->instruction_count = 0;
    q.replay_state->has_unread_data = false;
    q.replay_fetch_data_kind();
}

/*
 * Who waits for log does so in a read, and holds QEMU's locks: the main loop
 * stands still. From here on it gets the placeholder instead, for which nobody
 * does anything; so until ft_replay_return(). The lock is held.
 */
void ft_replay_yield(void)
{
    ft.yielding = true;
    ft_loop_wake();
    pthread_cond_broadcast(&ft.data);
}

static void fetch(void *opaque)
{
    bool yielded;

    (void)opaque;
    pthread_mutex_lock(&ft.lock);
    yielded = ft.yielded && !ft.yielding;
    if (yielded) {
        ft.yielded = false;
    }
    pthread_mutex_unlock(&ft.lock);
    if (yielded) {
        q.replay_state->has_unread_data = false;
        q.replay_fetch_data_kind();
    }
}

/* The lock is held. */
void ft_replay_return(void)
{
    ft.yielding = false;
    if (ft.yielded) {
        q.aio_bh_schedule_oneshot_full(ft.main_context, fetch, NULL,
                                       "ftvirt-fetch");
    }
}

FILE *ft_stream_open(bool read)
{
    cookie_io_functions_t io = {
        .read = read ? replay_read : NULL,
        .write = read ? NULL : record_write,
        .seek = read ? replay_seek : record_seek,
    };
    FILE *f = fopencookie(&ft, read ? "r" : "w", io);

    if (f) {
        /* A reader's buffer holds what replay_read() returns at once. */
        setvbuf(f, NULL, read ? _IOFBF : _IONBF, read ? READ_BUFFER : 0);
    }
    return f;
}

FILE *ft_stream_null(void)
{
    cookie_io_functions_t io = { .write = null_write, .seek = replay_seek };
    FILE *f = fopencookie(&ft, "w", io);

    if (f) {
        setvbuf(f, NULL, _IONBF, 0);
    }
    return f;
}

/*
 * In-place go-live, inside the read of the end of the log: the caller holds
 * the replay mutex, so that nobody else looks at the mode. Requests that wait
 * for their event in the log complete as this side's own from here on.
 */
void ft_go_live(void)
{
    int64_t logged = q.replay_state->cached_clock[REPLAY_CLOCK_VIRTUAL_RT];
    /* Not cpu_get_clock(): the log may end within a read of the clock, whose
     * seqlock the caller then holds for writing (icount_warp_rt). */
    int64_t lag = logged - q.cpu_get_clock_locked();
    FILE *null = ft_stream_null();

    if (lag > 0) {
        /* Otherwise virtual time would stand still until this host's clock
         * has caught up with the primary's. */
        __atomic_add_fetch(&q.timers_state->cpu_clock_offset, lag,
                           __ATOMIC_SEQ_CST);
    }
    /* The old stream is in use by the caller: it is left open. */
    *q.replay_file = null;
    *q.replay_mode = Q_REPLAY_RECORD;

    pthread_mutex_lock(&ft.lock);
    ft.mode = FT_LIVE;
    ft.promote = false;
    ft_send_state("the log is consumed");
    pthread_mutex_unlock(&ft.lock);
    ft_announce();
    q.qemu_notify_event();
}
