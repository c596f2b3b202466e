#include "run/behind.h"

#include <stdlib.h>

enum { NONE = UINT32_MAX };

/* A SEND or RECV of the list. */
typedef struct message {
    uint32_t cell;
    uint32_t in_cell, in_line; /* the next one there; NONE: the last */
    bool open;                 /* begun, and nobody has waited for it */
    bool listed;               /* in its cell's list, where closed ones stay until they are met */
} message;

/* Open messages of a channel, one way, in their order. */
typedef struct line {
    uint32_t first, last; /* NONE: none is open */
    uint64_t begun;       /* when the last receive got its place, the last send began */
} line;

typedef struct cell {
    uint32_t messages; /* the first that may be open; NONE */
    uint64_t free;     /* from this time on nothing before needs its bytes */
    uint64_t made;     /* from this time on nothing before writes them */
} cell;

/* Action number at time: times count through the rounds. */
typedef struct pair {
    uint64_t time;
    uint32_t action;
} pair;

typedef struct finder {
    const hs_touches_config *c;
    hs_touches *touches;
    message *messages; /* by action; only of SEND and RECV */
    line *lines;       /* by channel, out and in */
    cell *cells;
    uint64_t now, start; /* the action's time; of its round's first */
    uint64_t fence;      /* B2: no earlier than this */
    pair *waits, *posts, *starts;
    size_t wait_count, post_count, start_count;
} finder;

static const hs_plan_action *action_of(const finder *f, uint32_t i) {
    return &f->c->plan->actions[f->c->first + i];
}

static line *line_of(const finder *f, const hs_plan_action *a) {
    return &f->lines[2 * (size_t)a->channel + (a->kind == HS_A_RECV)];
}

/* Somebody waits for the message, and so for those of its line before it: their bytes are free. */
static void close_until(finder *f, uint32_t number) {
    line *l = line_of(f, action_of(f, number));
    for (bool met = false; !met;) {
        message *m = &f->messages[l->first];
        met = l->first == number;
        m->open = false;
        if (f->cells[m->cell].free < f->now) f->cells[m->cell].free = f->now;
        if (action_of(f, l->first)->kind == HS_A_RECV) f->cells[m->cell].made = f->now;
        l->first = m->in_line;
    }
    if (l->first == NONE) l->last = NONE;
}

static void wait_at(finder *f, uint64_t time, uint32_t number) {
    f->waits[f->wait_count++] = (pair){.time = time, .action = number};
    close_until(f, number);
}

static void wait_for(finder *f, uint32_t number) {
    wait_at(f, f->now, number);
}

/* How an action uses a cell: it waits for the receives into it, and where it writes for the sends from it. */
static void touch(void *ctx, uint32_t number, int how) {
    finder *f = ctx;
    uint32_t *at = &f->cells[number].messages;
    while (*at != NONE) {
        const uint32_t action = *at;
        message *m = &f->messages[action];
        if (m->open && ((how & HS_TOUCH_WRITES) || action_of(f, action)->kind == HS_A_RECV))
            wait_for(f, action);
        if (m->open) {
            at = &m->in_cell;
        } else {
            m->listed = false;
            *at = m->in_cell;
        }
    }
}

/* And what is no message needs the bytes until it is done. */
static void use(void *ctx, uint32_t number, int how) {
    finder *f = ctx;
    touch(ctx, number, how);
    f->cells[number].free = f->now + 1;
    if (how & HS_TOUCH_WRITES) f->cells[number].made = f->now + 1;
}

/* When a message may begin of which the list is at the action: its own time at the latest. */
static uint64_t begins(const finder *f, const hs_plan_action *a, uint64_t from) {
    if (f->c->plan->channels[a->channel].across) return f->now; /* an exchange is one thing */
    const line *l = line_of(f, a);
    const uint64_t time = from > f->fence ? from : f->fence;
    return l->begun > time ? l->begun : time;
}

static void open_message(finder *f, uint32_t number) {
    const hs_plan_action *a = action_of(f, number);
    message *m = &f->messages[number];
    line *l = line_of(f, a);
    cell *c = &f->cells[m->cell];
    m->open = true;
    m->in_line = NONE;
    if (l->last == NONE)
        l->first = number;
    else
        f->messages[l->last].in_line = number;
    l->last = number;
    if (!m->listed) {
        m->listed = true;
        m->in_cell = c->messages;
        c->messages = number;
    }
    l->begun = begins(f, a, a->kind == HS_A_RECV ? c->free : c->made);
    const pair begun = {.time = l->begun, .action = number};
    if (a->kind == HS_A_RECV)
        f->posts[f->post_count++] = begun;
    else
        f->starts[f->start_count++] = begun;
}

static void find_cell(void *ctx, uint32_t number, int how) {
    (void)how;
    *(uint32_t *)ctx = number;
}

static void prepare(finder *f, size_t channels) {
    for (size_t l = 0; l < 2 * channels; l++) f->lines[l] = (line){.first = NONE, .last = NONE};
    for (uint32_t c = 0; c < hs_touches_cells(f->touches); c++) f->cells[c].messages = NONE;
    for (uint32_t i = 0; i < f->c->count; i++)
        if (hs_plan_is_message(action_of(f, i)))
            hs_touches_each(f->touches, action_of(f, i), find_cell, &f->messages[i].cell);
}

static bool is_across(const finder *f, const hs_plan_action *a) {
    return f->c->plan->channels[a->channel].across > 0;
}

/* A message, or the two of an exchange (B1). */
static void play_messages(finder *f, uint32_t i, uint32_t count) {
    for (uint32_t k = i; k < i + count; k++)
        if (f->messages[k].open && action_of(f, k)->kind == HS_A_RECV) wait_for(f, k);
    for (uint32_t k = i; k < i + count; k++) hs_touches_each(f->touches, action_of(f, k), touch, f);
    for (uint32_t k = i; k < i + count; k++)
        if (f->messages[k].open) /* of the run before: over before this one begins */
            wait_at(f, begins(f, action_of(f, k), f->cells[f->messages[k].cell].made), k);
    for (uint32_t k = i; k < i + count; k++) open_message(f, k);
}

/* One run of the list. */
static void play(finder *f) {
    const hs_plan_position *p = f->c->position;
    const bool step = f->c->first == p->first_step && f->c->count == p->steps;
    f->wait_count = f->post_count = f->start_count = 0;
    f->start = f->fence = f->now;
    for (uint32_t i = 0; i < f->c->count; i++, f->now++) {
        const hs_plan_action *a = action_of(f, i);
        if (step && (i == p->step_prefix || i == p->step_prefix + p->step_checks))
            f->fence = f->now;
        if (hs_plan_is_message(a)) {
            const bool across = is_across(f, a);
            if (!across || a->kind == HS_A_SEND) play_messages(f, i, across ? 2 : 1);
        } else {
            hs_touches_each(f->touches, a, use, f);
            if (a->kind == HS_A_APPLY || a->kind == HS_A_CHECK) f->fence = f->now + 1;
        }
    }
}

/* By action, those of one action in their order. */
static bool sort(const finder *f, const pair *pairs, size_t count, hs_behind_part *out) {
    out->first = calloc(f->c->count + (size_t)2, sizeof *out->first);
    out->action = calloc(count + 1, sizeof *out->action);
    if (!out->first || !out->action) return false;
    for (size_t k = 0; k < count; k++) out->first[pairs[k].time - f->start + 2]++;
    for (uint32_t i = 2; i < f->c->count + 2; i++) out->first[i] += out->first[i - 1];
    for (size_t k = 0; k < count; k++)
        out->action[out->first[pairs[k].time - f->start + 1]++] = pairs[k].action;
    return true;
}

hs_status hs_behind_find(const hs_touches_config *config, bool again, hs_behind *behind,
                         hs_why *why) {
    finder f = {.c = config};
    const size_t count = config->count, channels = config->plan->count[HS_SECTION_CHANNELS];
    *behind = (hs_behind){.count = config->count};
    HS_TRY(hs_touches_create(config, &f.touches, why));
    f.messages = calloc(count + 1, sizeof *f.messages);
    f.lines = calloc(2 * channels + 1, sizeof *f.lines);
    f.cells = calloc(hs_touches_cells(f.touches) + (size_t)1, sizeof *f.cells);
    f.waits = calloc(2 * count + 1, sizeof *f.waits); /* one of the run before, and one of this */
    f.posts = calloc(count + 1, sizeof *f.posts);
    f.starts = calloc(count + 1, sizeof *f.starts);
    bool room = f.messages && f.lines && f.cells && f.waits && f.posts && f.starts;
    if (room) {
        prepare(&f, channels);
        for (int round = again ? 0 : 1; round < 2; round++) play(&f);
        room = sort(&f, f.waits, f.wait_count, &behind->waits) &&
               sort(&f, f.posts, f.post_count, &behind->posts) &&
               sort(&f, f.starts, f.start_count, &behind->starts);
    }
    hs_touches_destroy(f.touches);
    free(f.messages);
    free(f.lines);
    free(f.cells);
    free(f.waits);
    free(f.posts);
    free(f.starts);
    if (room) return HS_OK;
    hs_behind_free(behind);
    return hs_fail(why, HS_E_MEMORY, "no memory for the messages of a list of %zu actions", count);
}

void hs_behind_free(hs_behind *behind) {
    free(behind->waits.first);
    free(behind->waits.action);
    free(behind->posts.first);
    free(behind->posts.action);
    free(behind->starts.first);
    free(behind->starts.action);
    *behind = (hs_behind){0};
}
