/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What libvirt and its users must not ask of a QEMU that records or replays:
 * changes that the guest would see and the log would not have, so that the
 * backup would diverge, and what QEMU itself cannot do then, such as saving its
 * state, at which it aborts. libvirt has no veto; a disabled command of the
 * monitor is one: it fails at once, and libvirt shows the reason.
 */
#include "ftvirt.h"

static const char reason[] =
    "the domain is protected by ftvirt; take the protection away with "
    "'ftvirt suspend', and bring it back with 'ftvirt resume'";

static const char *const commands[] = {
    /* The guest would see it. */
    "device_add", "device_del", "set_link", "block_resize", "balloon",
    "inject-nmi", "system_wakeup", "chardev-send-break", "qom-set",
    "eject", "blockdev-open-tray", "blockdev-close-tray",
    "blockdev-insert-medium", "blockdev-remove-medium",
    "blockdev-change-medium",
    /* What devices are attached to; opening an image drains the others. */
    "blockdev-add", "netdev_add",
    /* The block graph would change below the recording, or be drained. */
    "transaction", "blockdev-snapshot", "blockdev-snapshot-sync",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-delete-internal-sync", "blockdev-mirror",
    "drive-mirror", "blockdev-backup", "drive-backup", "block-commit",
    "block-stream", "blockdev-reopen", "change-backing-file",
    "block_set_io_throttle",
    /* State is neither saved nor loaded in record/replay. */
    "migrate", "snapshot-save", "snapshot-load", "snapshot-delete",
};

/* What the primary does on both sides, and a backup must not do by itself. */
static const char *const of_primary[] = {
    "stop", "system_reset", "system_powerdown", "dump-guest-memory",
};

/* A backup that holds checkpoints runs only when it goes live. */
static const char *const of_standby[] = { "cont" };

static const char replays[] =
    "this is a backup of ftvirt, which does what its primary does; "
    "ask the primary's host";

static void set(const char *const *list, size_t n, const char *why)
{
    for (size_t i = 0; i < n; i++) {
        if (why) {
            q.qmp_disable_command(q.qmp_commands, list[i], why);
        } else {
            q.qmp_enable_command(q.qmp_commands, list[i]);
        }
    }
}

/* Called with the lock held, as the mode changes, in the main loop or a thread
 * that it waits for; what is called here takes no lock and waits for nothing.
 */
void ft_veto(enum ft_mode mode)
{
    static enum ft_mode before = FT_BOOT;
    const char *why = mode == FT_REPLAY || mode == FT_STANDBY ? replays : reason;

    if (mode == before) {
        return;
    }
    before = mode;
    set(commands, sizeof(commands) / sizeof(commands[0]),
        mode == FT_BOOT || mode == FT_IDLE ? NULL : why);
    set(of_primary, sizeof(of_primary) / sizeof(of_primary[0]),
        mode == FT_REPLAY || mode == FT_STANDBY ? replays : NULL);
    set(of_standby, sizeof(of_standby) / sizeof(of_standby[0]),
        mode == FT_STANDBY ? replays : NULL);
}
