/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Every symbol that ftvirt.so takes from the QEMU that loads it, with why.
 * Distribution builds of QEMU export them all, because their modules need it.
 * Resolved by dlsym; one that is missing makes the plugin refuse to load.
 */
#ifndef FTVIRT_SYMBOLS_H
#define FTVIRT_SYMBOLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

/* replay/replay-internal.h: struct ReplayState; compared in check.c. */
struct q_replay_state {
    int64_t cached_clock[2]; /* HOST, VIRTUAL_RT */
    uint64_t current_icount;
    int instruction_count;
    unsigned int current_event;
    unsigned int data_kind;
    bool has_unread_data;
    uint64_t file_offset;
    uint64_t block_request_id;
    uint64_t read_event_id;
};

/* include/system/cpu-timers-internal.h: struct TimersState, its first part. */
struct q_timers_state {
    int64_t cpu_ticks_prev;
    int64_t cpu_ticks_offset;
    unsigned seqlock;
    int spin;
    int16_t cpu_ticks_enabled;
    int16_t icount_time_shift;
    int64_t last_delta;
    int64_t qemu_icount_bias;
    int64_t vm_clock_warp_start;
    int64_t cpu_clock_offset;
    int64_t qemu_icount;
};

/* include/qom/object.h: struct ObjectClass is 96 bytes; include/net/filter.h. */
struct q_netfilter_class {
    uint8_t parent_class[96];
    void *setup, *cleanup, *status_changed, *handle_event;
    ssize_t (*receive_iov)(void *nf, void *sender, unsigned flags,
                           const void *iov, int iovcnt, void *sent_cb);
};

/* include/net/filter.h: struct NetFilterState, its first part. */
struct q_netfilter_state {
    uint8_t parent[40];
    char *netdev_id;
    void *netdev;
};

/* qapi/net.json: AnnounceParameters; compared in announce.c. Who it is, and for
 * which cards, is left out; room for those fields is there. */
struct q_announce_parameters {
    int64_t initial, max, rounds, step;
    uint64_t optional[8];
};

/* include/qemu/notify.h: Notifier */
struct q_plain_notifier {
    void (*notify)(struct q_plain_notifier *, void *data);
    void *node[2];
};

/* include/qemu/notify.h: NotifierWithReturn */
struct q_notifier {
    int (*notify)(struct q_notifier *, void *data, void **errp);
    void *node[2];
};

enum { Q_REPLAY_NONE = 0, Q_REPLAY_RECORD = 1, Q_REPLAY_PLAY = 2 };
enum { Q_CLOCK_REALTIME = 0, Q_CLOCK_VIRTUAL = 1, Q_CLOCK_HOST = 2,
       Q_CLOCK_VIRTUAL_RT = 3 };
enum { Q_NET_CLIENT_DRIVER_NIC = 1 };
enum { Q_MIG_EVENT_PRECOPY_DONE = 1, Q_MIG_EVENT_PRECOPY_FAILED = 2 };
/* qapi/run-state.json */
enum { Q_RUN_STATE_IO_ERROR = 3, Q_RUN_STATE_PAUSED = 4,
       Q_RUN_STATE_RUNNING = 9, Q_RUN_STATE_WATCHDOG = 13,
       Q_RUN_STATE_GUEST_PANICKED = 14 };
enum { Q_SHUTDOWN_HOST_QMP_RESET = 3 };
enum { Q_CHAR_FEATURE_REPLAY = 2 };
enum { Q_TIMER_ATTR_ALL = -1 };
/* include/system/replay.h: ReplayCheckpoint; include/qemu/main-loop.h */
enum { Q_CHECKPOINT_RESET = 8 };
enum { Q_MAIN_LOOP_POLL_FILL = 0, Q_MAIN_LOOP_POLL_OK = 2 };

/* X(return type, name, arguments, why) */
#define FT_FUNCTIONS(X) \
    X(uint64_t, replay_get_current_icount, (void), "position of the guest in its execution") \
    X(void, qemu_register_reset, (void (*)(void *), void *), "completes disk requests before a reset waits for them") \
    X(void *, bdrv_next_node, (void *), "the disks' nodes") \
    X(bool, runstate_check, (int), "whether an error of a disk has stopped the VM") \
    X(bool, qemu_vmstop_requested, (int *), "or is about to") \
    X(void, qemu_system_vmstop_request_prepare, (void), "leaves that as it was") \
    X(void, qemu_system_vmstop_request, (int), "the same") \
    X(void, bdrv_do_drained_begin_quiesce, (void *, void *), "no new requests meanwhile") \
    X(void, bdrv_drained_end, (void *), "the end of that") \
    X(bool, bdrv_drain_poll, (void *, void *, bool), "whether one has requests in flight") \
    X(void, replay_add_input_sync_event, (void), "an event that does nothing: a paused guest logs no other") \
    X(void, replay_account_executed_instructions, (void), "a backup's vCPU is where the log has a completion") \
    X(void, replay_async_events, (void), "takes completions from the log, or puts them there") \
    X(void, icount_account_warp_timer, (void), "the guest's clock is the same on both sides when devices are reset") \
    X(bool, replay_checkpoint, (int), "marks in the log where devices are reset") \
    X(void, pause_all_vcpus, (void), "nothing is executed between the log of a reset and the reset") \
    X(void, main_loop_poll_add_notifier, (struct q_plain_notifier *), "sees a reset that is due before it is logged") \
    X(bool, aio_poll, (void *, bool), "lets requests complete") \
    X(void, helper_pause, (void *), "PAUSE as QEMU executes it") \
    X(void, cpu_loop_exit_noexc, (void *), "ends a translation block") \
    X(void, helper_write_eflags, (void *, uint64_t, uint32_t), "tells where the flags are") \
    X(void, cpu_sync_bndcs_hflags, (void *), "tells where the hidden flags are") \
    X(void, helper_sysexit, (void *, int), "tells where registers are") \
    X(void, cpu_x86_update_cr3, (void *, uint64_t), "tells where the control registers are") \
    X(int, x86_cpu_gdb_write_register, (void *cpu, uint8_t *value, int n), "tells where the state of the vCPU begins") \
    X(int, bdrv_flush, (void *bs), "images are complete before they are compared") \
    X(const char *, bdrv_get_format_name, (void *bs), "which nodes wait for the log") \
    X(int, qemu_ram_foreach_block, (int (*f)(void *, void *), void *opaque), "memory, to compare it") \
    X(const char *, qemu_ram_get_idstr, (void *block), "its name") \
    X(void *, qemu_ram_get_host_addr, (void *block), "where it is") \
    X(uint64_t, qemu_ram_get_used_length, (void *block), "how much it is") \
    X(int, qcrypto_hash_bytes, (int algorithm, const void *buf, size_t len, uint8_t **result, size_t *size, void **errp), "SHA-256 of it") \
    X(int, qemu_reset_requested_get, (void), "whether the guest asked for the reset that is due on the backup") \
    X(void, qemu_system_reset_request, (int), "asks for it where an operator did on the primary") \
    X(void, replay_mutex_lock, (void), "held by the main loop in record and replay") \
    X(void, replay_mutex_unlock, (void), "released when a mode is left") \
    X(bool, replay_mutex_locked, (void), "what the caller holds") \
    X(void, replay_finish_events, (void), "runs queued events when record is left") \
    X(void, replay_enable_events, (void), "queues events when record is entered") \
    X(void, replay_save_instructions, (void), "logs the instructions up to an output") \
    X(void, replay_fetch_data_kind, (void), "first event at the backup's start") \
    X(void, replay_register_char_driver, (void *chr), "libvirt's -chardev is not recorded otherwise") \
    X(void, bql_lock_impl, (const char *file, int line), "QEMU's big lock") \
    X(void, bql_unlock, (void), "QEMU's big lock") \
    X(void *, qemu_get_aio_context, (void), "the disks' loop, to let requests complete") \
    X(void *, iohandler_get_aio_context, (void), "main loop, to run things in it and in no other thread") \
    X(void, aio_bh_schedule_oneshot_full, (void *ctx, void (*cb)(void *), void *opaque, const char *name), "runs things in the main loop") \
    X(struct q_announce_parameters *, migrate_announce_params, (void), "shows how they lie") \
    X(void, qmp_announce_self, (struct q_announce_parameters *params, void **errp), "switches learn where the guest is now") \
    X(void *, qemu_add_vm_change_state_handler_prio, (void (*cb)(void *, bool, int), void *opaque, int prio), "the stop and the start of the VM") \
    X(void, migration_add_notifier, (struct q_notifier *n, int (*f)(struct q_notifier *, void *, void **)), "the end of the clone") \
    X(void, qmp_cont, (void **errp), "resumes after the clone, disks reactivated") \
    X(int, vm_stop, (int state), "short stop to leave record") \
    X(void, vm_start, (void), "end of the short stop") \
    X(void, runstate_set, (int), "what is queued at a stop is done as if the VM ran") \
    X(bool, runstate_is_running, (void), "whether a short stop is needed") \
    X(void, bdrv_drain_all, (void), "requests in flight end before idle") \
    X(void, run_on_cpu, (void *cpu, void (*f)(void *, uint64_t), uint64_t arg), "modes change in the vCPU thread, where it holds no replay lock") \
    X(void, tlb_flush, (void *cpu), "both sides start with an empty TLB") \
    X(void, qemu_notify_event, (void), "wakes the main loop") \
    X(int64_t, cpu_get_clock_locked, (void), "clock of the VM, adjusted at go-live; its lock may be held by the caller") \
    X(int64_t, cpu_get_ticks, (void), "proves where its offset lies") \
    X(bool, replay_has_events, (void), "whether a halted vCPU is to be woken") \
    X(void, qemu_clock_notify, (int type), "wakes it") \
    X(bool, all_cpu_threads_idle, (void), "whether the vCPU is halted") \
    X(void *, iothread_get_aio_context, (void *iothread), "the monitors' loop, which a backup's vCPU is not to wake") \
    X(void *, aio_get_g_source, (void *ctx), "where it begins to poll") \
    X(void, g_source_unref, (void *source), "gives that back") \
    X(void, qemu_clock_enable, (int type, bool enabled), "due timers run before the state is saved") \
    X(bool, qemu_clock_run_timers, (int type), "due timers run before the state is saved") \
    X(int64_t, qemu_clock_deadline_ns_all, (int type, int attrs), "no timer is due at the switch; livelock watch") \
    X(int, qemu_find_net_clients_except, (const char *id, void **ncs, int type, int max), "NICs whose queues are emptied") \
    X(void, qemu_purge_queued_packets, (void *nc), "packets queued while stopped were not recorded") \
    X(ssize_t, qemu_netfilter_pass_to_next, (void *sender, unsigned flags, const void *iov, int iovcnt, void *nf), "lets a gated packet go") \
    X(void *, object_class_by_name, (const char *name), "classes filter-replay, for the gate, and virtio-blk-device, for its reset") \
    X(void *, object_resolve_path, (const char *path, bool *ambiguous), "chardevs and virtio devices") \
    X(int, object_child_foreach, (void *obj, int (*f)(void *, void *), void *opaque), "chardevs") \
    X(int, object_child_foreach_recursive, (void *obj, int (*f)(void *, void *), void *opaque), "virtio devices") \
    X(void *, object_dynamic_cast, (void *obj, const char *type), "virtio devices") \
    X(const char *, object_get_canonical_path_component, (void *obj), "names of chardevs") \
    X(void, qemu_chr_set_feature, (void *chr, int feature), "marks guest-facing chardevs as recorded") \
    X(void, virtio_queue_invalidate_signalled_used, (void *vdev, int n), "as a load of the state does") \
    X(void, qemu_register_powerdown_notifier, (struct q_plain_notifier *n), "the power button") \
    X(void, replay_input_event, (void *console, void *event), "the power button, recorded") \
    X(void *, qemu_input_handler_register, (void *dev, const void *handler), "the power button, replayed") \
    X(void, qmp_disable_command, (void *commands, const char *name, const char *why), "what must not be asked of a protected domain") \
    X(void, qmp_enable_command, (void *commands, const char *name), "and may be asked again") \
    X(void *, qmp_query_version, (void **errp), "the version of QEMU") \
    X(const char *, error_get_pretty, (void *err), "messages") \
    X(void, error_free, (void *err), "messages")

/* X(type, name, why) */
#define FT_VARIABLES(X) \
    X(int, replay_mode, "switched in place") \
    X(FILE *, replay_file, "the log, made a stream in memory") \
    X(struct q_replay_state, replay_state, "counters set at the switch") \
    X(struct q_timers_state, timers_state, "clock offset at go-live") \
    X(void *, qmp_commands, "the monitor's commands") \
    X(void *, mon_iothread, "the monitors' loop") \
    X(void *, helper_info_pause, "what TCG calls for PAUSE") \
    X(void *, cpus_queue, "the vCPU")

struct q_symbols {
#define X(ret, name, args, why) ret (*name) args;
    FT_FUNCTIONS(X)
#undef X
#define X(type, name, why) type *name;
    FT_VARIABLES(X)
#undef X
};

extern struct q_symbols q;

#define q_bql_lock() q.bql_lock_impl(__FILE__, __LINE__)

#endif
