/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The second method: instead of a log, the state that changed goes to the
 * backup, at short stops (checkpoints). The backup holds memory and the state
 * of devices as of the newest complete one, and executes nothing until it goes
 * live. Works for any accelerator and any number of vCPUs.
 */
#ifndef FTVIRT_CHECKPOINT_H
#define FTVIRT_CHECKPOINT_H

#include "../ftvirt.h"
#include "symbols.h"

#define CK_PAGE 4096u
#define CK_BLOCKS 256
/* The state of devices is a few hundred KiB; QEMU's own limit is far above. */
#define CK_DEVICE_MAX (64u << 20)
/* Pages that a live round stages at once: 64 MiB. */
#define CK_ROUND_PAGES 16384u
/* Staged bytes beyond which the memory is given back once they are taken. */
#define CK_STAGE_KEEP (64u << 20)
/* An entry of the staging's table: RAM block, whether the page is all zeros (it
 * has no room among the staged pages then), page in the block. */
#define CK_ENTRY_BLOCK 48
#define CK_ENTRY_ZERO (UINT64_C(1) << 47)

/*
 * Staging: a file in memory that plugin and agent share; PROTOCOL.md has its
 * layout. The primary's plugin writes it and the agent reads it, on the backup it
 * is the other way round; whose turn it is is said by frames.
 */
struct ck_stage_header {
    uint64_t running; /* number of the checkpoint that the guest runs towards */
};

struct ck_block {
    char name[256];
    uint8_t *host;
    uint64_t pages;
    void *mr;
    unsigned long *todo; /* pages that the backup does not have as they are */
    uint64_t waiting;    /* how many */
};

/* What the next part of the staging takes. */
struct ck_staged {
    uint64_t number; /* of the checkpoint, 0: a part of a live round */
    uint64_t pages;
    uint64_t device; /* bytes of device state */
    uint64_t left;   /* pages that wait still */
    bool running;    /* the guest runs after it */
    /* Nanoseconds: stop of the vCPUs, drain of the disks, copy of the pages,
     * state of the devices, resume. */
    int64_t stop_ns, drain_ns, copy_ns, device_ns, resume_ns;
};

struct ck_state {
    struct ck_block blocks[CK_BLOCKS];
    unsigned count;
    uint64_t total; /* pages of all blocks */
    bool tracking;

    int fd;
    uint8_t *stage;
    size_t stage_size, table_at, device_at, pages_at;

    /* The lock of ft guards what follows. */
    pthread_cond_t work; /* the thread has something to do */
    pthread_cond_t over; /* the main loop has done it */
    bool begin, round, first, apply, promote;
    bool done;           /* of what the main loop was asked */
    bool wanted;         /* an output waits, or the guest was paused or resumed */
    bool in_stop;        /* the VM's handlers are called by a checkpoint */
    uint64_t number;     /* primary: newest taken; backup: newest complete */
    struct ck_staged last, applying;
    int64_t taken_ns;    /* when the newest was taken */
    uint64_t rate;       /* pages dirtied a second, of the last interval */
    int64_t least_ns, most_ns;
    uint64_t watermark;  /* pages */
    const char *error;

    uint8_t *device;     /* backup: device state of the newest complete one */
    size_t device_len;
    bool device_runs;
};

extern struct ck_state ck;

/* Frames of the agent for this method; PROTOCOL.md. */
enum { CK_BEGIN = 96, CK_ROUND, CK_FIRST, CK_SCHEDULE, CK_APPLY };

/* memory.c */
const char *ck_memory_begin(bool track);
const char *ck_memory_same(void);
void ck_memory_end(void);
void ck_memory_snapshot(bool bql);
uint64_t ck_memory_copy(uint64_t most, bool zeros, uint64_t *left);
const char *ck_memory_apply(const struct ck_staged *s);
void ck_stage_trim(uint64_t pages);

/* state.c */
const char *ck_state_save(uint64_t *len);
const char *ck_state_load(void);
void ck_clock_before(void);
void ck_clock_after(void);

/* checkpoint.c */
bool ck_init(const char **why);
const char *ck_take(int type, const uint8_t *p, size_t len);
void ck_wanted(void);
void ck_acked(void);
void ck_welcomed(void);
void ck_schedule_idle(void);
void ck_promote(void);
void ck_pace(unsigned thousandths);

#endif
