#include "core/arena.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20, COLLAPSE_AT_ONCE = 64 }; /* huge pages */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; the C libraries' headers are younger */
#endif

/* Addresses for bytes, aligned to a huge page where it fills one. */
static hs_status reserve(size_t bytes, int protection, hs_arena *arena, hs_why *why) {
    *arena = (hs_arena){0};
    if (bytes == 0 || bytes > SIZE_MAX / 2) {
        return hs_fail(why, HS_E_MEMORY, "cannot reserve an arena of %zu bytes", bytes);
    }
    const size_t slack = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
    void *map = mmap(NULL, bytes + slack, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        return hs_fail(
            why, HS_E_MEMORY,
            "cannot reserve %zu bytes for the plan's memory: %s; use more stages, a smaller "
            "microbatch, or a machine with more memory",
            bytes, strerror(errno));
    }
    uintptr_t base = (uintptr_t)map;
    if (slack) base = (base + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
    *arena =
        (hs_arena){.base = (uint8_t *)base, .bytes = bytes, .map = map, .map_bytes = bytes + slack};
    return HS_OK;
}

hs_status hs_arena_create(size_t bytes, hs_arena *arena, hs_why *why) {
    HS_TRY(reserve(bytes, PROT_READ | PROT_WRITE, arena, why));
    if (bytes >= HUGE_PAGE)
        (void)madvise(arena->base, bytes, MADV_HUGEPAGE); /* a wish: refused is fine */
    return HS_OK;
}

typedef struct range {
    int fd;
    uint8_t *base;
    bool clear;
} range;

/* Each needs one small page present, else it is refused. Written and not read through the mapping: one that is mapped
 * has to be taken out of all processors' tables first, a third of the whole time. */
static bool collapse(const range *r, int64_t first, int64_t pages) {
    for (int64_t i = first; i < first + pages; i++)
        (void)!pwrite(r->fd, "", 1, (off_t)(i * HUGE_PAGE));
    return madvise(r->base + first * HUGE_PAGE, (size_t)pages * HUGE_PAGE, MADV_COLLAPSE) == 0;
}

static void take_pages(void *ctx, int64_t begin, int64_t end, int worker) {
    const range *r = ctx;
    (void)worker;
    for (int64_t at = begin; at < end; at += COLLAPSE_AT_ONCE) {
        const int64_t pages = end - at < COLLAPSE_AT_ONCE ? end - at : COLLAPSE_AT_ONCE;
        (void)collapse(r, at, pages); /* a wish: small pages are fine */
        if (r->clear) memset(r->base + at * HUGE_PAGE, 0, (size_t)pages * HUGE_PAGE);
    }
}

/* The memfd at its size; *left: an earlier process may have written to it. */
static hs_status size_file(int fd, size_t bytes, bool *left, hs_why *why) {
    struct stat found;
    if (fstat(fd, &found) != 0)
        return hs_fail(why, HS_E_IO, "the supervisor's arena cannot be read: %s", strerror(errno));
    *left = (size_t)found.st_size == bytes;
    if (!*left && (ftruncate(fd, 0) != 0 || ftruncate(fd, (off_t)bytes) != 0))
        return hs_fail(why, HS_E_MEMORY,
                       "the supervisor's arena cannot be made %zu bytes long: %s%s", bytes,
                       strerror(errno),
                       errno == EFBIG ? "; raise the limit on files (ulimit -f unlimited)" : "");
    return HS_OK;
}

hs_status hs_arena_open(int fd, size_t bytes, hs_pool *pool, hs_arena *arena, hs_why *why) {
    const bool huge = bytes >= HUGE_PAGE;
    const size_t unit = huge ? HUGE_PAGE : 64;
    const size_t whole = (bytes + unit - 1) / unit * unit;
    range r = {.fd = fd};
    HS_TRY(reserve(whole, PROT_NONE, arena, why));
    hs_status st = size_file(fd, whole, &r.clear, why);
    if (st == HS_OK && mmap(arena->base, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                            0) == MAP_FAILED)
        st = hs_fail(why, HS_E_MEMORY, "the supervisor's arena of %zu bytes cannot be mapped: %s",
                     whole, strerror(errno));
    if (st != HS_OK) {
        hs_arena_destroy(arena);
        return st;
    }
    arena->bytes = bytes;
    r.base = arena->base;
    if (!huge) {
        if (r.clear) memset(r.base, 0, whole);
        return HS_OK;
    }
    if (!collapse(&r, 0, 1)) {
        hs_arena_destroy(arena);
        (void)!ftruncate(fd, 0);
        return hs_arena_create(bytes, arena, why);
    }
    hs_parallel_for(pool, (int64_t)(whole / HUGE_PAGE), take_pages, &r);
    return HS_OK;
}

void hs_arena_destroy(hs_arena *arena) {
    if (arena->map) (void)munmap(arena->map, arena->map_bytes);
    *arena = (hs_arena){0};
}
