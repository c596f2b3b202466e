#include "run/trace.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/text.h"
#include "kernels/kernels.h"

typedef struct event {
    int64_t step, start_ns, end_ns, moved_ns;
    uint32_t action;
    uint32_t call; /* of the action, the one that this is of; NO_CALL: of the action itself */
    bool wait;
} event;

enum { NO_CALL = UINT32_MAX };

struct hs_trace {
    const hs_plan *plan;
    uint32_t rank; /* the trace's process number */
    bool calls;
    size_t capacity, added;
    event *events; /* ring: number n lies at n % capacity */
    char buffer[65536];
};

hs_status hs_trace_create(const hs_plan *plan, uint32_t rank, bool calls, hs_trace **out,
                          hs_why *why) {
    const hs_plan_position *position = &plan->positions[hs_plan_position_of(plan, rank)];
    *out = NULL;
    hs_trace *trace = calloc(1, sizeof *trace);
    size_t most = position->steps;
    for (uint32_t i = 0; i < position->steps; i++) {
        const hs_plan_action *a = &plan->actions[position->first_step + i];
        most += a->kind == HS_A_SEND ? 2 : a->kind == HS_A_RECV; /* where it begins, and its wait */
        if (calls && a->kind == HS_A_RUN) most += plan->programs[a->program].calls;
    }
    const size_t capacity = most * HS_TRACE_STEPS + 1;
    event *events = calloc(capacity, sizeof *events);
    if (!trace || !events) {
        free(trace);
        free(events);
        return hs_fail(why, HS_E_MEMORY, "no memory for a trace of %zu instructions", capacity);
    }
    trace->plan = plan;
    trace->rank = rank;
    trace->calls = calls;
    trace->capacity = capacity;
    trace->events = events;
    *out = trace;
    return HS_OK;
}

void hs_trace_destroy(hs_trace *trace) {
    if (!trace) return;
    free(trace->events);
    free(trace);
}

static void add(hs_trace *trace, const event *e) {
    if (trace) trace->events[trace->added++ % trace->capacity] = *e;
}

void hs_trace_add(hs_trace *trace, int64_t step, uint32_t action, int64_t start_ns, int64_t end_ns,
                  int64_t moved_ns) {
    add(trace, &(event){.step = step,
                        .start_ns = start_ns,
                        .end_ns = end_ns,
                        .moved_ns = moved_ns,
                        .action = action,
                        .call = NO_CALL});
}

void hs_trace_wait(hs_trace *trace, int64_t step, uint32_t action, int64_t start_ns,
                   int64_t end_ns) {
    add(trace, &(event){.step = step,
                        .start_ns = start_ns,
                        .end_ns = end_ns,
                        .action = action,
                        .call = NO_CALL,
                        .wait = true});
}

bool hs_trace_has_calls(const hs_trace *trace) {
    return trace && trace->calls;
}

void hs_trace_call(hs_trace *trace, int64_t step, uint32_t action, uint32_t call, int64_t start_ns,
                   int64_t end_ns) {
    add(trace,
        &(event){
            .step = step, .start_ns = start_ns, .end_ns = end_ns, .action = action, .call = call});
}

static bool flush(int fd, hs_text *text) {
    for (size_t at = 0; at < text->used;) {
        const ssize_t n = write(fd, text->at + at, text->used - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += (size_t)n;
    }
    text->used = 0;
    return true;
}

static bool write_events(const hs_trace *trace, int fd, hs_text *text) {
    const size_t kept = trace->added < trace->capacity ? trace->added : trace->capacity;
    hs_text_printf(text, "{\"traceEvents\":[\n");
    for (size_t n = trace->added - kept; n < trace->added; n++) {
        const event *e = &trace->events[n % trace->capacity];
        const hs_plan_action *action = &trace->plan->actions[e->action];
        char name[40];
        if (e->call == NO_CALL)
            hs_plan_action_name(trace->plan, action, name);
        else
            (void)snprintf(name, sizeof name, "%s",
                           hs_kernel_facts_of(trace->plan->calls[e->call].kernel)->name);
        hs_text_printf(text, "%s{\"name\":", n == trace->added - kept ? "" : ",\n");
        hs_text_json_string(text, name);
        hs_text_printf(text,
                       ",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,\"pid\":%" PRIu32
                       ",\"tid\":%d,\"args\":{\"step\":%" PRId64 ",\"mb\":%" PRId32 "%s",
                       (double)e->start_ns / 1000.0, (double)(e->end_ns - e->start_ns) / 1000.0,
                       trace->rank, e->call != NO_CALL, e->step, (int32_t)action->microbatch,
                       e->wait ? ",\"wait\":1" : "");
        if (e->moved_ns) hs_text_printf(text, ",\"moved_us\":%.3f", (double)e->moved_ns / 1000.0);
        if (e->call != NO_CALL) hs_text_printf(text, ",\"call\":%" PRIu32, e->call);
        hs_text_printf(text, "}}");
        if (text->used > text->size - 1024 && !flush(fd, text)) return false;
    }
    hs_text_printf(text, "\n]}\n");
    return flush(fd, text);
}

hs_status hs_trace_write(hs_trace *trace, const char *path, hs_why *why) {
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return hs_fail(why, HS_E_IO, "trace %s cannot be written: %s", path, strerror(errno));
    hs_text text = hs_text_over(trace->buffer, sizeof trace->buffer);
    const bool written = write_events(trace, fd, &text);
    const int code = errno;
    if (close(fd) != 0 || !written) {
        return hs_fail(why, HS_E_IO, "trace %s cannot be written: %s", path, strerror(code));
    }
    return HS_OK;
}
