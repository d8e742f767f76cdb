/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The state of devices and vCPUs, saved and loaded by QEMU's own functions for
 * migration, and the guest's clocks, which are to run on during a checkpoint.
 */
#define _GNU_SOURCE
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

/* Before 11 a stream begins with a magic number and a version. */
#define HEADER_BEFORE 11

/* Saves into the staging. The VM stands still. */
const char *ck_state_save(uint64_t *len)
{
    void *ioc = qc.qio_channel_buffer_new(1u << 20);
    void *file = qc.qemu_file_new_output(ioc);
    const char *why = NULL;
    size_t n = 0;
    ssize_t got;

    qc.global_state_store();
    if (qc.qemu_save_device_state(file) < 0 || qc.qemu_fflush(file) < 0) {
        why = "QEMU cannot save the state of its devices";
    } else if (qc.qio_channel_io_seek(ioc, 0, 0, NULL) < 0) {
        why = "the state of devices cannot be read back";
    }
    while (!why && (got = qc.qio_channel_read(ioc, (char *)ck.stage + ck.device_at + n, CK_DEVICE_MAX - n, NULL))) {
        if (got < 0) {
            why = "the state of devices cannot be read back";
        } else if ((n += (size_t)got) == CK_DEVICE_MAX) {
            why = "the state of devices is larger than 64 MiB";
        }
    }
    qc.qemu_fclose(file);
    qc.object_unref(ioc);
    *len = n;
    return why;
}

/* Loads the newest complete checkpoint's, on a machine that never ran. */
const char *ck_state_load(void)
{
    void *ioc = qc.qio_channel_buffer_new(ck.device_len + 64);
    void *file, *err = NULL;
    int ret;

    qc.qio_channel_write_all(ioc, (char *)ck.device, ck.device_len, NULL);
    qc.qio_channel_io_seek(ioc, 0, 0, NULL);
    file = qc.qemu_file_new_input(ioc);
    if (ft.qemu_major < HEADER_BEFORE) {
        qc.qemu_get_be32(file);
        qc.qemu_get_be32(file);
        /* It takes no second argument, and does not look for one. */
    }
    ret = qc.qemu_load_device_state(file, &err);
    qc.qemu_fclose(file);
    qc.object_unref(ioc);
    if (!ret) {
        return NULL;
    }
    if (err) {
        ft_report("load: %s", q.error_get_pretty(err));
        q.error_free(err);
    }
    return "QEMU cannot load the state of the devices";
}

static struct {
    int64_t ticks_offset, clock_offset, at;
    struct kvm_clock_data kvm;
    bool has_kvm;
} before;

/*
 * A stop takes its time out of the guest's clocks, forty times a second: a guest
 * would be slow by a tenth and more. So after it the offsets are put back to what
 * they were, and kvmclock, which QEMU sets back to the stop, is put forward. What
 * was saved is the time of the stop.
 */
void ck_clock_before(void)
{
    before.ticks_offset = q.timers_state->cpu_ticks_offset;
    before.clock_offset = q.timers_state->cpu_clock_offset;
    memset(&before.kvm, 0, sizeof(before.kvm));
    before.has_kvm = *qc.kvm_allowed && *qc.kvm_state &&
                     qc.kvm_vm_ioctl(*qc.kvm_state, KVM_GET_CLOCK, &before.kvm) == 0;
    before.at = ft_now_ns();
}

/* After the handlers of the VM's start, before the vCPUs run. */
void ck_clock_after(void)
{
    if (before.has_kvm) {
        before.kvm.flags = 0;
        before.kvm.clock += (uint64_t)(ft_now_ns() - before.at);
        qc.kvm_vm_ioctl(*qc.kvm_state, KVM_SET_CLOCK, &before.kvm);
    }
    q.timers_state->cpu_ticks_offset = before.ticks_offset;
    q.timers_state->cpu_clock_offset = before.clock_offset;
}
