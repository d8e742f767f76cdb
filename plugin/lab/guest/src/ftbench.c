// SPDX-License-Identifier: Apache-2.0
//
// ftbench runs in the lab's guest beside ftguest when a benchmark boots it:
//
//   ftbench serve       TCP 11: one line, which a shell runs; its output is the
//                       answer, and "exit CODE\n" the last line of it
//   ftbench forks N     makes N processes, one after the other
//   ftbench memory N    goes N times over 32 MiB: fills, copies, reads at random
//   ftbench dirty MIB S writes to each page of MIB MiB once in S seconds, for ever
//
// Times are taken by who asks, outside: the clocks of a guest whose
// instructions are counted are not those of the world.

#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SHELL "/bin/busybox"

enum {
	PORT = 11,
	LINE_SIZE = 1024,
	PAGE = 4096,
	MEMORY = 32 << 20,
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *pages(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static int code_of(int status)
{
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// answer runs what one client asks for.
static void answer(int fd)
{
	char line[LINE_SIZE];
	size_t used = 0;
	char *end;

	do {
		ssize_t n = read(fd, line + used, sizeof line - 1 - used);
		if (n <= 0)
			return;
		used += (size_t)n;
		line[used] = 0;
		end = strchr(line, '\n');
	} while (!end && used < sizeof line - 1);
	if (!end)
		return;
	*end = 0;
	pid_t pid = fork();
	if (pid < 0)
		return;
	if (!pid) {
		// The console's input is for ftguest.
		int none = open("/dev/null", O_RDONLY);
		if (none >= 0)
			dup2(none, 0);
		dup2(fd, 1);
		dup2(fd, 2);
		close(fd);
		execl(SHELL, "sh", "-c", line, (char *)NULL);
		_exit(127);
	}
	int status;
	if (waitpid(pid, &status, 0) == pid)
		dprintf(fd, "exit %d\n", code_of(status));
}

static void serve(void)
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (listener < 0)
		die("socket");
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&addr, sizeof addr) || listen(listener, 16))
		die("listen");
	signal(SIGCHLD, SIG_IGN); // those that answer end by themselves
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0)
			continue;
		if (!fork()) {
			signal(SIGCHLD, SIG_DFL);
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
			answer(fd);
			_exit(0);
		}
		close(fd);
	}
}

static void forks(int n)
{
	while (n-- > 0) {
		int status;
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (!pid) {
			execl(SHELL, "true", (char *)NULL);
			_exit(127);
		}
		if (waitpid(pid, &status, 0) != pid || status)
			die("child");
	}
}

static void memory(int n)
{
	size_t words = MEMORY / 2 / sizeof(uint64_t);
	uint64_t *from = pages(MEMORY), *to = from + words, x = 88172645463325252ull, sum = 0;

	while (n-- > 0) {
		memset(from, n, MEMORY / 2);
		memcpy(to, from, MEMORY / 2);
		for (size_t i = 0; i < words / 8; i++) {
			x ^= x << 13, x ^= x >> 7, x ^= x << 17; // Marsaglia's xorshift
			sum += to[x % words]++;
		}
	}
	printf("%llu\n", (unsigned long long)sum);
}

// dirty spreads each pass over its time in steps of 10 ms.
static void dirty(size_t mib, long seconds)
{
	size_t count = mib << 20 >> 12, steps = (size_t)seconds * 100;
	volatile char *p = pages(mib << 20);
	struct timespec step = { .tv_nsec = 10000000 };

	if (!steps)
		exit(2);
	for (size_t pass = 1;; pass++)
		for (size_t i = 0; i < steps; i++) {
			for (size_t page = i * count / steps; page < (i + 1) * count / steps; page++)
				*(volatile size_t *)(p + page * PAGE) = pass;
			nanosleep(&step, NULL);
		}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "serve") && argc == 2)
		serve();
	else if (!strcmp(what, "forks") && argc == 3)
		forks(atoi(argv[2]));
	else if (!strcmp(what, "memory") && argc == 3)
		memory(atoi(argv[2]));
	else if (!strcmp(what, "dirty") && argc == 4)
		dirty((size_t)atol(argv[2]), atol(argv[3]));
	else
		return 2;
	return 0;
}
