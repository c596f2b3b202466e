/* A plan from its file to its last use: opened, checked room by room, closed; names of its actions. */

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "run/plan/plan_internal.h"

hs_status hs_plan_refuse(const hs_plan_checker *c, const char *format, ...) {
    char text[600];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return hs_fail(c->why, HS_E_CONFIG, "plan %s refused: %s; compile it again with this version",
                   c->file, text);
}

static hs_status check_all(hs_plan_checker *c) {
    HS_TRY(hs_plan_check_file(c));
    HS_TRY(hs_plan_check_config(c));
    HS_TRY(hs_plan_check_tensors(c));
    HS_TRY(hs_plan_check_positions(c));
    HS_TRY(hs_plan_check_states(c));
    c->program_uses = calloc(c->plan->count[HS_SECTION_PROGRAMS] + 1, 1);
    c->sends = calloc(c->plan->count[HS_SECTION_CHANNELS] * HS_PLAN_COUNTED + 1, sizeof *c->sends);
    c->recvs = calloc(c->plan->count[HS_SECTION_CHANNELS] * HS_PLAN_COUNTED + 1, sizeof *c->recvs);
    c->stage_at = calloc(HS_PLAN_STAGES, sizeof *c->stage_at);
    c->run_for = calloc(c->plan->count[HS_SECTION_PROGRAMS] + 1, sizeof *c->run_for);
    if (!c->program_uses || !c->sends || !c->recvs || !c->stage_at || !c->run_for) {
        return hs_fail(c->why, HS_E_MEMORY, "no memory to check plan %s", c->file);
    }
    return hs_plan_check_lists(c);
}

hs_status hs_plan_adopt(uint8_t *bytes, size_t size, const char *file, hs_plan *plan, hs_why *why) {
    *plan = (hs_plan){.bytes = bytes, .size = size};
    hs_plan_checker c = {.plan = plan, .file = file, .why = why};
    const hs_status st = check_all(&c);
    free(c.program_uses);
    free(c.sends);
    free(c.recvs);
    free(c.stage_at);
    free(c.run_for);
    if (st != HS_OK) hs_plan_close(plan);
    return st;
}

hs_status hs_plan_open(const char *path, hs_plan *plan, hs_why *why) {
    uint8_t *bytes;
    size_t size;
    *plan = (hs_plan){0};
    HS_TRY(hs_plan_read(path, &bytes, &size, why));
    return hs_plan_adopt(bytes, size, path, plan, why);
}

void hs_plan_close(hs_plan *plan) {
    free(plan->bytes);
    *plan = (hs_plan){0};
}

void hs_plan_action_name(const hs_plan *plan, const hs_plan_action *a, char text[40]) {
    static const char *const names[HS_A_COUNT] = {
        "",      "run",      "SEND",  "RECV",   "data",  "combine", "report",
        "apply", "snapshot", "merge", "decide", "check", "foresee"};
    char number[12] = "";
    if (a->microbatch != UINT32_MAX)
        (void)snprintf(number, sizeof number, "%" PRIu32, a->microbatch);
    if (a->kind == HS_A_RUN && a->op != 'O' && a->op != '-') {
        (void)snprintf(text, 40, "%" PRIu32 "%c%s", a->stage, a->op, number);
    } else if (a->kind == HS_A_RUN) {
        const hs_plan_program *p = &plan->programs[a->program];
        (void)snprintf(text, 40, "%.*s", (int)(p->name_length < 32 ? p->name_length : 32),
                       plan->strings + p->name_offset);
    } else if (hs_plan_is_message(a)) {
        static const char *const kinds[HS_CH_COUNT] = {
            "?",      "F",       "B",      "TIED_GRAD", "TIED_WEIGHT",
            "REPORT", "CONTROL", "REDUCE", "GATHER",    "NORMS"};
        const uint32_t kind = plan->channels[a->channel].kind;
        (void)snprintf(text, 40, "%" PRIu32 "%s_%s%s", a->stage, names[a->kind],
                       a->op != '-' && a->op != 'O' ? (const char[]){a->op, 0} : kinds[kind],
                       number);
    } else {
        (void)snprintf(text, 40, "%s", names[a->kind]);
    }
}
