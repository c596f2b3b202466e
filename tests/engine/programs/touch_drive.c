/* What of a position's slots each action of a step touches, by page, reads and writes alike.
 *
 *   touch_drive PLAN POSITION
 *
 * The engine's linker and kernels run the position's scheduled programs in the order of its step. Before each
 * action nobody may touch the slots; the first touch of a page is noted and allowed. Messages are not sent:
 * what arrives is a small number. One line a scheduled action: its place in the step, then the pages, as
 * first+count, counted from the page in which the slots begin.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "run/machine.h"

enum { PAGE = 4096 };

static uint8_t *area, *area_end;
static volatile sig_atomic_t *touched;

static void note(int number, siginfo_t *info, void *context) {
    uint8_t *const at = info->si_addr;
    (void)number;
    (void)context;
    if (at < area || at >= area_end) abort();
    const size_t page = (size_t)(at - area) / PAGE;
    touched[page] = 1;
    if (mprotect(area + page * PAGE, PAGE, PROT_READ | PROT_WRITE) != 0) abort();
}

static void tell(size_t action, size_t pages) {
    (void)printf("%zu", action);
    for (size_t first = 0, end; first < pages; first = end) {
        end = first + 1;
        if (!touched[first]) continue;
        while (end < pages && touched[end]) end++;
        (void)printf(" %zu+%zu", first, end - first);
    }
    (void)printf("\n");
}

static hs_status act(hs_machine *m, const hs_plan *plan, const hs_plan_action *a, hs_why *why) {
    if (a->kind == HS_A_RUN) return hs_linked_run(m->linked, a, why);
    uint8_t *const at =
        m->spaces.arena + hs_linked_offset(m->linked, &a->ref, a->slot, a->microbatch);
    for (uint64_t i = 0; i < a->ref.bytes && a->kind == HS_A_SEND; i++)
        (void)*(volatile const uint8_t *)(at + i);
    for (uint64_t i = 0; i < a->ref.bytes && a->kind == HS_A_RECV; i++)
        at[i] = i % 4 == 3 ? 0x3c : i % 4 == 1 && plan->config->dtype != HS_F32 ? 0x3c : 1;
    return HS_OK;
}

static void give_tokens(const hs_machine *m, const hs_plan *plan, const hs_plan_position *p) {
    const uint64_t offsets[2] = {p->tokens_offset, p->targets_offset};
    for (int k = 0; k < 2; k++) {
        for (uint32_t b = 0; b < p->mb_count && offsets[k] != UINT64_MAX; b++) {
            int32_t *rows =
                (int32_t *)(void *)(m->spaces.arena + p->mb_offset + b * p->mb_stride + offsets[k]);
            for (int64_t r = 0; r < hs_plan_rows(plan); r++)
                rows[r] = (int32_t)(r % plan->config->vocab);
        }
    }
}

static hs_status drive(const hs_plan *plan, const hs_plan_position *p, hs_machine *m, hs_why *why) {
    for (uint32_t i = 0; i < p->inits + p->loads; i++) {
        const uint32_t at = i < p->inits ? p->first_init + i : p->first_load + i - p->inits;
        if (plan->actions[at].kind == HS_A_RUN)
            HS_TRY(hs_linked_run(m->linked, &plan->actions[at], why));
    }
    give_tokens(m, plan, p);
    const uintptr_t first = (uintptr_t)m->spaces.arena + p->act_offset;
    const uintptr_t end = first + p->act_slots * p->act_stride;
    area = (uint8_t *)(first / PAGE * PAGE);
    area_end = (uint8_t *)((end + PAGE - 1) / PAGE * PAGE);
    const size_t pages = (size_t)(area_end - area) / PAGE;
    touched = calloc(pages + 1, sizeof *touched);
    if (!touched) return hs_fail(why, HS_E_MEMORY, "no memory for %zu pages", pages);
    const struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGSEGV, &action, NULL) != 0) abort();
    for (uint32_t i = 0; i < p->steps; i++) {
        const hs_plan_action *a = &plan->actions[p->first_step + i];
        if (!strchr("FIWB", a->op)) continue;
        for (size_t k = 0; k < pages; k++) touched[k] = 0;
        if (mprotect(area, pages * PAGE, PROT_NONE) != 0) abort();
        HS_TRY(act(m, plan, a, why));
        if (mprotect(area, pages * PAGE, PROT_READ | PROT_WRITE) != 0) abort();
        tell(i, pages);
    }
    return HS_OK;
}

int main(int argc, char **argv) {
    if (argc != 3) return 64;
    hs_plan plan = {0};
    hs_machine machine = {0};
    hs_why why = {.text = ""};
    hs_status st = hs_plan_open(argv[1], &plan, &why);
    if (st == HS_OK) {
        const hs_plan_position *p = &plan.positions[atoi(argv[2])];
        const hs_machine_config config = {.backend = &hs_backend_cpu,
                                          .plan = &plan,
                                          .position = p,
                                          .threads = 1,
                                          .local_ranks = 1,
                                          .arena_fd = -1};
        st = hs_machine_create(&config, &machine, &why);
        if (st == HS_OK) st = drive(&plan, p, &machine, &why);
    }
    if (st != HS_OK) (void)fprintf(stderr, "%s\n", why.text);
    hs_machine_destroy(&machine);
    hs_plan_close(&plan);
    return hs_status_exit(st);
}
