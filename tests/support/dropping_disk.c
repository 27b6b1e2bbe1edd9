/* Loaded before a program (LD_PRELOAD): writes down, in order, everything that it does to the files under $DISK_ROOT.
   The drill then plays the record up to some point and leaves out what was not fsynced, as a power cut may.

   record: u8 kind, u32 path bytes, u32 second path bytes, u64 offset, u64 data bytes, then path, second path, data
   kinds:  w write, t truncate, s fsync (of a file or a folder), c create, d mkdir, r rename, u unlink, m rmdir */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int out = -2;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t raw_write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(fd, data, n);
}

static const char *inside(const char *path) {
    const char *root = getenv("DISK_ROOT");
    size_t n = root ? strlen(root) : 0;
    if (!n || strncmp(path, root, n) || (path[n] && path[n] != '/')) return NULL;
    return path[n] ? path + n + 1 : ".";
}

static const char *of_path(int dir, const char *path, char *buffer) {
    if (path[0] == '/') return inside(path);
    char base[PATH_MAX];
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return NULL;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return NULL;
        base[n] = 0;
    }
    snprintf(buffer, PATH_MAX, "%.2000s/%.2000s", base, path);
    return inside(buffer);
}

static const char *of_fd(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    if (n < 0) return NULL;
    buffer[n] = 0;
    return inside(buffer);
}

static void note(char kind, const char *path, const char *second, uint64_t offset, const void *data, uint64_t n) {
    if (out == -2) {
        REAL(int, "open", const char *, int, ...);
        out = real(getenv("DISK_RECORD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    uint32_t a = strlen(path), b = second ? strlen(second) : 0;
    char head[25];
    head[0] = kind;
    memcpy(head + 1, &a, 4), memcpy(head + 5, &b, 4), memcpy(head + 9, &offset, 8), memcpy(head + 17, &n, 8);
    raw_write(out, head, 25), raw_write(out, path, a);
    if (b) raw_write(out, second, b);
    if (n) raw_write(out, data, n);
}

/* The deed and its record are one step, or the record's order would not be the disk's. */
#define TOGETHER(result, deed, path, record) \
    do { \
        if (path) pthread_mutex_lock(&lock); \
        result = deed; \
        int kept = errno; \
        if (path) { \
            if (result >= 0) { record; } \
            pthread_mutex_unlock(&lock); \
        } \
        errno = kept; \
    } while (0)

static int opened(int dir, const char *path, int flags, mode_t mode, const char *name) {
    REAL(int, "openat", int, const char *, int, ...);
    char buffer[PATH_MAX];
    const char *known = (flags & (O_CREAT | O_TRUNC)) ? of_path(dir, path, buffer) : NULL;
    (void)name;
    int result, was = known && faccessat(dir, path, F_OK, 0) == 0;
    TOGETHER(result, real(dir, path, flags, mode), known, {
        if (!was) note('c', known, NULL, 0, NULL, 0);
        else if (flags & O_TRUNC) note('t', known, NULL, 0, NULL, 0);
    });
    return result;
}

#define MODE va_list more; va_start(more, flags); mode_t mode = va_arg(more, int); va_end(more)
int open(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode, "open"); }
int open64(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode, "open"); }
int openat(int dir, const char *path, int flags, ...) { MODE; return opened(dir, path, flags, mode, "openat"); }
int openat64(int dir, const char *path, int flags, ...) { MODE; return opened(dir, path, flags, mode, "openat"); }

ssize_t write(int fd, const void *data, size_t n) {
    char buffer[PATH_MAX];
    const char *path = of_fd(fd, buffer);
    if (!path) return raw_write(fd, data, n);
    off_t at = (fcntl(fd, F_GETFL) & O_APPEND) ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    ssize_t result;
    TOGETHER(result, raw_write(fd, data, n), path, note('w', path, NULL, at, data, result));
    return result;
}

static ssize_t placed(int fd, const void *data, size_t n, off_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    char buffer[PATH_MAX];
    const char *path = of_fd(fd, buffer);
    ssize_t result;
    TOGETHER(result, real(fd, data, n, at), path, note('w', path, NULL, at, data, result));
    return result;
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return placed(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return placed(fd, data, n, at); }

static int cut(int fd, off_t size) {
    REAL(int, "ftruncate64", int, off_t);
    char buffer[PATH_MAX];
    const char *path = of_fd(fd, buffer);
    int result;
    TOGETHER(result, real(fd, size), path, note('t', path, NULL, size, NULL, 0));
    return result;
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int synced(int fd, const char *name) {
    /* Nothing need reach this machine's disk: the record says what would have. */
    (void)name;
    char buffer[PATH_MAX];
    const char *path = of_fd(fd, buffer);
    int result;
    TOGETHER(result, fcntl(fd, F_GETFD) < 0 ? -1 : 0, path, note('s', path, NULL, 0, NULL, 0));
    return result;
}
int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

#define ONE(name, kind) \
    int name(const char *path) { \
        REAL(int, #name, const char *); \
        char buffer[PATH_MAX]; \
        const char *known = of_path(AT_FDCWD, path, buffer); \
        int result; \
        TOGETHER(result, real(path), known, note(kind, known, NULL, 0, NULL, 0)); \
        return result; \
    }
ONE(unlink, 'u')
ONE(rmdir, 'm')

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char buffer[PATH_MAX];
    const char *known = of_path(dir, path, buffer);
    int result;
    TOGETHER(result, real(dir, path, flags), known, note(flags & AT_REMOVEDIR ? 'm' : 'u', known, NULL, 0, NULL, 0));
    return result;
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    char buffer[PATH_MAX];
    const char *known = of_path(AT_FDCWD, path, buffer);
    int result;
    TOGETHER(result, real(path, mode), known, note('d', known, NULL, 0, NULL, 0));
    return result;
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    char one[PATH_MAX], two[PATH_MAX];
    const char *known = of_path(AT_FDCWD, from, one), *target = of_path(AT_FDCWD, to, two);
    int result;
    TOGETHER(result, real(from, to), known, note('r', known, target ? target : "", 0, NULL, 0));
    return result;
}
