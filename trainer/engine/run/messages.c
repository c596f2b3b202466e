#include "run/messages.h"

#include <stdlib.h>

#include "core/clock.h"

/* Where a receive's message comes to, in host memory. */
typedef struct place {
    uint8_t *host, *at; /* host NULL: `at` is a window */
    uint64_t offset;
} place;

struct hs_messages {
    hs_messages_config c;
    uint64_t *sent, *posted;    /* by channel, since create */
    bool overlaps;              /* the device's memory is the host's */
    uint64_t *number[HS_LISTS]; /* by action: of the message that it began last, on its channel */
    const hs_plan_action *awaited;
    int64_t moved_ns;
    place exchanged; /* of the exchange that is under way, memory apart */
};

static const hs_plan_action *action_of(const hs_messages *m, hs_list list, uint32_t i) {
    const hs_plan_range actions = hs_plan_list(m->c.position, list);
    HS_ASSERT(i < actions.count);
    return &m->c.plan->actions[actions.first + i];
}

hs_status hs_messages_most(const hs_plan *plan, const hs_plan_position *position, uint32_t *most,
                           hs_why *why) {
    const size_t channels = plan->count[HS_SECTION_CHANNELS];
    uint32_t *counts = malloc((2 * channels + 1) * sizeof *counts);
    if (!counts) return hs_fail(why, HS_E_MEMORY, "no memory to count messages");
    *most = 1;
    for (int list = 0; list < HS_LISTS; list++) {
        const hs_plan_range actions = hs_plan_list(position, (hs_list)list);
        for (size_t c = 0; c < 2 * channels; c++) counts[c] = 0;
        for (uint32_t i = 0; i < actions.count; i++) {
            const hs_plan_action *a = &plan->actions[actions.first + i];
            if (!hs_plan_is_message(a)) continue;
            const uint32_t n = ++counts[2 * (size_t)a->channel + (a->kind == HS_A_RECV)];
            if (n > *most) *most = n;
        }
    }
    free(counts);
    return HS_OK;
}

static hs_status progress(void *ctx, hs_why *why) {
    hs_messages *m = ctx;
    const int64_t start = hs_clock_ns();
    const hs_status st = m->c.transport->progress(m->c.comm, why);
    m->moved_ns += hs_clock_ns() - start;
    return st;
}

hs_status hs_messages_order(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                            hs_behind behind[HS_LISTS], hs_why *why) {
    for (int list = 0; list < HS_LISTS; list++) {
        const hs_plan_range actions = hs_plan_list(position, (hs_list)list);
        const hs_touches_config config = {.plan = plan,
                                          .position = position,
                                          .replica = replica,
                                          .first = actions.first,
                                          .count = actions.count,
                                          .unified = true};
        HS_TRY(hs_behind_find(&config, list == HS_LIST_STEP, &behind[list], why));
    }
    return HS_OK;
}

static hs_status open_numbers(hs_messages *m, hs_why *why) {
    for (int list = 0; list < HS_LISTS; list++) {
        const size_t count = m->c.behind[list].count;
        m->number[list] = calloc(count + 1, sizeof *m->number[list]);
        if (!m->number[list])
            return hs_fail(why, HS_E_MEMORY, "no memory for the numbers of %zu messages", count);
    }
    hs_linked_between(m->c.linked, progress, m);
    return HS_OK;
}

hs_status hs_messages_create(const hs_messages_config *config, hs_messages **out, hs_why *why) {
    *out = NULL;
    hs_messages *m = calloc(1, sizeof *m);
    const size_t channels = config->plan->count[HS_SECTION_CHANNELS];
    if (m) {
        m->c = *config;
        m->overlaps = config->comm && config->behind;
        m->sent = calloc(channels + 1, sizeof *m->sent);
        m->posted = calloc(channels + 1, sizeof *m->posted);
    }
    if (!m || !m->sent || !m->posted) {
        hs_messages_destroy(m);
        return hs_fail(why, HS_E_MEMORY, "no memory for the messages of %zu channels", channels);
    }
    const hs_status st = m->overlaps ? open_numbers(m, why) : HS_OK;
    if (st != HS_OK) {
        hs_messages_destroy(m);
        return st;
    }
    *out = m;
    return HS_OK;
}

void hs_messages_destroy(hs_messages *m) {
    if (!m) return;
    for (int list = 0; list < HS_LISTS; list++) free(m->number[list]);
    free(m->sent);
    free(m->posted);
    free(m);
}

const hs_plan_action *hs_messages_awaited(const hs_messages *m) {
    return m ? m->awaited : NULL;
}

int64_t hs_messages_moved_ns(const hs_messages *m) {
    return m->moved_ns;
}

uint32_t hs_messages_peer(const hs_plan *plan, uint32_t rank, const hs_plan_action *a) {
    if (a->channel == UINT32_MAX) return UINT32_MAX;
    return hs_comm_peer(&plan->channels[a->channel], rank, plan->config->positions,
                        a->kind == HS_A_RECV);
}

/* --- behind the work --------------------------------------------------------------------- */

static hs_status wait_for(hs_messages *m, hs_list list, uint32_t i, int64_t step, hs_why *why) {
    const hs_plan_action *a = action_of(m, list, i);
    const bool sends = a->kind == HS_A_SEND;
    const int64_t start = hs_clock_ns();
    hs_rank_page_set(m->c.page, step, i, a->kind, a->op, a->microbatch,
                     hs_messages_peer(m->c.plan, m->c.rank, a));
    m->awaited = a;
    const hs_status st = sends
                             ? m->c.transport->sent(m->c.comm, a->channel, m->number[list][i], why)
                             : m->c.transport->got(m->c.comm, a->channel, m->number[list][i], why);
    hs_comm_wait wait;
    m->c.transport->last_wait(m->c.comm, &wait);
    if (wait.since_ns >= start) { /* it was not there yet */
        const int64_t end = hs_clock_ns();
        hs_metrics_add(m->c.metrics, a, end - start);
        if (list >= HS_LIST_STEP)
            hs_trace_wait(m->c.trace, step, (uint32_t)(a - m->c.plan->actions), start, end);
    }
    if (st == HS_OK) m->awaited = NULL;
    return st;
}

static hs_status post(hs_messages *m, hs_list list, uint32_t i, hs_why *why) {
    const hs_plan_action *a = action_of(m, list, i);
    const uint64_t offset = hs_linked_offset(m->c.linked, &a->ref, a->slot, a->microbatch);
    m->number[list][i] = ++m->posted[a->channel];
    hs_spaces_settle(m->c.spaces, offset, a->ref.bytes);
    return m->c.transport->post(m->c.comm, a->channel, m->c.spaces->arena + offset, a->ref.bytes,
                                a->microbatch, why);
}

static hs_status start(hs_messages *m, hs_list list, uint32_t i, int64_t step, hs_why *why) {
    const hs_plan_action *a = action_of(m, list, i);
    const uint64_t offset = hs_linked_offset(m->c.linked, &a->ref, a->slot, a->microbatch);
    hs_spaces_settle(m->c.spaces, offset, a->ref.bytes);
    const int64_t begin = hs_clock_ns();
    m->number[list][i] = ++m->sent[a->channel];
    const hs_status st = m->c.transport->send(m->c.comm, a->channel, m->c.spaces->arena + offset,
                                              a->ref.bytes, a->microbatch, why);
    const int64_t end = hs_clock_ns();
    hs_metrics_add(m->c.metrics, a, end - begin);
    if (list >= HS_LIST_STEP)
        hs_trace_wait(m->c.trace, step, (uint32_t)(a - m->c.plan->actions), begin, end);
    return st;
}

bool hs_which_leaves_out(hs_which which, const hs_plan *plan, const hs_plan_action *a) {
    const hs_plan_channel *ch = a->kind == HS_A_SEND ? &plan->channels[a->channel] : NULL;
    const bool report = ch && ch->kind == HS_CH_REPORT && !ch->across;
    switch (which) {
    case HS_NO_REPORT:
        return report;
    case HS_AGAIN:
        return report || a->kind == HS_A_DATA;
    case HS_NO_DATA:
        return a->kind == HS_A_DATA;
    case HS_REPORT:
        return !report;
    default:
        return false;
    }
}

hs_status hs_messages_before(hs_messages *m, hs_list list, uint32_t i, int64_t step, hs_which which,
                             hs_why *why) {
    if (!m->overlaps) return HS_OK;
    const hs_behind_part *waits = &m->c.behind[list].waits, *posts = &m->c.behind[list].posts;
    const hs_behind_part *starts = &m->c.behind[list].starts;
    for (uint32_t k = waits->first[i]; which != HS_REPORT && k < waits->first[i + 1]; k++)
        HS_TRY(wait_for(m, list, waits->action[k], step, why));
    for (uint32_t k = posts->first[i]; which != HS_REPORT && k < posts->first[i + 1]; k++)
        HS_TRY(post(m, list, posts->action[k], why));
    for (uint32_t k = starts->first[i]; k < starts->first[i + 1]; k++)
        if (!hs_which_leaves_out(which, m->c.plan, action_of(m, list, starts->action[k])))
            HS_TRY(start(m, list, starts->action[k], step, why));
    return HS_OK;
}

hs_status hs_messages_progress(hs_messages *m, hs_why *why) {
    return m->overlaps ? progress(m, why) : HS_OK;
}

hs_status hs_messages_settle(hs_messages *m, hs_why *why) {
    if (!m->overlaps) return HS_OK;
    for (uint32_t c = 0; c < m->c.plan->count[HS_SECTION_CHANNELS]; c++) {
        if (m->sent[c]) HS_TRY(m->c.transport->sent(m->c.comm, c, m->sent[c], why));
        if (m->posted[c]) HS_TRY(m->c.transport->got(m->c.comm, c, m->posted[c], why));
    }
    return HS_OK;
}

/* --- of a device whose memory is apart --------------------------------------------------- */

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

static hs_status open_place(hs_messages *m, const hs_plan_action *a, place *p, hs_why *why) {
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
    if (across) HS_TRY(open_place(m, a + 1, &m->exchanged, why)); /* an exchange: comm.h */
    HS_TRY(m->c.transport->send(m->c.comm, a->channel, from, a->ref.bytes, a->microbatch, why));
    m->sent[a->channel]++;
    return across ? HS_OK : m->c.transport->sent(m->c.comm, a->channel, m->sent[a->channel], why);
}

static hs_status receive(hs_messages *m, const hs_plan_action *a, const hs_turn *turn,
                         hs_why *why) {
    const bool across = m->c.plan->channels[a->channel].across > 0;
    place p = m->exchanged;
    if (!across) HS_TRY(open_place(m, a, &p, why));
    HS_TRY(m->c.transport->got(m->c.comm, a->channel, ++m->posted[a->channel], why));
    if (across) HS_TRY(m->c.transport->sent(m->c.comm, a->channel, m->sent[a->channel], why));
    if (p.host) return HS_OK;
    HS_TRY(hs_spaces_begin(m->c.spaces, turn, why));
    HS_TRY(hs_spaces_put(m->c.spaces, p.offset, p.at, a->ref.bytes, why));
    return hs_spaces_end(m->c.spaces, turn, why);
}

/* --- both -------------------------------------------------------------------------------- */

hs_status hs_messages_run(hs_messages *m, hs_list list, uint32_t i, const hs_turn *turn,
                          hs_why *why) {
    const hs_plan_action *a = action_of(m, list, i);
    const uint64_t offset = hs_linked_offset(m->c.linked, &a->ref, a->slot, a->microbatch);
    if (m->overlaps) return HS_OK; /* it has its place, or has begun */
    if (m->c.direct && m->c.direct[a->channel])
        return pass(m, a, turn, offset, m->c.landings->lists[list][i], why);
    return a->kind == HS_A_SEND ? send(m, a, turn, offset, why) : receive(m, a, turn, why);
}
