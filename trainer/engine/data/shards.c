#include "data/shards.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "wire/shard.h"

struct hs_shards {
    const hs_plan_config *config;
    const hs_plan_shard *table;
    size_t count;
    const uint8_t **maps; /* by shard, header first; NULL: no sample in it, not opened */
};

static size_t shard_bytes(const hs_shards *shards, size_t s) {
    return sizeof(hs_shard_header) + shards->table[s].tokens * shards->config->token_bytes;
}

static hs_status check_header(const hs_shards *shards, size_t s, const char *path,
                              const hs_shard_header *header, hs_why *why) {
    const hs_plan_config *config = shards->config;
    if (memcmp(header->magic, HS_SHARD_MAGIC, sizeof header->magic) != 0 ||
        header->version != HS_SHARD_VERSION) {
        return hs_fail(why, HS_E_DATA,
                       "%s is not a token shard of version %u; prepare the data again", path,
                       HS_SHARD_VERSION);
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

static hs_status map_shard(hs_shards *shards, size_t s, const char *dir, hs_why *why) {
    char path[4200];
    (void)snprintf(path, sizeof path, "%s/%05zu.bin", dir, s);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return hs_fail(why, HS_E_DATA, "shard %s cannot be opened: %s", path, strerror(errno));
    struct stat info;
    hs_status st = HS_OK;
    const size_t bytes = shard_bytes(shards, s);
    if (fstat(fd, &info) != 0) {
        st = hs_fail(why, HS_E_DATA, "shard %s cannot be read: %s", path, strerror(errno));
    } else if ((uint64_t)info.st_size != bytes) {
        st = hs_fail(why, HS_E_DATA,
                     "shard %s has %" PRId64 " bytes, the plan says %zu; fetch it again", path,
                     (int64_t)info.st_size, bytes);
    } else {
        void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            st = hs_fail(why, HS_E_DATA, "shard %s cannot be mapped: %s", path, strerror(errno));
        } else {
            shards->maps[s] = map;
            st = check_header(shards, s, path, map, why);
        }
    }
    (void)close(fd);
    return st;
}

hs_status hs_shards_open(const char *dir, const hs_plan_config *config, const hs_plan_shard *table,
                         size_t count, hs_shards **out, hs_why *why) {
    *out = NULL;
    hs_shards *shards = calloc(1, sizeof *shards);
    const uint8_t **maps = calloc(count ? count : 1, sizeof *maps);
    if (!shards || !maps) {
        free(shards);
        free(maps);
        return hs_fail(why, HS_E_MEMORY, "no memory for %zu shards", count);
    }
    *shards = (hs_shards){.config = config, .table = table, .count = count, .maps = maps};
    for (size_t s = 0; s < count; s++) {
        if (table[s].tokens <= config->sequence) continue; /* too short for one sample */
        const hs_status st = map_shard(shards, s, dir, why);
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
    for (size_t s = 0; s < shards->count; s++) {
        if (shards->maps[s])
            (void)munmap((void *)(uintptr_t)shards->maps[s], shard_bytes(shards, s));
    }
    free(shards->maps);
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
    HS_ASSERT(shards->maps[s] && first + config->sequence < shards->table[s].tokens);
    const uint8_t *tokens = shards->maps[s] + sizeof(hs_shard_header) + first * config->token_bytes;
    for (uint32_t t = 0; t <= config->sequence; t++) {
        uint32_t token;
        if (config->token_bytes == 2) {
            uint16_t narrow;
            memcpy(&narrow, tokens + 2 * (size_t)t, 2);
            token = narrow;
        } else {
            memcpy(&token, tokens + 4 * (size_t)t, 4);
        }
        if (token >= config->vocab) {
            return hs_fail(why, HS_E_DATA,
                           "shard %05zu.bin, token number %" PRIu64 " is %" PRIu32
                           ", the vocabulary ends at %" PRIu32 "; prepare the data again",
                           s, first + t, token, config->vocab);
        }
        if (inputs && t < config->sequence) inputs[t] = (int32_t)token;
        if (targets && t > 0) targets[t - 1] = (int32_t)token;
    }
    return HS_OK;
}
