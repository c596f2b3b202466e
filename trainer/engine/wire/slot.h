/* A snapshot slot: a sealed memfd (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), one a slot and rank, made and
 * pre-faulted by the agent, mapped by the rank.
 *
 *   offset              size                  what
 *        0              4096                  hs_slot_header
 *     4096              8 * chunks            u64 checksums, one a chunk of data, padded to 4096
 *   data_offset         data_bytes            the state: hs_plan_state.slot_offset counts from here
 *
 * chunks = ceil(data_bytes / HS_SLOT_CHUNK); a checksum is CRC-32 (zlib's, which C and Python both have fast) of the
 * chunk, zero-extended to u64. Who reads data verifies it: the rank that restores, the agent that stores.
 *
 * Who writes what: the rank everything but `hold`; the agent `hold`, and everything while it restores a slot
 * before it sends START. Before a rank says that it has a slot for the next snapshot it claims one: EMPTY, or READY but
 * not its newest, and not held: claim = 1; a full fence; hold is still 0, else claim = 0 and another one. From then on
 * the agent does not take hold of it, and what it holds stays whole until the gang has decided: then claim = 0, or a save:
 * state = FILLING, generation += 1; a full fence; data, checksums, step, epoch, header_crc; claim = 0; state = READY
 * (release).
 * A reader (the agent) sets hold = 1; a full fence; reads claim (must be 0), generation and state (must be READY),
 * header_crc; a full fence; data; a full fence; generation again: unchanged, or what it read is void. Then hold = 0. On
 * processors that order their stores and their loads (x86-64) only the first of the reader's fences has something to do.
 */
#ifndef HS_WIRE_SLOT_H
#define HS_WIRE_SLOT_H

#include <stdint.h>

#define HS_SLOT_MAGIC "HSSLOT\r\n"
#define HS_SLOT_VERSION 2u
#define HS_SLOT_HEADER_BYTES 4096u
#define HS_SLOT_CHUNK (4u << 20)
#define HS_SLOTS_MAX 16u /* of a rank: the plan allows, the agent hands over and the rank takes so many */

enum { HS_SLOT_EMPTY = 0, HS_SLOT_FILLING = 1, HS_SLOT_READY = 2 };
enum { HS_SLOT_SUM_CRC32 = 2 }; /* version 1 of slots had others */

typedef struct hs_slot_header {
    char magic[8];
    uint32_t version;
    uint32_t position;       /* of the rank */
    uint32_t state;          /* HS_SLOT_* ; offset 16 */
    uint32_t hold;           /* 1: the agent reads it; offset 20 */
    uint64_t generation;     /* +1 a fill; offset 24 */
    int64_t step;            /* optimizer steps done; offset 32 */
    uint64_t epoch;          /* of the attempt that filled it; offset 40 */
    uint64_t data_offset;    /* offset 48 */
    uint64_t data_bytes;     /* offset 56 */
    uint64_t chunks;         /* offset 64 */
    uint8_t plan_digest[32]; /* layout; offset 72 */
    uint8_t what_digest[32]; /* offset 104 */
    uint32_t header_crc;     /* CRC-32 of bytes [24, 136), then of [140, 156), then of the checksum table; offset 136 */
    uint32_t final;          /* 1: last of the attempt (done or preempted): the rank waits for its commit; offset 140 */
    uint32_t checksum_kind;  /* HS_SLOT_SUM_*; offset 144 */
    uint32_t replica;        /* of the rank */
    uint32_t persist;        /* 1: to be stored; else it is for a start from memory alone; offset 152 */
    uint32_t claim;          /* 1: the rank fills it next, if the gang saves; offset 156 */
} hs_slot_header;

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Static_assert(sizeof(hs_slot_header) == 160, "slot header");
#endif

#endif
