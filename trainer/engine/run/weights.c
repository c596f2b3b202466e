#include "run/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static hs_status read_at(int fd, const char *path, uint8_t *to, uint64_t bytes, uint64_t from,
                         hs_why *why) {
    while (bytes > 0) {
        const ssize_t n = pread(fd, to, bytes, (off_t)from);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            return hs_fail(why, HS_E_CONFIG, "weights %s cannot be read at byte %" PRIu64 ": %s",
                           path, from, n < 0 ? strerror(errno) : "the file ends there");
        }
        to += n;
        from += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return HS_OK;
}

static hs_status write_all(int fd, const char *path, const uint8_t *from, uint64_t bytes,
                           hs_why *why) {
    while (bytes > 0) {
        const ssize_t n = write(fd, from, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return hs_fail(why, HS_E_IO, "dump %s cannot be written: %s", path, strerror(errno));
        from += n;
        bytes -= (uint64_t)n;
    }
    return HS_OK;
}

/* First byte of a tensor in the file, or the file's size for tensor = count. */
static uint64_t place(const hs_plan *plan, uint32_t tensor) {
    uint64_t at = 0;
    for (uint32_t t = 0; t < tensor; t++) {
        at += (uint64_t)plan->tensors[t].elements * 4;
        if (t + 1 < plan->count[HS_SECTION_TENSORS]) at = (at + 63) & ~UINT64_C(63);
    }
    return at;
}

hs_status hs_weights_read(const char *path, const hs_plan *plan, const hs_plan_position *position,
                          uint32_t replica, hs_spaces *spaces, hs_why *why) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        const int code = errno;
        if (fd >= 0) (void)close(fd);
        return hs_fail(why, HS_E_CONFIG, "weights %s cannot be opened: %s", path, strerror(code));
    }
    /* the file may end with the last tensor or with its padding */
    const uint64_t size = place(plan, (uint32_t)plan->count[HS_SECTION_TENSORS]);
    const uint64_t padded = (size + 63) & ~UINT64_C(63), has = (uint64_t)info.st_size;
    hs_status st = HS_OK;
    if (has != size && has != padded) {
        st = hs_fail(why, HS_E_CONFIG,
                     "weights %s have %" PRIu64 " bytes, this model's take %" PRIu64, path, has,
                     size);
    }
    for (uint32_t i = 0; st == HS_OK && i < position->states; i++) {
        const hs_plan_state *state = &plan->states[position->first_state + i];
        const hs_plan_share share = hs_plan_share_of(plan, state, replica);
        uint64_t left = share.count * 4, offset = state->master_offset;
        uint64_t from = place(plan, state->tensor) + share.first * 4;
        for (uint64_t n; st == HS_OK && left > 0; left -= n, from += n, offset += n) {
            uint8_t *to;
            n = left;
            st = hs_spaces_writable(spaces, offset, &n, &to, why);
            if (st == HS_OK) st = read_at(fd, path, to, n, from, why);
            if (st == HS_OK) st = hs_spaces_put(spaces, offset, to, n, why);
        }
    }
    (void)close(fd);
    return st;
}

hs_status hs_weights_dump(const char *dir, int64_t step, int what, const hs_plan *plan,
                          uint32_t rank, hs_spaces *spaces, hs_why *why) {
    const hs_plan_position *position = &plan->positions[hs_plan_position_of(plan, rank)];
    char path[4300];
    (void)snprintf(path, sizeof path, "%s/%" PRId64 "-%" PRIu32 ".%s", dir, step, rank,
                   what == HS_DUMP_GRADS ? "grads" : "weights");
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return hs_fail(why, HS_E_IO, "dump %s cannot be written: %s", path, strerror(errno));
    hs_status st = HS_OK;
    for (uint32_t i = 0; st == HS_OK && i < position->states; i++) {
        const hs_plan_state *state = &plan->states[position->first_state + i];
        const hs_plan_share share = hs_plan_share_of(plan, state, hs_plan_replica_of(plan, rank));
        uint64_t offset =
            what == HS_DUMP_GRADS ? state->grad_offset + share.first * 4 : state->master_offset;
        uint64_t left = share.count * 4;
        for (uint64_t n; st == HS_OK && left > 0; left -= n, offset += n) {
            const uint8_t *from;
            n = left;
            st = hs_spaces_readable(spaces, offset, &n, &from, why);
            if (st == HS_OK) st = write_all(fd, path, from, n, why);
        }
    }
    if (close(fd) != 0 && st == HS_OK) {
        st = hs_fail(why, HS_E_IO, "dump %s cannot be written: %s", path, strerror(errno));
    }
    return st;
}
