/* Memory that is planned, reserved once, and never grows: zero at first, in huge pages where the
 * system gives them. Owner: whoever created it.
 *
 * An arena is private to the process, its pages taken when first touched; or it lies in a memfd
 * that somebody else keeps, which takes all its pages when it is first opened, and still has them
 * for the process that opens it next: finding, zeroing and mapping gigabytes anew takes seconds.
 */
#ifndef HS_CORE_ARENA_H
#define HS_CORE_ARENA_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "core/threads.h"

typedef struct hs_arena {
    uint8_t *base; /* aligned to 2 MiB where bytes is at least that, else to a page */
    size_t bytes;
    void *map; /* what munmap takes */
    size_t map_bytes;
} hs_arena;

/* A private one. HS_E_MEMORY with why where the system refuses. */
hs_status hs_arena_create(size_t bytes, hs_arena *arena, hs_why *why);

/* The one whose pages the memfd keeps; fd stays the caller's. pool zeroes what was left in it;
 * NULL: this thread. Where the kernel gives a memfd no huge pages (before Linux 6.1) the memfd is
 * emptied and the arena is a private one: huge pages are worth more, in every step, than a faster
 * start after a failure. HS_E_MEMORY, HS_E_IO with why. */
hs_status hs_arena_open(int fd, size_t bytes, hs_pool *pool, hs_arena *arena, hs_why *why);

/* Safe on a zeroed arena. */
void hs_arena_destroy(hs_arena *arena);

#endif
