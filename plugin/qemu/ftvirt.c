/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry of the plugin:
 *   -plugin file=ftvirt.so,socket=PATH,uuid=UUID[,role=backup]
 *           [,method=checkpoint][,ring=BYTES]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"

#define EXPORT __attribute__((visibility("default")))

/* include/qemu/qemu-plugin.h: version 2 is known to QEMU 9.1 to 10.x. */
EXPORT int qemu_plugin_version = 2;
EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc,
                               char **argv);

struct ft_state ft = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .space = PTHREAD_COND_INITIALIZER,
    .data = PTHREAD_COND_INITIALIZER,
    .turn = PTHREAD_COND_INITIALIZER,
    .gate = PTHREAD_COND_INITIALIZER,
    .room = PTHREAD_COND_INITIALIZER,
    .wake_fd = -1,
    .tick_ns = 50 * 1000000,
    .diverge_ns = INT64_C(5000000000),
};

void ft_report(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    fputs("ftvirt: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
}

/* QEMU takes its signals by signalfd in the main loop: ours must not. */
bool ft_thread_with(void *(*f)(void *), const char *name, void *opaque)
{
    sigset_t all, old;
    pthread_t thread;
    bool ok;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ok = pthread_create(&thread, NULL, f, opaque) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (ok) {
        pthread_setname_np(thread, name);
        pthread_detach(thread);
    }
    return ok;
}

bool ft_thread(void *(*f)(void *), const char *name)
{
    return ft_thread_with(f, name, NULL);
}

static bool parse_uuid(const char *text)
{
    int n = 0;

    for (; *text && n < 32; text++) {
        static const char digits[] = "0123456789abcdef";
        const char *d = strchr(digits, *text | 0x20);

        if (*text == '-') {
            continue;
        }
        if (!d) {
            return false;
        }
        ft.uuid[n / 2] = ft.uuid[n / 2] << 4 | (uint8_t)(d - digits);
        n++;
    }
    return n == 32 && !*text;
}

static bool parse_ring(const char *text, size_t *ring)
{
    char *end;
    unsigned long long n = strtoull(text, &end, 10);

    *ring = n;
    return !*end && n >= FT_FEED_WINDOW && n <= (1ull << 32) && !(n & (n - 1));
}

static const char *configure(int argc, char **argv)
{
    size_t ring = FT_RING_DEFAULT;
    bool uuid = false;

    for (int i = 0; i < argc; i++) {
        char *value = strchr(argv[i], '=');

        if (!value) {
            return "arguments are name=value";
        }
        *value++ = 0;
        if (!strcmp(argv[i], "socket")) {
            if (strlen(value) >= sizeof(ft.socket_path)) {
                return "socket= is too long for a unix socket";
            }
            strcpy(ft.socket_path, value);
        } else if (!strcmp(argv[i], "uuid")) {
            uuid = parse_uuid(value);
        } else if (!strcmp(argv[i], "role")) {
            if (strcmp(value, "backup") && strcmp(value, "primary")) {
                return "role= is primary or backup";
            }
            ft.backup = !strcmp(value, "backup");
        } else if (!strcmp(argv[i], "method")) {
            if (strcmp(value, "lockstep") && strcmp(value, "checkpoint")) {
                return "method= is lockstep or checkpoint";
            }
            ft.checkpoints = !strcmp(value, "checkpoint");
        } else if (!strcmp(argv[i], "ring")) {
            if (!parse_ring(value, &ring)) {
                return "ring= is a power of two, 4 MiB to 4 GiB, in bytes";
            }
        } else {
            return "arguments are socket, uuid, role, method and ring";
        }
    }
    if (!*ft.socket_path || !uuid) {
        return "socket= and uuid= are needed";
    }
    return ft_stream_init(ring) ? NULL : "out of memory";
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    const char *why = configure(argc, argv);

    (void)id;
    (void)info;
    if (why || !ft_check(&why)) {
        ft_report("not loaded: %s", why);
        return -1;
    }
    ft.main_context = q.iohandler_get_aio_context();
    if (!ft.checkpoints) {
        ft_mode_init();
        ft_power_init();
    } else if (!ck_init(&why)) {
        ft_report("not loaded: %s", why);
        return -1;
    }
    if (!ft_control_init()) {
        ft_report("not loaded: %s", strerror(errno));
        return -1;
    }
    return 0;
}
