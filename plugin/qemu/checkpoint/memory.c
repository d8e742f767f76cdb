/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's memory: which pages were written, and the staging to which they
 * are copied. QEMU's dirty log knows of writes by vCPUs, under TCG and KVM, and
 * by devices.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint.h"

#define WORD_BITS (8 * sizeof(unsigned long))

static char reason[320];

static const char *refuse(const char *fmt, const char *what)
{
    snprintf(reason, sizeof(reason), fmt, what);
    return reason;
}

struct listing {
    unsigned count;
    const char *why;
};

static int add_block(void *block, void *opaque)
{
    struct listing *l = opaque;
    const char *name = q.qemu_ram_get_idstr(block);
    uint64_t size = q.qemu_ram_get_used_length(block), offset;
    struct ck_block *b = &ck.blocks[l->count];

    if (!qc.qemu_ram_is_migratable(block)) {
        return 0;
    }
    if (l->count == CK_BLOCKS) {
        l->why = "it has too many RAM blocks";
        return 1;
    }
    if (size % CK_PAGE || strlen(name) >= sizeof(b->name)) {
        l->why = refuse("RAM block %s is not made of whole pages", name);
        return 1;
    }
    memset(b, 0, sizeof(*b));
    strcpy(b->name, name);
    b->host = q.qemu_ram_get_host_addr(block);
    b->pages = size / CK_PAGE;
    b->mr = b->host ? qc.memory_region_from_host(b->host, &offset) : NULL;
    if (!b->mr || offset) {
        l->why = refuse("RAM block %s has no memory region of its own", name);
        return 1;
    }
    l->count++;
    return 0;
}

/* A file of memory, as large as all of RAM; only what is written takes room. */
static const char *stage(void)
{
    size_t table = (ck.total * sizeof(uint64_t) + CK_PAGE - 1) & ~(size_t)(CK_PAGE - 1);

    ck.table_at = CK_PAGE;
    ck.device_at = ck.table_at + table;
    ck.pages_at = ck.device_at + CK_DEVICE_MAX;
    ck.stage_size = ck.pages_at + ck.total * CK_PAGE;
    if (ftruncate(ck.fd, (off_t)ck.stage_size) < 0) {
        return refuse("staging memory: %s", strerror(errno));
    }
    ck.stage = mmap(NULL, ck.stage_size, PROT_READ | PROT_WRITE, MAP_SHARED, ck.fd, 0);
    if (ck.stage == MAP_FAILED) {
        ck.stage = NULL;
        return refuse("staging memory: %s", strerror(errno));
    }
    return NULL;
}

/* In the main loop. All pages are to be copied, if writes are tracked. */
const char *ck_memory_begin(bool track)
{
    struct listing l = { 0 };
    void *err = NULL;
    const char *why;

    ck_memory_end();
    if (ck.stage) {
        munmap(ck.stage, ck.stage_size);
        ck.stage = NULL;
    }
    q.qemu_ram_foreach_block(add_block, &l);
    ck.count = l.count;
    ck.total = 0;
    for (unsigned i = 0; i < ck.count; i++) {
        ck.total += ck.blocks[i].pages;
    }
    if (l.why) {
        return l.why;
    }
    why = stage();
    if (why || !track) {
        return why;
    }
    for (unsigned i = 0; i < ck.count; i++) {
        struct ck_block *b = &ck.blocks[i];
        size_t words = (b->pages + WORD_BITS - 1) / WORD_BITS;

        b->todo = malloc(words * sizeof(*b->todo) + 1);
        if (!b->todo) {
            ck_memory_end();
            return "out of memory";
        }
        memset(b->todo, 0xff, words * sizeof(*b->todo));
        if (b->pages % WORD_BITS) {
            b->todo[words - 1] = ~0ul >> (WORD_BITS - b->pages % WORD_BITS);
        }
        b->waiting = b->pages;
    }
    if (!qc.memory_global_dirty_log_start(Q_GLOBAL_DIRTY_MIGRATION, &err)) {
        why = refuse("writes to memory cannot be tracked: %s", err ? q.error_get_pretty(err) : "no reason given");
        if (err) {
            q.error_free(err);
        }
        ck_memory_end();
        return why;
    }
    ck.tracking = true;
    /* What was written before counts as dirty too: all of it is copied anyway. */
    ck_memory_snapshot(false);
    return NULL;
}

/* In the main loop. The blocks stay known, for nothing but their names. */
void ck_memory_end(void)
{
    if (ck.tracking) {
        qc.memory_global_dirty_log_stop(Q_GLOBAL_DIRTY_MIGRATION);
        ck.tracking = false;
    }
    for (unsigned i = 0; i < ck.count; i++) {
        free(ck.blocks[i].todo);
        ck.blocks[i].todo = NULL;
        ck.blocks[i].waiting = 0;
    }
}

static int same_block(void *block, void *opaque)
{
    struct listing *l = opaque;
    struct ck_block *b = &ck.blocks[l->count];

    if (!qc.qemu_ram_is_migratable(block)) {
        return 0;
    }
    if (l->count == ck.count || q.qemu_ram_get_host_addr(block) != b->host ||
        q.qemu_ram_get_used_length(block) != b->pages * CK_PAGE) {
        l->why = refuse("RAM block %s appeared, moved or was resized", q.qemu_ram_get_idstr(block));
        return 1;
    }
    l->count++;
    return 0;
}

/* In the main loop: NULL if the blocks are those of the beginning. */
const char *ck_memory_same(void)
{
    struct listing l = { 0 };

    q.qemu_ram_foreach_block(same_block, &l);
    if (!l.why && l.count != ck.count) {
        l.why = refuse("RAM block %s went away", ck.blocks[l.count].name);
    }
    return l.why;
}

static void merge(struct ck_block *b, const struct q_dirty_snapshot *s)
{
    size_t words = (b->pages + WORD_BITS - 1) / WORD_BITS;

    for (size_t i = 0; i < words; i++) {
        unsigned long fresh = s->dirty[i];

        if (i == words - 1 && b->pages % WORD_BITS) {
            fresh &= ~0ul >> (WORD_BITS - b->pages % WORD_BITS);
        }
        fresh &= ~b->todo[i];
        b->todo[i] |= fresh;
        b->waiting += (uint64_t)__builtin_popcountl(fresh);
    }
}

/* Adds what was written since the last one to what is to be copied. With the
 * big lock held, or taken here for each block. */
void ck_memory_snapshot(bool take_lock)
{
    for (unsigned i = 0; i < ck.count; i++) {
        struct ck_block *b = &ck.blocks[i];
        struct q_dirty_snapshot *s;

        if (take_lock) {
            q_bql_lock();
        }
        s = qc.memory_region_snapshot_and_clear_dirty(b->mr, 0, b->pages * CK_PAGE, Q_DIRTY_MEMORY_MIGRATION);
        if (take_lock) {
            q.bql_unlock();
        }
        merge(b, s);
        qc.g_free(s);
    }
}

/* Copies pages that wait to the staging, at most so many, and tells how many
 * that were and how many wait still. Without the guest stopped a page may be
 * torn: it was written then, and is copied again. */
uint64_t ck_memory_copy(uint64_t most, bool zeros, uint64_t *left)
{
    uint64_t *table = (uint64_t *)(void *)(ck.stage + ck.table_at);
    uint8_t *to = ck.stage + ck.pages_at;
    uint64_t n = 0;

    *left = 0;
    for (unsigned i = 0; i < ck.count; i++) {
        struct ck_block *b = &ck.blocks[i];

        for (size_t w = 0; b->waiting && n < most; w++) {
            while (b->todo[w] && n < most) {
                unsigned bit = (unsigned)__builtin_ctzl(b->todo[w]);
                uint64_t page = w * WORD_BITS + bit;
                const uint8_t *from = b->host + page * CK_PAGE;

                table[n] = (uint64_t)i << CK_ENTRY_BLOCK | page;
                if (zeros && ft_zeros(from, CK_PAGE)) {
                    table[n] |= CK_ENTRY_ZERO;
                } else {
                    memcpy(to, from, CK_PAGE);
                    to += CK_PAGE;
                }
                b->todo[w] &= b->todo[w] - 1;
                b->waiting--;
                n++;
            }
        }
        *left += b->waiting;
    }
    return n;
}

/* On the backup. What is not a page of the guest's memory is refused before
 * anything is written: the table comes from another host. */
const char *ck_memory_apply(const struct ck_staged *s)
{
    const uint64_t *table = (const uint64_t *)(const void *)(ck.stage + ck.table_at);
    const uint8_t *from = ck.stage + ck.pages_at;
    const uint64_t page_mask = CK_ENTRY_ZERO - 1;

    if (s->pages > ck.total || s->device > CK_DEVICE_MAX) {
        return "more than there is room for";
    }
    for (uint64_t i = 0; i < s->pages; i++) {
        uint64_t block = table[i] >> CK_ENTRY_BLOCK;

        if (block >= ck.count || (table[i] & page_mask) >= ck.blocks[block].pages) {
            return "a page that the guest does not have";
        }
    }
    for (uint64_t i = 0; i < s->pages; i++) {
        uint64_t entry = table[i], block = entry >> CK_ENTRY_BLOCK, page = entry & page_mask;
        uint8_t *to;

        if (block >= ck.count || page >= ck.blocks[block].pages) {
            return "a page that changed while it was looked at";
        }
        to = ck.blocks[block].host + page * CK_PAGE;
        if (!(entry & CK_ENTRY_ZERO)) {
            memcpy(to, from, CK_PAGE);
            from += CK_PAGE;
        } else if (!ft_zeros(to, CK_PAGE)) {
            memset(to, 0, CK_PAGE);
        }
    }
    return NULL;
}

/* Gives back what a large round or checkpoint took; its content is gone. */
void ck_stage_trim(uint64_t pages)
{
    if (ck.stage && pages * CK_PAGE > CK_STAGE_KEEP) {
        (void)!fallocate(ck.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         (off_t)(ck.pages_at + CK_STAGE_KEEP),
                         (off_t)(pages * CK_PAGE - CK_STAGE_KEEP));
    }
}
