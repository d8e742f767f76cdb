/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's PAUSE. QEMU leaves the execution loop for each, to let another
 * vCPU run, of which there is none. With a log that is two events for each turn
 * of a spin loop, and two changes of threads on the backup: the delay loops of
 * a kernel that boots make megabytes of log, and the backup falls behind by a
 * minute. Here PAUSE ends its translation block and goes on with the next, as
 * any other instruction that ends one.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "ftvirt.h"

/* target/i386/cpu.h */
#define HF_INHIBIT_IRQ (1u << 3)
#define HF_MPX_EN (1u << 25)
#define TF_MASK 0x100u
#define RF_MASK 0x10000u
/* The flags are near the beginning of CPUX86State, behind the registers. */
#define ENV_SIZE 65536
#define SEARCH 1024

static size_t eflags_at, hflags_at;

/* target/i386/tcg/misc_helper.c: helper_pause, but for how it ends. */
static void __attribute__((noreturn)) pause_helper(uint8_t *env)
{
    uint64_t *eflags = (uint64_t *)(env + eflags_at);

    if (*eflags & TF_MASK) {
        q.helper_pause(env); /* a debugger steps through the guest */
    }
    /* do_end_instruction() */
    *(uint32_t *)(env + hflags_at) &= ~HF_INHIBIT_IRQ;
    *eflags &= ~(uint64_t)RF_MASK;
    q.cpu_loop_exit_noexc(*q.cpus_queue);
    abort();
}

/* Where helper_write_eflags() writes. */
static bool find_eflags(uint8_t *env)
{
    memset(env, 0, ENV_SIZE);
    q.helper_write_eflags(env, RF_MASK, RF_MASK);
    for (size_t at = 0; at < SEARCH; at += 8) {
        if ((*(uint64_t *)(env + at) & RF_MASK) == RF_MASK) {
            eflags_at = at;
            return true;
        }
    }
    return false;
}

/* What cpu_sync_bndcs_hflags() takes one bit out of. */
static bool find_hflags(uint8_t *env)
{
    for (size_t at = 0; at < SEARCH; at += 4) {
        memset(env, 0, ENV_SIZE);
        *(uint32_t *)(env + at) = UINT32_MAX;
        q.cpu_sync_bndcs_hflags(env);
        if (*(uint32_t *)(env + at) == ~HF_MPX_EN) {
            hflags_at = at;
            return true;
        }
    }
    return false;
}

size_t ft_eflags_at(void) { return eflags_at; }

size_t ft_hflags_at(void) { return hflags_at; }

bool ft_pause_init(const char **why)
{
    uint8_t *env = malloc(ENV_SIZE);
    bool found = env && find_eflags(env) && find_hflags(env);

    free(env);
    if (!found || *q.helper_info_pause != (void *)q.helper_pause) {
        *why = "CPUX86State or the helper of PAUSE lies otherwise in this QEMU";
        return false;
    }
    *q.helper_info_pause = (void *)pause_helper;
    return true;
}
