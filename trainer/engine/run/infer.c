#include "run/infer.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "backend/load.h"
#include "run/algorithms.h"
#include "run/machine.h"
#include "run/weights.h"

/* Reads exactly bytes; *got is less only at the end of the input. */
static hs_status read_all(uint8_t *to, size_t bytes, size_t *got, hs_why *why) {
    *got = 0;
    while (*got < bytes) {
        const ssize_t n = read(STDIN_FILENO, to + *got, bytes - *got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return hs_fail(why, HS_E_IO, "standard input cannot be read: %s", strerror(errno));
        if (n == 0) return HS_OK;
        *got += (size_t)n;
    }
    return HS_OK;
}

static hs_status write_all(const uint8_t *from, size_t bytes, hs_why *why) {
    while (bytes > 0) {
        const ssize_t n = write(STDOUT_FILENO, from, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return hs_fail(why, HS_E_IO, "standard output cannot be written: %s", strerror(errno));
        from += n;
        bytes -= (size_t)n;
    }
    return HS_OK;
}

/* The lists of inference hold program runs only (a plan of one position has no channels; the loader
 * refuses the rest). */
static hs_status run_list(const hs_plan *plan, hs_machine *machine, uint32_t first, uint32_t count,
                          hs_why *why) {
    HS_TRY(hs_spaces_join(&machine->spaces, why));
    for (uint32_t i = 0; i < count; i++) {
        const hs_plan_action *a = &plan->actions[first + i];
        HS_ASSERT(a->kind == HS_A_RUN);
        HS_TRY(hs_linked_run(machine->linked, a, why));
    }
    return HS_OK;
}

/* The logits, or the losses, of the request that ran last, to standard output. */
static hs_status answer(const hs_plan *plan, hs_spaces *spaces, hs_why *why) {
    const hs_plan_position *p = &plan->positions[0];
    const bool losses = p->loss_offset != UINT64_MAX;
    uint64_t offset = losses ? p->mb_offset + p->loss_offset : p->logits_offset;
    uint64_t left = 4 * (uint64_t)hs_plan_rows(plan) * (losses ? 1 : plan->config->vocab);
    for (uint64_t n; left > 0; left -= n, offset += n) {
        const uint8_t *from;
        n = left;
        HS_TRY(hs_spaces_readable(spaces, offset, &n, &from, why));
        HS_TRY(write_all(from, n, why));
    }
    return HS_OK;
}

/* The tokens or targets of a request, each at least `low`, to `offset` in the microbatch's area. *end: the
 * input has ended before them. */
static hs_status take(const hs_plan *plan, hs_spaces *spaces, uint64_t offset, int32_t low,
                      bool *end, hs_why *why) {
    const size_t rows = (size_t)hs_plan_rows(plan);
    const uint64_t at = plan->positions[0].mb_offset + offset;
    int32_t *tokens = (int32_t *)(void *)hs_spaces_host(spaces, at, rows * 4);
    size_t got;
    HS_TRY(read_all((uint8_t *)tokens, rows * 4, &got, why));
    *end = got == 0;
    if (*end) return HS_OK;
    if (got != rows * 4)
        return hs_fail(why, HS_E_DATA, "a request was cut short: %zu bytes of %zu", got, rows * 4);
    for (size_t r = 0; r < rows; r++) {
        if (tokens[r] < low || tokens[r] >= (int64_t)plan->config->vocab) {
            return hs_fail(why, HS_E_DATA,
                           "token %" PRId32 " of a request is outside %" PRId32 "..%" PRIu32,
                           tokens[r], low, plan->config->vocab - 1);
        }
    }
    return hs_spaces_put(spaces, at, tokens, rows * 4, why);
}

static hs_status serve(const hs_plan *plan, hs_machine *machine, hs_why *why) {
    const hs_plan_position *p = &plan->positions[0];
    for (;;) {
        bool end;
        HS_TRY(take(plan, &machine->spaces, p->tokens_offset, 0, &end, why));
        if (end) return HS_OK;
        if (p->loss_offset != UINT64_MAX) {
            HS_TRY(take(plan, &machine->spaces, p->targets_offset, -1, &end, why));
            if (end) return hs_fail(why, HS_E_DATA, "a request was cut short: it has no targets");
        }
        HS_TRY(run_list(plan, machine, p->first_step, p->steps, why));
        HS_TRY(answer(plan, &machine->spaces, why));
    }
}

hs_status hs_infer(const hs_infer_args *args, hs_why *why) {
    hs_plan plan = {0};
    hs_machine machine = {0};
    hs_status st = HS_OK;
    HS_TRY_GOTO(st, out, hs_plan_open(args->plan, &plan, why));
    if (plan.config->mode != HS_MODE_INFER) {
        st = hs_fail(why, HS_E_CONFIG, "plan %s is for training; compile one for inference",
                     args->plan);
        goto out;
    }
    const hs_backend *backend;
    HS_TRY_GOTO(st, out, hs_backend_load(args->device_kind, &backend, why));
    const hs_machine_config config = {.backend = backend,
                                      .plan = &plan,
                                      .position = &plan.positions[0],
                                      .kernel_path = args->kernel_path,
                                      .device = args->device,
                                      .threads =
                                          args->threads ? args->threads : plan.config->threads,
                                      .local_ranks = 1,
                                      .arena_fd = -1};
    HS_TRY_GOTO(st, out, hs_machine_create(&config, &machine, why));
    const hs_algorithms_config algorithms = {.machine = &machine, .log = args->log};
    HS_TRY_GOTO(st, out, hs_algorithms_settle(&algorithms, why));
    HS_TRY_GOTO(st, out,
                hs_weights_read(args->weights, &plan, &plan.positions[0], 0, &machine.spaces, why));
    HS_TRY_GOTO(
        st, out,
        run_list(&plan, &machine, plan.positions[0].first_load, plan.positions[0].loads, why));
    HS_LOG(args->log, HS_LOG_INFO, "ready", HS_S("kernel_path", machine.facts.kernels),
           HS_I("threads", machine.threads), HS_I("arena_bytes", (int64_t)machine.spaces.bytes));
    st = serve(&plan, &machine, why);
out:
    hs_machine_destroy(&machine);
    hs_plan_close(&plan);
    return st;
}
