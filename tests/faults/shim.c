/* Faults between a process and its system, loaded before the C library (LD_PRELOAD).
 *
 *   FAULT_PATH    what the first two concern: files whose path begins so
 *   FAULT_SLOW    a file with the microseconds that every read and write takes longer
 *   FAULT_FULL    a file; while it exists there is no space left for any write
 *   FAULT_CLOCK   a file with the seconds by which the wall clock is wrong
 *
 * The files are looked at anew each time, so a test can begin and end a fault while a run goes on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

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
  if (writes && full && !access(full, F_OK)) {
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
