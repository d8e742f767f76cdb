/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What checkpoints take from QEMU beside ../symbols.h, each with why. */
#ifndef FTVIRT_CHECKPOINT_SYMBOLS_H
#define FTVIRT_CHECKPOINT_SYMBOLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* system/physmem.c: struct DirtyBitmapSnapshot. Both bounds are addresses among
 * all RAM blocks; a block begins where a word of the bitmap does. */
struct q_dirty_snapshot {
    uint64_t start, end;
    unsigned long dirty[];
};

/* include/exec/memory.h: GLOBAL_DIRTY_MIGRATION; include/exec/ramlist.h:
 * DIRTY_MEMORY_MIGRATION */
enum { Q_GLOBAL_DIRTY_MIGRATION = 1, Q_DIRTY_MEMORY_MIGRATION = 2 };
/* qapi/run-state.json */
enum { Q_RUN_STATE_FINISH_MIGRATE = 7 };

/* X(return type, name, arguments, why) */
#define CK_FUNCTIONS(X) \
    X(bool, qemu_ram_is_migratable, (void *block), "which RAM blocks make up the guest's memory") \
    X(void *, memory_region_from_host, (void *host, uint64_t *offset), "their regions, for which dirty pages are told") \
    X(bool, memory_global_dirty_log_start, (unsigned flags, void **errp), "begins to track writes, by KVM, TCG and devices") \
    X(void, memory_global_dirty_log_stop, (unsigned flags), "ends it") \
    X(struct q_dirty_snapshot *, memory_region_snapshot_and_clear_dirty, (void *mr, uint64_t at, uint64_t size, unsigned client), "which pages were written") \
    X(void, g_free, (void *), "that answer") \
    X(void, resume_all_vcpus, (void), "the end of a checkpoint's stop") \
    X(void, vm_state_notify, (bool running, int state), "devices put what is queued into their state") \
    X(void, cpu_disable_ticks, (void), "the guest's time of the checkpoint") \
    X(void, cpu_enable_ticks, (void), "it goes on") \
    X(int, global_state_store, (void), "a part of the state that its load insists on") \
    X(void *, qio_channel_buffer_new, (size_t capacity), "the state of devices, in memory") \
    X(int64_t, qio_channel_io_seek, (void *ioc, int64_t offset, int whence, void **errp), "back to its beginning") \
    X(ssize_t, qio_channel_read, (void *ioc, char *buf, size_t len, void **errp), "takes it out") \
    X(int, qio_channel_write_all, (void *ioc, const char *buf, size_t len, void **errp), "puts it in") \
    X(void *, qemu_file_new_output, (void *ioc), "what the state is saved to") \
    X(void *, qemu_file_new_input, (void *ioc), "what it is loaded from") \
    X(unsigned, qemu_get_be32, (void *file), "the header that QEMU before 11 saves with it") \
    X(int, qemu_fflush, (void *file), "all of it is there") \
    X(int, qemu_fclose, (void *file), "frees that") \
    X(void, object_unref, (void *object), "frees the channel") \
    X(int, qemu_save_device_state, (void *file), "the state of all devices and vCPUs") \
    X(int, qemu_load_device_state, (void *file, void **errp), "the same, on the backup; before 11 without errp") \
    X(int, kvm_vm_ioctl, (void *state, unsigned long type, ...), "the guest's kvmclock, which would lose the time of each stop") \
    X(void, cpu_throttle_set, (int percentage), "slows a guest that dirties more than the link takes") \
    X(void, cpu_throttle_stop, (void), "ends that")

/* X(type, name, why) */
#define CK_VARIABLES(X) \
    X(bool, kvm_allowed, "whether there is a kvmclock") \
    X(void *, kvm_state, "the KVM that has it")

struct q_checkpoint_symbols {
#define X(ret, name, args, why) ret (*name) args;
    CK_FUNCTIONS(X)
#undef X
#define X(type, name, why) type *name;
    CK_VARIABLES(X)
#undef X
};

extern struct q_checkpoint_symbols qc;

#endif
