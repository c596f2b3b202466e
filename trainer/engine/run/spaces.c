#include "run/spaces.h"

#include <stdlib.h>

enum { WINDOW_BYTES = 1 << 20 }; /* at least: any message of the position fits too */

struct hs_host_piece {
    uint64_t offset, bytes;
    uint64_t at; /* in the pinned memory; its address from create on */
};

static const hs_host_piece *piece_of(const hs_spaces *s, uint64_t offset, uint64_t bytes) {
    for (uint32_t i = 0; i < s->piece_count; i++) {
        const hs_host_piece *piece = &s->pieces[i];
        if (offset >= piece->offset && offset - piece->offset <= piece->bytes &&
            bytes <= piece->bytes - (offset - piece->offset))
            return piece;
    }
    return NULL;
}

static void add(hs_spaces *s, uint64_t offset, uint64_t bytes, uint64_t *total) {
    if (piece_of(s, offset, bytes)) return;
    s->pieces[s->piece_count++] = (hs_host_piece){.offset = offset, .bytes = bytes, .at = *total};
    *total += (bytes + 63) / 64 * 64;
}

static void add_blocks(hs_spaces *s, const hs_plan *plan, const hs_plan_position *p, int kind,
                       uint64_t *total) {
    for (uint32_t i = 0; i < p->steps; i++) {
        const hs_plan_action *a = &plan->actions[p->first_step + i];
        if (a->kind == kind) add(s, a->ref.offset, a->ref.bytes, total);
    }
}

/* Lists the HOST pieces; returns how many bytes they take. */
static uint64_t find_pieces(hs_spaces *s, const hs_plan *plan, const hs_plan_position *p) {
    const uint64_t rows[3] = {p->tokens_offset, p->targets_offset, p->loss_offset};
    uint64_t total = 0;
    for (uint32_t m = 0; m < p->mb_count; m++)
        for (int k = 0; k < 3; k++)
            if (rows[k] != UINT64_MAX)
                add(s, p->mb_offset + m * p->mb_stride + rows[k], 4 * (uint64_t)hs_plan_rows(plan),
                    &total);
    if (p->sumsq_offset != UINT64_MAX)
        add(s, p->sumsq_offset, 8 * (uint64_t)plan->count[HS_SECTION_TENSORS], &total);
    if (p->control_offset != UINT64_MAX) add(s, p->control_offset, sizeof(hs_step_control), &total);
    add_blocks(s, plan, p, HS_A_COMBINE, &total); /* holds position 0's own report */
    add_blocks(s, plan, p, HS_A_REPORT, &total);
    add_blocks(s, plan, p, HS_A_APPLY, &total);
    add_blocks(s, plan, p, HS_A_MERGE, &total);
    add_blocks(s, plan, p, HS_A_CHECK, &total);
    add_blocks(s, plan, p, HS_A_FORESEE, &total);
    return total;
}

static uint64_t longest_message(const hs_plan *plan, const hs_plan_position *p) {
    uint64_t most = WINDOW_BYTES;
    for (size_t i = 0; i < plan->count[HS_SECTION_CHANNELS]; i++) {
        const hs_plan_channel *c = &plan->channels[i];
        if ((c->from == p->position || c->to == p->position) && c->bytes > most) most = c->bytes;
    }
    return (most + 63) / 64 * 64;
}

static hs_status open_host(hs_spaces *s, const hs_plan *plan, const hs_plan_position *p,
                           hs_why *why) {
    /* rows, norms and control, and blocks of actions: a plan says how many MERGEs have one of their own */
    s->pieces = calloc(3 * (size_t)p->mb_count + 2 + p->steps, sizeof *s->pieces);
    if (!s->pieces) return hs_fail(why, HS_E_MEMORY, "no memory for the list of HOST memory");
    const uint64_t total = find_pieces(s, plan, p);
    s->window_bytes = longest_message(plan, p);
    s->host_bytes = total + (HS_WINDOWS + 1) * s->window_bytes;
    HS_TRY(s->backend->pinned(s->device, s->host_bytes, &s->host, why));
    s->out_window = s->host + total;
    for (int w = 0; w < HS_WINDOWS; w++)
        s->in_window[w] = s->out_window + (uint64_t)(w + 1) * s->window_bytes;
    return HS_OK;
}

hs_status hs_spaces_create(const hs_backend *backend, hs_device *device, const hs_plan *plan,
                           const hs_plan_position *position, int fd, hs_spaces *s, hs_why *why) {
    *s = (hs_spaces){.backend = backend, .device = device, .bytes = position->arena_bytes};
    hs_status st = backend->alloc(device, s->bytes, fd, &s->arena, why);
    if (st == HS_OK && !backend->unified) st = open_host(s, plan, position, why);
    if (st != HS_OK) hs_spaces_destroy(s);
    return st;
}

void hs_spaces_destroy(hs_spaces *s) {
    free(s->pieces);
    *s = (hs_spaces){0};
}

uint8_t *hs_spaces_host(const hs_spaces *s, uint64_t offset, uint64_t bytes) {
    if (s->backend->unified) return s->arena + offset;
    const hs_host_piece *piece = piece_of(s, offset, bytes);
    return piece ? s->host + piece->at + (offset - piece->offset) : NULL;
}

static void issued(hs_spaces *s, int stream) {
    for (int other = 0; other < HS_STREAMS; other++) s->news[other][stream] = true;
}

hs_status hs_spaces_after(hs_spaces *s, int stream, int before, hs_why *why) {
    if (stream == before || !s->news[stream][before]) return HS_OK;
    s->news[stream][before] = false;
    HS_TRY(s->backend->record(s->device, before, HS_EVENT_STREAM + before, why));
    return s->backend->follow(s->device, stream, HS_EVENT_STREAM + before, why);
}

hs_status hs_spaces_join(hs_spaces *s, hs_why *why) {
    if (s->backend->unified) return HS_OK;
    for (int stream = 0; stream < HS_TURN_STREAMS; stream++)
        for (int before = 0; before < HS_TURN_STREAMS; before++)
            HS_TRY(hs_spaces_after(s, stream, before, why));
    return HS_OK;
}

hs_status hs_spaces_begin(hs_spaces *s, const hs_turn *turn, hs_why *why) {
    if (!turn || s->backend->unified) return HS_OK;
    for (int u = 0; u < HS_TURN_STREAMS; u++)
        if (turn->follow[u] >= 0)
            HS_TRY(s->backend->follow(s->device, turn->stream, turn->follow[u], why));
    if (!turn->saved || !s->saving) return HS_OK;
    s->saving = false;
    return s->backend->follow(s->device, turn->stream, HS_EVENT_STREAM + HS_STREAM_SAVE, why);
}

hs_status hs_spaces_end(hs_spaces *s, const hs_turn *turn, hs_why *why) {
    if (!turn || s->backend->unified || turn->record < 0) return HS_OK;
    return s->backend->record(s->device, turn->stream, turn->record, why);
}

hs_status hs_spaces_put(hs_spaces *s, uint64_t offset, const void *host, uint64_t bytes,
                        hs_why *why) {
    uint8_t *const to = s->arena + offset;
    if (s->backend->unified && host == to) return HS_OK;
    issued(s, HS_STREAM_IN);
    HS_TRY(s->backend->copy(s->device, HS_STREAM_IN, to, host, bytes, HS_COPY_TO_DEVICE, why));
    for (int w = 0; w < HS_WINDOWS; w++)
        if (host == s->in_window[w])
            return s->backend->record(s->device, HS_STREAM_IN, HS_EVENT_WINDOW + w, why);
    return HS_OK;
}

hs_status hs_spaces_get(hs_spaces *s, uint64_t offset, void *host, uint64_t bytes, hs_why *why) {
    const uint8_t *const from = s->arena + offset;
    if (s->backend->unified && host == from) return HS_OK;
    issued(s, HS_STREAM_OUT);
    return s->backend->copy(s->device, HS_STREAM_OUT, host, from, bytes, HS_COPY_FROM_DEVICE, why);
}

static hs_status await(hs_spaces *s, int event, hs_why *why) {
    return s->await ? s->await(s->await_ctx, event, why) : s->backend->wait(s->device, event, why);
}

hs_status hs_spaces_in_window(hs_spaces *s, uint8_t **at, hs_why *why) {
    const int w = (int)(s->in_turn++ % HS_WINDOWS);
    *at = s->in_window[w];
    return await(s, HS_EVENT_WINDOW + w, why);
}

uint8_t *hs_spaces_out_window(hs_spaces *s) {
    return s->out_window;
}

hs_status hs_spaces_launch(hs_spaces *s, uint16_t kernel, const hs_args *args, uint32_t count,
                           hs_why *why) {
    issued(s, HS_STREAM_COMPUTE);
    return s->backend->launch(s->device, HS_STREAM_COMPUTE, kernel, args, count, why);
}

uint8_t *hs_spaces_message(hs_spaces *s, int stream, uint64_t offset) {
    issued(s, stream);
    return s->arena + offset;
}

hs_status hs_spaces_replay(hs_spaces *s, hs_graph *graph, hs_why *why) {
    issued(s, HS_STREAM_COMPUTE);
    return s->backend->replay(s->device, HS_STREAM_COMPUTE, graph, why);
}

void hs_spaces_settle(hs_spaces *s, uint64_t offset, uint64_t bytes) {
    if (s->backend->settle) s->backend->settle(s->device, s->arena + offset, bytes);
}

hs_status hs_spaces_wait(hs_spaces *s, int stream, hs_why *why) {
    HS_TRY(s->backend->record(s->device, stream, HS_EVENT_STREAM + stream, why));
    return await(s, HS_EVENT_STREAM + stream, why);
}

hs_status hs_spaces_readable(hs_spaces *s, uint64_t offset, uint64_t *bytes, const uint8_t **at,
                             hs_why *why) {
    const bool unified = s->backend->unified;
    uint8_t *const to = unified ? s->arena + offset : s->out_window;
    if (!unified && *bytes > s->window_bytes) *bytes = s->window_bytes;
    *at = to;
    HS_TRY(hs_spaces_after(s, HS_STREAM_OUT, HS_STREAM_COMPUTE, why));
    HS_TRY(hs_spaces_get(s, offset, to, *bytes, why));
    return hs_spaces_wait(s, HS_STREAM_OUT, why);
}

hs_status hs_spaces_writable(hs_spaces *s, uint64_t offset, uint64_t *bytes, uint8_t **at,
                             hs_why *why) {
    HS_TRY(hs_spaces_after(s, HS_STREAM_IN, HS_STREAM_COMPUTE, why));
    if (s->backend->unified) {
        *at = s->arena + offset;
        return hs_spaces_wait(s, HS_STREAM_IN, why);
    }
    if (*bytes > s->window_bytes) *bytes = s->window_bytes;
    return hs_spaces_in_window(s, at, why);
}

hs_status hs_spaces_save(hs_spaces *s, uint64_t offset, void *host, uint64_t bytes, hs_why *why) {
    HS_TRY(hs_spaces_after(s, HS_STREAM_SAVE, HS_STREAM_COMPUTE, why));
    issued(s, HS_STREAM_SAVE);
    return s->backend->copy(s->device, HS_STREAM_SAVE, host, s->arena + offset, bytes,
                            HS_COPY_FROM_DEVICE, why);
}

hs_status hs_spaces_saved(hs_spaces *s, hs_why *why) {
    s->saving = true;
    return s->backend->record(s->device, HS_STREAM_SAVE, HS_EVENT_STREAM + HS_STREAM_SAVE, why);
}

hs_status hs_spaces_wait_saved(const hs_spaces *s, hs_why *why) {
    return s->backend->wait(s->device, HS_EVENT_STREAM + HS_STREAM_SAVE, why);
}
