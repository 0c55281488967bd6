/* Faults between a process and its system, loaded before the C library (LD_PRELOAD).
 *
 *   FAULT_PATH    what the first two concern: files whose path begins so
 *   FAULT_SLOW    a file with the microseconds that every read and write takes longer
 *   FAULT_FULL    a file; while it exists there is no space left for any write
 *   FAULT_PROCESS the only process that has no space, by its JAX_PROCESS_ID; all if it is not set
 *   FAULT_CLOCK   a file with the seconds by which the wall clock is wrong
 *
 * The files are looked at anew each time, so a test can begin and end a fault while a run goes on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* What the system has by this name. */
#define NEXT(name)                                  \
  ({                                                \
    static __typeof__(&name) next;                  \
    if (!next) next = dlsym(RTLD_NEXT, #name);      \
    next;                                           \
  })

/* The number in the file that a variable names, or 0. */
static long number(const char *variable) {
  const char *path = getenv(variable);
  int fd = path ? NEXT(open)(path, O_RDONLY) : -1;
  if (fd < 0) return 0;
  char text[32];
  ssize_t size = NEXT(read)(fd, text, sizeof text - 1);
  close(fd);
  if (size <= 0) return 0;
  text[size] = 0;
  return atol(text);
}

/* Whether this is one of the processes whose disk may be full. */
static int is_concerned(void) {
  const char *only = getenv("FAULT_PROCESS"), *self = getenv("JAX_PROCESS_ID");
  return !only || (self && !strcmp(only, self));
}

/* Waits if the file is slow; whether it is on a full disk, for who writes. */
static int meet(int fd, int writes) {
  const char *prefix = getenv("FAULT_PATH"), *full = getenv("FAULT_FULL");
  char link[64], path[4096];
  if (!prefix) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  if (strncmp(path, prefix, strlen(prefix))) return 0;
  long microseconds = number("FAULT_SLOW");
  if (microseconds) usleep(microseconds);
  if (writes && full && is_concerned() && !access(full, F_OK)) {
    errno = ENOSPC;
    return 1;
  }
  return 0;
}

#define READS(type, name, parameters, ...) \
  type name parameters { meet(fd, 0); return NEXT(name)(__VA_ARGS__); }
#define WRITES(type, name, parameters, ...) \
  type name parameters { return meet(fd, 1) ? -1 : NEXT(name)(__VA_ARGS__); }

READS(ssize_t, read, (int fd, void *to, size_t size), fd, to, size)
READS(ssize_t, pread, (int fd, void *to, size_t size, off_t at), fd, to, size, at)
READS(ssize_t, pread64, (int fd, void *to, size_t size, off64_t at), fd, to, size, at)
WRITES(ssize_t, write, (int fd, const void *from, size_t size), fd, from, size)
WRITES(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), fd, from, size, at)
WRITES(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), fd, from, size, at)
WRITES(ssize_t, writev, (int fd, const struct iovec *from, int num), fd, from, num)
WRITES(ssize_t, pwritev, (int fd, const struct iovec *from, int num, off_t at), fd, from, num, at)
WRITES(int, fsync, (int fd), fd)

/* Who waits until a time of the wrong clock must not wait for that of the kernel's, which is right. */
static const struct timespec *met(const struct timespec *until, struct timespec *at) {
  if (!until || until->tv_sec < 1000000000) return until; /* of a clock that began at the boot */
  *at = *until;
  at->tv_sec -= number("FAULT_CLOCK");
  return at;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *until) {
  struct timespec at;
  static __typeof__(&pthread_cond_timedwait) next;
  if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* not the older */
  if (!next) next = NEXT(pthread_cond_timedwait);
  return next(condition, mutex, met(until, &at));
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *until) {
  struct timespec at;
  return NEXT(pthread_cond_clockwait)(condition, mutex, clock, met(until, &at));
}

long syscall(long what, ...) {
  long of[6];
  va_list rest;
  va_start(rest, what);
  for (int i = 0; i < 6; i++) of[i] = va_arg(rest, long);
  va_end(rest);
  struct timespec at;
  if (what == SYS_futex && of[1] & FUTEX_CLOCK_REALTIME) of[3] = (long)met((void *)of[3], &at);
  return NEXT(syscall)(what, of[0], of[1], of[2], of[3], of[4], of[5]);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int status = NEXT(clock_gettime)(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += number("FAULT_CLOCK");
  return status;
}

int gettimeofday(struct timeval *now, void *zone) {
  int status = NEXT(gettimeofday)(now, zone);
  now->tv_sec += number("FAULT_CLOCK");
  return status;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
