/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What 'ftvirt verify' needs of each side: a primary that stands still for a
 * while, and hashes of memory and registers where both stand. The main loop
 * stops the VM and writes to the images what QEMU only has in its caches; a
 * thread of our own hashes, so that the main loop goes on.
 */
#include <stdlib.h>
#include <string.h>

#include "ftvirt.h"

#define HASH_SIZE 32
/* crypto/hash.h: QCRYPTO_HASH_ALGO_SHA256 */
#define SHA256 3
#define BLOCKS 64
#define BATCH 512

struct block {
    char name[256];
    const uint8_t *at;
    uint64_t size;
};

struct look {
    uint64_t id;
    uint32_t chunk;
    unsigned flags;
    uint64_t icount;
    unsigned count;
    struct block blocks[BLOCKS];
};

static bool hash(const uint8_t *from, size_t len, uint8_t out[HASH_SIZE])
{
    size_t size = HASH_SIZE;

    return q.qcrypto_hash_bytes(SHA256, from, len, &out, &size, NULL) == 0 &&
           size == HASH_SIZE;
}

/* Much of a guest's memory is zeros, which need no hashing. */
bool ft_zeros(const uint8_t *at, size_t len)
{
    uint64_t first;

    memcpy(&first, at, sizeof(first));
    return !first && !memcmp(at, at + sizeof(first), len - sizeof(first));
}

bool ft_look_init(const char **why)
{
    static const uint8_t want[] = { 0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01 };
    uint8_t got[HASH_SIZE] = { 0 };

    if (hash((const uint8_t *)"abc", 3, got) &&
        !memcmp(got, want, sizeof(want))) {
        return true;
    }
    *why = "SHA-256 is another hash in this QEMU";
    return false;
}

static bool wanted(void)
{
    bool now;

    pthread_mutex_lock(&ft.lock);
    now = ft.hold && !ft.held && ft.mode == FT_RECORD;
    pthread_mutex_unlock(&ft.lock);
    return now;
}

/*
 * Stops a primary that has no disk request in flight, as one is known to one
 * side's disk before the other's. What is queued, and the guest's idle time, are
 * seen to at each stop (mode.c). This is the main loop, so the vCPU executes
 * nothing between the look and the stop.
 */
static void hold(void *opaque)
{
    (void)opaque;
    if (!wanted() || !q.runstate_is_running() ||
        ft_disks_in_flight()) {
        return;
    }
    q.vm_stop(Q_RUN_STATE_PAUSED);
    pthread_mutex_lock(&ft.lock);
    ft.held = true;
    ft_send_state("held");
    pthread_mutex_unlock(&ft.lock);
}

static void release(void *opaque)
{
    bool held;

    (void)opaque;
    pthread_mutex_lock(&ft.lock);
    held = ft.held && !ft.hold;
    if (held) {
        ft.held = false;
    }
    pthread_mutex_unlock(&ft.lock);
    if (held && !q.runstate_is_running()) {
        q.vm_start();
    }
}

/* What is due by the clock; the lock is held. True if it is to look again
 * soon. */
bool ft_hold_due(int64_t now)
{
    if (ft.hold && (now >= ft.hold_until_ns || ft.mode != FT_RECORD)) {
        ft.hold = false;
    }
    if (ft.hold && !ft.held) {
        q.aio_bh_schedule_oneshot_full(ft.main_context, hold, NULL,
                                       "ftvirt-hold");
    } else if (!ft.hold && ft.held) {
        q.aio_bh_schedule_oneshot_full(ft.main_context, release, NULL,
                                       "ftvirt-release");
    }
    return ft.hold != ft.held;
}

static int add_block(void *block, void *opaque)
{
    struct look *l = opaque;
    const uint8_t *at = q.qemu_ram_get_host_addr(block);
    struct block *b = &l->blocks[l->count];

    if (!at || l->count == BLOCKS) {
        return 0;
    }
    l->count++;
    b->at = at;
    b->size = q.qemu_ram_get_used_length(block);
    strncpy(b->name, q.qemu_ram_get_idstr(block), sizeof(b->name) - 1);
    return 0;
}

/* False if nobody waits for it any more. */
static bool look_at(struct look *l, const struct block *b)
{
    uint8_t hashes[BATCH * HASH_SIZE];
    uint8_t of_zeros[HASH_SIZE];
    uint64_t from = 0, at = 0;
    bool known = false;
    size_t n = 0;

    while (at < b->size) {
        uint64_t left = b->size - at;
        size_t len = left < l->chunk ? left : l->chunk;
        bool empty = len == l->chunk && ft_zeros(b->at + at, len);
        uint8_t *to = hashes + n * HASH_SIZE;

        if (empty && known) {
            memcpy(to, of_zeros, HASH_SIZE);
        } else if (!hash(b->at + at, len, to)) {
            return false;
        }
        if (empty && !known) {
            memcpy(of_zeros, to, HASH_SIZE);
            known = true;
        }
        n++;
        at += len;
        if (n == BATCH || at == b->size) {
            if (!ft_send_memory(l->id, b->name, b->size, from, hashes,
                                n * HASH_SIZE)) {
                return false;
            }
            from = at;
            n = 0;
        }
    }
    return true;
}

static void *look_thread(void *opaque)
{
    struct look *l = opaque;
    uint64_t registers[FT_REGISTERS];
    bool ok = true;

    for (unsigned i = 0; i < l->count && ok && !(l->flags & FT_LOOK_BUSY); i++) {
        ok = look_at(l, &l->blocks[i]);
    }
    if (!ft_registers(registers)) {
        memset(registers, 0, sizeof(registers));
    }
    pthread_mutex_lock(&ft.lock);
    if (ft.running && ft.mode != FT_REPLAY) {
        l->flags |= FT_LOOK_RUNS;
    }
    if (!ok || l->icount != (uint64_t)q.timers_state->qemu_icount) {
        l->flags |= FT_LOOK_MOVED;
    }
    if (ft.look == l->id) {
        ft_replay_return();
    }
    ft_send_looked(l->id, l->icount, l->flags, registers);
    pthread_mutex_unlock(&ft.lock);
    free(l);
    return NULL;
}

/* Images of a copy on write format have tables that QEMU writes when a guest
 * flushes, or when it has to. A node of blkreplay waits for the log. */
static void write_back(void)
{
    for (void *bs = q.bdrv_next_node(NULL); bs; bs = q.bdrv_next_node(bs)) {
        const char *format = q.bdrv_get_format_name(bs);

        if (format && strcmp(format, "blkreplay")) {
            q.bdrv_flush(bs);
        }
    }
}

static void look(void *opaque)
{
    struct look *l = opaque;

    if (ft_disks_in_flight()) {
        l->flags |= FT_LOOK_BUSY;
    } else {
        write_back();
        q.qemu_ram_foreach_block(add_block, l);
    }
    l->icount = q.timers_state->qemu_icount;
    if (!ft_thread_with(look_thread, "ftvirt-look", l)) {
        pthread_mutex_lock(&ft.lock);
        ft_replay_return();
        pthread_mutex_unlock(&ft.lock);
        free(l);
    }
}

void ft_look(uint64_t id, uint32_t chunk)
{
    struct look *l = calloc(1, sizeof(*l));

    if (l) {
        l->id = id;
        l->chunk = chunk;
        q.aio_bh_schedule_oneshot_full(ft.main_context, look, l, "ftvirt-look");
    }
}
