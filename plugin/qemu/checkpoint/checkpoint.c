/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Checkpoints: when one is taken, and how. One thread decides; what needs the
 * main loop is done in a bottom half of it, while the thread waits. One checkpoint
 * is under way at a time: the next is taken when the agent says that the backup
 * holds the last, until when the staging is its.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "checkpoint.h"

#define MS INT64_C(1000000)
#define SECOND INT64_C(1000000000)
/* The least that a rate is made of. */
#define RATE_NS (1 * MS)

struct ck_state ck = {
    .fd = -1,
    .least_ns = 1 * MS,
    .most_ns = 100 * MS,
    .watermark = 2048,
};

struct q_checkpoint_symbols qc;

/* The next number that an output or a write of the guest belongs to is in the
 * staging, so that the agent finds it without a question. */
static void publish(uint64_t number)
{
    struct ck_stage_header *h = (void *)ck.stage;

    __atomic_store_n(&h->running, number + 1, __ATOMIC_RELEASE);
}

/* Runs f in the main loop and waits for its end; the lock is held. */
static void in_main_loop(void (*f)(void *), const char *name)
{
    ck.done = false;
    q.aio_bh_schedule_oneshot_full(ft.main_context, f, NULL, name);
    while (!ck.done) {
        pthread_cond_wait(&ck.over, &ft.lock);
    }
}

static void done(void)
{
    pthread_mutex_lock(&ft.lock);
    ck.done = true;
    pthread_cond_signal(&ck.over);
    pthread_mutex_unlock(&ft.lock);
}

static void begin(void *opaque)
{
    (void)opaque;
    ck.error = ck_memory_begin(!ft.backup);
    done();
}

static void end(void *opaque)
{
    (void)opaque;
    ck_memory_end();
    qc.cpu_throttle_stop();
    done();
}

/*
 * The stop. QEMU's own vm_stop would flush disks and tell libvirt, forty times a
 * second; this is what matters of it. QEMU must believe that it does not run:
 * some devices abort if they are saved otherwise.
 */
static void take(void *opaque)
{
    struct ck_staged s = { 0 };
    int64_t at[6];

    (void)opaque;
    ck.error = ck_memory_same();
    if (ck.error) {
        done();
        return;
    }
    s.running = q.runstate_is_running();
    at[0] = ft_now_ns();
    if (s.running) {
        ck.in_stop = true;
        ck_clock_before();
        q.runstate_set(Q_RUN_STATE_FINISH_MIGRATE);
        qc.cpu_disable_ticks();
        q.pause_all_vcpus();
        qc.vm_state_notify(false, Q_RUN_STATE_FINISH_MIGRATE);
    }
    at[1] = ft_now_ns();
    q.bdrv_drain_all();
    at[2] = ft_now_ns();
    ck_memory_snapshot(false);
    s.pages = ck_memory_copy(UINT64_MAX, false, &s.left);
    at[3] = ft_now_ns();
    ck.error = ck_state_save(&s.device);
    at[4] = ft_now_ns();

    pthread_mutex_lock(&ft.lock);
    if (!ck.error) {
        s.number = ++ck.number;
        ck.wanted = false;
        publish(s.number);
    }
    pthread_mutex_unlock(&ft.lock);

    if (s.running) {
        q.runstate_set(Q_RUN_STATE_RUNNING);
        qc.vm_state_notify(true, Q_RUN_STATE_RUNNING);
        qc.cpu_enable_ticks();
        ck_clock_after();
        qc.resume_all_vcpus();
        ck.in_stop = false;
    }
    at[5] = ft_now_ns();
    s.stop_ns = at[1] - at[0];
    s.drain_ns = at[2] - at[1];
    s.copy_ns = at[3] - at[2];
    s.device_ns = at[4] - at[3];
    s.resume_ns = at[5] - at[4];

    pthread_mutex_lock(&ft.lock);
    if (!ck.error) {
        int64_t interval = ck.taken_ns ? at[5] - ck.taken_ns : 0;

        ck.rate = s.number > 1 && interval > RATE_NS ? s.pages * SECOND / (uint64_t)interval : 0;
        ck.taken_ns = at[5];
        ck.last = s;
        ft.pause_ns = at[5] - at[0];
    }
    pthread_mutex_unlock(&ft.lock);
    done();
}

static void go_live(void *opaque)
{
    (void)opaque;
    ck.error = ck_state_load();
    if (!ck.error) {
        pthread_mutex_lock(&ft.lock);
        ft.mode = FT_LIVE;
        pthread_mutex_unlock(&ft.lock);
        if (ck.device_runs) {
            q.vm_start();
        }
        ft_announce();
    }
    done();
}

/* A checkpoint that cannot be taken ends the method here: the gate stays shut,
 * the guest runs, and the agent asks the arbiter. The lock is held. */
static void fail(const char *what)
{
    char text[200];

    snprintf(text, sizeof(text), "%s%s", what, ck.error ? ck.error : "?");
    ft_report("%s", text);
    ft_send_state(text);
}

static void do_begin(void)
{
    ck.begin = false;
    in_main_loop(begin, "ftvirt-begin");
    if (ck.error) {
        fail("not cloned: ");
        return;
    }
    ck.number = ft.acked = ft.open_to = ft.doubt = 0;
    ck.wanted = ck.first = ck.round = ck.apply = false;
    ck.taken_ns = 0;
    ck.rate = 0;
    publish(0);
    ft.mode = ft.backup ? FT_STANDBY : FT_CHECKPOINT;
    ft_send_blocks();
    ft_send_state("begun");
}

static void do_round(void)
{
    struct ck_staged s = { .running = ft.running };

    ck.round = false;
    pthread_mutex_unlock(&ft.lock);
    s.pages = 0;
    /* What the last round left, before what was written meanwhile. */
    s.pages = ck_memory_copy(CK_ROUND_PAGES, true, &s.left);
    if (!s.pages) {
        ck_memory_snapshot(true);
        s.pages = ck_memory_copy(CK_ROUND_PAGES, true, &s.left);
    }
    pthread_mutex_lock(&ft.lock);
    ck.last = s;
    ft_send_staged();
}

static void do_take(void)
{
    ck.first = false;
    in_main_loop(take, "ftvirt-checkpoint");
    if (ck.error) {
        fail(ck.number ? "no checkpoint: " : "not cloned: ");
        return;
    }
    ft_send_staged();
    if (ck.number == 1) {
        ft_send_state("cloned");
    }
}

static void do_apply(void)
{
    struct ck_staged s = ck.applying;
    uint8_t *device = NULL;
    const char *why;

    ck.apply = false;
    pthread_mutex_unlock(&ft.lock);
    if (s.number && s.device <= CK_DEVICE_MAX) {
        device = malloc(s.device + 1);
    }
    why = s.number && !device ? "no room for the state of devices" : ck_memory_apply(&s);
    if (!why && device) {
        memcpy(device, ck.stage + ck.device_at, s.device);
    }
    if (!why) {
        ck_stage_trim(s.pages);
    }
    pthread_mutex_lock(&ft.lock);
    if (why) {
        /* Memory may be of neither checkpoint: this is no backup any more. */
        free(device);
        ck.number = 0;
        ck.error = why;
        fail("not applied: ");
        return;
    }
    if (device) {
        free(ck.device);
        ck.device = device;
        ck.device_len = s.device;
        ck.device_runs = s.running;
        ck.number = s.number;
        ft.loaded = true;
    }
    ft_send_applied(s.number);
}

static void do_promote(void)
{
    ck.promote = false;
    in_main_loop(go_live, "ftvirt-live");
    if (ck.error) {
        fail("not live: ");
    } else {
        ft_send_state("live");
    }
}

/* When the next checkpoint is due; the lock is held. */
static int64_t due(void)
{
    int64_t at;

    if (ck.number != ft.acked) {
        return INT64_MAX; /* its acknowledgement wakes this thread */
    }
    if (ck.wanted) {
        return ck.taken_ns + ck.least_ns;
    }
    if (!ft.running) {
        return INT64_MAX;
    }
    at = ck.most_ns;
    if (ck.rate) {
        int64_t full = (int64_t)(ck.watermark * (uint64_t)SECOND / ck.rate);

        at = full < at ? full : at;
        at = at > ck.least_ns ? at : ck.least_ns;
    }
    return ck.taken_ns + at;
}

static void wait_until(int64_t at)
{
    struct timespec t = { .tv_sec = at / SECOND, .tv_nsec = at % SECOND };

    if (at == INT64_MAX) {
        pthread_cond_wait(&ck.work, &ft.lock);
    } else {
        pthread_cond_timedwait(&ck.work, &ft.lock, &t);
    }
}

static void *thread(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&ft.lock);
    for (;;) {
        if (ck.begin) {
            do_begin();
        } else if (ck.round && ft.mode == FT_CHECKPOINT && !ck.number) {
            do_round();
        } else if (ck.apply && ft.mode == FT_STANDBY) {
            do_apply();
        } else if (ck.promote && ft.mode == FT_STANDBY) {
            do_promote();
        } else if (ck.tracking && ft.mode != FT_CHECKPOINT) {
            in_main_loop(end, "ftvirt-end");
        } else if (ft.mode == FT_CHECKPOINT && (ck.first || ck.number)) {
            int64_t at = ck.first ? 0 : due();

            if (ck.error) {
                at = INT64_MAX;
            }
            if (at > ft_now_ns()) {
                wait_until(at);
            } else {
                do_take();
            }
        } else {
            wait_until(INT64_MAX);
        }
    }
    return NULL;
}

/* An output waits; the lock is held. */
void ck_wanted(void)
{
    if (!ck.wanted) {
        ck.wanted = true;
        pthread_cond_signal(&ck.work);
    }
}

/* The backup holds the newest checkpoint; the lock is held. */
void ck_acked(void)
{
    ck_stage_trim(ck.last.pages);
    pthread_cond_signal(&ck.work);
}

/* The connection is new: what it had not been told is told again. */
void ck_welcomed(void)
{
    if (!ck.stage || (ft.mode != FT_CHECKPOINT && ft.mode != FT_STANDBY)) {
        return;
    }
    ft_send_blocks();
    if (ft.mode == FT_CHECKPOINT && ck.number > ft.acked) {
        ft_send_staged();
    }
}

void ck_promote(void)
{
    ck.promote = true;
    pthread_cond_signal(&ck.work);
}

/* Leaves FT_CHECKPOINT or FT_LIVE; the lock is held. */
void ck_schedule_idle(void)
{
    if (ft.mode == FT_CHECKPOINT || ft.mode == FT_LIVE) {
        ft.mode = FT_IDLE;
        ft_send_state("idle");
        pthread_cond_signal(&ck.work);
        pthread_cond_broadcast(&ft.gate);
    }
}

static void starting(void *opaque, bool running, int state)
{
    (void)opaque;
    (void)state;
    if (!running || ck.in_stop) {
        return;
    }
    pthread_mutex_lock(&ft.lock);
    ft.running = true;
    ft.started = true;
    if (ft.mode == FT_BOOT) {
        ft.mode = FT_IDLE;
    }
    ck_wanted();
    ft_send_state("running");
    pthread_mutex_unlock(&ft.lock);
}

static void stopping(void *opaque, bool running, int state)
{
    (void)opaque;
    if (running || ck.in_stop) {
        return;
    }
    pthread_mutex_lock(&ft.lock);
    ft.running = false;
    ft.stop_state = state;
    ck_wanted();
    ft_send_stopped();
    pthread_mutex_unlock(&ft.lock);
}

static bool resolve(const char **why)
{
    static char text[128];
    const char *missing = NULL;

#define X(ret, name, args, use) \
    if (!missing && !(*(void **)&qc.name = dlsym(RTLD_DEFAULT, #name))) { \
        missing = #name; \
    }
    CK_FUNCTIONS(X)
#undef X
#define X(type, name, use) \
    if (!missing && !(*(void **)&qc.name = dlsym(RTLD_DEFAULT, #name))) { \
        missing = #name; \
    }
    CK_VARIABLES(X)
#undef X
    if (missing) {
        snprintf(text, sizeof(text), "this QEMU does not export %s", missing);
        *why = text;
    }
    return !missing;
}

bool ck_init(const char **why)
{
    pthread_condattr_t monotonic;

    if (!resolve(why)) {
        return false;
    }
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&ck.work, &monotonic);
    pthread_cond_init(&ck.over, NULL);
    ck.fd = memfd_create("ftvirt", MFD_CLOEXEC);
    if (ck.fd < 0) {
        *why = strerror(errno);
        return false;
    }
    if (ft.backup) {
        ft.mode = FT_STANDBY;
    }
    q.qemu_add_vm_change_state_handler_prio(starting, NULL, INT_MIN);
    q.qemu_add_vm_change_state_handler_prio(stopping, NULL, INT_MAX);
    if (!ft_thread(thread, "ftvirt-ckpt")) {
        *why = "no thread";
        return false;
    }
    return true;
}

/* Obeys a frame of this method; the lock is held. What is returned refuses it. */
const char *ck_take(int type, const uint8_t *p, size_t len)
{
    switch (type) {
    case CK_BEGIN:
        if (len != 8 || (ft.mode != FT_IDLE && ft.mode != FT_STANDBY) || ft_get(p, 8) < ft.epoch ||
            (!ft.backup && ft_get(p, 8) == ft.epoch)) {
            return "only an idle VM can begin a newer epoch";
        }
        ft.epoch = ft_get(p, 8);
        ck.begin = true;
        ck.error = NULL;
        break;
    case CK_ROUND:
        if (ft.mode != FT_CHECKPOINT || ck.number) {
            return "rounds are before the first checkpoint";
        }
        ck.round = true;
        break;
    case CK_FIRST:
        if (ft.mode != FT_CHECKPOINT || ck.number) {
            return "the first checkpoint is taken once";
        }
        ck.first = true;
        break;
    case CK_SCHEDULE:
        if (len != 12 || !ft_get(p, 4) || ft_get(p, 4) > ft_get(p + 4, 4) || !ft_get(p + 8, 4)) {
            return "the least interval is above 0 and not above the longest, the watermark above 0";
        }
        ck.least_ns = (int64_t)ft_get(p, 4) * 1000;
        ck.most_ns = (int64_t)ft_get(p + 4, 4) * 1000;
        ck.watermark = ft_get(p + 8, 4);
        break;
    case CK_APPLY:
        if (len != 25 || ft.mode != FT_STANDBY || ck.apply || !ck.stage) {
            return "only a backup applies, one after the other";
        }
        ck.applying = (struct ck_staged){
            .number = ft_get(p, 8), .pages = ft_get(p + 8, 8), .device = ft_get(p + 16, 8), .running = p[24],
        };
        if (ck.applying.number ? ck.applying.number <= ck.number || !ck.applying.device : ck.number) {
            return "an older checkpoint, or a round after the first";
        }
        ck.apply = true;
        break;
    default:
        return "unknown frame";
    }
    pthread_cond_signal(&ck.work);
    return NULL;
}

/* Thousandths of their time that the vCPUs are to pause; the lock is held. */
static void pace(void *opaque)
{
    unsigned thousandths = (unsigned)(uintptr_t)opaque;

    if (thousandths >= 10) {
        qc.cpu_throttle_set((int)(thousandths / 10));
    } else {
        qc.cpu_throttle_stop();
    }
}

void ck_pace(unsigned thousandths)
{
    q.aio_bh_schedule_oneshot_full(ft.main_context, pace, (void *)(uintptr_t)thousandths, "ftvirt-pace");
}
