/* I1 of run/plan.h: the file's bytes into memory of our own, its header, digest and sections. */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/hash.h"
#include "run/plan/plan_internal.h"

#define MAX_FILE (UINT64_C(1) << 32)

static const struct {
    const char *name;
    size_t bytes;
} section_kinds[HS_SECTION_COUNT] = {
    [HS_SECTION_CONFIG] = {"config", sizeof(hs_plan_config)},
    [HS_SECTION_STRINGS] = {"strings", 1},
    [HS_SECTION_TENSORS] = {"tensors", sizeof(hs_plan_tensor)},
    [HS_SECTION_SHARDS] = {"shards", sizeof(hs_plan_shard)},
    [HS_SECTION_POSITIONS] = {"positions", sizeof(hs_plan_position)},
    [HS_SECTION_STATES] = {"states", sizeof(hs_plan_state)},
    [HS_SECTION_PROGRAMS] = {"programs", sizeof(hs_plan_program)},
    [HS_SECTION_CALLS] = {"calls", sizeof(hs_plan_call)},
    [HS_SECTION_ACTIONS] = {"actions", sizeof(hs_plan_action)},
    [HS_SECTION_CHANNELS] = {"channels", sizeof(hs_plan_channel)},
    [HS_SECTION_PARTS] = {"parts", sizeof(hs_plan_part)},
    [HS_SECTION_WEIGHTS] = {"weights", sizeof(hs_plan_weight)},
};

const char *hs_plan_section_name(int section) {
    return section_kinds[section].name;
}

hs_status hs_plan_check_file(hs_plan_checker *c) {
    hs_plan *plan = c->plan;
    if (plan->size < sizeof(hs_plan_header)) {
        return REFUSE(c, "%zu bytes, the header alone takes %zu", plan->size,
                      sizeof(hs_plan_header));
    }
    const hs_plan_header *header = plan->header = (const hs_plan_header *)plan->bytes;
    if (memcmp(header->magic, HS_PLAN_MAGIC, sizeof header->magic) != 0) {
        return REFUSE(c, "it does not start with the magic of a plan");
    }
    if (header->version != HS_PLAN_VERSION && header->version != HS_PLAN_PLAIN) {
        return REFUSE(c, "version %" PRIu32 ", this engine reads %u and %u", header->version,
                      HS_PLAN_PLAIN, HS_PLAN_VERSION);
    }
    const bool mixed = header->version == HS_PLAN_VERSION;
    const int sections = mixed ? HS_SECTION_COUNT : HS_SECTIONS_PLAIN;
    if (header->sections != (uint32_t)sections) {
        return REFUSE(c, "%" PRIu32 " sections, this version has %d", header->sections, sections);
    }
    if (header->file_bytes != plan->size) {
        return REFUSE(c, "cut or grown: %zu bytes, its header says %" PRIu64, plan->size,
                      header->file_bytes);
    }
    if (header->reserved)
        return REFUSE(c, "header: reserved is %" PRIu64 ", not 0", header->reserved);
    uint8_t digest[32];
    hs_sha256_of(plan->bytes + 64, plan->size - 64, digest);
    if (memcmp(digest, header->digest, sizeof digest) != 0) {
        return REFUSE(c, "its bytes do not have the digest that its header says");
    }
    uint64_t end = offsetof(hs_plan_header, section) + (size_t)sections * sizeof(hs_plan_section);
    for (int s = 0; s < sections; s++) {
        const hs_plan_section *section = &header->section[s];
        const uint64_t size = section_kinds[s].bytes;
        if (section->offset % 64 || section->offset < end || section->offset > plan->size) {
            return REFUSE(
                c, "section %s starts at %" PRIu64 ", not on a multiple of 64 in %" PRIu64 "..%zu",
                section_kinds[s].name, section->offset, end, plan->size);
        }
        if (section->count > (plan->size - section->offset) / size) {
            return REFUSE(c,
                          "section %s: %" PRIu64 " records of %" PRIu64 " bytes from %" PRIu64
                          " on pass the end at %zu",
                          section_kinds[s].name, section->count, size, section->offset, plan->size);
        }
        if (section->count > UINT32_MAX - 1) {
            return REFUSE(c, "section %s has %" PRIu64 " records, too many", section_kinds[s].name,
                          section->count);
        }
        if (!hs_plan_is_zero(plan->bytes + end, section->offset - end)) {
            return REFUSE(c, "padding before section %s is not zero", section_kinds[s].name);
        }
        end = section->offset + section->count * size;
        plan->count[s] = section->count;
    }
    if (!hs_plan_is_zero(plan->bytes + end, plan->size - end)) {
        return REFUSE(c, "bytes after the last section are not zero");
    }
    if (mixed != (plan->count[HS_SECTION_PARTS] != 0)) {
        return REFUSE(c, "%zu parts of a mixture in a plan of version %" PRIu32,
                      plan->count[HS_SECTION_PARTS], header->version);
    }
    if (plan->count[HS_SECTION_CONFIG] != 1) {
        return REFUSE(c, "%zu config records, not 1", plan->count[HS_SECTION_CONFIG]);
    }
    const uint8_t *at[HS_SECTION_COUNT];
    for (int s = 0; s < sections; s++) at[s] = plan->bytes + header->section[s].offset;
    plan->config = (const hs_plan_config *)at[HS_SECTION_CONFIG];
    plan->strings = (const char *)at[HS_SECTION_STRINGS];
    plan->tensors = (const hs_plan_tensor *)at[HS_SECTION_TENSORS];
    plan->shards = (const hs_plan_shard *)at[HS_SECTION_SHARDS];
    plan->positions = (const hs_plan_position *)at[HS_SECTION_POSITIONS];
    plan->states = (const hs_plan_state *)at[HS_SECTION_STATES];
    plan->programs = (const hs_plan_program *)at[HS_SECTION_PROGRAMS];
    plan->calls = (const hs_plan_call *)at[HS_SECTION_CALLS];
    plan->actions = (const hs_plan_action *)at[HS_SECTION_ACTIONS];
    plan->channels = (const hs_plan_channel *)at[HS_SECTION_CHANNELS];
    if (!mixed) return HS_OK;
    plan->parts = (const hs_plan_part *)at[HS_SECTION_PARTS];
    plan->weights = (const hs_plan_weight *)at[HS_SECTION_WEIGHTS];
    return HS_OK;
}

hs_status hs_plan_read(const char *path, uint8_t **out, size_t *out_size, hs_why *why) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        const int code = fd < 0 ? errno : EINVAL;
        if (fd >= 0) (void)close(fd);
        return hs_fail(why, HS_E_CONFIG, "plan %s cannot be read: %s", path, strerror(code));
    }
    const size_t size = (size_t)info.st_size;
    uint8_t *bytes = NULL;
    hs_status st = HS_OK;
    if (size == 0 || size > MAX_FILE) {
        st = hs_fail(why, HS_E_CONFIG, "plan %s refused: %zu bytes, outside 1..%" PRIu64, path,
                     size, MAX_FILE);
    } else if (!(bytes = malloc(size))) {
        st = hs_fail(why, HS_E_MEMORY, "no memory for plan %s of %zu bytes", path, size);
    }
    for (size_t at = 0; st == HS_OK && at < size;) {
        const ssize_t n = read(fd, bytes + at, size - at);
        if (n > 0) {
            at += (size_t)n;
        } else if (n == 0 || errno != EINTR) {
            st = hs_fail(why, HS_E_CONFIG, "plan %s cannot be read to its end: %s", path,
                         n == 0 ? "it was cut" : strerror(errno));
        }
    }
    (void)close(fd);
    if (st != HS_OK) {
        free(bytes);
        return st;
    }
    *out = bytes;
    *out_size = size;
    return HS_OK;
}
