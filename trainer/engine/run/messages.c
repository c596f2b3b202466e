#include "run/messages.h"

#include <stdlib.h>

/* Where a receive's message comes to, in host memory. */
typedef struct place {
    uint8_t *host, *at; /* host NULL: `at` is a window */
    uint64_t offset;
} place;

struct hs_messages {
    hs_messages_config c;
    uint64_t *sent, *posted; /* by channel, since create */
    place exchanged;         /* of the exchange that is under way */
};

static void bounds(const hs_plan_position *p, hs_list list, uint32_t *first, uint32_t *count) {
    const uint32_t firsts[HS_LISTS] = {p->first_init, p->first_load, p->first_step};
    const uint32_t counts[HS_LISTS] = {p->inits, p->loads, p->steps};
    *first = firsts[list];
    *count = counts[list];
}

static const hs_plan_action *action_of(const hs_messages *m, hs_list list, uint32_t i) {
    uint32_t first, count;
    bounds(m->c.position, list, &first, &count);
    HS_ASSERT(i < count);
    return &m->c.plan->actions[first + i];
}

uint32_t hs_messages_most(const hs_plan *plan, const hs_plan_position *position) {
    (void)plan;
    (void)position;
    return 1;
}

hs_status hs_messages_create(const hs_messages_config *config, hs_messages **out, hs_why *why) {
    *out = NULL;
    hs_messages *m = calloc(1, sizeof *m);
    const size_t channels = config->plan->count[HS_SECTION_CHANNELS];
    if (m) {
        m->c = *config;
        m->sent = calloc(channels + 1, sizeof *m->sent);
        m->posted = calloc(channels + 1, sizeof *m->posted);
    }
    if (!m || !m->sent || !m->posted) {
        hs_messages_destroy(m);
        return hs_fail(why, HS_E_MEMORY, "no memory for the messages of %zu channels", channels);
    }
    *out = m;
    return HS_OK;
}

void hs_messages_destroy(hs_messages *m) {
    if (!m) return;
    free(m->sent);
    free(m->posted);
    free(m);
}

/* From device to device: nobody waits here. */
static hs_status pass(hs_messages *m, const hs_plan_action *a, const hs_turn *turn, uint64_t offset,
                      uint64_t there, hs_why *why) {
    const bool sends = a->kind == HS_A_SEND;
    hs_stop_busy(m->c.stop, true);
    hs_status st = hs_spaces_begin(m->c.spaces, turn, why);
    uint8_t *const at =
        hs_spaces_message(m->c.spaces, sends ? HS_STREAM_OUT : HS_STREAM_IN, offset);
    if (st == HS_OK)
        st = sends ? m->c.transport->put(m->c.comm, a->channel, at, there, a->ref.bytes,
                                         a->microbatch, why)
                   : m->c.transport->take(m->c.comm, a->channel, at, a->ref.bytes, a->microbatch,
                                          why);
    if (st == HS_OK) st = hs_spaces_end(m->c.spaces, turn, why);
    hs_stop_busy(m->c.stop, false);
    return st;
}

static hs_status post(hs_messages *m, const hs_plan_action *a, place *p, hs_why *why) {
    p->offset = hs_linked_offset(m->c.linked, &a->ref, a->slot, a->microbatch);
    p->host = p->at = hs_spaces_host(m->c.spaces, p->offset, a->ref.bytes);
    if (!p->host) {
        hs_stop_busy(m->c.stop, true);
        const hs_status st = hs_spaces_in_window(m->c.spaces, &p->at, why);
        hs_stop_busy(m->c.stop, false);
        if (st != HS_OK) return st;
    }
    return m->c.transport->post(m->c.comm, a->channel, p->at, a->ref.bytes, a->microbatch, why);
}

/* Messages of the device space pass through a window, which holds the longest. */
static hs_status send(hs_messages *m, const hs_plan_action *a, const hs_turn *turn, uint64_t offset,
                      hs_why *why) {
    const uint8_t *from = hs_spaces_host(m->c.spaces, offset, a->ref.bytes);
    if (!from) {
        uint8_t *const window = hs_spaces_out_window(m->c.spaces);
        hs_stop_busy(m->c.stop, true);
        hs_status st = hs_spaces_begin(m->c.spaces, turn, why);
        if (st == HS_OK) st = hs_spaces_get(m->c.spaces, offset, window, a->ref.bytes, why);
        if (st == HS_OK) st = hs_spaces_end(m->c.spaces, turn, why);
        if (st == HS_OK) st = hs_spaces_wait(m->c.spaces, HS_STREAM_OUT, why);
        hs_stop_busy(m->c.stop, false);
        if (st != HS_OK) return st;
        from = window;
    }
    const bool across = m->c.plan->channels[a->channel].across > 0;
    if (across) HS_TRY(post(m, a + 1, &m->exchanged, why)); /* an exchange: comm.h */
    HS_TRY(m->c.transport->send(m->c.comm, a->channel, from, a->ref.bytes, a->microbatch, why));
    m->sent[a->channel]++;
    return across ? HS_OK : m->c.transport->sent(m->c.comm, a->channel, m->sent[a->channel], why);
}

static hs_status receive(hs_messages *m, const hs_plan_action *a, const hs_turn *turn,
                         hs_why *why) {
    const bool across = m->c.plan->channels[a->channel].across > 0;
    place p = m->exchanged;
    if (!across) HS_TRY(post(m, a, &p, why));
    HS_TRY(m->c.transport->got(m->c.comm, a->channel, ++m->posted[a->channel], why));
    if (across) HS_TRY(m->c.transport->sent(m->c.comm, a->channel, m->sent[a->channel], why));
    if (p.host) return HS_OK;
    HS_TRY(hs_spaces_begin(m->c.spaces, turn, why));
    HS_TRY(hs_spaces_put(m->c.spaces, p.offset, p.at, a->ref.bytes, why));
    return hs_spaces_end(m->c.spaces, turn, why);
}

hs_status hs_messages_run(hs_messages *m, hs_list list, uint32_t i, const hs_turn *turn,
                          hs_why *why) {
    const hs_plan_action *a = action_of(m, list, i);
    const uint64_t offset = hs_linked_offset(m->c.linked, &a->ref, a->slot, a->microbatch);
    if (m->c.direct && m->c.direct[a->channel])
        return pass(m, a, turn, offset, m->c.landings->lists[list][i], why);
    return a->kind == HS_A_SEND ? send(m, a, turn, offset, why) : receive(m, a, turn, why);
}
