/* Memory that is planned, reserved once, and never grows: one anonymous mapping, zero, in huge
 * pages where the system gives them. Owner: whoever created it. Pages are taken when first touched.
 */
#ifndef HS_CORE_ARENA_H
#define HS_CORE_ARENA_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct hs_arena {
    uint8_t *base; /* aligned to 2 MiB where bytes is at least that, else to a page */
    size_t bytes;
    void *map; /* what munmap takes */
    size_t map_bytes;
} hs_arena;

/* HS_E_MEMORY with why where the system refuses. */
hs_status hs_arena_create(size_t bytes, hs_arena *arena, hs_why *why);
/* Safe on a zeroed arena. */
void hs_arena_destroy(hs_arena *arena);

#endif
