#include "run/landings.h"

#include <inttypes.h>
#include <stdlib.h>

static uint64_t offset_of(const hs_plan_position *p, uint32_t replica, const hs_plan_action *a) {
    const hs_plan_ref ref = hs_plan_resolve(&a->ref, replica);
    uint64_t base = 0;
    if (a->ref.space == HS_SPACE_ACT) base = p->act_offset + a->slot * p->act_stride;
    if (a->ref.space == HS_SPACE_MB) base = p->mb_offset + a->microbatch * p->mb_stride;
    return base + ref.offset;
}

/* The receiver's action that meets a channel's send; `from`: where to look on from, by channel. */
static const hs_plan_action *meet(const hs_plan *plan, uint32_t channel, hs_plan_range there,
                                  uint32_t *from) {
    while (*from < there.count) {
        const hs_plan_action *a = &plan->actions[there.first + (*from)++];
        if (a->kind == HS_A_RECV && a->channel == channel) return a;
    }
    return NULL;
}

static hs_status find(const hs_plan *plan, const hs_plan_position *p, uint32_t replica,
                      hs_list which, uint32_t *from, uint64_t **out, hs_why *why) {
    const hs_plan_range here = hs_plan_list(p, which);
    uint64_t *at = *out = malloc(((size_t)here.count + 1) * sizeof *at);
    if (!at) return hs_fail(why, HS_E_MEMORY, "no memory for %" PRIu32 " actions", here.count);
    for (size_t c = 0; c < plan->count[HS_SECTION_CHANNELS]; c++) from[c] = 0;
    for (uint32_t i = 0; i < here.count; i++) {
        const hs_plan_action *a = &plan->actions[here.first + i], *theirs;
        at[i] = UINT64_MAX;
        if (a->kind != HS_A_SEND) continue;
        const hs_plan_position *peer = &plan->positions[plan->channels[a->channel].to];
        theirs = meet(plan, a->channel, hs_plan_list(peer, which), &from[a->channel]);
        if (!theirs || theirs->ref.bytes != a->ref.bytes || theirs->microbatch != a->microbatch)
            return hs_fail(why, HS_E_BUG,
                           "action %" PRIu32 " of position %" PRIu32 " sends on channel %" PRIu32
                           " what position %" PRIu32 " does not receive",
                           i, p->position, a->channel, peer->position);
        at[i] = offset_of(peer, replica ^ plan->channels[a->channel].across, theirs);
    }
    return HS_OK;
}

hs_status hs_landings_find(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                           hs_landings *landings, hs_why *why) {
    *landings = (hs_landings){.lists = {NULL}};
    uint32_t *from = malloc((plan->count[HS_SECTION_CHANNELS] + 1) * sizeof *from);
    hs_status st = from ? HS_OK : hs_fail(why, HS_E_MEMORY, "no memory for a list of channels");
    for (int which = 0; st == HS_OK && which < HS_LISTS; which++)
        st = find(plan, position, replica, (hs_list)which, from, &landings->lists[which], why);
    free(from);
    if (st != HS_OK) hs_landings_free(landings);
    return st;
}

void hs_landings_free(hs_landings *landings) {
    for (int which = 0; which < HS_LISTS; which++) free(landings->lists[which]);
    *landings = (hs_landings){.lists = {NULL}};
}
