/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The power button, as of 'virsh shutdown'. QEMU tells ACPI of it at once, at a
 * moment that no log has, and the backup would never hear of it. Here it goes
 * by way of an input event, which is recorded: a multi-touch event, of which
 * nothing else in a protected domain knows. Both sides take it at the same
 * place in the log, and only then tell the devices.
 */
#include "ftvirt.h"

/* qapi/ui.json: InputEvent, of type mtt, and InputMultiTouchEvent */
struct input_mtt {
    int type;
    int64_t slot, tracking_id;
    int axis;
    int64_t value;
};
struct input_event {
    int type;
    struct input_mtt *mtt;
};
/* include/ui/input.h: QemuInputHandler */
struct input_handler {
    const char *name;
    uint32_t mask;
    void (*event)(void *dev, void *console, struct input_event *event);
    void (*sync)(void *dev);
};

enum { INPUT_MTT = 4, BUTTON_SLOT = 0x4654 };

/* The devices that were to be told; the order is QEMU's. */
static struct q_plain_notifier *devices;

static struct q_plain_notifier *next(struct q_plain_notifier *n)
{
    return n->node[0];
}

/* QEMU was asked to press the button. Nothing comes of it on a backup. */
static void asked(struct q_plain_notifier *n, void *data)
{
    struct input_mtt mtt = { .slot = BUTTON_SLOT };
    struct input_event event = { .type = INPUT_MTT, .mtt = &mtt };

    (void)n;
    (void)data;
    q.replay_input_event(NULL, &event);
}

static void pass(struct q_plain_notifier *n, void *data)
{
    (void)n;
    (void)data;
}

static void pressed(void *dev, void *console, struct input_event *event)
{
    (void)dev;
    (void)console;
    if (event->type != INPUT_MTT || event->mtt->slot != BUTTON_SLOT) {
        return;
    }
    for (struct q_plain_notifier *n = devices, *then; n; n = then) {
        then = next(n);
        n->notify(n, NULL);
    }
}

static void released(void *dev)
{
    (void)dev;
}

/* Whether the list lies as assumed: each entry is where its predecessor, or
 * the head, points to. */
static bool is_list(struct q_plain_notifier *n)
{
    for (; n; n = next(n)) {
        if (!n->node[1] || *(struct q_plain_notifier **)n->node[1] != n) {
            return false;
        }
    }
    return true;
}

/* When the VM first runs, all devices are there. From then on QEMU's list is
 * ours alone, and the devices are told by us. */
static void starting(void *opaque, bool running, int state)
{
    static bool started;
    static struct q_plain_notifier notifier = { .notify = asked };
    static const struct input_handler handler = {
        .name = "ftvirt power button", .mask = 1u << INPUT_MTT,
        .event = pressed, .sync = released,
    };

    (void)opaque;
    (void)state;
    if (!running || started) {
        return;
    }
    started = true;
    q.qemu_register_powerdown_notifier(&notifier);
    if (!is_list(&notifier)) {
        ft_report("the power button is not replayed: struct Notifier differs");
        notifier.notify = pass;
        return;
    }
    devices = next(&notifier);
    notifier.node[0] = NULL;
    q.qemu_input_handler_register(NULL, &handler);
}

void ft_power_init(void)
{
    q.qemu_add_vm_change_state_handler_prio(starting, NULL, 0);
}
