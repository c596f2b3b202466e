#include "run/output.h"

#include <limits.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

const hs_output_piece *hs_output_first(const hs_output *output) {
    return output->count ? &output->pieces[output->first] : NULL;
}

void hs_output_pop(hs_output *output) {
    output->first = (output->first + 1) % HS_OUTPUT_PIECES;
    output->count--;
}

static hs_output_piece *last_of(hs_output *output, uint64_t epoch, int32_t rank, int32_t stream) {
    for (uint32_t i = output->count; i-- > 0;) {
        hs_output_piece *piece = &output->pieces[(output->first + i) % HS_OUTPUT_PIECES];
        if (piece->rank == rank && piece->stream == stream && piece->epoch == epoch) return piece;
    }
    return NULL;
}

void hs_output_push(hs_output *output, uint64_t epoch, int32_t rank, int32_t stream,
                    const char *data, size_t bytes) {
    while (bytes) {
        hs_output_piece *piece = last_of(output, epoch, rank, stream);
        if (!piece || piece->bytes == HS_OUTPUT_PIECE_BYTES) {
            if (output->count == HS_OUTPUT_PIECES) {
                output->dropped_bytes += hs_output_first(output)->bytes;
                hs_output_pop(output);
            }
            piece = &output->pieces[(output->first + output->count++) % HS_OUTPUT_PIECES];
            piece->epoch = epoch;
            piece->rank = rank;
            piece->stream = stream;
            piece->bytes = 0;
        }
        const size_t room = HS_OUTPUT_PIECE_BYTES - piece->bytes;
        const size_t n = bytes < room ? bytes : room;
        memcpy(piece->data + piece->bytes, data, n);
        piece->bytes += (uint32_t)n;
        data += n;
        bytes -= n;
    }
}

void hs_output_echo(int fd, const char *data, size_t bytes) {
    while (bytes) {
        struct pollfd room = {.fd = fd, .events = POLLOUT};
        if (poll(&room, 1, 0) != 1 || !(room.revents & POLLOUT)) return;
        /* A pipe with POLLOUT takes PIPE_BUF bytes without waiting. */
        const ssize_t n = write(fd, data, bytes < PIPE_BUF ? bytes : PIPE_BUF);
        if (n <= 0) return;
        data += n;
        bytes -= (size_t)n;
    }
}
