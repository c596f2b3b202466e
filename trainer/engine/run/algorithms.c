#include "run/algorithms.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/products.h"
#include "core/clock.h"
#include "core/hash.h"

enum {
    FILE_MOST = 64 << 20,
    TABLE_MOST = sizeof(hs_algorithms) + HS_ALGORITHMS_MAX * sizeof(hs_algorithm),
};

typedef struct settling {
    const hs_algorithms_config *c;
    const hs_product_table *products;
    hs_device *device;
    hs_algorithms family; /* device, capability, library */
    bool others;          /* tables of other families were seen */
    char path[600];
    int fd; /* of the file; -1: none */
    uint8_t *bytes;
    size_t size;
    uint8_t table[TABLE_MOST], answer[TABLE_MOST];
} settling;

static bool same_family(const hs_algorithms *a, const hs_algorithms *b) {
    return memcmp(a->device, b->device, sizeof a->device) == 0 &&
           memcmp(a->library, b->library, sizeof a->library) == 0 && a->capability == b->capability;
}

static uint32_t crc_of(const uint8_t *table, size_t bytes) {
    const size_t from = offsetof(hs_algorithms, device);
    return hs_crc32c(0, table + from, bytes - from);
}

/* The table at the start of some bytes: its header and its bytes. */
static hs_status table_at(const uint8_t *at, size_t left, const char *where, hs_algorithms *head,
                          size_t *bytes, hs_why *why) {
    if (left < sizeof *head || memcmp(at, HS_ALGORITHMS_MAGIC, sizeof head->magic) != 0)
        return hs_fail(why, HS_E_CONFIG,
                       "%s does not hold tables of algorithms: remove it if no run needs it",
                       where);
    memcpy(head, at, sizeof *head);
    if (head->version != HS_ALGORITHMS_VERSION)
        return hs_fail(
            why, HS_E_CONFIG,
            "%s has tables of algorithms of version %" PRIu32
            ", this engine reads version %u: use the release that wrote them, or a newer "
            "one",
            where, head->version, HS_ALGORITHMS_VERSION);
    *bytes = sizeof *head + (size_t)head->count * sizeof(hs_algorithm);
    if (head->count > HS_ALGORITHMS_MAX || *bytes > left || crc_of(at, *bytes) != head->crc)
        return hs_fail(why, HS_E_CONFIG,
                       "a table of algorithms in %s is damaged (%" PRIu32
                       " algorithms, %zu bytes left): start the attempt again, which brings it "
                       "anew; without an agent, remove it if no run needs it",
                       where, head->count, left);
    return HS_OK;
}

/* Takes what tables say of this device and library. */
static hs_status use(settling *s, const uint8_t *at, size_t left, const char *where, hs_why *why) {
    while (left) {
        hs_algorithms head;
        size_t bytes = 0;
        HS_TRY(table_at(at, left, where, &head, &bytes, why));
        if (same_family(&head, &s->family))
            HS_TRY(s->products->use(s->device, (const hs_algorithm *)(at + sizeof head), head.count,
                                    why));
        else
            s->others = true;
        at += bytes;
        left -= bytes;
    }
    return HS_OK;
}

static hs_status read_file(settling *s, hs_why *why) {
    struct stat about;
    if (fstat(s->fd, &about) != 0) return hs_fail(why, HS_E_IO, "%s: %s", s->path, strerror(errno));
    if (about.st_size > FILE_MOST)
        return hs_fail(why, HS_E_CONFIG, "%s has %lld bytes, more than tables of algorithms take",
                       s->path, (long long)about.st_size);
    s->bytes = malloc((size_t)about.st_size + 1);
    if (!s->bytes) return hs_fail(why, HS_E_MEMORY, "no memory for %s", s->path);
    while (s->size < (size_t)about.st_size) {
        const ssize_t n =
            pread(s->fd, s->bytes + s->size, (size_t)about.st_size - s->size, (off_t)s->size);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return hs_fail(why, HS_E_IO, "%s cannot be read: %s", s->path,
                           n ? strerror(errno) : "it became shorter");
        s->size += (size_t)n;
    }
    return HS_OK;
}

/* What the attempt names, or, without an agent, what this node's ranks have kept: open and locked
 * until this one has settled. */
static hs_status bring(settling *s, hs_why *why) {
    static const uint8_t none[HS_SHA256_BYTES];
    const hs_attempt *a = s->c->attempt;
    if (!a || (s->c->agent && memcmp(a->algorithms_digest, none, sizeof none) == 0)) return HS_OK;
    (void)snprintf(s->path, sizeof s->path, "%s/algorithms", a->work_dir);
    s->fd = open(s->path, s->c->agent ? O_RDONLY | O_CLOEXEC : O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->fd < 0)
        return hs_fail(why, HS_E_CONFIG,
                       "the run's algorithms cannot be opened: %s: %s; start the attempt again",
                       s->path, strerror(errno));
    while (!s->c->agent && flock(s->fd, LOCK_EX) != 0)
        if (errno != EINTR)
            return hs_fail(why, HS_E_IO, "%s cannot be locked: %s", s->path, strerror(errno));
    HS_TRY(read_file(s, why));
    if (!s->c->agent) return HS_OK;
    uint8_t digest[HS_SHA256_BYTES];
    hs_sha256_of(s->bytes, s->size, digest);
    if (memcmp(digest, a->algorithms_digest, sizeof digest) == 0) return HS_OK;
    return hs_fail(why, HS_E_CONFIG,
                   "%s is not what attempt %" PRIu64
                   " names: somebody changed it; start the attempt again, which brings it anew",
                   s->path, a->epoch);
}

static hs_status need(void *ctx, uint16_t kernel, const hs_args *args, hs_why *why) {
    const settling *s = ctx;
    return s->products->need(s->device, kernel, args, why);
}

/* The run's choice: the agent's answer, or ours, appended to the file. */
static hs_status keep(settling *s, size_t bytes, hs_why *why) {
    const hs_algorithms_config *c = s->c;
    if (c->agent) {
        size_t came = 0;
        HS_TRY(hs_agent_link_agree(c->agent, s->table, bytes, s->answer, sizeof s->answer, &came,
                                   hs_deadline_ns(c->attempt->connect_ms), c->stop, why));
        return use(s, s->answer, came, "the agent's answer", why);
    }
    for (size_t done = 0; s->fd >= 0 && done < bytes;) {
        const ssize_t n = pwrite(s->fd, s->table + done, bytes - done, (off_t)(s->size + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return hs_fail(why, HS_E_IO, "%s cannot be written: %s", s->path, strerror(errno));
        done += (size_t)n;
    }
    return use(s, s->table, bytes, "this rank's own choice", why);
}

/* Said once a run: who goes by the choice later has nothing to choose. */
static void tell_plain(const settling *s, const hs_algorithm *list, uint32_t count) {
    const hs_algorithm *first = NULL;
    int64_t plain = 0;
    for (uint32_t i = count; i-- > 0;)
        if (!list[i].candidates) first = &list[i], plain++;
    if (!first) return;
    HS_LOG(
        s->c->log, HS_LOG_WARN,
        "the library has no algorithm of one sum for some products: a plain kernel computes them, "
        "without tensor cores, which is slow",
        HS_I("products", plain), HS_I("m", first->key.m), HS_I("n", first->key.n),
        HS_I("k", first->key.k), HS_S("library", s->family.library),
        HS_S("mend", "sizes that are multiples of 16 (train.microbatch, the model's widths)"));
}

static hs_status choose(settling *s, uint32_t missing, hs_why *why) {
    const int64_t began = hs_clock_ns();
    const hs_log *log = s->c->log;
    if (s->others)
        HS_LOG(log, HS_LOG_WARN,
               "this run has no algorithms for this device and library, but for others: its bits "
               "change from here on",
               HS_S("device", s->family.device), HS_S("library", s->family.library));
    hs_algorithms *head = (hs_algorithms *)s->table;
    *head = s->family;
    HS_TRY(s->products->choose(s->device, (hs_algorithm *)(s->table + sizeof *head), why));
    head->count = missing;
    const size_t bytes = sizeof *head + missing * sizeof(hs_algorithm);
    head->crc = crc_of(s->table, bytes);
    const int64_t chosen = hs_clock_ns();
    HS_TRY(keep(s, bytes, why));
    HS_LOG(log, HS_LOG_INFO, "algorithms chosen", HS_I("products", missing),
           HS_I("us", (chosen - began) / 1000), HS_I("agreed_us", (hs_clock_ns() - chosen) / 1000),
           HS_S("library", s->family.library), HS_S("device", s->family.device));
    tell_plain(s, (const hs_algorithm *)(s->table + sizeof *head), missing);
    const uint32_t left = s->products->missing(s->device);
    if (left == 0) return HS_OK;
    return hs_fail(why, HS_E_BUG,
                   "%" PRIu32 " of %" PRIu32 " products were left out of the run's choice", left,
                   missing);
}

static hs_status settle(settling *s, hs_why *why) {
    const hs_machine *m = s->c->machine;
    (void)snprintf(s->family.device, sizeof s->family.device, "%s", m->facts.device);
    (void)snprintf(s->family.library, sizeof s->family.library, "%s",
                   s->products->library(s->device));
    memcpy(s->family.magic, HS_ALGORITHMS_MAGIC, sizeof s->family.magic);
    s->family.version = HS_ALGORITHMS_VERSION;
    s->family.capability = m->facts.capability;
    HS_TRY(hs_linked_each(m->linked, need, s, why));
    HS_TRY(bring(s, why));
    HS_TRY(use(s, s->bytes, s->size, s->path, why));
    const uint32_t missing = s->products->missing(s->device);
    return missing ? choose(s, missing, why) : HS_OK;
}

hs_status hs_algorithms_settle(const hs_algorithms_config *config, hs_why *why) {
    const hs_product_table *products = config->machine->backend->products;
    if (!products || !products->library(config->machine->device)) return HS_OK;
    settling *s = calloc(1, sizeof *s);
    if (!s) return hs_fail(why, HS_E_MEMORY, "no memory for the table of algorithms");
    s->c = config;
    s->products = products;
    s->device = config->machine->device;
    s->fd = -1;
    const hs_status st = settle(s, why);
    if (s->fd >= 0) (void)close(s->fd);
    free(s->bytes);
    free(s);
    return st;
}
