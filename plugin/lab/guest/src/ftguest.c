// SPDX-License-Identifier: Apache-2.0
//
// ftguest is the only program of the lab's guest. It is small, static and
// quiet: nothing runs, and no timer fires, unless a test asked for it, so that
// what a test sees is its own doing.
//
//   TCP 7   echo
//   TCP 8   control, one command per line, one reply line each:
//             status | lines start RATE | lines stop | load start RATE |
//             load stop | grow KIB | sync | poweroff | reboot
//   TCP 9   quiesces (writers stopped, disk synced) and answers one line with
//           the number and checksum of what was written, then closes
//   TCP 10  ledger: takes records of 16 bytes for good, and answers each with the
//           number and checksum of all that it ever took, big-endian (u64, u32,
//           u32 zero); the same is its greeting
//   console the same commands as on TCP 8
//
// The lines writer appends records "L NUMBER MILLISECONDS CRC32\n" to
// /data/lines, syncs each, and then prints it on the console. The load writer
// rewrites and re-reads random blocks of /data/load past the page cache.
// grow writes where the disk was never written, so that its image must grow.
// reboot is one without any preparation: what was not synced is lost. Its answer
// says how many lines were.
// Each writer is a process of its own, so that its waiting for the disk does
// not hold up the echo; what it has done is in memory shared with the main one.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LINES_FILE "/data/lines"
#define LOAD_FILE "/data/load"
#define GROWN_FILE "/data/grown"

enum {
	MAX_CLIENTS = 64,
	MAX_RATE = 10000,
	MAX_GROWTH = 1024, // KiB
	COMMAND_SIZE = 256,
	BLOCK_SIZE = 4096,
	LOAD_BLOCKS = 1024,
	RECORD_SIZE = 16,
};

// What the writers tell the main process. Each field has one writer.
struct shared {
	uint64_t lines;	      // number of the last line that is on the disk
	uint64_t line_errors; // appends or syncs that failed
	uint64_t load_ops;
	uint64_t load_errors; // I/O errors and blocks that were not as written
	uint32_t generation[LOAD_BLOCKS];
};

enum kind {
	UNUSED,
	LISTEN_ECHO,
	LISTEN_CONTROL,
	LISTEN_HASH,
	LISTEN_LEDGER,
	ECHO,
	CONTROL,
	LEDGER,
	CONSOLE,
	POWER_BUTTON
};

struct client {
	enum kind kind;
	size_t used;
	char command[COMMAND_SIZE];
};

static struct shared *shared;
static pid_t lines_pid, load_pid, grow_pid;
static int power_off;
static uint64_t echo_bytes;
static char boot_id[37]; // of this run of the kernel
static uint64_t ledger_count;
static uint32_t ledger_crc;
static volatile sig_atomic_t stop_writer;

static void die(const char *what)
{
	fprintf(stderr, "ftguest: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

// crc32 is the IEEE polynomial, as in Go's hash/crc32.
static uint32_t crc32(uint32_t crc, const void *data, size_t len)
{
	static uint32_t table[256];
	const unsigned char *p = data;

	if (!table[1]) {
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t c = i;
			for (int k = 0; k < 8; k++)
				c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
			table[i] = c;
		}
	}
	crc = ~crc;
	while (len--)
		crc = table[(crc ^ *p++) & 0xff] ^ (crc >> 8);
	return ~crc;
}

static int write_all(int fd, const void *data, size_t len)
{
	const char *p = data;

	while (len) {
		ssize_t n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static struct pollfd polls[MAX_CLIENTS];
static struct client clients[MAX_CLIENTS];

// ---- writers ---------------------------------------------------------------

static void on_stop(int sig)
{
	(void)sig;
	stop_writer = 1;
}

// pace sleeps until the next of rate events per second is due. A writer that
// has fallen behind starts afresh instead of catching up in a burst.
static void pace(struct timespec *next, unsigned rate)
{
	struct timespec now;

	next->tv_nsec += 1000000000L / (long)rate;
	if (next->tv_nsec >= 1000000000L) {
		next->tv_nsec -= 1000000000L;
		next->tv_sec++;
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec > next->tv_sec || (now.tv_sec == next->tv_sec && now.tv_nsec > next->tv_nsec)) {
		*next = now;
		return;
	}
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, next, NULL);
}

// last_line finds the number of the last record in the file, so that numbers
// go on after a reboot.
static uint64_t last_line(int fd)
{
	char tail[128];
	off_t size = lseek(fd, 0, SEEK_END);
	off_t from = size > (off_t)sizeof tail - 1 ? size - (off_t)sizeof tail + 1 : 0;
	ssize_t n = pread(fd, tail, sizeof tail - 1, from);

	if (n <= 1)
		return 0;
	tail[n - 1] = 0; // the last newline
	char *start = strrchr(tail, '\n');
	start = start ? start + 1 : tail;
	unsigned long long number;
	return sscanf(start, "L %llu ", &number) == 1 ? number : 0;
}

// recall_lines finds out what an earlier run of the guest left. A line that was being
// written when it ended was never said to be on the disk.
static void recall_lines(void)
{
	int fd = open(LINES_FILE, O_RDWR);
	off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	char c = '\n';

	while (size > 0 && pread(fd, &c, 1, size - 1) == 1 && c != '\n')
		size--;
	if (fd < 0 || ftruncate(fd, size))
		return;
	shared->lines = last_line(fd);
	close(fd);
}

static void write_lines(unsigned rate)
{
	int fd = open(LINES_FILE, O_RDWR | O_CREAT | O_APPEND, 0644);
	struct timespec next;

	if (fd < 0) {
		__atomic_add_fetch(&shared->line_errors, 1, __ATOMIC_RELAXED);
		die(LINES_FILE);
	}
	__atomic_store_n(&shared->lines, last_line(fd), __ATOMIC_RELAXED);
	clock_gettime(CLOCK_MONOTONIC, &next);
	while (!stop_writer) {
		char line[64];
		uint64_t number = shared->lines + 1;
		int n = snprintf(line, sizeof line, "L %010llu %010llu", (unsigned long long)number,
				 (unsigned long long)now_ms());

		n += snprintf(line + n, sizeof line - (size_t)n, " %08x\n", crc32(0, line, (size_t)n));
		if (write_all(fd, line, (size_t)n) || fdatasync(fd)) {
			// A hole in the numbers would look like a lost line: stop here.
			__atomic_add_fetch(&shared->line_errors, 1, __ATOMIC_RELAXED);
			die(LINES_FILE);
		}
		__atomic_store_n(&shared->lines, number, __ATOMIC_RELAXED);
		write_all(STDOUT_FILENO, line, (size_t)n);
		pace(&next, rate);
	}
	exit(0);
}

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void fill_block(uint32_t *words, uint32_t block, uint32_t generation)
{
	uint32_t x = block * 2654435761u ^ generation * 40503u;

	for (unsigned i = 0; i < BLOCK_SIZE / sizeof *words; i++)
		words[i] = x += 0x9e3779b9u;
}

static void write_load(unsigned rate)
{
	int fd = open(LOAD_FILE, O_RDWR | O_CREAT | O_DIRECT, 0644);
	uint32_t *want = aligned_alloc(BLOCK_SIZE, BLOCK_SIZE);
	uint32_t *got = aligned_alloc(BLOCK_SIZE, BLOCK_SIZE);
	uint64_t seed = 0x2545f4914f6cdd1dull ^ shared->load_ops;
	struct timespec next;

	if (fd < 0 || !want || !got || ftruncate(fd, (off_t)LOAD_BLOCKS * BLOCK_SIZE)) {
		__atomic_add_fetch(&shared->load_errors, 1, __ATOMIC_RELAXED);
		die(LOAD_FILE);
	}
	clock_gettime(CLOCK_MONOTONIC, &next);
	while (!stop_writer) {
		uint64_t r = random_next(&seed);
		uint32_t block = (uint32_t)(r >> 8) % LOAD_BLOCKS;
		off_t offset = (off_t)block * BLOCK_SIZE;
		uint32_t *generation = &shared->generation[block];
		int bad;

		if (*generation && (r & 1)) {
			fill_block(want, block, *generation);
			bad = pread(fd, got, BLOCK_SIZE, offset) != BLOCK_SIZE || memcmp(got, want, BLOCK_SIZE) != 0;
		} else {
			fill_block(want, block, *generation + 1);
			bad = pwrite(fd, want, BLOCK_SIZE, offset) != BLOCK_SIZE;
			++*generation;
			if ((r >> 1 & 7) == 0)
				bad |= fdatasync(fd) != 0;
		}
		if (bad)
			__atomic_add_fetch(&shared->load_errors, 1, __ATOMIC_RELAXED);
		__atomic_add_fetch(&shared->load_ops, 1, __ATOMIC_RELAXED);
		pace(&next, rate);
	}
	exit(0);
}

static void grow(unsigned kib)
{
	static char block[BLOCK_SIZE];
	int fd = open(GROWN_FILE, O_WRONLY | O_CREAT | O_APPEND, 0644);
	int bad = fd < 0;

	memset(block, 0x5a, sizeof block);
	for (unsigned written = 0; !bad && written < kib; written += BLOCK_SIZE / 1024)
		bad = write_all(fd, block, sizeof block);
	exit(bad || fdatasync(fd) || close(fd));
}

static void read_boot_id(void)
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, boot_id, sizeof boot_id - 1) != sizeof boot_id - 1)
		die("boot_id");
	close(fd);
}

static int running(pid_t *pid)
{
	if (*pid > 0 && waitpid(*pid, NULL, WNOHANG) == *pid)
		*pid = 0;
	return *pid > 0;
}

static void stop(pid_t *pid)
{
	if (running(pid)) {
		kill(*pid, SIGTERM);
		while (waitpid(*pid, NULL, 0) < 0 && errno == EINTR)
			;
	}
	*pid = 0;
}

static void start(pid_t *pid, unsigned rate, void (*writer)(unsigned))
{
	stop(pid);
	*pid = fork();
	if (*pid == 0) {
		// No SA_RESTART: the sleep in pace() ends at once.
		struct sigaction on_term = {.sa_handler = on_stop};
		sigaction(SIGTERM, &on_term, NULL);
		// A connection that the main process closes must not stay open here.
		for (int i = 0; i < MAX_CLIENTS; i++)
			if (polls[i].fd > STDERR_FILENO)
				close(polls[i].fd);
		writer(rate);
	}
}

// ---- commands --------------------------------------------------------------

static int reply(int fd, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int reply(int fd, const char *format, ...)
{
	char line[512];
	va_list args;

	va_start(args, format);
	int n = vsnprintf(line, sizeof line, format, args);
	va_end(args);
	return write_all(fd, line, (size_t)n);
}

static unsigned parse_number(const char *text, unsigned most)
{
	char *end;
	unsigned long number = strtoul(text, &end, 10);

	return end == text || *end || number > most ? 0 : (unsigned)number;
}

static void command(int fd, const char *line)
{
	char word[3][32] = {"", "", ""};
	int words = sscanf(line, "%31s %31s %31s", word[0], word[1], word[2]);
	int is_lines = !strcmp(word[0], "lines");

	if (words == 1 && !strcmp(word[0], "status")) {
		reply(fd, "ok uptime_ms=%llu lines=%llu lines_running=%d line_errors=%llu load_ops=%llu load_running=%d load_errors=%llu echo_bytes=%llu boot=%s\n",
		      (unsigned long long)now_ms(), (unsigned long long)shared->lines, running(&lines_pid),
		      (unsigned long long)shared->line_errors, (unsigned long long)shared->load_ops,
		      running(&load_pid), (unsigned long long)shared->load_errors,
		      (unsigned long long)echo_bytes, boot_id);
	} else if (words == 3 && (is_lines || !strcmp(word[0], "load")) && !strcmp(word[1], "start")) {
		unsigned rate = parse_number(word[2], MAX_RATE);
		if (!rate) {
			reply(fd, "error: rate must be 1 to %d per second: %s\n", MAX_RATE, word[2]);
			return;
		}
		start(is_lines ? &lines_pid : &load_pid, rate, is_lines ? write_lines : write_load);
		reply(fd, "ok\n");
	} else if (words == 2 && (is_lines || !strcmp(word[0], "load")) && !strcmp(word[1], "stop")) {
		stop(is_lines ? &lines_pid : &load_pid);
		reply(fd, "ok\n");
	} else if (words == 2 && !strcmp(word[0], "grow")) {
		unsigned kib = parse_number(word[1], MAX_GROWTH);
		if (!kib) {
			reply(fd, "error: a disk grows by 1 to %d KiB: %s\n", MAX_GROWTH, word[1]);
			return;
		}
		start(&grow_pid, kib, grow);
		reply(fd, "ok\n");
	} else if (words == 1 && !strcmp(word[0], "sync")) {
		sync();
		reply(fd, "ok\n");
	} else if (words == 1 && !strcmp(word[0], "poweroff")) {
		reply(fd, "ok\n");
		power_off = 1;
	} else if (words == 1 && !strcmp(word[0], "reboot")) {
		reply(fd, "ok lines=%llu\n", (unsigned long long)shared->lines);
		reboot(RB_AUTOBOOT);
	} else if (words > 0) {
		reply(fd, "error: unknown command: %s\n", line);
	}
}

static void quiesce_and_hash(int fd)
{
	static char buffer[65536];
	uint32_t crc = 0;
	uint64_t bytes = 0;
	ssize_t n;

	stop(&lines_pid);
	stop(&load_pid);
	stop(&grow_pid);
	sync();
	int file = open(LINES_FILE, O_RDONLY);
	while (file >= 0 && (n = read(file, buffer, sizeof buffer)) > 0) {
		crc = crc32(crc, buffer, (size_t)n);
		bytes += (uint64_t)n;
	}
	if (file >= 0)
		close(file);
	reply(fd, "ok lines=%llu bytes=%llu crc32=%08x line_errors=%llu load_ops=%llu load_errors=%llu\n",
	      (unsigned long long)shared->lines, (unsigned long long)bytes, crc,
	      (unsigned long long)shared->line_errors, (unsigned long long)shared->load_ops,
	      (unsigned long long)shared->load_errors);
}

// ---- main loop -------------------------------------------------------------

static void add(int fd, enum kind kind)
{
	for (int i = 0; i < MAX_CLIENTS; i++) {
		if (clients[i].kind == UNUSED) {
			polls[i] = (struct pollfd){.fd = fd, .events = POLLIN};
			clients[i] = (struct client){.kind = kind};
			return;
		}
	}
	close(fd);
}

static void drop(int i)
{
	close(polls[i].fd);
	polls[i].fd = -1;
	clients[i].kind = UNUSED;
}

static void listen_on(uint16_t port, enum kind kind)
{
	struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons(port)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)&addr, sizeof addr) || listen(fd, 16))
		die("listen");
	add(fd, kind);
}

static int tell_ledger(int fd)
{
	unsigned char answer[RECORD_SIZE] = {0};

	for (int i = 0; i < 8; i++)
		answer[i] = (unsigned char)(ledger_count >> (56 - 8 * i));
	for (int i = 0; i < 4; i++)
		answer[8 + i] = (unsigned char)(ledger_crc >> (24 - 8 * i));
	return write_all(fd, answer, sizeof answer);
}

static void accept_on(int listener, enum kind kind)
{
	struct timeval patience = {.tv_sec = 10};
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	int one = 1;

	if (fd < 0)
		return;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	// A client that does not read must not stop the others for ever.
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	if (kind == LISTEN_HASH) {
		quiesce_and_hash(fd);
		close(fd);
		return;
	}
	if (kind == LISTEN_LEDGER && tell_ledger(fd)) {
		close(fd);
		return;
	}
	add(fd, kind == LISTEN_ECHO ? ECHO : kind == LISTEN_LEDGER ? LEDGER : CONTROL);
}

static void read_commands(int i)
{
	struct client *c = &clients[i];
	ssize_t n = read(polls[i].fd, c->command + c->used, sizeof c->command - 1 - c->used);

	if (n <= 0) {
		drop(i);
		return;
	}
	c->used += (size_t)n;
	c->command[c->used] = 0;
	char *end;
	while ((end = strpbrk(c->command, "\r\n"))) {
		*end = 0;
		command(clients[i].kind == CONSOLE ? STDOUT_FILENO : polls[i].fd, c->command);
		c->used -= (size_t)(end + 1 - c->command);
		memmove(c->command, end + 1, c->used + 1);
	}
	if (c->used == sizeof c->command - 1)
		c->used = 0; // an endless line is no command
}

static void read_records(int i)
{
	struct client *c = &clients[i];
	ssize_t n = read(polls[i].fd, c->command + c->used, sizeof c->command - c->used);

	if (n <= 0) {
		drop(i);
		return;
	}
	c->used += (size_t)n;
	size_t done = 0;
	for (; c->used - done >= RECORD_SIZE; done += RECORD_SIZE) {
		ledger_crc = crc32(ledger_crc, c->command + done, RECORD_SIZE);
		ledger_count++;
		if (tell_ledger(polls[i].fd)) {
			drop(i);
			return;
		}
	}
	c->used -= done;
	memmove(c->command, c->command + done, c->used);
}

static void serve(int i)
{
	static char buffer[65536];
	struct input_event event;
	ssize_t n;

	switch (clients[i].kind) {
	case LISTEN_ECHO:
	case LISTEN_CONTROL:
	case LISTEN_HASH:
	case LISTEN_LEDGER:
		accept_on(polls[i].fd, clients[i].kind);
		break;
	case ECHO:
		n = read(polls[i].fd, buffer, sizeof buffer);
		if (n <= 0 || write_all(polls[i].fd, buffer, (size_t)n))
			drop(i);
		else
			echo_bytes += (uint64_t)n;
		break;
	case CONTROL:
	case CONSOLE:
		read_commands(i);
		break;
	case LEDGER:
		read_records(i);
		break;
	case POWER_BUTTON:
		n = read(polls[i].fd, &event, sizeof event);
		if (n != sizeof event)
			drop(i);
		else if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			power_off = 1;
		break;
	case UNUSED:
		break;
	}
}

// watch_power_button makes an orderly shutdown from outside work.
static void watch_power_button(void)
{
	for (int i = 0; i < 8; i++) {
		char path[32];
		snprintf(path, sizeof path, "/dev/input/event%d", i);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0)
			add(fd, POWER_BUTTON);
	}
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IONBF, 0);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		die("mmap");
	for (int i = 0; i < MAX_CLIENTS; i++)
		polls[i].fd = -1;
	listen_on(7, LISTEN_ECHO);
	listen_on(8, LISTEN_CONTROL);
	listen_on(9, LISTEN_HASH);
	listen_on(10, LISTEN_LEDGER);
	add(STDIN_FILENO, CONSOLE);
	watch_power_button();

	read_boot_id();
	recall_lines();
	unsigned rate = argc > 1 ? parse_number(argv[1], MAX_RATE) : 0;
	if (rate)
		start(&lines_pid, rate, write_lines);
	rate = argc > 2 ? parse_number(argv[2], MAX_RATE) : 0;
	if (rate)
		start(&load_pid, rate, write_load);
	reply(STDOUT_FILENO, "ftguest ready uptime_ms=%llu\n", (unsigned long long)now_ms());

	while (!power_off) {
		if (poll(polls, MAX_CLIENTS, -1) < 0)
			continue;
		for (int i = 0; i < MAX_CLIENTS; i++)
			if (polls[i].fd >= 0 && polls[i].revents)
				serve(i);
	}
	stop(&lines_pid);
	stop(&load_pid);
	stop(&grow_pid);
	sync();
	reply(STDOUT_FILENO, "ftguest poweroff\n");
	return 0;
}
