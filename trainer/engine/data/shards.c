#include "data/shards.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/files.h"
#include "wire/shard.h"

struct hs_shards {
    const hs_plan_config *config;
    const hs_plan_shard *table;
    size_t count;
    const hs_plan_part *parts; /* of a mixture */
    size_t part_count;
    int *fds;        /* by shard; -1: no sample in it, not opened */
    bool *masked;    /* by shard; a token's top bit says whether it counts */
    uint8_t *sample; /* T + 1 tokens as they are in a file */
    char dir[4096];
};

static void name_of(const hs_shards *shards, size_t s, char path[4200]) {
    size_t k = 0;
    while (k + 1 < shards->part_count && shards->parts[k + 1].first_shard <= s) k++;
    if (!shards->part_count) {
        (void)snprintf(path, 4200, "%s/%05zu.bin", shards->dir, s);
        return;
    }
    char digest[2 * sizeof shards->parts->digest + 1];
    for (size_t i = 0; i < sizeof shards->parts->digest; i++)
        (void)snprintf(digest + 2 * i, 3, "%02x", shards->parts[k].digest[i]);
    (void)snprintf(path, 4200, "%s/%s/%05zu.bin", shards->dir, digest,
                   s - shards->parts[k].first_shard);
}

/* Reads bytes of an open shard. What a file no longer holds, or a disk no longer gives, is said
 * with its place; a mapping would have ended the process by SIGBUS. */
static hs_status read_at(const hs_shards *shards, size_t s, uint64_t offset, void *to, size_t bytes,
                         hs_why *why) {
    char path[4200];
    for (size_t done = 0; done < bytes;) {
        const ssize_t n =
            pread(shards->fds[s], (uint8_t *)to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n > 0) {
            done += (size_t)n;
            continue;
        }
        const int code = errno;
        name_of(shards, s, path);
        if (n == 0) {
            struct stat info = {.st_size = 0};
            (void)fstat(shards->fds[s], &info);
            return hs_fail(why, HS_E_DATA,
                           "%s ends at byte %" PRId64 "; %zu bytes were wanted at %" PRIu64
                           ": it was cut after it was opened; fetch it again",
                           path, (int64_t)info.st_size, bytes, offset);
        }
        return hs_fail(why, HS_E_LOST, "%s cannot be read at byte %" PRIu64 ": %s", path,
                       offset + done, strerror(code));
    }
    return HS_OK;
}

static size_t shard_bytes(const hs_shards *shards, size_t s) {
    return sizeof(hs_shard_header) + shards->table[s].tokens * shards->config->token_bytes;
}

static hs_status check_header(const hs_shards *shards, size_t s, const char *path,
                              const hs_shard_header *header, hs_why *why) {
    const hs_plan_config *config = shards->config;
    if (memcmp(header->magic, HS_SHARD_MAGIC, sizeof header->magic) != 0 ||
        (header->version != HS_SHARD_VERSION && header->version != HS_SHARD_MASKED)) {
        return hs_fail(why, HS_E_DATA,
                       "%s is not a token shard of version %u or %u; prepare the data again", path,
                       HS_SHARD_VERSION, HS_SHARD_MASKED);
    }
    if (header->token_bytes != config->token_bytes || header->tokens != shards->table[s].tokens) {
        return hs_fail(why, HS_E_DATA,
                       "%s holds %" PRIu64 " tokens of %" PRIu32 " bytes, the plan says %" PRIu64
                       " of %" PRIu32 "; it belongs to another dataset",
                       path, header->tokens, header->token_bytes, shards->table[s].tokens,
                       config->token_bytes);
    }
    if (header->vocab > config->vocab) {
        return hs_fail(why, HS_E_DATA,
                       "%s was made with a vocabulary of %" PRIu32 ", the model's is %" PRIu32
                       "; raise model.vocab",
                       path, header->vocab, config->vocab);
    }
    return HS_OK;
}

/* Whether a file that cannot be opened is missing or closed to us; else its storage fails, or the
 * machine. */
static bool of_the_data(int code) {
    return code == ENOENT || code == ENOTDIR || code == EACCES || code == EPERM || code == ELOOP ||
           code == ENAMETOOLONG;
}

static hs_status open_shard(hs_shards *shards, size_t s, hs_why *why) {
    char path[4200];
    name_of(shards, s, path);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const int code = errno;
    if (fd < 0 && code == EMFILE)
        return hs_fail(
            why, HS_E_CONFIG,
            "shard %s cannot be opened: this process may have no more open files for "
            "%zu shards; raise the hard limit (ulimit -Hn), or prepare fewer, larger shards",
            path, shards->count);
    if (fd < 0)
        return hs_fail(why, of_the_data(code) ? HS_E_DATA : HS_E_LOST,
                       "shard %s cannot be opened: %s", path, strerror(code));
    shards->fds[s] = fd;
    struct stat info;
    const size_t bytes = shard_bytes(shards, s);
    if (fstat(fd, &info) != 0)
        return hs_fail(why, HS_E_LOST, "shard %s cannot be read: %s", path, strerror(errno));
    if ((uint64_t)info.st_size != bytes)
        return hs_fail(why, HS_E_DATA,
                       "shard %s has %" PRId64 " bytes, the plan says %zu; fetch it again", path,
                       (int64_t)info.st_size, bytes);
    hs_shard_header header;
    HS_TRY(read_at(shards, s, 0, &header, sizeof header, why));
    shards->masked[s] = header.version == HS_SHARD_MASKED;
    return check_header(shards, s, path, &header, why);
}

hs_status hs_shards_open(const char *dir, const hs_shard_tables *tables, hs_shards **out,
                         hs_why *why) {
    const hs_plan_config *config = tables->config;
    const hs_plan_shard *table = tables->shards;
    const size_t count = tables->count;
    *out = NULL;
    hs_shards *shards = calloc(1, sizeof *shards);
    int *fds = malloc((count ? count : 1) * sizeof *fds);
    bool *masked = calloc(count ? count : 1, sizeof *masked);
    uint8_t *sample = malloc(((size_t)config->sequence + 1) * config->token_bytes);
    if (!shards || !fds || !masked || !sample) {
        free(shards);
        free(fds);
        free(masked);
        free(sample);
        return hs_fail(why, HS_E_MEMORY, "no memory for %zu shards", count);
    }
    *shards = (hs_shards){.config = config,
                          .table = table,
                          .count = count,
                          .parts = tables->parts,
                          .part_count = tables->part_count,
                          .fds = fds,
                          .masked = masked,
                          .sample = sample};
    (void)snprintf(shards->dir, sizeof shards->dir, "%s", dir);
    for (size_t s = 0; s < count; s++) fds[s] = -1;
    hs_files_allow(); /* a descriptor a shard */
    for (size_t s = 0; s < count; s++) {
        if (table[s].tokens <= config->sequence) continue; /* too short for one sample */
        const hs_status st = open_shard(shards, s, why);
        if (st != HS_OK) {
            hs_shards_close(shards);
            return st;
        }
    }
    *out = shards;
    return HS_OK;
}

void hs_shards_close(hs_shards *shards) {
    if (!shards) return;
    for (size_t s = 0; s < shards->count; s++)
        if (shards->fds[s] >= 0) (void)close(shards->fds[s]);
    free(shards->fds);
    free(shards->masked);
    free(shards->sample);
    free(shards);
}

/* The shard that holds a sample: the last one whose first_sample is not above it (empty ones share
 * their successor's number and come before it). */
static size_t find_shard(const hs_shards *shards, uint64_t sample) {
    size_t low = 0, high = shards->count;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (shards->table[middle].first_sample <= sample) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

hs_status hs_shards_read(const hs_shards *shards, uint64_t sample, int32_t *inputs,
                         int32_t *targets, hs_why *why) {
    const hs_plan_config *config = shards->config;
    HS_ASSERT(sample < config->data_samples);
    const size_t s = find_shard(shards, sample);
    const uint64_t first = (sample - shards->table[s].first_sample) * config->sequence;
    HS_ASSERT(shards->fds[s] >= 0 && first + config->sequence < shards->table[s].tokens);
    const uint8_t *const tokens = shards->sample;
    const uint32_t mask = shards->masked[s] ? UINT32_C(1) << (8 * config->token_bytes - 1) : 0;
    HS_TRY(read_at(shards, s, sizeof(hs_shard_header) + first * config->token_bytes, shards->sample,
                   ((size_t)config->sequence + 1) * config->token_bytes, why));
    for (uint32_t t = 0; t <= config->sequence; t++) {
        uint32_t token;
        if (config->token_bytes == 2) {
            uint16_t narrow;
            memcpy(&narrow, tokens + 2 * (size_t)t, 2);
            token = narrow;
        } else {
            memcpy(&token, tokens + 4 * (size_t)t, 4);
        }
        const bool counts = !(token & mask);
        token &= ~mask;
        if (token >= config->vocab) {
            char path[4200];
            name_of(shards, s, path);
            return hs_fail(why, HS_E_DATA,
                           "%s, token number %" PRIu64 " is %" PRIu32
                           ", the vocabulary ends at %" PRIu32 "; prepare the data again",
                           path, first + t, token, config->vocab);
        }
        if (inputs && t < config->sequence) inputs[t] = (int32_t)token;
        if (targets && t > 0) targets[t - 1] = counts ? (int32_t)token : -1;
    }
    return HS_OK;
}
