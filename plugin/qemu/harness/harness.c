/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's stream, gate and connection outside of QEMU, for sanitizers: the
 * true sources with a QEMU of a few functions, an agent on a socket, and the
 * threads that QEMU would have. 'make -C plugin/qemu sanitize' runs it.
 *
 * Judged are, beside what the sanitizers see: the log arrives whole and in
 * order over connections that break; no packet leaves before the log up to it
 * was acknowledged, none is reordered, altered or lost without being counted;
 * a log that is fed is read back, and its end goes live only when promoted; and
 * garbage ends a connection and nothing else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../ftvirt.h"

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);

#define EPOCH 7
#define LOG_BYTES (16u << 20)
#define GARBAGE 1200

enum { LOG = 2, STATE = 3, CONSUMED = 4, ACK = 67, FEED = 68, PROMOTE = 69,
       OPEN = 70, CONFIG = 72 };

#define CHECK(what)                                                        \
    do {                                                                   \
        if (!(what)) {                                                     \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            abort();                                                       \
        }                                                                  \
    } while (0)

/* ---- a QEMU of a few functions ------------------------------------------ */

struct q_symbols q;
__thread bool ft_in_main, ft_in_vcpu;

static struct q_replay_state replay_state;
static struct q_timers_state timers_state;
static int replay_mode_value;
static FILE *replay_file_value;
static struct q_netfilter_class filter_replay, filter_buffer;
static struct q_netfilter_state filter;
static pthread_mutex_t bql = PTHREAD_MUTEX_INITIALIZER;
static int announced;

/* What left, judged by the thread that lets it go. */
static struct {
    pthread_mutex_t lock;
    uint64_t acked; /* by the agent, at least */
    uint64_t left, last;
    bool open;
} out = { .lock = PTHREAD_MUTEX_INITIALIZER };

static uint64_t icount(void) { return 0; }
static bool no(void) { return false; }
static void nothing(void) { }
static int64_t clock_0(void) { return 0; }
static void lock_bql(const char *file, int line)
{
    (void)file;
    (void)line;
    pthread_mutex_lock(&bql);
}
static void unlock_bql(void) { pthread_mutex_unlock(&bql); }
static void *class_by_name(const char *name)
{
    return strcmp(name, "filter-replay") ? &filter_buffer : &filter_replay;
}
static ssize_t filter_next(void *nf, void *sender, unsigned flags,
                           const void *iov, int n, void *sent)
{
    (void)nf;
    (void)sender;
    (void)flags;
    (void)iov;
    (void)n;
    (void)sent;
    return 0;
}
static void method(void) { }

struct packet {
    uint64_t number, pos, sum;
    uint8_t rest[1400];
};

static ssize_t pass(void *sender, unsigned flags, const void *iov, int n,
                    void *nf)
{
    const struct iovec *v = iov;
    struct packet p;

    CHECK(sender == &out && nf == &filter && flags == 3 && n == 1);
    CHECK(v->iov_len >= offsetof(struct packet, rest) &&
          v->iov_len <= sizeof(p));
    memcpy(&p, v->iov_base, v->iov_len);
    CHECK(p.sum == (p.number ^ p.pos ^ v->iov_len));
    pthread_mutex_lock(&out.lock);
    CHECK(out.open || p.pos <= out.acked);
    CHECK(p.number > out.last);
    out.last = p.number;
    out.left++;
    pthread_mutex_unlock(&out.lock);
    return v->iov_len;
}

static void bh(void *ctx, void (*f)(void *), void *opaque, const char *name)
{
    (void)ctx;
    (void)name;
    f(opaque);
}
static void *context(void) { return &bql; }

bool ft_check(const char **why)
{
    q = (struct q_symbols){
        .replay_get_current_icount = icount, .replay_mutex_locked = no,
        .replay_save_instructions = nothing, .replay_fetch_data_kind = nothing,
        .qemu_notify_event = nothing, .cpu_get_clock_locked = clock_0,
        .bql_lock_impl = lock_bql, .bql_unlock = unlock_bql,
        .iohandler_get_aio_context = context, .aio_bh_schedule_oneshot_full = bh,
        .object_class_by_name = class_by_name,
        .qemu_netfilter_pass_to_next = pass, .replay_state = &replay_state,
        .timers_state = &timers_state, .replay_mode = &replay_mode_value,
        .replay_file = &replay_file_value, .all_cpu_threads_idle = no,
    };
    filter_replay.receive_iov = filter_next;
    filter_replay.handle_event = filter_buffer.handle_event = method;
    filter_buffer.receive_iov = filter_next;
    filter_buffer.setup = filter_buffer.cleanup = method;
    return ft_gate_init(why);
}

void ft_mode_init(void) { }
void ft_mode_schedule_idle(void) { }
void ft_mode_schedule_reset(void) { }
void ft_mode_schedule_tick(void) { }
void ft_mode_open(void)
{
    ft.mode = FT_LIVE;
    pthread_mutex_lock(&out.lock);
    out.open = true;
    pthread_mutex_unlock(&out.lock);
    pthread_cond_broadcast(&ft.gate);
    pthread_cond_broadcast(&ft.space);
}
void ft_announce(void) { announced++; }
void ft_power_init(void) { }
bool ft_disk_failed(void) { return false; }
bool ft_zeros(const uint8_t *at, size_t len) { (void)at; (void)len; return false; }
void ft_veto(enum ft_mode mode) { (void)mode; }
void ft_digest_logged(const uint8_t *buf, size_t size, int64_t now)
{
    (void)buf;
    (void)size;
    (void)now;
}
void ft_digest_check(uint64_t pos) { (void)pos; }
void ft_digest_consumed(void) { }
void ft_loop_next(uint8_t kind) { (void)kind; }
void ft_loop_wake(void) { }
bool ft_hold_due(int64_t now) { (void)now; return false; }
void ft_look(uint64_t id, uint32_t chunk) { (void)id; (void)chunk; }

/* ---- the agent ------------------------------------------------------------ */

static int listener, agent = -1;
static uint8_t frame_buf[5 + FT_FRAME_MAX];

static uint64_t get(const uint8_t *p, int bytes)
{
    uint64_t v = 0;

    while (bytes--) {
        v = v << 8 | *p++;
    }
    return v;
}

static uint8_t *put(uint8_t *p, uint64_t v, int bytes)
{
    while (bytes--) {
        *p++ = (uint8_t)(v >> (8 * bytes));
    }
    return p;
}

/* False once the plugin has hung up. */
static bool say(uint8_t type, const void *payload, size_t len)
{
    uint8_t head[5];
    struct iovec iov[] = { { head, 5 }, { (void *)payload, len } };
    struct msghdr m = { .msg_iov = iov, .msg_iovlen = 2 };

    put(put(head, len, 4), type, 1);
    return sendmsg(agent, &m, MSG_NOSIGNAL) == (ssize_t)(5 + len);
}

static bool all(void *to, size_t len)
{
    return recv(agent, to, len, MSG_WAITALL) == (ssize_t)len;
}

/* The next frame, its payload in frame_buf; 0 once the plugin has hung up. */
static uint8_t hear(size_t *len)
{
    uint8_t head[5];

    if (!all(head, 5)) {
        return 0;
    }
    *len = get(head, 4);
    CHECK(*len <= FT_FRAME_MAX);
    return !*len || all(frame_buf, *len) ? head[4] : 0;
}

/* Takes the plugin's connection and its HELLO; what the log holds is told. */
static void greet(uint64_t *tail, uint64_t *head)
{
    size_t len;

    if (agent >= 0) {
        close(agent);
    }
    agent = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(agent >= 0 && hear(&len) == 1 && len >= 60);
    *tail = get(frame_buf + 28, 8);
    *head = get(frame_buf + 36, 8);
}

static bool welcome(uint64_t resume)
{
    uint8_t b[18];

    put(put(put(b, 1, 2), EPOCH, 8), resume, 8);
    return say(64, b, sizeof(b));
}

static bool say_number(uint8_t type, uint64_t v)
{
    uint8_t b[8];

    put(b, v, 8);
    return say(type, b, sizeof(b));
}

static uint8_t byte_at(uint64_t pos) { return (uint8_t)(pos * 2654435761u >> 13); }

/* ---- the tests ------------------------------------------------------------- */

static unsigned seed = 1;

static unsigned any(unsigned below) { return (unsigned)rand_r(&seed) % below; }

static volatile bool logged;

/* QEMU's vCPU thread: the log, in pieces as QEMU writes it. */
static void *vcpu(void *unused)
{
    FILE *f = ft_stream_open(false);
    uint8_t piece[4096];
    unsigned own = 99;
    uint64_t pos = 0;

    (void)unused;
    CHECK(f);
    ft_in_vcpu = true;
    while (pos < LOG_BYTES) {
        size_t n = 1 + (unsigned)rand_r(&own) % (rand_r(&own) % 16 ? 32 : sizeof(piece));

        for (size_t i = 0; i < n; i++) {
            piece[i] = byte_at(pos + i);
        }
        CHECK(fwrite(piece, 1, n, f) == n);
        pos += n;
    }
    fclose(f);
    __atomic_store_n(&logged, true, __ATOMIC_SEQ_CST);
    return NULL;
}

static uint64_t packets;

/* QEMU's main loop: packets, one after the other. */
static void *main_loop(void *unused)
{
    unsigned own = 7;

    (void)unused;
    while (!__atomic_load_n(&logged, __ATOMIC_SEQ_CST)) {
        struct packet p = { .number = ++packets };
        size_t len = offsetof(struct packet, rest) + (unsigned)rand_r(&own) % 1400;
        struct iovec iov[2];
        struct timespec pause = { .tv_nsec = 20000 };

        pthread_mutex_lock(&ft.lock);
        p.pos = ft.ring.head; /* it may only grow until the gate has it */
        pthread_mutex_unlock(&ft.lock);
        p.sum = p.number ^ p.pos ^ len;
        iov[0] = (struct iovec){ &p, 10 };
        iov[1] = (struct iovec){ (uint8_t *)&p + 10, len - 10 };
        pthread_mutex_lock(&bql);
        CHECK(filter_replay.receive_iov(&filter, &out, 3, iov, 2, NULL) == (ssize_t)len);
        pthread_mutex_unlock(&bql);
        nanosleep(&pause, NULL);
    }
    return NULL;
}

/* A primary, whose agent comes and goes. */
static void test_record(void)
{
    uint64_t tail, head, have = 0, connections = 1;
    pthread_t threads[2];
    size_t len;

    pthread_mutex_lock(&ft.lock);
    ft_ring_reset(0);
    ft.epoch = EPOCH;
    ft.mode = FT_RECORD;
    ft.running = true;
    pthread_mutex_unlock(&ft.lock);
    greet(&tail, &head);
    CHECK(welcome(0));
    CHECK(pthread_create(&threads[0], NULL, vcpu, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, main_loop, NULL) == 0);
    while (have < LOG_BYTES) {
        uint8_t type = any(25) ? hear(&len) : 0;

        if (!type) {
            shutdown(agent, SHUT_RDWR);
            greet(&tail, &head);
            CHECK(tail <= have && have <= head);
            connections++;
            pthread_mutex_lock(&out.lock);
            out.acked = have;
            pthread_mutex_unlock(&out.lock);
            /* The connection may break once more. */
            (void)welcome(have);
            continue;
        }
        if (type == LOG) {
            CHECK(get(frame_buf, 8) == have);
            for (size_t i = 8; i < len; i++) {
                CHECK(frame_buf[i] == byte_at(have + i - 8));
            }
            have += len - 8;
        }
        /* At each STATS as well: the log may be full of what was sent. */
        if (any(3) || type != LOG) {
            pthread_mutex_lock(&out.lock);
            out.acked = have;
            pthread_mutex_unlock(&out.lock);
            say_number(ACK, have);
        }
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    /* What the last ack let go leaves by itself; the rest with OPEN. */
    say_number(OPEN, EPOCH);
    for (int tries = 0;; tries++) {
        struct timespec pause = { .tv_nsec = 5000000 };
        uint64_t queued, left, dropped;

        pthread_mutex_lock(&ft.lock);
        queued = ft.gate_count;
        dropped = ft.gate_dropped;
        pthread_mutex_unlock(&ft.lock);
        pthread_mutex_lock(&out.lock);
        left = out.left;
        pthread_mutex_unlock(&out.lock);
        if (!queued && left + dropped == packets) {
            break;
        }
        CHECK(tries < 2000);
        nanosleep(&pause, NULL);
    }
    printf("record: %u bytes over %llu connections, %llu of %llu packets left\n",
           LOG_BYTES, (unsigned long long)connections,
           (unsigned long long)out.left, (unsigned long long)packets);
    CHECK(connections > 3 && out.left > 20);
}

static uint64_t replayed;

/* QEMU's vCPU thread on a backup. */
static void *reader(void *unused)
{
    FILE *f = ft_stream_open(true);
    uint8_t b[512];

    (void)unused;
    CHECK(f);
    /* As QEMU reads: an event's kind, where the log may end, and the rest. */
    for (;;) {
        int kind = fgetc(f);
        size_t rest = replayed * 7 % sizeof(b);
        bool live;

        pthread_mutex_lock(&ft.lock);
        live = ft.mode == FT_LIVE;
        pthread_mutex_unlock(&ft.lock);
        if (live) {
            CHECK(kind == 1 && replayed == LOG_BYTES && announced == 1);
            return NULL;
        }
        CHECK(kind == byte_at(replayed));
        replayed++;
        if (rest > LOG_BYTES - replayed) {
            rest = LOG_BYTES - replayed;
        }
        CHECK(fread(b, 1, rest, f) == rest);
        for (size_t i = 0; i < rest; i++, replayed++) {
            CHECK(b[i] == byte_at(replayed));
        }
    }
}

/* A backup that is fed, and promoted at the end. */
static void test_replay(void)
{
    uint64_t fed = 0, consumed = 0, tail, head;
    pthread_t thread;
    size_t len;

    shutdown(agent, SHUT_RDWR);
    pthread_mutex_lock(&ft.lock);
    ft_ring_reset(0);
    ft.mode = FT_REPLAY;
    ft.loaded = true;
    ft.promote = false;
    pthread_mutex_unlock(&ft.lock);
    greet(&tail, &head);
    CHECK(welcome(0));
    CHECK(pthread_create(&thread, NULL, reader, NULL) == 0);
    while (consumed < LOG_BYTES) {
        uint8_t b[8 + 65536];
        size_t n = 1 + any(65536);

        if (n > LOG_BYTES - fed) {
            n = LOG_BYTES - fed;
        }
        if (n && fed + n <= consumed + FT_FEED_WINDOW) {
            put(b, fed, 8);
            for (size_t i = 0; i < n; i++) {
                b[8 + i] = byte_at(fed + i);
            }
            CHECK(say(FEED, b, 8 + n));
            fed += n;
            continue;
        }
        switch (hear(&len)) {
        case 0:
            CHECK(!"the plugin hung up");
        case CONSUMED:
            CHECK(get(frame_buf, 8) >= consumed && get(frame_buf, 8) <= fed);
            consumed = get(frame_buf, 8);
        }
    }
    CHECK(say_number(PROMOTE, EPOCH + 1)); /* is refused */
    CHECK(say_number(PROMOTE, EPOCH));
    CHECK(pthread_join(thread, NULL) == 0);
    printf("replay: %u bytes, live at the end\n", LOG_BYTES);
}

/* An agent that says anything. The plugin hangs up at most, and comes again. */
static void test_garbage(void)
{
    uint64_t tail, head;
    uint8_t b[600];

    for (int round = 0; round < GARBAGE / 40; round++) {
        shutdown(agent, SHUT_RDWR);
        greet(&tail, &head);
        if (any(8)) {
            welcome(0);
        }
        for (int i = 0; i < 40; i++) {
            /* IDLE and below are asked of QEMU, which is not there. */
            uint8_t type = (uint8_t)(any(2) ? 60 + any(20) : any(256));
            size_t n = any(2) ? 8 : any(sizeof(b));

            for (size_t k = 0; k < n; k++) {
                b[k] = any(3) ? (uint8_t)any(256) : 0;
            }
            if (!say(type, b, n)) {
                break;
            }
        }
        if (!any(4)) {
            put(b, FT_FRAME_MAX + 1 + any(1u << 30), 4);
            send(agent, b, 5, MSG_NOSIGNAL);
        }
    }
    printf("garbage: %d frames\n", GARBAGE);
}

int main(void)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    char dir[] = "/tmp/ftvirt-harness-XXXXXX", socket_arg[120], uuid[64] =
        "uuid=01234567-89ab-cdef-0123-456789abcdef", ring[] = "ring=4194304";
    char *argv[] = { socket_arg, uuid, ring };

    setlinebuf(stdout);
    alarm(60); /* whatever hangs is a failure */
    CHECK(mkdtemp(dir));
    snprintf(at.sun_path, sizeof(at.sun_path), "%s/agent", dir);
    snprintf(socket_arg, sizeof(socket_arg), "socket=%s", at.sun_path);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(listener >= 0 && !bind(listener, (struct sockaddr *)&at, sizeof(at)) &&
          !listen(listener, 4));
    CHECK(qemu_plugin_install(0, NULL, 3, argv) == 0);
    test_record();
    test_replay();
    test_garbage();
    unlink(at.sun_path);
    rmdir(dir);
    /* Its threads are for ever, as in QEMU. */
    fflush(stdout);
    _exit(0);
}
