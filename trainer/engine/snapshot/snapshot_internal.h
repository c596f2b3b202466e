/* What the files of a rank's slots share: snapshot.c makes, maps and restores them, fill.c fills. */
#ifndef HS_SNAPSHOT_INTERNAL_H
#define HS_SNAPSHOT_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "snapshot/snapshot.h"

/* One tensor's master, m or v, or the rank's piece of it: where it lies in a slot's data and in the arena. Ascending, without
 * overlap. */
typedef struct hs_piece {
    uint64_t at;            /* in the data */
    uint64_t bytes, offset; /* in the arena */
} hs_piece;

typedef struct hs_mapping {
    int fd;
    uint8_t *map; /* hs_slot_header, checksums, data */
} hs_mapping;

/* A fill from begin to its end. Of two threads: whose it is, `state` says, under the lock. */
typedef enum hs_fill_state { HS_FILL_NONE, HS_FILL_RUNS, HS_FILL_ENDED } hs_fill_state;

typedef struct hs_fill {
    hs_fill_state state;
    hs_snapshot_done what;
    int64_t begin_ns;
    hs_status status; /* once it ended */
    hs_why why;
} hs_fill;

struct hs_snapshot {
    uint32_t position, replica;
    uint8_t plan_digest[32], what_digest[32];
    uint64_t epoch, data_offset, data_bytes, chunks, slot_bytes;
    uint8_t *arena; /* NULL: `device` copies */
    hs_snapshot_device device;
    hs_pool *pool;
    const hs_log *log;
    uint32_t piece_count;
    hs_piece *pieces;
    int count, newest, claimed; /* slots; I2, -1: none; for the next fill, -1: none */
    hs_mapping slots[HS_SNAPSHOT_SLOTS_MAX];

    bool under_way; /* the rank's thread's: a fill began, and was not taken yet */
    hs_fill fill;
    /* the thread that ends fills, where a device copies */
    bool threaded;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool quit;
    _Atomic bool abandon;
    int ended_fd;  /* an eventfd, readable when a fill ended; -1: none */
    hs_pool *sums; /* its own threads */
};

static inline hs_slot_header *hs_snapshot_header(const hs_snapshot *s, int i) {
    return (void *)s->slots[i].map;
}
static inline uint64_t *hs_snapshot_sums(const hs_snapshot *s, int i) {
    return (void *)(s->slots[i].map + HS_SLOT_HEADER_BYTES);
}

/* The two words that two processes write and read: plain fields in the wire header, atomics here.
 */
static inline uint32_t hs_snapshot_load(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}
static inline void hs_snapshot_store(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

/* Of bytes [24, 136), [140, 156) and the checksums. */
uint32_t hs_snapshot_header_crc(const hs_snapshot *s, int i);

/* One pass over a slot's chunks, by a pool. */
typedef struct hs_chunks {
    const hs_snapshot *snapshot;
    int slot;
    bool to_slot;
    _Atomic int64_t bad; /* the first damaged chunk that was found; INT64_MAX: none */
} hs_chunks;

/* To the slot: copies (where the arena is the host's; else gaps alone are zeroed) and sums. From it:
 * compares, and copies likewise. Leaves early where the snapshot is abandoned. */
void hs_snapshot_chunks(void *chunks, int64_t begin, int64_t end, int worker);

/* fill.c: the thread, where it is needed. */
hs_status hs_snapshot_start_filling(hs_snapshot *s, hs_why *why);

#endif
