/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Switches go on sending to the host of the copy that is gone until they hear
 * from this one, and a guest that has nothing to say is not heard. So QEMU
 * announces its cards as soon as it is live, also when libvirt, by which the
 * agent asks for the same, does not answer.
 */
#include <string.h>

#include "ftvirt.h"

/* In the main loop, after go-live: a replaying guest must not see it. */
static void announce(void *unused)
{
    /* Of QEMU's migration, which leaves all but rounds at its defaults: that
     * they are there proves where the fields lie. */
    const struct q_announce_parameters *theirs = q.migrate_announce_params();
    struct q_announce_parameters params;
    void *error = NULL;

    (void)unused;
    if (theirs->initial != 50 || theirs->max != 550 || theirs->step != 100) {
        return; /* libvirt's way is left */
    }
    memset(&params, 0, sizeof(params));
    params.initial = 50;
    params.max = 550;
    params.rounds = 5;
    params.step = 50;
    q.qmp_announce_self(&params, &error); /* which sets no error */
}

void ft_announce(void)
{
    q.aio_bh_schedule_oneshot_full(ft.main_context, announce, NULL,
                                   "ftvirt-announce");
}
