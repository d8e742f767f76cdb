/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent's side of the plugin: one thread that keeps a unix-socket
 * connection to the agent, ships the log and obeys. PROTOCOL.md has the
 * frames. The thread takes no lock of QEMU, so that it answers however QEMU
 * is blocked.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"

#define PROTOCOL 1
#define HEADER 5
#define MS INT64_C(1000000)

enum frame {
    HELLO = 1, LOG, STATE, CONSUMED, STATS, DIVERGED, ERROR, DIGEST, MEMORY, LOOKED,
    BLOCKS = 32, STAGED, APPLIED,
    WELCOME = 64, ARM, DISARM, ACK, FEED, PROMOTE, OPEN, IDLE, CONFIG, PACE, CHECK, HOLD, LOOK,
};

/* Log bytes per frame, and how long a lone byte may wait for company. */
#define LOG_CHUNK (64u << 10)
#define COALESCE_NS (15 * MS)
#define STATS_NS (100 * MS)
#define CONSUMED_NS (10 * MS)
#define RECONNECT_MS 100
/* EVENT_CHECKPOINT + CHECKPOINT_RESET_REQUESTED, and for how long it must be
 * the next event before nobody else can have asked for it. */
#define RESET_REQUESTED_KIND 32
#define RESET_NS (20 * MS)

#define OUT_MAX (512u << 10)

/* Only the io thread touches these, but for out, which the lock guards. What
 * leaves is out of before: nobody waits for the lock while it is sent. */
static struct {
    int fd;
    bool greeted; /* the first bytes of the connection have left */
    uint8_t in[HEADER + FT_FRAME_MAX];
    size_t in_len;
    uint8_t buffers[2][OUT_MAX];
    uint8_t *out, *leaving;
    size_t out_len, leaving_len, left_len;
    uint64_t reported;
    int64_t stats_ns, consumed_ns, unsent_ns, looked_ns;
} io = { .fd = -1, .out = io.buffers[0], .leaving = io.buffers[1] };

void ft_wake_io(void)
{
    uint64_t one = 1;

    if (__atomic_exchange_n(&ft.woken, true, __ATOMIC_ACQ_REL)) {
        return; /* it has not looked since */
    }
    if (write(ft.wake_fd, &one, sizeof(one)) < 0) {
        /* It is full of wake-ups already. */
    }
}

static uint8_t *put(uint8_t *p, uint64_t v, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--) {
        *p++ = (uint8_t)(v >> (8 * i));
    }
    return p;
}

uint64_t ft_get(const uint8_t *p, int bytes)
{
    uint64_t v = 0;

    for (int i = 0; i < bytes; i++) {
        v = v << 8 | p[i];
    }
    return v;
}

/* Starts a frame in out; the lock is held. NULL if the agent does not read. */
static uint8_t *frame(enum frame type, size_t len)
{
    uint8_t *p = io.out + io.out_len;

    if (io.fd < 0 || io.out_len + HEADER + len > OUT_MAX) {
        return NULL;
    }
    io.out_len += HEADER + len;
    p = put(p, len, 4);
    return put(p, type, 1);
}

void ft_send_state(const char *text)
{
    size_t len = strnlen(text, 200);
    uint8_t *p;

    /* Each change of the mode comes by here. */
    ft_veto(ft.mode);
    if (!ft.connected || !(p = frame(STATE, 42 + len))) {
        return;
    }
    p = put(p, ft.mode, 1);
    p = put(p, ft.running, 1);
    p = put(p, ft.epoch, 8);
    p = put(p, ft.mode == FT_REPLAY ? ft.ring.tail : ft.ring.head, 8);
    p = put(p, q.timers_state->qemu_icount, 8);
    p = put(p, ft.pause_ns, 8);
    p = put(p, ft.gate_dropped, 8);
    memcpy(p, text, len);
    ft_wake_io();
}

/* Tells that the VM stands still, and why: the agent is to know a copy that was
 * paused, as by a disk without room, from one that runs. The lock is held. */
void ft_send_stopped(void)
{
    static const char *const names[] = {
        [Q_RUN_STATE_IO_ERROR] = "io-error",
        [Q_RUN_STATE_PAUSED] = "paused",
        [Q_RUN_STATE_WATCHDOG] = "watchdog",
        [Q_RUN_STATE_GUEST_PANICKED] = "guest-panicked",
    };
    const size_t known = sizeof(names) / sizeof(names[0]);
    char text[40] = "stopped";
    unsigned state = ft.stop_state;

    if (state < known && names[state]) {
        snprintf(text, sizeof(text), "stopped: %s", names[state]);
    }
    ft_send_state(text);
}

void ft_send_digest(uint64_t pos, uint64_t icount, uint64_t hash)
{
    uint8_t *p = ft.connected ? frame(DIGEST, 8 * 3) : NULL;

    if (p) {
        p = put(p, pos, 8);
        p = put(p, icount, 8);
        put(p, hash, 8);
    }
}

/* Waits for room; false if the agent does not wait for it any more. */
bool ft_send_memory(uint64_t id, const char *name, uint64_t size, uint64_t from,
                    const uint8_t *hashes, size_t len)
{
    size_t name_len = strlen(name);
    uint8_t *p = NULL;
    bool waited_for;

    pthread_mutex_lock(&ft.lock);
    while ((waited_for = ft.connected && ft.look == id) &&
           !(p = frame(MEMORY, 8 * 3 + 1 + name_len + len))) {
        pthread_cond_wait(&ft.room, &ft.lock);
    }
    if (waited_for) {
        p = put(p, id, 8);
        p = put(p, size, 8);
        p = put(p, from, 8);
        p = put(p, name_len, 1);
        memcpy(p, name, name_len);
        memcpy(p + name_len, hashes, len);
    }
    pthread_mutex_unlock(&ft.lock);
    ft_wake_io();
    return waited_for;
}

/* The lock is held. */
void ft_send_looked(uint64_t id, uint64_t icount, unsigned flags,
                    const uint64_t registers[FT_REGISTERS])
{
    uint8_t *p = NULL;

    while (ft.connected && ft.look == id &&
           !(p = frame(LOOKED, 8 * 3 + 1 + 8 * FT_REGISTERS))) {
        pthread_cond_wait(&ft.room, &ft.lock);
    }
    if (!p) {
        return;
    }
    p = put(p, id, 8);
    p = put(p, ft.mode == FT_REPLAY ? ft.ring.tail : ft.ring.head, 8);
    p = put(p, icount, 8);
    p = put(p, flags, 1);
    for (int i = 0; i < FT_REGISTERS; i++) {
        p = put(p, registers[i], 8);
    }
    ft.look = 0;
    ft_wake_io();
}

/* What a checkpoint is made of, and how the staging lies. */
void ft_send_blocks(void)
{
    size_t len = 8 * 4;
    uint8_t *p;

    for (unsigned i = 0; i < ck.count; i++) {
        len += 8 + 1 + strlen(ck.blocks[i].name);
    }
    if (!ft.connected || !(p = frame(BLOCKS, len))) {
        return;
    }
    p = put(p, ck.stage_size, 8);
    p = put(p, ck.table_at, 8);
    p = put(p, ck.device_at, 8);
    p = put(p, ck.pages_at, 8);
    for (unsigned i = 0; i < ck.count; i++) {
        size_t n = strlen(ck.blocks[i].name);

        p = put(p, ck.blocks[i].pages, 8);
        p = put(p, n, 1);
        memcpy(p, ck.blocks[i].name, n);
        p += n;
    }
    ft_wake_io();
}

void ft_send_staged(void)
{
    uint8_t *p = ft.connected ? frame(STAGED, 8 * 9 + 1) : NULL;

    if (!p) {
        return;
    }
    p = put(p, ck.last.number, 8);
    p = put(p, ck.last.pages, 8);
    p = put(p, ck.last.device, 8);
    p = put(p, ck.last.left, 8);
    p = put(p, ck.last.running, 1);
    p = put(p, ck.last.stop_ns, 8);
    p = put(p, ck.last.drain_ns, 8);
    p = put(p, ck.last.copy_ns, 8);
    p = put(p, ck.last.device_ns, 8);
    put(p, ck.last.resume_ns, 8);
    ft_wake_io();
}

void ft_send_applied(uint64_t number)
{
    uint8_t *p = ft.connected ? frame(APPLIED, 8) : NULL;

    if (p) {
        put(p, number, 8);
        ft_wake_io();
    }
}

static void send_error(enum frame to, const char *text)
{
    size_t len = strnlen(text, 200);
    uint8_t *p = frame(ERROR, 1 + len);

    if (p) {
        p = put(p, to, 1);
        memcpy(p, text, len);
    }
}

static void send_hello(void)
{
    uint8_t *p = frame(HELLO, 2 + 1 + 1 + 16 + 8 * 4 + 4 + 3 + 4 +
                       strlen(FTVIRT_VERSION));

    if (!p) {
        return;
    }
    p = put(p, PROTOCOL, 2);
    p = put(p, ft.backup, 1);
    p = put(p, ft.mode, 1);
    memcpy(p, ft.uuid, 16);
    p = put(p + 16, ft.epoch, 8);
    p = put(p, ft.checkpoints ? ft.acked : ft.ring.tail, 8);
    p = put(p, ft.checkpoints ? ck.number : ft.ring.head, 8);
    p = put(p, q.timers_state->qemu_icount, 8);
    p = put(p, getpid(), 4);
    p = put(p, ft.qemu_major, 1);
    p = put(p, ft.qemu_minor, 1);
    p = put(p, ft.qemu_micro, 1);
    p = put(p, FT_FEED_WINDOW, 4);
    memcpy(p, FTVIRT_VERSION, strlen(FTVIRT_VERSION));
}

static void send_stats(void)
{
    uint8_t *p = frame(STATS, 8 * (9 + FT_GATE_DELAYS));

    if (!p) {
        return;
    }
    p = put(p, ft.acked, 8);
    p = put(p, ft.ring.head, 8);
    p = put(p, q.timers_state->qemu_icount, 8);
    p = put(p, ft.gate_count, 8);
    p = put(p, ft.gate_released, 8);
    p = put(p, ft.gate_dropped, 8);
    p = put(p, ft.gate_delay_ns, 8);
    p = put(p, ft.gate_delay_max_ns, 8);
    p = put(p, ft.full_since_ns ? ft_now_ns() - ft.full_since_ns : 0, 8);
    for (int i = 0; i < FT_GATE_DELAYS; i++) {
        p = put(p, ft.gate_delays[i], 8);
    }
    ft.gate_delay_max_ns = 0;
}

static void send_consumed(void)
{
    uint8_t *p = frame(CONSUMED, 8 * 3 + 1);

    if (!p) {
        return;
    }
    p = put(p, ft.ring.tail, 8);
    p = put(p, ft.ring.head, 8);
    p = put(p, q.timers_state->qemu_icount, 8);
    put(p, ft.starving | ft.loaded << 1 | ft.running << 2, 1);
    io.reported = ft.ring.tail;
}

/* Moves unsent log into out. */
static void send_log(int64_t now)
{
    while (ft.sent < ft.ring.head) {
        size_t len = ft.ring.head - ft.sent;
        uint8_t *p;

        if (!ft.flush && len < LOG_CHUNK) {
            if (!io.unsent_ns) {
                io.unsent_ns = now;
            }
            if (now - io.unsent_ns < COALESCE_NS) {
                return;
            }
        }
        if (len > LOG_CHUNK) {
            len = LOG_CHUNK;
        }
        if (io.out_len + HEADER + 8 + len > OUT_MAX / 2) {
            return;
        }
        if (!(p = frame(LOG, 8 + len))) {
            return;
        }
        p = put(p, ft.sent, 8);
        ft_ring_copy(ft.sent, p, len);
        ft.sent += len;
        io.unsent_ns = 0;
    }
    ft.flush = false;
    if (ft.ended) {
        pthread_cond_broadcast(&ft.space);
    }
}

/* Milliseconds until what is unsent has waited long enough. */
static int until_sent(int64_t now)
{
    int64_t left = io.unsent_ns ? COALESCE_NS - (now - io.unsent_ns) : 0;

    return left > 0 ? left / MS + 1 : 1;
}

static void watch_divergence(int64_t now)
{
    uint64_t icount = q.timers_state->qemu_icount;
    uint8_t *p;

    if (icount != ft.progress_icount || !ft.running || !ft.loaded ||
        ft.starving || ft.yielded || ft.ring.head == ft.ring.tail) {
        ft.progress_icount = icount;
        ft.progress_ns = now;
        return;
    }
    if (ft.diverged || now - ft.progress_ns < ft.diverge_ns) {
        return;
    }
    ft.diverged = true;
    p = frame(DIVERGED, 8 * 2 + 4 * 2);
    if (p) {
        p = put(p, ft.ring.tail, 8);
        p = put(p, icount, 8);
        p = put(p, q.replay_state->data_kind, 4);
        put(p, q.replay_state->instruction_count, 4);
    }
}

/* A reset that the guest did not ask for itself, as of 'virsh reset', has to be
 * asked for here as well: the log only tells when it is due. */
static bool reset_is_due(int64_t now)
{
    return ft.loaded && ft.running && q.replay_state->has_unread_data &&
           q.replay_state->data_kind == RESET_REQUESTED_KIND &&
           now - ft.progress_ns >= RESET_NS;
}

static const char *take_ack(const uint8_t *p, size_t len)
{
    uint64_t pos;
    int64_t now;

    if (len != 8) {
        return "ACK is 8 bytes";
    }
    pos = ft_get(p, 8);
    if ((ft.mode != FT_RECORD && ft.mode != FT_CHECKPOINT) || pos <= ft.acked) {
        return NULL;
    }
    if (pos > (ft.checkpoints ? ck.number : ft.sent)) {
        return "ACK of what was not sent";
    }
    now = ft_boot_ns();
    if (now - io.looked_ns > FT_SILENCE_NS) {
        ft.doubt = ft.checkpoints ? ck.number : ft.ring.head;
    }
    ft.acked = pos;
    if (ft.checkpoints) {
        ck_acked();
    } else {
        ft.ring.tail = pos;
        pthread_cond_broadcast(&ft.space);
    }
    if (pos <= ft.doubt) {
        return NULL;
    }
    ft.open_to = pos;
    ft.open_ns = now;
    if (ft.gate_head && ft.gate_head->pos <= pos) {
        pthread_cond_signal(&ft.gate);
    }
    return NULL;
}

static const char *take_welcome(const uint8_t *p, size_t len)
{
    uint64_t resume;

    if (len != 18 || ft_get(p, 2) != PROTOCOL) {
        return "WELCOME is 18 bytes, of protocol 1";
    }
    resume = ft_get(p + 10, 8);
    if (ft.backup && !ft.epoch) {
        ft.epoch = ft_get(p + 2, 8);
    }
    if (ft.mode == FT_RECORD) {
        if (ft_get(p + 2, 8) != ft.epoch) {
            return "WELCOME of another epoch";
        }
        if (resume < ft.ring.tail || resume > ft.ring.head) {
            return "WELCOME resumes where there is no log";
        }
        ft.acked = ft.open_to = ft.ring.tail = ft.sent = resume;
        ft.open_ns = ft_boot_ns();
        pthread_cond_broadcast(&ft.space);
        pthread_cond_broadcast(&ft.gate);
    }
    ft.connected = true;
    if (ft.started && !ft.running) {
        ft_send_stopped(); /* this agent has not heard of it */
    }
    if (ft.checkpoints) {
        ck_welcomed();
    }
    return NULL;
}

static const char *take_feed(const uint8_t *p, size_t len)
{
    if (ft.mode != FT_REPLAY || ft.promote) {
        return "FEED to a plugin that does not replay";
    }
    if (len < 8 || ft_get(p, 8) != ft.ring.head) {
        return "FEED leaves a gap";
    }
    if (len - 8 > ft.ring.size - (ft.ring.head - ft.ring.tail)) {
        return "FEED is over the window";
    }
    ft_ring_put(p + 8, len - 8);
    pthread_cond_broadcast(&ft.data);
    return NULL;
}

/* Obeys one frame; the lock is held. An error ends the connection. */
static const char *take(enum frame type, const uint8_t *p, size_t len)
{
    uint64_t epoch = len == 8 ? ft_get(p, 8) : 0;

    if (!ft.connected && type != WELCOME) {
        return "the first frame must be WELCOME";
    }
    switch (type) {
    case WELCOME:
        return take_welcome(p, len);
    case ACK:
        return take_ack(p, len);
    case FEED:
        return take_feed(p, len);
    case ARM:
        if (ft.mode != FT_IDLE || !epoch || epoch <= ft.epoch) {
            send_error(type, "only an idle VM can begin a newer epoch");
            return NULL;
        }
        ft.arm = true;
        ft.arm_epoch = epoch;
        return NULL;
    case DISARM:
        ft.arm = false;
        return NULL;
    case PROMOTE:
        if ((ft.mode != FT_REPLAY && ft.mode != FT_STANDBY) || !ft.loaded || epoch != ft.epoch) {
            send_error(type, "only a loaded backup of this epoch goes live");
            return NULL;
        }
        if (ft.checkpoints) {
            ck_promote();
            return NULL;
        }
        ft.promote = true;
        ft.look = 0; /* what looks at this VM has to stop now */
        ft_replay_return();
        ft_loop_wake();
        pthread_cond_broadcast(&ft.data);
        return NULL;
    case OPEN:
        if ((ft.mode != FT_RECORD && ft.mode != FT_CHECKPOINT) || epoch != ft.epoch) {
            send_error(type, "only a primary of this epoch goes on alone");
            return NULL;
        }
        ft_mode_open();
        return NULL;
    case IDLE:
        if (ft.checkpoints) {
            ck_schedule_idle();
        } else {
            ft_mode_schedule_idle();
        }
        return NULL;
    case CONFIG:
        if (len != 8) {
            return "CONFIG is 8 bytes";
        }
        ft.diverge_ns = ft_get(p, 4) * MS;
        ft.tick_ns = ft_get(p + 4, 4) * MS;
        return NULL;
    case CHECK:
        if (len != 8) {
            return "CHECK is 8 bytes";
        }
        ft_digest_check(ft_get(p, 8));
        return NULL;
    case HOLD:
        if (len != 4) {
            return "HOLD is 4 bytes";
        }
        if (ft_get(p, 4) && ft.mode != FT_RECORD) {
            send_error(type, "only a primary is held");
            return NULL;
        }
        ft.hold = ft_get(p, 4) != 0;
        ft.hold_until_ns = ft_now_ns() + (int64_t)ft_get(p, 4) * MS;
        return NULL;
    case LOOK:
        if (len != 12 || ft_get(p + 8, 4) < FT_LOOK_CHUNK_MIN) {
            return "LOOK is 12 bytes, for chunks of 4 KiB at least";
        }
        ft.look = ft_get(p, 8);
        pthread_cond_broadcast(&ft.room);
        if (!ft.look) {
            ft_replay_return();
            return NULL;
        }
        if (ft.mode == FT_REPLAY) {
            ft_replay_yield();
        }
        ft_look(ft.look, ft_get(p + 8, 4));
        return NULL;
    case PACE:
        if (len != 2 || ft_get(p, 2) > FT_PACE_MOST) {
            return "PACE is 2 bytes, at most 900";
        }
        ft.pace = ft_get(p, 2);
        if (ft.checkpoints) {
            ck_pace(ft.pace);
        }
        return NULL;
    default:
        if (ft.checkpoints) {
            const char *why = ck_take(type, p, len);

            if (why) {
                send_error(type, why);
            }
            return NULL;
        }
        return "unknown frame";
    }
}

static void disconnect(const char *why)
{
    if (why) {
        ft_report("agent: %s", why);
    }
    close(io.fd);
    pthread_mutex_lock(&ft.lock);
    io.fd = -1;
    io.in_len = io.out_len = io.leaving_len = io.left_len = 0;
    ft.connected = false;
    ft.look = 0;
    ft_replay_return();
    pthread_cond_broadcast(&ft.room);
    if (ft.ended) {
        pthread_cond_broadcast(&ft.space);
    }
    pthread_mutex_unlock(&ft.lock);
}

static bool connect_agent(void)
{
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    memcpy(to.sun_path, ft.socket_path, sizeof(to.sun_path));
    if (fd < 0) {
        return false;
    }
    if (connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
        close(fd);
        return false;
    }
    pthread_mutex_lock(&ft.lock);
    io.fd = fd;
    io.greeted = false;
    send_hello();
    pthread_mutex_unlock(&ft.lock);
    return true;
}

static bool receive(void)
{
    for (;;) {
        ssize_t n = recv(io.fd, io.in + io.in_len, sizeof(io.in) - io.in_len, 0);
        const char *why = NULL;
        size_t at = 0;

        if (n <= 0) {
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
                return true;
            }
            disconnect(NULL);
            return false;
        }
        io.in_len += n;
        pthread_mutex_lock(&ft.lock);
        while (!why && io.in_len - at >= HEADER) {
            size_t len = ft_get(io.in + at, 4);

            if (len > FT_FRAME_MAX) {
                why = "frame too long";
            } else if (io.in_len - at < HEADER + len) {
                break;
            } else {
                why = take(io.in[at + 4], io.in + at + HEADER, len);
                at += HEADER + len;
            }
        }
        pthread_mutex_unlock(&ft.lock);
        if (why) {
            disconnect(why);
            return false;
        }
        memmove(io.in, io.in + at, io.in_len - at);
        io.in_len -= at;
    }
}

/* What is due by the clock; returns milliseconds until the next look. */
static int housekeeping(void)
{
    int64_t now = ft_now_ns();
    bool tick = false, reset = false, running;
    int wait = 200;

    pthread_mutex_lock(&ft.lock);
    io.looked_ns = ft_boot_ns();
    running = ft.running;
    if (ft.mode == FT_RECORD) {
        if (ft.connected) {
            if (now - io.stats_ns >= STATS_NS) {
                send_stats();
                io.stats_ns = now;
            }
            send_log(now);
        }
        /* An idle guest logs nothing; the backup, which waits for the log
         * holding QEMU's locks, would not answer its monitor. */
        tick = now - ft.last_log_ns >= ft.tick_ns;
        wait = ft.connected && ft.sent < ft.ring.head ? until_sent(now) : 20;
    } else if (ft.mode == FT_REPLAY) {
        watch_divergence(now);
        reset = reset_is_due(now);
        if (ft.connected && now - io.consumed_ns >= CONSUMED_NS &&
            (io.reported != ft.ring.tail || now - io.consumed_ns >= STATS_NS)) {
            send_consumed();
            io.consumed_ns = now;
        }
        wait = 10;
    }
    if (ft_hold_due(now)) {
        wait = 2;
    }
    pthread_mutex_unlock(&ft.lock);
    if (tick && running) {
        q.qemu_notify_event();
    } else if (tick) {
        ft_mode_schedule_tick();
    }
    if (reset) {
        ft_mode_schedule_reset();
    }
    return wait;
}

/* With the first bytes of a connection goes the staging of checkpoints. */
static ssize_t send_some(uint8_t *from, size_t len)
{
    struct iovec iov = { from, len };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } with = { 0 };

    if (ft.checkpoints && !io.greeted) {
        m.msg_control = &with;
        m.msg_controllen = sizeof(with.room);
        with.header.cmsg_level = SOL_SOCKET;
        with.header.cmsg_type = SCM_RIGHTS;
        with.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&with.header), &ck.fd, sizeof(int));
    }
    return sendmsg(io.fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static bool transmit(void)
{
    ssize_t n;

    if (io.left_len == io.leaving_len) {
        uint8_t *sent = io.leaving;

        pthread_mutex_lock(&ft.lock);
        io.leaving = io.out;
        io.leaving_len = io.out_len;
        io.left_len = 0;
        io.out = sent;
        io.out_len = 0;
        pthread_cond_broadcast(&ft.room);
        pthread_mutex_unlock(&ft.lock);
    }
    if (!io.leaving_len) {
        return true;
    }
    n = send_some(io.leaving + io.left_len, io.leaving_len - io.left_len);
    if (n > 0) {
        io.left_len += n;
        io.greeted = true;
    }
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
        disconnect(strerror(errno));
        return false;
    }
    return true;
}

static void *io_thread(void *unused)
{
    (void)unused;
    for (;;) {
        int wait = housekeeping();
        struct pollfd fds[2];
        uint64_t wakes;

        if (io.fd < 0 && !connect_agent() && wait > RECONNECT_MS) {
            wait = RECONNECT_MS;
        }
        if (io.fd >= 0 && !transmit()) {
            continue;
        }
        fds[0] = (struct pollfd){ .fd = ft.wake_fd, .events = POLLIN };
        fds[1] = (struct pollfd){ .fd = io.fd, .events = POLLIN };
        pthread_mutex_lock(&ft.lock);
        if (io.out_len || io.left_len < io.leaving_len) {
            fds[1].events |= POLLOUT;
        }
        pthread_mutex_unlock(&ft.lock);
        if (poll(fds, 2, wait) < 0 && errno != EINTR) {
            ft_report("poll: %s", strerror(errno));
        }
        if (fds[0].revents && read(ft.wake_fd, &wakes, sizeof(wakes)) < 0) {
            /* Somebody else's wake-up was counted in. */
        }
        /* Who wants something from here on wakes again. */
        __atomic_store_n(&ft.woken, false, __ATOMIC_RELEASE);
        if (io.fd >= 0 && fds[1].revents & (POLLIN | POLLHUP | POLLERR)) {
            receive();
        }
    }
    return NULL;
}

bool ft_control_init(void)
{
    ft.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return ft.wake_fd >= 0 && ft_thread(io_thread, "ftvirt-io");
}
