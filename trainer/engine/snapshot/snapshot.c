#include "snapshot/snapshot_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/crc32.h"

enum { HUGE_PAGE = 2 << 20 };

/* What header_crc covers, before the checksums. */
enum { CRC_FIRST = 24, CRC_END = 136, CRC_AGAIN = 140, CRC_LAST = 156 };
_Static_assert(offsetof(hs_slot_header, generation) == CRC_FIRST, "slot header");
_Static_assert(offsetof(hs_slot_header, header_crc) == CRC_END, "slot header");
_Static_assert(offsetof(hs_slot_header, final) == CRC_AGAIN, "slot header");
_Static_assert(offsetof(hs_slot_header, claim) == CRC_LAST, "slot header");

static uint64_t round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

uint32_t hs_snapshot_header_crc(const hs_snapshot *s, int i) {
    const uint8_t *header = s->slots[i].map;
    uint32_t crc = hs_crc32(0, header + CRC_FIRST, CRC_END - CRC_FIRST);
    crc = hs_crc32(crc, header + CRC_AGAIN, CRC_LAST - CRC_AGAIN);
    return hs_crc32(crc, hs_snapshot_sums(s, i), s->chunks * sizeof(uint64_t));
}

static int by_place(const void *a, const void *b) {
    const hs_piece *left = a, *right = b;
    return left->at < right->at ? -1 : left->at > right->at;
}

/* What lies behind one another in both places is copied at once. */
static void join_pieces(hs_snapshot *s) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->piece_count; i++) {
        hs_piece *last = kept ? &s->pieces[kept - 1] : NULL, *next = &s->pieces[i];
        if (last && last->at + last->bytes == next->at &&
            last->offset + last->bytes == next->offset)
            last->bytes += next->bytes;
        else
            s->pieces[kept++] = *next;
    }
    s->piece_count = kept;
}

/* That a rank keeps of each of a tensor's kinds (hs_plan_state). */
static uint64_t kept_bytes(const hs_plan_state *state, uint64_t elements) {
    return hs_piece_elements(elements, state->pieces) * sizeof(float);
}

hs_status hs_snapshot_create(const hs_snapshot_config *config, hs_snapshot **out, hs_why *why) {
    *out = NULL;
    hs_snapshot *s = calloc(1, sizeof *s);
    if (s) s->pieces = calloc((size_t)config->state_count * 3 + 1, sizeof *s->pieces);
    if (!s || !s->pieces) {
        free(s);
        return hs_fail(why, HS_E_MEMORY, "no memory for the table of %u snapshot tensors",
                       config->state_count);
    }
    s->position = config->position;
    s->replica = config->replica;
    memcpy(s->plan_digest, config->plan_digest, sizeof s->plan_digest);
    memcpy(s->what_digest, config->what_digest, sizeof s->what_digest);
    s->epoch = config->epoch;
    s->arena = config->arena;
    s->device = config->device;
    s->pool = config->pool;
    s->log = config->log;
    s->newest = s->claimed = s->ended_fd = -1;
    for (uint32_t i = 0; i < config->state_count; i++) {
        const hs_plan_state *state = &config->states[i];
        const uint64_t bytes = kept_bytes(state, (uint64_t)config->tensors[state->tensor].elements);
        const uint64_t offsets[3] = {state->master_offset, state->m_offset, state->v_offset};
        for (uint64_t k = 0; k < hs_state_kinds(state); k++)
            s->pieces[s->piece_count++] =
                (hs_piece){.at = state->slot_offset + k * round_up(bytes, 64),
                           .bytes = bytes,
                           .offset = offsets[k]};
    }
    qsort(s->pieces, s->piece_count, sizeof *s->pieces, by_place);
    for (uint32_t i = 0; i < s->piece_count; i++) {
        if (s->pieces[i].at < s->data_bytes) {
            hs_snapshot_destroy(s);
            return hs_fail(why, HS_E_CONFIG, "two tensors of a snapshot overlap in the plan");
        }
        s->data_bytes = round_up(s->pieces[i].at + s->pieces[i].bytes, 64);
    }
    join_pieces(s);
    s->chunks = (s->data_bytes + HS_SLOT_CHUNK - 1) / HS_SLOT_CHUNK;
    s->data_offset = HS_SLOT_HEADER_BYTES + round_up(s->chunks * sizeof(uint64_t), 4096);
    s->slot_bytes = config->slot_bytes;
    if (s->data_offset + s->data_bytes > s->slot_bytes) {
        const hs_status st =
            hs_fail(why, HS_E_CONFIG, "a snapshot takes %llu bytes, the plan's slots have %llu",
                    (unsigned long long)(s->data_offset + s->data_bytes),
                    (unsigned long long)s->slot_bytes);
        hs_snapshot_destroy(s);
        return st;
    }
    *out = s;
    return HS_OK;
}

void hs_snapshot_destroy(hs_snapshot *s) {
    if (!s) return;
    hs_snapshot_stop(s);
    for (int i = 0; i < s->count; i++) {
        if (s->slots[i].map) (void)munmap(s->slots[i].map, s->data_offset + s->data_bytes);
        close(s->slots[i].fd);
    }
    free(s->pieces);
    free(s);
}

/* On a border of huge pages, which the agent has made where it could: a fault each of them. NULL with errno. */
static uint8_t *map_aligned(int fd, uint64_t bytes) {
    const uint64_t room = bytes + HUGE_PAGE;
    uint8_t *around = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (around == MAP_FAILED) return NULL;
    uint8_t *at = around + (-(uintptr_t)around & (HUGE_PAGE - 1));
    if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        (void)munmap(around, room);
        return NULL;
    }
    const uint64_t mapped = round_up(bytes, 4096);
    if (at > around) (void)munmap(around, (size_t)(at - around));
    (void)munmap(at + mapped, (size_t)(around + room - (at + mapped)));
    return at;
}

static hs_status map_slot(hs_snapshot *s, int i, hs_why *why) {
    const int fd = s->slots[i].fd;
    struct stat info;
    const uint64_t need = s->data_offset + s->data_bytes;
    if (fstat(fd, &info) != 0)
        return hs_fail(why, HS_E_IO, "fstat of slot %d: %s", i, strerror(errno));
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return hs_fail(why, HS_E_CONFIG,
                       "slot %d is not a memfd sealed against shrinking; the agent must seal it",
                       i);
    if ((uint64_t)info.st_size < need)
        return hs_fail(why, HS_E_CONFIG,
                       "slot %d has %lld bytes, this position's snapshot needs %llu", i,
                       (long long)info.st_size, (unsigned long long)need);
    s->slots[i].map = map_aligned(fd, need);
    if (!s->slots[i].map)
        return hs_fail(why, HS_E_MEMORY, "mmap of slot %d (%llu bytes): %s", i,
                       (unsigned long long)need, strerror(errno));
    hs_slot_header *header = hs_snapshot_header(s, i);
    const bool known = memcmp(header->magic, HS_SLOT_MAGIC, sizeof header->magic) == 0;
    if (known && hs_snapshot_load(&header->state) == HS_SLOT_READY &&
        (header->position != s->position || header->replica != s->replica))
        return hs_fail(why, HS_E_CONFIG, "slot %d is of position %u of replica %u, not %u of %u", i,
                       header->position, header->replica, s->position, s->replica);
    hs_snapshot_store(&header->claim, 0); /* of a rank that died before it filled */
    /* FILLING: its rank died in the middle. Without a magic: fresh from the agent. */
    if (!known || hs_snapshot_load(&header->state) != HS_SLOT_READY)
        hs_snapshot_store(&header->state, HS_SLOT_EMPTY);
    return HS_OK;
}

hs_status hs_snapshot_attach(hs_snapshot *s, const int *fds, int count, hs_why *why) {
    if (s->count || count < 0 || count > HS_SNAPSHOT_SLOTS_MAX) {
        for (int i = 0; i < count; i++) close(fds[i]);
        return hs_fail(why, HS_E_CONFIG, "%d snapshot slots came, at most %d are taken, once",
                       count, HS_SNAPSHOT_SLOTS_MAX);
    }
    for (int i = 0; i < count; i++) s->slots[i] = (hs_mapping){.fd = fds[i], .map = NULL};
    s->count = count;
    for (int i = 0; i < count; i++) HS_TRY(map_slot(s, i, why));
    return count ? hs_snapshot_start_filling(s, why) : HS_OK;
}

uint8_t *hs_snapshot_memory(const hs_snapshot *s, int i, uint64_t *bytes) {
    *bytes = s->data_offset + s->data_bytes;
    return i < s->count ? s->slots[i].map : NULL;
}

int hs_snapshot_fds(const hs_snapshot *s, int fds[HS_SNAPSHOT_SLOTS_MAX]) {
    for (int i = 0; i < s->count; i++) fds[i] = s->slots[i].fd;
    return s->count;
}

int64_t hs_snapshot_step(const hs_snapshot *s, int i) {
    if (i < 0 || i >= s->count ||
        hs_snapshot_load(&hs_snapshot_header(s, i)->state) != HS_SLOT_READY)
        return -1;
    return hs_snapshot_header(s, i)->step;
}

/* --- chunks ------------------------------------------------------------------------------ */

/* The first piece that ends after `at`. */
static uint32_t find_piece(const hs_snapshot *s, uint64_t at) {
    uint32_t low = 0, high = s->piece_count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (s->pieces[middle].at + s->pieces[middle].bytes > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* The checksum of data [at, end) of a slot, which is copied meanwhile from or to the arena, if that is the host's; what
 * lies between pieces is zero in a slot. */
static uint32_t pass(const hs_snapshot *s, uint8_t *data, uint64_t at, uint64_t end, bool to_slot) {
    uint32_t crc = 0;
    for (uint32_t p = find_piece(s, at); at < end; p++) {
        const bool any = p < s->piece_count && s->pieces[p].at < end;
        const uint64_t begin = any ? s->pieces[p].at : end;
        if (begin > at) {
            if (to_slot) memset(data + at, 0, begin - at);
            crc = hs_crc32(crc, data + at, begin - at);
            at = begin;
        }
        if (!any) break;
        const uint64_t stop = s->pieces[p].at + s->pieces[p].bytes;
        const uint64_t n = (stop < end ? stop : end) - at;
        uint8_t *arena = s->arena ? s->arena + s->pieces[p].offset + (at - s->pieces[p].at) : NULL;
        if (!arena) /* the device did, or will */
            crc = hs_crc32(crc, data + at, n);
        else if (to_slot)
            crc = hs_crc32_copy(crc, data + at, arena, n);
        else
            crc = hs_crc32_copy(crc, arena, data + at, n);
        at += n;
    }
    return crc;
}

void hs_snapshot_chunks(void *ctx, int64_t begin, int64_t end, int worker) {
    hs_chunks *w = ctx;
    const hs_snapshot *s = w->snapshot;
    uint8_t *data = s->slots[w->slot].map + s->data_offset;
    (void)worker;
    for (int64_t chunk = begin; chunk < end && !atomic_load(&s->abandon); chunk++) {
        const uint64_t first = (uint64_t)chunk * HS_SLOT_CHUNK;
        const uint64_t last =
            first + HS_SLOT_CHUNK < s->data_bytes ? first + HS_SLOT_CHUNK : s->data_bytes;
        const uint64_t sum = pass(s, data, first, last, w->to_slot);
        if (w->to_slot) {
            hs_snapshot_sums(s, w->slot)[chunk] = sum;
        } else if (hs_snapshot_sums(s, w->slot)[chunk] != sum) {
            int64_t seen = atomic_load(&w->bad);
            while (chunk < seen && !atomic_compare_exchange_weak(&w->bad, &seen, chunk)) continue;
        }
    }
}

/* --- restoring --------------------------------------------------------------------------- */

static hs_status check_header(const hs_snapshot *s, int i, int64_t step, hs_why *why) {
    const hs_slot_header *header = hs_snapshot_header(s, i);
    if (memcmp(header->magic, HS_SLOT_MAGIC, sizeof header->magic) != 0 ||
        header->version != HS_SLOT_VERSION)
        return hs_fail(why, HS_E_RESTORE, "slot %d holds no snapshot of this version", i);
    const uint32_t state = hs_snapshot_load(&header->state);
    if (state != HS_SLOT_READY)
        return hs_fail(why, HS_E_RESTORE, "slot %d is not ready (state %u)", i, state);
    if (header->data_offset != s->data_offset || header->data_bytes != s->data_bytes ||
        header->chunks != s->chunks)
        return hs_fail(
            why, HS_E_RESTORE, "slot %d holds %llu bytes at %llu, this position %llu at %llu", i,
            (unsigned long long)header->data_bytes, (unsigned long long)header->data_offset,
            (unsigned long long)s->data_bytes, (unsigned long long)s->data_offset);
    if (header->header_crc != hs_snapshot_header_crc(s, i))
        return hs_fail(why, HS_E_RESTORE, "the header of slot %d is damaged (checksum)", i);
    if (header->position != s->position || header->replica != s->replica ||
        memcmp(header->plan_digest, s->plan_digest, sizeof s->plan_digest) != 0)
        return hs_fail(why, HS_E_RESTORE, "slot %d is of another layout, position or replica", i);
    if (memcmp(header->what_digest, s->what_digest, sizeof s->what_digest) != 0)
        return hs_fail(why, HS_E_RESTORE, "slot %d is of another run's spec", i);
    if (header->step != step)
        return hs_fail(why, HS_E_RESTORE,
                       "slot %d is of step %lld, the attempt starts after step %lld", i,
                       (long long)header->step, (long long)step);
    if (header->checksum_kind != HS_SLOT_SUM_CRC32)
        return hs_fail(why, HS_E_RESTORE, "slot %d has checksums of the unknown kind %u", i,
                       header->checksum_kind);
    return HS_OK;
}

/* A slot's pieces, to a device. */
static hs_status copy_back(const hs_snapshot *s, int slot, hs_why *why) {
    uint8_t *data = s->slots[slot].map + s->data_offset;
    for (uint32_t i = 0; i < s->piece_count; i++) {
        const hs_piece *p = &s->pieces[i];
        HS_TRY(s->device.copy(s->device.ctx, false, p->offset, data + p->at, p->bytes, why));
    }
    return s->device.copied(s->device.ctx, false, why);
}

hs_status hs_snapshot_restore(hs_snapshot *s, int i, int64_t step, hs_why *why) {
    if (i < 0 || i >= s->count)
        return hs_fail(why, HS_E_RESTORE, "no slot %d to restore from: %d came", i, s->count);
    const int64_t begin_ns = hs_clock_ns();
    HS_TRY(check_header(s, i, step, why));
    hs_chunks w = {.snapshot = s, .slot = i, .bad = INT64_MAX};
    hs_parallel_for(s->pool, (int64_t)s->chunks, hs_snapshot_chunks, &w);
    const int64_t bad = atomic_load(&w.bad);
    if (bad != INT64_MAX)
        return hs_fail(why, HS_E_RESTORE, "chunk %lld of slot %d (step %lld) is damaged (checksum)",
                       (long long)bad, i, (long long)step);
    if (!s->arena) HS_TRY(copy_back(s, i, why));
    s->newest = i;
    HS_LOG(s->log, HS_LOG_DEBUG, "slot restored", HS_I("step", step), HS_I("slot", i),
           HS_I("us", (hs_clock_ns() - begin_ns) / 1000));
    return HS_OK;
}
