/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Is this QEMU one that ftvirt knows? Every symbol must be there, and every
 * structure that is touched must lie as symbols.h says: each is proven by
 * changing a field and asking an exported function of QEMU for it. Runs at
 * load, before vCPUs exist, when only this thread touches these.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "ftvirt.h"

struct q_symbols q;

static char reason[256];

static bool refuse(const char **why, const char *fmt, const char *what)
{
    snprintf(reason, sizeof(reason), fmt, what);
    *why = reason;
    return false;
}

static bool resolve(const char **why)
{
#define X(ret, name, args, use) \
    *(void **)&q.name = dlsym(RTLD_DEFAULT, #name); \
    if (!q.name) { \
        return refuse(why, "this QEMU does not export %s", #name); \
    }
    FT_FUNCTIONS(X)
#undef X
#define X(type, name, use) \
    *(void **)&q.name = dlsym(RTLD_DEFAULT, #name); \
    if (!q.name) { \
        return refuse(why, "this QEMU does not export %s", #name); \
    }
    FT_VARIABLES(X)
#undef X
    return true;
}

static bool check_version(const char **why)
{
    /* qapi/control.json: VersionInfo, VersionTriple */
    struct { int64_t *qemu; char *package; } *info = q.qmp_query_version(NULL);
    char text[32];

    ft.qemu_major = (int)info->qemu[0];
    ft.qemu_minor = (int)info->qemu[1];
    ft.qemu_micro = (int)info->qemu[2];
    free(info->qemu);
    free(info->package);
    free(info);
    snprintf(text, sizeof(text), "%d.%d.%d", ft.qemu_major, ft.qemu_minor,
             ft.qemu_micro);
    if (ft.qemu_major < 9 || (ft.qemu_major == 9 && ft.qemu_minor < 1)) {
        return refuse(why, "QEMU %s has known record/replay bugs; "
                      "9.1 or newer is needed", text);
    }
    if (ft.qemu_major > 10) {
        return refuse(why, "QEMU %s is newer than what this plugin knows "
                      "(9.1 to 10.x)", text);
    }
    return true;
}

static bool check_replay_state(const char **why)
{
    static uint8_t event[] = { 0, 0, 0, 0, 7 };
    struct q_replay_state saved = *q.replay_state;
    FILE *file = *q.replay_file;
    bool fits;

    if (saved.read_event_id != UINT64_MAX) {
        return refuse(why, "%s lies otherwise in this QEMU", "ReplayState");
    }
    *q.replay_file = fmemopen(event, sizeof(event), "r");
    if (!*q.replay_file) {
        *q.replay_file = file;
        return refuse(why, "%s", "out of memory");
    }
    q.replay_state->has_unread_data = false;
    q.replay_state->data_kind = 1;
    q.replay_fetch_data_kind();
    fits = q.replay_state->has_unread_data && !q.replay_state->data_kind &&
           q.replay_state->instruction_count == 7 &&
           q.replay_state->current_event == saved.current_event + 1;
    fclose(*q.replay_file);
    *q.replay_file = file;
    *q.replay_state = saved;
    return fits || refuse(why, "%s lies otherwise in this QEMU", "ReplayState");
}

static bool check_timers_state(const char **why)
{
    int64_t icount = q.timers_state->qemu_icount;
    int64_t offset = q.timers_state->cpu_clock_offset;
    bool fits;

    q.timers_state->qemu_icount = 0x12345678;
    q.timers_state->cpu_clock_offset = 0x3456789a;
    fits = q.replay_get_current_icount() == 0x12345678 &&
           q.cpu_get_clock_locked() == 0x3456789a;
    q.timers_state->qemu_icount = icount;
    q.timers_state->cpu_clock_offset = offset;
    return fits || refuse(why, "%s lies otherwise in this QEMU", "TimersState");
}

static bool check_no_replay(const char **why)
{
    return *q.replay_mode == Q_REPLAY_NONE ||
           refuse(why, "%s", "checkpoints are taken of a QEMU without record/replay: "
                  "leave out -icount rr=, or method=checkpoint");
}

/* Time stands still until the VM starts. */
static bool check_ticks(const char **why)
{
    struct q_timers_state saved = *q.timers_state;
    bool fits;

    q.timers_state->cpu_ticks_offset = 0x1234567812345678;
    q.timers_state->cpu_clock_offset = 0x3456789a;
    fits = q.cpu_get_ticks() == 0x1234567812345678 &&
           q.cpu_get_clock_locked() == 0x3456789a;
    q.timers_state->cpu_ticks_prev = saved.cpu_ticks_prev;
    q.timers_state->cpu_ticks_offset = saved.cpu_ticks_offset;
    q.timers_state->cpu_clock_offset = saved.cpu_clock_offset;
    return fits || refuse(why, "%s lies otherwise in this QEMU", "TimersState");
}

bool ft_check(const char **why)
{
    if (!resolve(why) || !check_version(why)) {
        return false;
    }
    if (ft.checkpoints) {
        return check_no_replay(why) && check_ticks(why) && ft_look_init(why) &&
               ft_gate_init(why);
    }
    if (*q.replay_mode != Q_REPLAY_RECORD || !*q.replay_file) {
        return refuse(why, "%s", "QEMU must be started with "
                      "-icount shift=N,rr=record,rrfile=/dev/null");
    }
    return check_replay_state(why) && check_timers_state(why) &&
           ft_pause_init(why) && ft_digest_init(why) &&
           ft_look_init(why) && ft_reset_init(why) && ft_gate_init(why);
}
