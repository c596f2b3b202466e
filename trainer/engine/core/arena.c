#include "core/arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

hs_status hs_arena_create(size_t bytes, hs_arena *arena, hs_why *why) {
    *arena = (hs_arena){0};
    if (bytes == 0 || bytes > SIZE_MAX / 2) {
        return hs_fail(why, HS_E_MEMORY, "cannot reserve an arena of %zu bytes", bytes);
    }
    const size_t slack = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
    void *map =
        mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        return hs_fail(
            why, HS_E_MEMORY,
            "cannot reserve %zu bytes for the plan's memory: %s; use more stages, a smaller "
            "microbatch, or a machine with more memory",
            bytes, strerror(errno));
    }
    uintptr_t base = (uintptr_t)map;
    if (slack) {
        base = (base + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
        (void)madvise((void *)base, bytes, MADV_HUGEPAGE); /* a wish: refused is fine */
    }
    *arena =
        (hs_arena){.base = (uint8_t *)base, .bytes = bytes, .map = map, .map_bytes = bytes + slack};
    return HS_OK;
}

void hs_arena_destroy(hs_arena *arena) {
    if (arena->map) (void)munmap(arena->map, arena->map_bytes);
    *arena = (hs_arena){0};
}
