/* What a rank is doing, for its supervisor to look at: one page of shared memory (memfd) a rank,
 * made by the supervisor, written by the executor before every action, read when something stalls.
 * Never a decision, only evidence: words may be torn between fields, each field is whole.
 */
#ifndef HS_CORE_RANK_PAGE_H
#define HS_CORE_RANK_PAGE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define HS_RANK_PAGE_BYTES 4096u

typedef struct hs_rank_page {
    _Atomic uint64_t moves;      /* +1 an action: moves when the rank does */
    _Atomic int64_t step;        /* 1-based, of the step being run; 0: starting */
    _Atomic uint32_t action;     /* index in the step's list */
    _Atomic uint32_t kind;       /* HS_A_* */
    _Atomic uint32_t op;         /* 'F' 'B' ... '-' */
    _Atomic uint32_t microbatch; /* UINT32_MAX: none */
    _Atomic uint32_t peer;       /* rank; UINT32_MAX: none */
} hs_rank_page;

/* page NULL: does nothing (a rank without a supervisor). */
static inline void hs_rank_page_set(hs_rank_page *page, int64_t step, uint32_t action,
                                    uint32_t kind, char op, uint32_t microbatch, uint32_t peer) {
    if (page == NULL) return;
    atomic_store_explicit(&page->step, step, memory_order_relaxed);
    atomic_store_explicit(&page->action, action, memory_order_relaxed);
    atomic_store_explicit(&page->kind, kind, memory_order_relaxed);
    atomic_store_explicit(&page->op, (uint32_t)(unsigned char)op, memory_order_relaxed);
    atomic_store_explicit(&page->microbatch, microbatch, memory_order_relaxed);
    atomic_store_explicit(&page->peer, peer, memory_order_relaxed);
    atomic_fetch_add_explicit(&page->moves, 1, memory_order_release);
}

#endif
