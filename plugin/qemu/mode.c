/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Modes of the VM. They change while the VM is stopped, in the vCPU thread at
 * the one place where it holds neither the replay mutex nor waits for it; a
 * change under its feet would leave the mutex locked for ever. The exception
 * is go-live, which happens inside a read (stream.c).
 */
#include <string.h>

#include "checkpoint/checkpoint.h"

#define MAX_NICS 64
/* include/hw/virtio/virtio.h: VIRTIO_QUEUE_MAX */
#define VIRTIO_QUEUES 1024

static void *first_cpu(void)
{
    return *q.cpus_queue;
}

static int mark_chardev(void *chr, void *opaque)
{
    const char *id = q.object_get_canonical_path_component(chr);

    (void)opaque;
    if (id && (!strncmp(id, "charserial", 10) ||
               !strncmp(id, "charparallel", 12))) {
        q.qemu_chr_set_feature(chr, Q_CHAR_FEATURE_REPLAY);
        q.replay_register_char_driver(chr);
    }
    return 0;
}

/* QEMU records only chardevs made by -serial; libvirt makes them by -chardev.
 * Their order, by name in a hash, must be the same on both sides: they are
 * registered in the order of object_child_foreach, which is by insertion
 * into equal tables, from equal command lines. */
static void mark_chardevs(void)
{
    void *all = q.object_resolve_path("/chardevs", NULL);

    if (all) {
        q.object_child_foreach(all, mark_chardev, NULL);
    }
}

static int invalidate_used(void *obj, void *opaque)
{
    (void)opaque;
    if (q.object_dynamic_cast(obj, "virtio-device")) {
        for (int n = 0; n < VIRTIO_QUEUES; n++) {
            q.virtio_queue_invalidate_signalled_used(obj, n);
        }
    }
    return 0;
}

__thread bool ft_in_vcpu, ft_in_main;

/* Runs in the vCPU thread with the BQL held. */
static void flip(void *cpu, uint64_t mode)
{
    ft_in_vcpu = true;
    *q.replay_mode = (int)mode;
    q.tlb_flush(cpu);
}

/* Leaves record or live; the caller is the main loop, the VM is stopped. */
static void leave_record(void)
{
    FILE *old = *q.replay_file;

    q.replay_finish_events();
    q.bdrv_drain_all();
    pthread_mutex_lock(&ft.lock);
    ft.mode = FT_IDLE;
    pthread_cond_broadcast(&ft.space);
    pthread_mutex_unlock(&ft.lock);
    *q.replay_file = ft_stream_null();
    if (old) {
        fclose(old);
    }
    q.replay_mutex_unlock();
    q.run_on_cpu(first_cpu(), flip, Q_REPLAY_NONE);
    ft_gate_release();
}

/*
 * idle -> record, after the state of the stopped VM went to the backup. From
 * here to the end of vm_start nothing may happen that is not in the log and
 * not in the state.
 */
static const char *enter_record(void)
{
    void *ncs[MAX_NICS];
    FILE *log;
    int n;

    q.qemu_clock_enable(Q_CLOCK_VIRTUAL, true);
    if (q.qemu_clock_deadline_ns_all(Q_CLOCK_VIRTUAL, Q_TIMER_ATTR_ALL) !=
        ft.deadline_at_stop) {
        return "a timer of the guest ran while it was stopped";
    }
    log = ft_stream_open(false);
    if (!log) {
        return "out of memory";
    }
    pthread_mutex_lock(&ft.lock);
    ft.epoch = ft.arm_epoch;
    ft.arm = false;
    ft_ring_reset(0);
    ft.mode = FT_RECORD;
    ft.pace = 0;
    ft.last_log_ns = ft_now_ns();
    pthread_mutex_unlock(&ft.lock);

    q.run_on_cpu(first_cpu(), flip, Q_REPLAY_RECORD);
    q.bql_unlock();
    q.replay_mutex_lock();
    q_bql_lock();

    if (*q.replay_file) {
        fclose(*q.replay_file);
    }
    *q.replay_file = log;
    q.replay_state->current_icount = q.replay_get_current_icount();
    q.replay_enable_events();
    q.object_child_foreach_recursive(q.object_resolve_path("/machine", NULL),
                                     invalidate_used, NULL);
    /* What came in while the VM was stopped and waits in a NIC's queue was
     * not recorded. From here on it goes through the filter. */
    n = q.qemu_find_net_clients_except(NULL, ncs, Q_NET_CLIENT_DRIVER_NIC,
                                       MAX_NICS);
    for (int i = 0; i < n && i < MAX_NICS; i++) {
        q.qemu_purge_queued_packets(ncs[i]);
    }
    return NULL;
}

static void cont(void)
{
    void *err = NULL;

    q.qmp_cont(&err);
    if (err) {
        ft_report("cannot resume: %s", q.error_get_pretty(err));
        pthread_mutex_lock(&ft.lock);
        ft_send_state(q.error_get_pretty(err));
        pthread_mutex_unlock(&ft.lock);
        q.error_free(err);
    }
}

/* Tells the agent whether the VM records, and for how long it stood still. */
static void report_clone(const char *why)
{
    char text[160] = "cloned";

    if (why) {
        snprintf(text, sizeof(text), "not cloned: %s", why);
        ft_report("%s", text);
    }
    pthread_mutex_lock(&ft.lock);
    ft.pause_ns = ft_now_ns() - ft.stopped_ns;
    ft.arm = false;
    ft_send_state(text);
    pthread_mutex_unlock(&ft.lock);
}

/* The migration that clones this VM has ended, in the main loop. */
static int migration_ended(struct q_notifier *n, void *data, void **errp)
{
    int event = *(int *)data;
    const char *why;
    bool armed;

    (void)n;
    (void)errp;
    pthread_mutex_lock(&ft.lock);
    armed = ft.arm && ft.mode == FT_IDLE;
    if (event == Q_MIG_EVENT_PRECOPY_FAILED) {
        ft.arm = false;
    }
    pthread_mutex_unlock(&ft.lock);
    if (event != Q_MIG_EVENT_PRECOPY_DONE || !armed) {
        return 0;
    }
    why = enter_record();
    cont();
    report_clone(why);
    return 0;
}

/* Logs the end of a group of input events, of which there are none. */
static void log_nothing(void)
{
    q.replay_add_input_sync_event();
    q.replay_async_events();
}

/*
 * What is queued for the devices of a primary that has just been stopped is
 * done as if it still ran, before they are told: a network card would put its
 * work off until it runs again, and a packet would wait or be lost, but the
 * backup, which does not stop, cannot know. The instructions are logged with
 * it: the backup is to come to where this one stands, and a stopped VM may log
 * nothing else for a long time.
 */
static void finish_queued(int state)
{
    /* The states that a VM leaves again to run; from any other QEMU aborts. */
    bool resumable = state == Q_RUN_STATE_PAUSED ||
                     state == Q_RUN_STATE_IO_ERROR ||
                     state == Q_RUN_STATE_WATCHDOG ||
                     state == Q_RUN_STATE_GUEST_PANICKED;

    if (resumable) {
        q.runstate_set(Q_RUN_STATE_RUNNING);
        /* Events, and the end of the guest's idle time: the timer of that would
         * go on logging, and at its end do nothing here, but not there. */
        q.icount_account_warp_timer();
    } else {
        q.replay_async_events();
    }
    /* The backup lets an event happen when it has seen the next one. */
    log_nothing();
    if (resumable) {
        q.runstate_set(state);
    }
}

/*
 * The VM has stopped; called before all other handlers. Timers that are due
 * now must run before the state is saved: QEMU runs them a moment later in
 * the stopped primary (its vCPU thread enables the clock again at any kick),
 * after the state was saved, and then the backup runs them once more.
 */
static void stopped(int state)
{
    ft.stopped_ns = ft_now_ns();
    if (*q.replay_mode == Q_REPLAY_RECORD && q.replay_mutex_locked()) {
        finish_queued(state);
    }
    if (*q.replay_mode == Q_REPLAY_PLAY && state == Q_RUN_STATE_IO_ERROR &&
        q.replay_mutex_locked()) {
        ft_replay_hold();
    }
    if (*q.replay_mode != Q_REPLAY_NONE) {
        return;
    }
    q.qemu_clock_enable(Q_CLOCK_VIRTUAL, true);
    q.qemu_clock_run_timers(Q_CLOCK_VIRTUAL);
    q.qemu_clock_run_timers(Q_CLOCK_VIRTUAL_RT);
    ft.deadline_at_stop =
        q.qemu_clock_deadline_ns_all(Q_CLOCK_VIRTUAL, Q_TIMER_ATTR_ALL);
    q.qemu_clock_enable(Q_CLOCK_VIRTUAL, false);
    /* Saved with the state: what the backup counts from. */
    q.replay_state->current_icount = q.replay_get_current_icount();
    q.replay_state->instruction_count = 0;
    q.replay_state->has_unread_data = false;
}

static void first_start(void)
{
    mark_chardevs();
    ft_digest_find_vcpu(first_cpu());
    ft_loop_init();
    if (ft.backup) {
        return;
    }
    /* The main loop holds the replay mutex; the vCPU thread has not begun. */
    q.replay_finish_events();
    if (q.replay_mutex_locked()) {
        q.replay_mutex_unlock();
    }
    *q.replay_mode = Q_REPLAY_NONE;
    pthread_mutex_lock(&ft.lock);
    ft.mode = FT_IDLE;
    ft_send_state("started");
    pthread_mutex_unlock(&ft.lock);
}

/* First of all handlers when the VM starts, priority INT_MIN. */
static void starting(void *opaque, bool running, int state)
{
    (void)opaque;
    (void)state;
    if (!running) {
        return;
    }
    if (!ft.started) {
        ft.started = true;
        first_start();
        if (ft.backup) {
            ft_replay_begin();
        }
    }
    pthread_mutex_lock(&ft.lock);
    ft.running = true;
    ft.progress_ns = ft_now_ns();
    ft_send_state("running");
    pthread_mutex_unlock(&ft.lock);
}

/* First of all handlers when the VM stops, last when it starts, priority
 * INT_MAX. */
static void stopping(void *opaque, bool running, int state)
{
    (void)opaque;
    if (running) {
        ft_retry();
        return;
    }
    stopped(state);
    pthread_mutex_lock(&ft.lock);
    ft.running = false;
    ft.stop_state = state;
    ft_send_stopped();
    pthread_mutex_unlock(&ft.lock);
}

static void go_idle(void *opaque)
{
    bool running = q.runstate_is_running();
    enum ft_mode mode;

    (void)opaque;
    pthread_mutex_lock(&ft.lock);
    mode = ft.mode;
    pthread_mutex_unlock(&ft.lock);
    if (mode != FT_RECORD && mode != FT_LIVE) {
        return;
    }
    if (running) {
        q.vm_stop(Q_RUN_STATE_PAUSED);
    }
    leave_record();
    if (running) {
        q.vm_start();
    }
    pthread_mutex_lock(&ft.lock);
    ft_send_state("idle");
    pthread_mutex_unlock(&ft.lock);
}

/* The backup is lost and the arbiter was won: outputs pass, the log ends.
 * The lock is held. */
void ft_mode_open(void)
{
    if (ft.mode == FT_CHECKPOINT) {
        ft.mode = FT_LIVE;
        ck_acked(); /* wakes who ends the checkpoints */
        ft_send_state("goes on alone");
    }
    if (ft.mode == FT_RECORD) {
        ft.mode = FT_LIVE;
        ft.sent = ft.acked = ft.open_to = ft.ring.tail = ft.ring.head;
        pthread_cond_broadcast(&ft.space);
        ft_send_state("goes on alone");
    }
    pthread_cond_broadcast(&ft.gate);
}

void ft_mode_schedule_idle(void)
{
    q.aio_bh_schedule_oneshot_full(ft.main_context, go_idle, NULL, "ftvirt-idle");
}

/* QEMU tells whether requests are in flight only of nodes that take no new
 * ones. */
void ft_disks_quiesce(void)
{
    for (void *bs = q.bdrv_next_node(NULL); bs; bs = q.bdrv_next_node(bs)) {
        q.bdrv_do_drained_begin_quiesce(bs, NULL);
    }
}

void ft_disks_resume(void)
{
    for (void *bs = q.bdrv_next_node(NULL); bs; bs = q.bdrv_next_node(bs)) {
        q.bdrv_drained_end(bs);
    }
}

bool ft_disks_busy(void)
{
    for (void *bs = q.bdrv_next_node(NULL); bs; bs = q.bdrv_next_node(bs)) {
        if (q.bdrv_drain_poll(bs, NULL, false)) {
            return true;
        }
    }
    return false;
}

bool ft_disks_in_flight(void)
{
    bool found;

    ft_disks_quiesce();
    found = ft_disks_busy();
    ft_disks_resume();
    return found;
}

/*
 * What the main loop queues for the log is logged and done by the vCPU's thread.
 * QEMU kicks that, which does not wake a halted vCPU (rr_wait_io_event): packets
 * and completions would wait for the guest's next timer. This wakes it.
 */
static void wake_for_events(void)
{
    if (*q.replay_mode == Q_REPLAY_RECORD && q.replay_mutex_locked() &&
        q.replay_has_events()) {
        q.qemu_clock_notify(Q_CLOCK_VIRTUAL);
    }
}

/*
 * The main loop polls, or has polled. QEMU logs that a reset is due, and pauses
 * the vCPU after that, which may still take an interrupt meanwhile; the backup's
 * may be paused already. So the primary's is paused before it is logged.
 */
static void polled(struct q_plain_notifier *n, void *poll)
{
    (void)n;
    if (*(int *)poll == Q_MAIN_LOOP_POLL_FILL) {
        ft_loop_wait();
    }
    wake_for_events();
    if (*(int *)poll == Q_MAIN_LOOP_POLL_OK && ft.mode == FT_RECORD &&
        q.qemu_reset_requested_get() && q.runstate_is_running()) {
        q.pause_all_vcpus();
        /* Deadlines are the same as on the backup. */
        q.qemu_clock_enable(Q_CLOCK_VIRTUAL, true);
    }
}

/* A paused primary has nothing to log, and yet the backup is to see that it is
 * there, and not to wait for the log with QEMU's locks held. */
static void tick(void *opaque)
{
    (void)opaque;
    if (ft.mode == FT_RECORD && !q.runstate_is_running() &&
        q.replay_mutex_locked()) {
        log_nothing();
    }
}

void ft_mode_schedule_tick(void)
{
    q.aio_bh_schedule_oneshot_full(ft.main_context, tick, NULL, "ftvirt-tick");
}

static void reset(void *opaque)
{
    (void)opaque;
    if (!q.qemu_reset_requested_get()) {
        q.qemu_system_reset_request(Q_SHUTDOWN_HOST_QMP_RESET);
    }
}

void ft_mode_schedule_reset(void)
{
    q.aio_bh_schedule_oneshot_full(ft.main_context, reset, NULL, "ftvirt-reset");
}

void ft_mode_init(void)
{
    static struct q_plain_notifier poll_notifier = { .notify = polled };
    static struct q_notifier notifier;

    ft_in_main = true;
    if (ft.backup) {
        /* The command line says record, as the primary's does. */
        *q.replay_mode = Q_REPLAY_PLAY;
        q.replay_state->data_kind = 25;
        q.replay_state->has_unread_data = true;
        ft.mode = FT_REPLAY;
    }
    if (*q.replay_file) {
        fclose(*q.replay_file);
    }
    *q.replay_file = ft.backup ? ft_stream_open(true) : ft_stream_null();
    q.qemu_add_vm_change_state_handler_prio(starting, NULL, INT_MIN);
    q.qemu_add_vm_change_state_handler_prio(stopping, NULL, INT_MAX);
    q.migration_add_notifier(&notifier, migration_ended);
    q.main_loop_poll_add_notifier(&poll_notifier);
}
