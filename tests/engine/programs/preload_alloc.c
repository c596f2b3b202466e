/* Loaded before the engine. Two proofs:
 *
 *   HS_ALLOC_FORBID=1   aborts the process (exit 99) at an allocation between the "start" line and
 * the "end" line of its standard output: nothing allocates after start-up. HS_ALLOC_FAIL=N     the
 * N-th allocation (from 0) and every later one returns NULL: clean-up paths are walked.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int forbid, armed;
static long fail_at = -1, count;

__attribute__((constructor)) static void read_environment(void) {
    const char *n = getenv("HS_ALLOC_FAIL");
    forbid = getenv("HS_ALLOC_FORBID") != NULL;
    if (n) fail_at = strtol(n, NULL, 10);
}

static int refuse(void) {
    if (armed && forbid) {
        static const char words[] = "an allocation after start-up\n";
        (void)!write(2, words, sizeof words - 1);
        _exit(99);
    }
    return fail_at >= 0 && count++ >= fail_at;
}

extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t n, size_t bytes);
extern void *__libc_realloc(void *at, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes) {
    if (!refuse()) return __libc_malloc(bytes);
    errno = ENOMEM;
    return NULL;
}
void *calloc(size_t n, size_t bytes) {
    if (!refuse()) return __libc_calloc(n, bytes);
    errno = ENOMEM;
    return NULL;
}
void *realloc(void *at, size_t bytes) {
    if (!refuse()) return __libc_realloc(at, bytes);
    errno = ENOMEM;
    return NULL;
}
void *aligned_alloc(size_t alignment, size_t bytes) {
    if (!refuse()) return __libc_memalign(alignment, bytes);
    errno = ENOMEM;
    return NULL;
}

/* The engine prints its lines with writev. */
ssize_t writev(int fd, const struct iovec *parts, int n) {
    static ssize_t (*real)(int, const struct iovec *, int);
    static const char start[] = "{\"event\":\"start\"", end[] = "{\"event\":\"end\"";
    if (fd == 1 && n > 0 && parts[0].iov_len >= sizeof start) {
        if (memcmp(parts[0].iov_base, end, sizeof end - 1) == 0) armed = 0;
        const int starts = memcmp(parts[0].iov_base, start, sizeof start - 1) == 0;
        if (!real) real = (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");
        const ssize_t done = real(fd, parts, n);
        if (starts) armed = 1;
        return done;
    }
    if (!real) real = (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");
    return real(fd, parts, n);
}
