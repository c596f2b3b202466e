#include "run/attempt.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/hash.h"

enum { MAX_RANKS = 1 << 20 };
#define MAX_STEPS (INT64_C(1) << 40) /* as of a plan */

static size_t file_bytes(const hs_attempt *attempt) {
    return sizeof *attempt + (size_t)attempt->ranks * sizeof(hs_attempt_rank) +
           (size_t)attempt->skips * sizeof(hs_attempt_skip) +
           (size_t)attempt->rates * sizeof(hs_attempt_rate);
}

static hs_amendments amendments_of(const hs_attempt *a) {
    const hs_attempt_rank *ranks = (const hs_attempt_rank *)(a + 1);
    const hs_attempt_skip *skips = (const hs_attempt_skip *)(const void *)(ranks + a->ranks);
    return (hs_amendments){.steps = a->total_steps,
                           .skips = skips,
                           .rates = (const hs_attempt_rate *)(const void *)(skips + a->skips),
                           .skip_count = a->skips,
                           .rate_count = a->rates};
}

static hs_status check_amendments(const char *path, const hs_attempt *a, hs_why *why) {
    const hs_amendments m = amendments_of(a);
    if (m.steps < 0 || m.steps > MAX_STEPS) {
        return hs_fail(why, HS_E_CONFIG, "attempt %s: total_steps %" PRId64 " is out of range",
                       path, m.steps);
    }
    for (uint32_t i = 0; i < m.skip_count; i++) {
        const int64_t before = i ? m.skips[i - 1].last : 0;
        if (m.skips[i].first > before && m.skips[i].last >= m.skips[i].first &&
            m.skips[i].last <= MAX_STEPS)
            continue;
        return hs_fail(why, HS_E_CONFIG,
                       "attempt %s: the skipped batches %" PRId64 " to %" PRId64
                       " do not ascend from those before, or are out of range",
                       path, m.skips[i].first, m.skips[i].last);
    }
    for (uint32_t i = 0; i < m.rate_count; i++) {
        const int64_t before = i ? m.rates[i - 1].step : 0;
        if (m.rates[i].step > before && m.rates[i].factor > 0.0 && m.rates[i].factor <= 1.0)
            continue;
        return hs_fail(why, HS_E_CONFIG,
                       "attempt %s: the rate's factor %g from step %" PRId64
                       " is not above 0 and at most 1, or its step does not ascend",
                       path, m.rates[i].factor, m.rates[i].step);
    }
    return HS_OK;
}

/* All that can be said about the bytes alone. */
static hs_status check(const char *path, const hs_attempt *a, size_t size, hs_why *why) {
    const size_t checked = offsetof(hs_attempt, run);
    if (memcmp(a->magic, HS_ATTEMPT_MAGIC, sizeof a->magic) != 0)
        return hs_fail(why, HS_E_CONFIG, "%s is not an attempt file", path);
    if (a->version != HS_ATTEMPT_VERSION) {
        return hs_fail(why, HS_E_CONFIG,
                       "attempt %s is of version %" PRIu32
                       ", this engine reads version %u: install agent and engine of one release",
                       path, a->version, HS_ATTEMPT_VERSION);
    }
    if (a->ranks == 0 || a->ranks > MAX_RANKS || a->skips > HS_ATTEMPT_SKIPS_MAX ||
        a->rates > HS_ATTEMPT_RATES_MAX || file_bytes(a) != size) {
        return hs_fail(why, HS_E_CONFIG,
                       "attempt %s: %" PRIu32 " ranks, %" PRIu32 " skips and %" PRIu32
                       " rates do not go with %zu bytes",
                       path, a->ranks, a->skips, a->rates, size);
    }
    if (hs_crc32c(0, (const uint8_t *)a + checked, size - checked) != a->crc) {
        return hs_fail(why, HS_E_CONFIG, "attempt %s: its bytes do not have the checksum it says",
                       path);
    }
    if (!a->run[0] || !memchr(a->run, 0, sizeof a->run) ||
        !memchr(a->data_dir, 0, sizeof a->data_dir) ||
        !memchr(a->work_dir, 0, sizeof a->work_dir)) {
        return hs_fail(why, HS_E_CONFIG, "attempt %s: run, data_dir or work_dir does not end",
                       path);
    }
    if (a->start_step < -1 || a->stop_after < -1 || a->connect_ms == 0 || a->stall_ms == 0 ||
        a->commit_ms == 0 || a->trace > HS_TRACE_CALLS || a->data_ahead > 1) {
        return hs_fail(why, HS_E_CONFIG,
                       "attempt %s: start_step %" PRId64 ", stop_after %" PRId64
                       ", a deadline of 0 ms, trace %" PRIu32 " or data_ahead %" PRIu32
                       " is out of range",
                       path, a->start_step, a->stop_after, a->trace, a->data_ahead);
    }
    const hs_attempt_rank *ranks = (const hs_attempt_rank *)(a + 1);
    for (uint32_t r = 0; r < a->ranks; r++) {
        if (!memchr(ranks[r].host, 0, sizeof ranks[r].host) || ranks[r].port > 65535) {
            return hs_fail(why, HS_E_CONFIG,
                           "attempt %s: the address of rank %" PRIu32 " does not hold", path, r);
        }
    }
    return check_amendments(path, a, why);
}

hs_status hs_attempt_open(const char *path, hs_attempt_file *file, hs_why *why) {
    *file = (hs_attempt_file){0};
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        const int code = errno;
        if (fd >= 0) (void)close(fd);
        return hs_fail(why, HS_E_CONFIG, "attempt %s cannot be opened: %s", path, strerror(code));
    }
    const size_t size = (size_t)info.st_size;
    const size_t most = sizeof(hs_attempt) + (size_t)MAX_RANKS * sizeof(hs_attempt_rank) +
                        HS_ATTEMPT_SKIPS_MAX * sizeof(hs_attempt_skip) +
                        HS_ATTEMPT_RATES_MAX * sizeof(hs_attempt_rate);
    hs_attempt *attempt = NULL;
    hs_status st = HS_OK;
    if (size < sizeof *attempt || size > most) {
        st = hs_fail(why, HS_E_CONFIG, "attempt %s: %zu bytes are not an attempt file", path, size);
    } else if (!(attempt = malloc(size))) {
        st = hs_fail(why, HS_E_MEMORY, "no memory for attempt %s of %zu bytes", path, size);
    }
    for (size_t at = 0; st == HS_OK && at < size;) {
        const ssize_t n = read(fd, (uint8_t *)attempt + at, size - at);
        if (n > 0) {
            at += (size_t)n;
        } else if (n == 0 || errno != EINTR) {
            st = hs_fail(why, HS_E_CONFIG, "attempt %s cannot be read to its end", path);
        }
    }
    (void)close(fd);
    if (st == HS_OK) st = check(path, attempt, size, why);
    if (st != HS_OK) {
        free(attempt);
        return st;
    }
    *file = (hs_attempt_file){.attempt = attempt,
                              .ranks = (const hs_attempt_rank *)(attempt + 1),
                              .amendments = amendments_of(attempt)};
    return HS_OK;
}

void hs_attempt_close(hs_attempt_file *file) {
    if (file->attempt) explicit_bzero(file->attempt, sizeof *file->attempt);
    free(file->attempt);
    *file = (hs_attempt_file){0};
}

uint32_t hs_attempt_local_ranks(const hs_attempt_file *file, uint32_t rank) {
    uint32_t local = 0;
    for (uint32_t r = 0; r < file->attempt->ranks; r++) {
        local += file->ranks[r].node == file->ranks[rank].node;
    }
    return local;
}
