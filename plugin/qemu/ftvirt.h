/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * ftvirt.so: a QEMU TCG plugin that turns a domain's record/replay into a
 * streamed, gated log. It instruments no guest code. See PROTOCOL.md for what
 * it says to the agent, and symbols.h for what it takes from QEMU.
 */
#ifndef FTVIRT_H
#define FTVIRT_H

#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "symbols.h"

#ifndef FTVIRT_VERSION
#define FTVIRT_VERSION "0"
#endif

/* What the plugin does now; PROTOCOL.md gives the numbers on the wire. */
enum ft_mode {
    FT_BOOT = 0,   /* loaded, the first vm_start is still to come */
    FT_IDLE = 1,   /* unprotected: icount, no log */
    FT_RECORD = 2, /* primary: log streamed, outputs gated */
    FT_REPLAY = 3, /* backup: log consumed, outputs dropped */
    FT_LIVE = 4,   /* after go-live: log thrown away, outputs pass */
    FT_CHECKPOINT = 5, /* primary: state goes to the backup, outputs gated */
    FT_STANDBY = 6,    /* backup: holds the newest complete checkpoint */
};

/* Bytes of log that may be unacknowledged before the guest is held. */
#define FT_RING_DEFAULT (64u << 20)
/* Bytes of log that the agent may feed ahead of what was consumed. */
#define FT_FEED_WINDOW (4u << 20)
/* Gate limits: beyond these a packet is lost, as on a full network queue. */
#define FT_GATE_PACKETS 4096
#define FT_GATE_BYTES (16u << 20)
/* What a process that was stopped, or its host, finds when it goes on may be of
 * before a backup went live. So an ack that is read so long after we looked last
 * lets no output leave that is not newer, and an output whose turn came so long
 * ago is lost, as on a network. config.PluginSilence is the same, and what it is
 * added up with. By the clock that goes on while the host is suspended. */
#define FT_SILENCE_NS 100000000

/* Classes of delay that packets are counted in; PROTOCOL.md has the bounds. */
#define FT_GATE_DELAYS 12
/* Thousandths of its time that a vCPU may be made to pause. */
#define FT_PACE_MOST 900
/* What is compared of the vCPU: 16 general registers, RIP, eflags, CR0 to 4. */
#define FT_REGISTERS 23
/* Positions that a backup may be asked to look at ahead of what it consumed. */
#define FT_CHECKS 64
/* replay/replay-internal.h: EVENT_ASYNC + REPLAY_ASYNC_EVENT_BLOCK */
#define FT_BLOCK_KIND 8
/* The least piece of memory that is hashed. */
#define FT_LOOK_CHUNK_MIN 4096
/* A frame from the agent may not be longer than this. */
#define FT_FRAME_MAX (1u << 20)

/* A packet that waits for the ack of the log up to pos. */
struct ft_packet {
    struct ft_packet *next;
    uint64_t pos;
    int64_t queued_ns;
    void *filter;
    void *sender;
    unsigned flags;
    size_t len;
    uint8_t data[];
};

struct ft_ring {
    uint8_t *buf;
    size_t size;   /* a power of two */
    uint64_t head; /* position after the last byte in it */
    uint64_t tail; /* position of the first byte in it */
};

struct ft_state {
    /* set at load, constant afterwards */
    char socket_path[108];
    uint8_t uuid[16];
    bool backup;
    bool checkpoints; /* the method; false: lockstep */
    int qemu_major, qemu_minor, qemu_micro;
    /* AioContext of the main loop alone: what is scheduled in the usual one may
     * run in the vCPU's thread, while that waits for a disk (aio_poll). */
    void *main_context;
    ssize_t (*filter_next)(void *, void *, unsigned, const void *, int, void *);

    /* Guards everything below it. Never held while QEMU code is called. */
    pthread_mutex_t lock;
    pthread_cond_t space; /* record: the ring has room, or mode changed */
    pthread_cond_t data;  /* replay: fed bytes, or promote */
    pthread_cond_t turn;  /* replay: the main loop is wanted */
    pthread_cond_t gate;  /* gate thread: something may be released */
    pthread_cond_t room;  /* the agent has read something, or is gone */
    int wake_fd;          /* eventfd: io thread, look again */
    bool woken;           /* that is said already; atomic */

    enum ft_mode mode;
    uint64_t epoch;
    bool started;      /* the first vm_start is over; main loop only */
    bool running;      /* the VM runs */
    int stop_state;    /* QEMU's word for why it does not */
    bool arm;          /* switch to record after the next migration */
    uint64_t arm_epoch;
    bool promote;      /* replay: the end of the fed log is the end */
    bool ended;        /* record: QEMU closed the log (deliberate end) */
    bool connected;

    struct ft_ring ring; /* record: unacked log; replay: log not consumed */
    uint64_t acked;      /* record: end of log that the backup holds */
    uint64_t open_to;    /* record: outputs of before may leave */
    uint64_t doubt;      /* record: acks up to here come too late for outputs */
    int64_t open_ns;     /* record: when that was last said */
    uint64_t sent;       /* record: end of what this connection has been sent */
    bool flush;          /* record: an output waits, do not coalesce */
    int64_t last_log_ns; /* record: when something was logged last */
    int64_t full_since_ns;
    unsigned pace; /* record: part of its time that the vCPU is to pause, in
                    * thousandths */

    bool starving;           /* replay: a reader waits for the log */
    bool loaded;             /* replay: the VM state has been loaded */
    int64_t progress_ns;     /* replay: when something was consumed last */
    uint64_t progress_icount;
    int64_t diverge_ns;      /* replay: no progress for so long = diverged */
    bool diverged;
    int64_t tick_ns;         /* record: log at least this often */
    uint64_t check[FT_CHECKS]; /* replay: where the registers are looked at */
    unsigned checks;
    bool hold;              /* record: the VM is to stand still */
    bool held;              /* it does, by us */
    int64_t hold_until_ns;  /* it goes on then */
    bool main_wanted;       /* replay: the log does not go on without it */
    bool yielding;          /* replay: who waits for log is to let go of locks */
    bool yielded;           /* the placeholder was handed out for that */
    uint64_t look;          /* which answer the agent waits for, 0: none */

    struct ft_packet *gate_head, **gate_tail;
    unsigned gate_count;
    size_t gate_bytes;
    uint64_t gate_released, gate_dropped, gate_delay_ns, gate_delay_max_ns;
    uint64_t gate_delays[FT_GATE_DELAYS]; /* packets released, by delay */

    int64_t stopped_ns; /* when the VM was last stopped */
    int64_t pause_ns;   /* how long the clone stopped it */
    int64_t deadline_at_stop;
    uint64_t icount;    /* newest known, for reports */
};

extern struct ft_state ft;

int64_t ft_now_ns(void);
int64_t ft_boot_ns(void); /* with the time in which the host was suspended */
void ft_report(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* check.c: symbols and layouts; false with *why set if QEMU is not fit. */
bool ft_check(const char **why);

/* stream.c: QEMU's replay_file, in memory. */
bool ft_stream_init(size_t ring_size);
FILE *ft_stream_open(bool read);
FILE *ft_stream_null(void);
void ft_ring_reset(uint64_t pos);
void ft_ring_copy(uint64_t pos, uint8_t *to, size_t len);
void ft_ring_put(const uint8_t *from, size_t len);
void ft_replay_begin(void);
void ft_replay_yield(void);
void ft_replay_return(void);
void ft_replay_hold(void);
bool ft_replay_go_on(uint64_t id, unsigned count);

bool ft_for_vcpu(uint8_t kind);

/* loop.c: QEMU's event loops, kept off the vCPU. */
void ft_loop_init(void);
void ft_loop_wait(void);
void ft_loop_next(uint8_t kind);
void ft_loop_wake(void);

/* mode.c: idle, record, replay, live. */
extern __thread bool ft_in_vcpu, ft_in_main;
void ft_mode_init(void);
void ft_mode_schedule_idle(void);
void ft_mode_open(void);
void ft_mode_schedule_reset(void);
void ft_mode_schedule_tick(void);
void ft_disks_quiesce(void);
bool ft_disks_busy(void);
void ft_disks_resume(void);
bool ft_disks_in_flight(void);
void ft_go_live(void);

/* retry.c: disk requests that failed on a backup. */
void ft_retry(void);
bool ft_disk_failed(void);

/* gate.c: the output rule. */
bool ft_gate_init(const char **why);
void ft_gate_release(void);
bool ft_in_qemu(const void *f); /* a function of QEMU's own */

/* reset.c: resets of devices wait for disks. */
bool ft_reset_init(const char **why);

/* announce.c: the guest's cards, once it is live. */
void ft_announce(void);

/* pause.c: the guest's PAUSE instruction. */
bool ft_pause_init(const char **why);
size_t ft_eflags_at(void); /* in CPUX86State */
size_t ft_hflags_at(void);

/* digest.c: registers of both sides at the same event. */
bool ft_digest_init(const char **why);
void ft_digest_find_vcpu(uint8_t *cpu);
bool ft_registers(uint64_t out[FT_REGISTERS]);
void ft_digest_logged(const uint8_t *buf, size_t size, int64_t now);
void ft_digest_check(uint64_t pos);
void ft_digest_consumed(void);

/* power.c: the power button. */
void ft_power_init(void);

/* veto.c: monitor commands that a protected domain refuses. */
void ft_veto(enum ft_mode mode);

/* look.c: memory and registers of a VM that stands still. */
enum { FT_LOOK_RUNS = 1, FT_LOOK_BUSY = 2, FT_LOOK_MOVED = 4 };
bool ft_look_init(const char **why);
bool ft_hold_due(int64_t now);
void ft_look(uint64_t id, uint32_t chunk);
bool ft_zeros(const uint8_t *at, size_t len);

/* control.c: the agent. */
bool ft_control_init(void);
void ft_send_blocks(void);
void ft_send_staged(void);
void ft_send_applied(uint64_t number);
bool ft_thread(void *(*f)(void *), const char *name);
bool ft_thread_with(void *(*f)(void *), const char *name, void *opaque);
uint64_t ft_get(const uint8_t *p, int bytes); /* a number of a frame */
void ft_wake_io(void);
void ft_send_state(const char *text);
void ft_send_stopped(void);
void ft_send_digest(uint64_t pos, uint64_t icount, uint64_t hash);
bool ft_send_memory(uint64_t id, const char *name, uint64_t size, uint64_t from,
                    const uint8_t *hashes, size_t len);
void ft_send_looked(uint64_t id, uint64_t icount, unsigned flags,
                    const uint64_t registers[FT_REGISTERS]);

#endif
