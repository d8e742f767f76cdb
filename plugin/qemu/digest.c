/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What both sides are compared by while they run: a hash of the registers at
 * the same event. The event is an INTERRUPT, which QEMU logs and consumes
 * between two translation blocks, when the vCPU has just entered the handler:
 * no register is anywhere but in CPUX86State then. The primary chooses; the
 * backup is told the position before the log that leads to it, and tells what
 * it has there.
 */
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "ftvirt.h"

#define INTERRUPT_KIND 1
/* Between two choices of the primary. */
#define PERIOD_NS INT64_C(100000000)
/* Flags that live in eflags itself: DF and the arithmetic ones are evaluated
 * lazily, from what depends on how the code was translated. */
#define EFLAGS_KEPT 0x3f7300u
#define ENV_SIZE 65536
#define SEARCH 4096

enum { RCX = 1, RDX = 2, RBX = 3, RSP = 4 };

/* target/i386/cpu.h: the beginning of CPUX86State. */
struct q_x86 {
    uint64_t regs[16];
    uint64_t eip;
};

static size_t cr_at;  /* of cr[5] in CPUX86State */
static size_t env_at; /* of CPUX86State in the vCPU, 0: not compared */

/* helper_sysexit() puts RCX into RSP and RDX into RIP, at privilege level 0
 * only, and only if an MSR that lies somewhere in it is not 0. */
static bool find_registers(uint8_t *env)
{
    struct q_x86 *x = (void *)env;
    const uint64_t sp = 0x1122334455667788, ip = 0x99aabbccddeeff;

    memset(env, 0x10, ENV_SIZE);
    memset(env + ft_hflags_at(), 0, 4);
    x->regs[RCX] = sp;
    x->regs[RDX] = ip;
    q.helper_sysexit(env, 2);
    return x->regs[RSP] == sp && x->eip == ip;
}

/* cpu_x86_update_cr3() writes cr[3]; paging is off in a state of zeros. */
static bool find_cr(uint8_t *env)
{
    const uint64_t cr3 = 0x123456789000;

    memset(env, 0, ENV_SIZE);
    q.cpu_x86_update_cr3(env, cr3);
    for (size_t at = 3 * 8; at < SEARCH; at += 8) {
        if (*(uint64_t *)(env + at) == cr3) {
            cr_at = at - 3 * 8;
            return true;
        }
    }
    return false;
}

bool ft_digest_init(const char **why)
{
    uint8_t *env = malloc(ENV_SIZE);
    bool found = env && find_registers(env) && find_cr(env);

    free(env);
    if (!found) {
        *why = "the registers in CPUX86State lie otherwise in this QEMU";
    }
    return found;
}

/* Writes RBX as a debugger does; the VM is stopped. */
static void write_rbx(uint8_t *cpu, uint32_t value)
{
    uint64_t wire = value;

    q.x86_cpu_gdb_write_register(cpu, (uint8_t *)&wire, 1 /* RBX, to it */);
}

/* Where in the vCPU CPUX86State is: two values are written to a register, and
 * appear at one place. */
void ft_digest_find_vcpu(uint8_t *cpu)
{
    const uint32_t first = 0x17693c5a, second = 0x5c3a9617;
    size_t size = malloc_usable_size(cpu) & ~(size_t)7;
    uint8_t *before = malloc(size);

    if (!before) {
        return;
    }
    memcpy(before, cpu, size);
    write_rbx(cpu, first);
    for (size_t at = RBX * 8; at + 8 <= size && !env_at; at += 8) {
        uint64_t *rbx = (uint64_t *)(cpu + at);

        if (*rbx == first) {
            write_rbx(cpu, second);
            if (*rbx == second) {
                env_at = at - RBX * 8;
                *rbx = *(uint64_t *)(before + at);
            } else {
                write_rbx(cpu, first);
            }
        }
    }
    free(before);
    if (!env_at) {
        ft_report("registers are not compared: they are not in the vCPU");
    }
}

bool ft_registers(uint64_t out[FT_REGISTERS])
{
    uint8_t *env = (uint8_t *)*q.cpus_queue + env_at;

    if (!env_at) {
        return false;
    }
    memcpy(out, env, sizeof(struct q_x86));
    out[17] = *(uint64_t *)(env + ft_eflags_at()) & EFLAGS_KEPT;
    memcpy(out + 18, env + cr_at, 5 * 8);
    return true;
}

/* FNV-1a over whole words. */
static bool hash(uint64_t *out)
{
    uint64_t r[FT_REGISTERS], h = 0xcbf29ce484222325;

    if (!ft_registers(r)) {
        return false;
    }
    for (int i = 0; i < FT_REGISTERS; i++) {
        for (int shift = 0; shift < 64; shift += 8) {
            h = (h ^ (r[i] >> shift & 0xff)) * 0x100000001b3;
        }
    }
    *out = h;
    return true;
}

/*
 * A write of the primary is about to be put at the ring's head; the lock is
 * held. In the vCPU's thread the byte after those of an INSTRUCTION event is a
 * kind: QEMU counts the instructions as logged when it has written them.
 */
void ft_digest_logged(const uint8_t *buf, size_t size, int64_t now)
{
    static int64_t chosen_ns;
    static bool counting;
    bool counted = q.replay_state->current_icount ==
                   (uint64_t)q.timers_state->qemu_icount;
    bool kind = counting && counted;
    uint64_t h;

    counting = !counted;
    if (!kind || size != 1 || *buf != INTERRUPT_KIND ||
        now - chosen_ns < PERIOD_NS || !hash(&h)) {
        return;
    }
    chosen_ns = now;
    ft_send_digest(ft.ring.head + 1, q.replay_state->current_icount, h);
}

/* The backup is to look at where the event before pos was consumed. */
void ft_digest_check(uint64_t pos)
{
    if (pos > ft.ring.tail && ft.checks < FT_CHECKS) {
        ft.check[ft.checks++] = pos;
    }
}

/* The backup reads the kind of its next event; the lock is held, and the kind
 * of the last is still known. */
void ft_digest_consumed(void)
{
    unsigned passed = 0;
    uint64_t h;

    while (passed < ft.checks && ft.check[passed] <= ft.ring.tail) {
        if (ft.check[passed++] == ft.ring.tail &&
            q.replay_state->data_kind == INTERRUPT_KIND && hash(&h)) {
            ft_send_digest(ft.ring.tail, q.replay_state->current_icount, h);
        }
    }
    ft.checks -= passed;
    memmove(ft.check, ft.check + passed, ft.checks * sizeof(ft.check[0]));
}
