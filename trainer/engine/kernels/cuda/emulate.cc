/* Fibers and their scheduler behind emulate.h. */
#include "kernels/cuda/emulate.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define HS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HS_ASAN 1
#endif
#endif
#ifdef HS_ASAN
extern "C" void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *size);
extern "C" void __asan_unpoison_memory_region(const volatile void *at, size_t size);
#endif

/* Saves the caller's registers on its stack, its stack pointer in *from, and goes on at `to`. */
extern "C" void hs_emulated_switch(void **from, void *to);
#if defined(__x86_64__)
__asm__(".text\n.type hs_emulated_switch,@function\nhs_emulated_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size hs_emulated_switch,.-hs_emulated_switch\n");
enum { SAVED_WORDS = 7, RETURN_WORD = 6 };
#elif defined(__aarch64__)
__asm__(".text\n.type hs_emulated_switch,%function\nhs_emulated_switch:\n"
        "sub sp,sp,#160\n"
        "stp x19,x20,[sp,#0]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
        "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
        "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
        "mov x2,sp\nstr x2,[x0]\nmov sp,x1\n"
        "ldp x19,x20,[sp,#0]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
        "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
        "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
        "add sp,sp,#160\nret\n.size hs_emulated_switch,.-hs_emulated_switch\n");
enum { SAVED_WORDS = 20, RETURN_WORD = 11 };
#else
#error "emulate.cc switches fibers on x86-64 and aarch64 only"
#endif

namespace hs_emulated {

uint3 thread_at, block_at;
dim3 block_size, grid_size;
uint64_t conflicts, products;

namespace {

enum {
    THREADS = 1024,
    STACK = 64 << 10,
    SHARED = 16,
    SHARED_BYTES = 48 << 10, /* of static arrays */
    SITES = 512,
    COPIES = 128 /* of a thread, in flight */
};
enum { AT_SYNC = -1, AT_WAIT = -2 };
enum state { READY, AT_BARRIER, AT_WARP, DONE };

struct fiber {
    void *sp, *fake;
    char *stack;
    state is;
    site at;
    warp_op op;
    unsigned mask, with;
    uint64_t value;
    together_fn does;
};

struct copy {
    void *to;
    const void *from;
    unsigned bytes, there;
    int group;
};
struct copies {
    int count, group; /* in flight; groups committed so far */
    copy at[COPIES];
};

struct passed {
    site at;
    int op;
};

fiber fibers[THREADS];
copies flights[THREADS];
int order[THREADS], place[THREADS]; /* who runs as the i-th, and as which one runs */
void *scheduler_sp;
#ifdef HS_ASAN
void *scheduler_fake;
const void *scheduler_bottom;
size_t scheduler_size;
#endif
void (*body)(void *);
void *closure;
const char *kernel;
int running, threads;
uint64_t random_state;
char text[1024];
bool faulty;
passed sites[SITES];
int site_count;
site skipped;
uint32_t skipped_lanes;
struct {
    void *at;
    size_t bytes;
} regions[SHARED];
int region_count;
size_t region_bytes;
void *dynamic;
size_t dynamic_bytes;
int capability = 86;

/* CUDA's programming guide, "maximum amount of shared memory per thread block", static and dynamic. */
size_t shared_given() {
    const int kib = capability == 80 || capability == 87   ? 163
                    : capability >= 90 && capability < 120 ? 227
                                                           : 99;
    return (size_t)kib << 10;
}

uint64_t next_random() {
    random_state += 0x9e3779b97f4a7c15u;
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

const char *name_of(const char *file) {
    const char *slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

bool same(site a, site b) {
    return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say(const char *format, ...) {
    const size_t used = strlen(text);
    va_list list;
    va_start(list, format);
    vsnprintf(text + used, sizeof text - used, format, list);
    va_end(list);
}

/* The first fault of a launch; the block is given up. */
void fault_begins() {
    faulty = true;
    text[0] = 0;
    say("%s, block (%u,%u,%u): ", kernel, block_at.x, block_at.y, block_at.z);
}

void to_scheduler() {
    fiber *f = &fibers[running];
#ifdef HS_ASAN
    __sanitizer_start_switch_fiber(f->is == DONE ? NULL : &f->fake, scheduler_bottom,
                                   scheduler_size);
#endif
    hs_emulated_switch(&f->sp, scheduler_sp);
#ifdef HS_ASAN
    __sanitizer_finish_switch_fiber(f->fake, NULL, NULL);
#endif
}

/* A fault in the thread that runs: it never goes on. */
void stop() {
    for (;;) to_scheduler();
}

void entry() {
#ifdef HS_ASAN
    __sanitizer_finish_switch_fiber(NULL, &scheduler_bottom, &scheduler_size);
#endif
    body(closure);
    if (flights[running].count) {
        fault_begins();
        say("thread %d returns with %d copies in flight", running, flights[running].count);
    }
    fibers[running].is = DONE;
    stop();
}

bool prepare(int i) {
    fiber *f = &fibers[i];
    if (!f->stack) {
        void *map = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) return false;
        f->stack = static_cast<char *>(map);
    }
#ifdef HS_ASAN
    if (f->is != DONE) __asan_unpoison_memory_region(f->stack, STACK); /* it was given up */
#endif
    /* at its first instruction a function finds the stack 8 beside a multiple of 16 */
    void **top = reinterpret_cast<void **>(f->stack + STACK - 64) - (RETURN_WORD == 6 ? 1 : 0);
    void **sp = top - SAVED_WORDS;
    memset(sp, 0, SAVED_WORDS * sizeof *sp);
    sp[RETURN_WORD] = reinterpret_cast<void *>(&entry);
    f->sp = sp;
    f->fake = NULL;
    f->is = READY;
    flights[i].count = flights[i].group = 0;
    return true;
}

void run_fiber(int i) {
    running = i;
    thread_at.x = (unsigned)i % block_size.x;
    thread_at.y = (unsigned)i / block_size.x % block_size.y;
    thread_at.z = (unsigned)i / (block_size.x * block_size.y);
#ifdef HS_ASAN
    __sanitizer_start_switch_fiber(&scheduler_fake, fibers[i].stack, STACK);
#endif
    hs_emulated_switch(&scheduler_sp, fibers[i].sp);
#ifdef HS_ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake, NULL, NULL);
#endif
}

void swap_order(int i, int j) {
    const int t = order[i];
    order[i] = order[j];
    order[j] = t;
}

/* A new order: all threads mixed, or warp by warp, so that a warp may run far ahead of others. */
void mix() {
    const bool warps = next_random() & 1;
    const int count = (threads + 31) / 32, first = warps ? (int)(next_random() % count) : 0;
    for (int i = 0; i < threads; i++) order[i] = (i + 32 * first) % threads;
    for (int i = threads - 1; i > 0; i--) {
        const int low = warps ? i / 32 * 32 : 0;
        swap_order(i, low + (int)(next_random() % (uint64_t)(i - low + 1)));
    }
    for (int i = 0; i < threads; i++) place[order[i]] = i;
}

void note(site at, int op) {
    for (int i = 0; i < site_count; i++)
        if (sites[i].op == op && same(sites[i].at, at)) return;
    if (site_count < SITES) sites[site_count++] = passed{at, op};
}

/* Whether all lanes of this one's mask stand where it stands; if so they get what they ask for. */
bool warp_passes(int i) {
    const fiber *f = &fibers[i];
    const int first = i / 32 * 32;
    for (int lane = 0; lane < 32; lane++) {
        if (!(f->mask >> lane & 1)) continue;
        const fiber *g = &fibers[first + lane];
        if (g->is != AT_WARP || g->op != f->op || g->mask != f->mask || !same(g->at, f->at))
            return false;
    }
    if (f->op == MMA || f->op == LDMATRIX) {
        void *records[32];
        for (int lane = 0; lane < 32; lane++) {
            records[lane] = reinterpret_cast<void *>(fibers[first + lane].value);
            fibers[first + lane].is = READY;
        }
        f->does(records);
        note(f->at, f->op);
        return true;
    }
    uint64_t given[32] = {0};
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; lane++)
        if (f->mask >> lane & 1) {
            given[lane] = fibers[first + lane].value;
            ballot |= (unsigned)(given[lane] & 1) << lane;
        }
    const unsigned mask = f->mask;
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        fiber *g = &fibers[first + lane];
        unsigned from = (unsigned)lane;
        switch (g->op) {
        case SYNC:
        case MMA:
        case LDMATRIX:
            break;
        case BALLOT:
            g->value = ballot;
            break;
        case SHUFFLE:
            from = g->with;
            break;
        case SHUFFLE_XOR:
            from = (unsigned)lane ^ g->with;
            break;
        case SHUFFLE_DOWN:
            from = (unsigned)lane + g->with < 32 ? (unsigned)lane + g->with : (unsigned)lane;
            break;
        }
        if (from > 31 || !(mask >> from & 1)) {
            fault_begins();
            say("thread %d reads lane %u, which is not in the mask %08x of the shuffle at %s:%d",
                first + lane, from, mask, name_of(g->at.file), g->at.line);
            return true;
        }
        if (g->op != BALLOT && g->op != SYNC) g->value = given[from];
        g->is = READY;
    }
    note(f->at, f->op);
    return true;
}

/* Nobody can go on: who stands where. */
void stuck() {
    fault_begins();
    say("threads wait for each other for ever:");
    for (int i = 0; i < threads;) {
        const fiber *f = &fibers[i];
        int last = i;
        while (last + 1 < threads && fibers[last + 1].is == f->is &&
               (f->is == DONE || same(fibers[last + 1].at, f->at)))
            last++;
        say(i ? "; %d-%d " : " %d-%d ", i, last);
        if (f->is == DONE)
            say("have returned");
        else if (f->is == AT_BARRIER)
            say("stand at __syncthreads, %s:%d", name_of(f->at.file), f->at.line);
        else
            say("stand at a %s of mask %08x, %s:%d",
                f->op == SYNC       ? "__syncwarp"
                : f->op == BALLOT   ? "ballot"
                : f->op == MMA      ? "mma"
                : f->op == LDMATRIX ? "ldmatrix"
                                    : "shuffle",
                f->mask, name_of(f->at.file), f->at.line);
        i = last + 1;
    }
}

/* The barrier that all threads stand at is passed; false: they do not all stand at one. */
bool barrier_passes() {
    for (int i = 0; i < threads; i++)
        if (fibers[i].is != AT_BARRIER || !same(fibers[i].at, fibers[0].at)) return false;
    note(fibers[0].at, AT_SYNC);
    for (int i = 0; i < threads; i++) fibers[i].is = READY;
    mix();
    return true;
}

bool all_done() {
    for (int i = 0; i < threads; i++)
        if (fibers[i].is != DONE) return false;
    return true;
}

void run_block() {
    region_count = 0;
    region_bytes = 0;
    if (dynamic) memset(dynamic, 0xff, dynamic_bytes);
    for (int i = 0; i < threads; i++)
        if (!prepare(i)) {
            fault_begins();
            say("no memory for the stacks of %d threads", threads);
            return;
        }
    mix();
    for (;;) {
        /* always the first in order that can: it gets as far ahead as it can get */
        for (int o = 0; o < threads;) {
            const int i = order[o++];
            if (fibers[i].is != READY) continue;
            run_fiber(i);
            if (fibers[i].is == AT_WARP && warp_passes(i))
                for (int lane = i / 32 * 32; lane < threads && lane < i / 32 * 32 + 32; lane++)
                    if (fibers[lane].is == READY && place[lane] < o) o = place[lane];
            if (faulty) return;
        }
        if (all_done()) return;
        if (barrier_passes()) continue;
        stuck();
        return;
    }
}

bool skips(site at) {
    return skipped.line == at.line && skipped_lanes >> (running % 32) & 1 &&
           !strcmp(name_of(at.file), skipped.file);
}

} // namespace

void barrier(site at) {
    if (skips(at)) return;
    fiber *f = &fibers[running];
    f->is = AT_BARRIER;
    f->at = at;
    to_scheduler();
}

uint64_t exchange(site at, warp_op op, unsigned mask, uint64_t value, unsigned with) {
    if (skips(at)) return value;
    fiber *f = &fibers[running];
    const int first = running / 32 * 32, lanes = threads - first < 32 ? threads - first : 32;
    if (!(mask >> (running % 32) & 1) || (lanes < 32 && mask >> lanes)) {
        fault_begins();
        say("thread %d calls a warp operation with mask %08x at %s:%d, %s", running, mask,
            name_of(at.file), at.line,
            lanes < 32 && mask >> lanes ? "which names lanes that the block does not have"
                                        : "which leaves it out");
        stop();
    }
    f->is = AT_WARP;
    f->at = at;
    f->op = op;
    f->mask = mask;
    f->with = with;
    f->value = value;
    to_scheduler();
    return f->value;
}

void together(site at, warp_op op, together_fn does, void *record) {
    fibers[running].does = does;
    exchange(at, op, 0xffffffffu, reinterpret_cast<uint64_t>(record), 0);
}

void copy_async(site at, void *to, const void *from, unsigned bytes, unsigned there) {
    copies *f = &flights[running];
    const uintptr_t both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (f->count == COPIES || there > bytes || both % bytes) {
        fault_begins();
        if (f->count == COPIES)
            say("thread %d has %d copies in flight and begins one more, %s:%d", running, COPIES,
                name_of(at.file), at.line);
        else if (both % bytes)
            say("thread %d copies %u bytes from or to an address that is no multiple of it, %s:%d",
                running, bytes, name_of(at.file), at.line);
        else
            say("thread %d copies %u of %u bytes, %s:%d", running, there, bytes, name_of(at.file),
                at.line);
        stop();
    }
    memset(to, 0xff, bytes);
    f->at[f->count++] = copy{to, from, bytes, there, f->group};
}

void copy_commit() {
    flights[running].group++;
}

void copy_wait(site at, int left) {
    copies *f = &flights[running];
    note(at, AT_WAIT);
    const bool skipping = skips(at);
    int kept = 0;
    for (int i = 0; i < f->count; i++) {
        const copy c = f->at[i];
        if (c.group >= f->group - left) {
            f->at[kept++] = c;
        } else if (!skipping) {
            if (c.there) memcpy(c.to, c.from, c.there);
            memset(static_cast<char *>(c.to) + c.there, 0, c.bytes - c.there);
        } /* else it never lands: what was waited for in vain is not told at the end too */
    }
    f->count = kept;
}

void *dynamic_shared() {
    return dynamic;
}

void shared(void *at, size_t bytes) {
    for (int i = 0; i < region_count; i++)
        if (regions[i].at == at) return;
    region_bytes += bytes;
    if (region_bytes + dynamic_bytes > shared_given()) {
        fault_begins();
        say("%zu bytes in arrays of shared memory beside %zu that the launch asks for; capability "
            "%d.%d gives %zu",
            region_bytes, dynamic_bytes, capability / 10, capability % 10, shared_given());
        stop();
    }
    if (region_count == SHARED || region_bytes > SHARED_BYTES) {
        fault_begins();
        say("%zu bytes in %d arrays of shared memory; a block has %d, and %d arrays here",
            region_bytes, region_count + 1, SHARED_BYTES, SHARED);
        stop();
    }
    regions[region_count].at = at;
    regions[region_count].bytes = bytes;
    region_count++;
    memset(at, 0xff, bytes);
}

void aligned16(const void *p, site at) {
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
    fault_begins();
    say("thread %d touches 16 bytes at an address that is no multiple of 16, %s:%d", running,
        name_of(at.file), at.line);
    stop();
}

int launch(const char *name, dim3 grid, dim3 size, size_t bytes, void (*body_)(void *),
           void *closure_) {
    kernel = name;
    body = body_;
    closure = closure_;
    block_size = size;
    grid_size = grid;
    faulty = false;
    block_at = uint3{0, 0, 0};
    const uint64_t per_block = (uint64_t)size.x * size.y * size.z;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (per_block == 0 || per_block > THREADS || blocks == 0 || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535) {
        fault_begins();
        say("a launch of %ux%ux%u blocks of %ux%ux%u threads is beyond what a GPU takes", grid.x,
            grid.y, grid.z, size.x, size.y, size.z);
        return -3;
    }
    threads = (int)per_block;
    const size_t given = shared_given();
    if (bytes > given) {
        fault_begins();
        say("a launch asks %zu bytes of shared memory a block; capability %d.%d gives %zu", bytes,
            capability / 10, capability % 10, given);
        return -3;
    }
    dynamic_bytes = bytes;
    dynamic = bytes ? aligned_alloc(128, (bytes + 127) / 128 * 128) : NULL;
    if (bytes && !dynamic) return -3;
    /* every block once: forwards or backwards from anywhere */
    const uint64_t from = next_random() % blocks;
    const bool backwards = next_random() & 1;
    for (uint64_t b = 0; b < blocks && !faulty; b++) {
        const uint64_t i = backwards ? (from + blocks - b) % blocks : (from + b) % blocks;
        block_at.x = (unsigned)(i % grid.x);
        block_at.y = (unsigned)(i / grid.x % grid.y);
        block_at.z = (unsigned)(i / grid.x / grid.y);
        run_block();
    }
    free(dynamic);
    dynamic = NULL;
    return faulty ? -3 : 0;
}

} // namespace hs_emulated

extern "C" void hs_emulated_seed(uint64_t seed) {
    hs_emulated::random_state = seed;
    hs_emulated::text[0] = 0;
    hs_emulated::site_count = 0;
    hs_emulated::conflicts = 0;
    hs_emulated::products = 0;
}

extern "C" void hs_emulated_architecture(int capability) {
    hs_emulated::capability = capability;
}

extern "C" uint64_t hs_emulated_conflicts(void) {
    return hs_emulated::conflicts;
}

extern "C" uint64_t hs_emulated_products(void) {
    return hs_emulated::products;
}

extern "C" const char *hs_emulated_text(void) {
    return hs_emulated::text;
}

extern "C" int hs_emulated_site(int i, const char **file, int *line, int *op) {
    if (i < 0 || i >= hs_emulated::site_count) return 0;
    *file = hs_emulated::name_of(hs_emulated::sites[i].at.file);
    *line = hs_emulated::sites[i].at.line;
    *op = hs_emulated::sites[i].op;
    return 1;
}

extern "C" void hs_emulated_skip(const char *file, int line, uint32_t lanes) {
    static char kept[256];
    snprintf(kept, sizeof kept, "%s", file);
    hs_emulated::skipped = hs_emulated::site{kept, line};
    hs_emulated::skipped_lanes = line ? lanes : 0;
}
