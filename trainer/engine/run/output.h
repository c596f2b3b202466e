/* Output of the ranks on its way to the agent: a bounded queue that never makes a writer wait. */
#ifndef HS_RUN_OUTPUT_H
#define HS_RUN_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

#define HS_OUTPUT_PIECES      64
#define HS_OUTPUT_PIECE_BYTES 16384u

typedef struct hs_output_piece {
    int32_t rank;
    int32_t stream; /* 1 stdout, 2 stderr */
    uint64_t epoch;
    uint32_t bytes;
    char data[HS_OUTPUT_PIECE_BYTES];
} hs_output_piece;

/* 1 MiB of pieces, oldest first. Zero-initialise. */
typedef struct hs_output {
    uint32_t first, count;
    uint64_t dropped_bytes; /* since last looked at */
    hs_output_piece pieces[HS_OUTPUT_PIECES];
} hs_output;

/* Appends; joins with the stream's last piece where that has room; the oldest piece makes room
 * where all are full. */
void hs_output_push(hs_output *output, uint64_t epoch, int32_t rank, int32_t stream,
                    const char *data, size_t bytes);
/* The oldest piece, or NULL. */
const hs_output_piece *hs_output_first(const hs_output *output);
void hs_output_pop(hs_output *output);

/* Writes to a descriptor only what it takes at once (files, or pipes with room); the rest is
 * dropped. */
void hs_output_echo(int fd, const char *data, size_t bytes);

#endif
