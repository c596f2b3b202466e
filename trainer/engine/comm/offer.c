/* What each end of a channel of device memory can do, and what two ends make of it (wire/frame.h). */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "comm/tcp_internal.h"

_Static_assert(sizeof(hs_link_memory) == sizeof((hs_offer *)NULL)->memory, "wire/frame.h");
_Static_assert(sizeof((hs_answer *)NULL)->id == HS_LINK_ID_BYTES, "wire/frame.h");

enum { IPC = 1 << HS_WAY_IPC, NCCL = 1 << HS_WAY_NCCL, TCP = 1 << HS_WAY_TCP };

const char *hs_way_name(uint32_t way) {
    static const char *const names[HS_WAYS] = {"tcp", "ipc", "nccl"};
    return way < HS_WAYS ? names[way] : "?";
}

/* One number a boot of a kernel; containers of one host see the same. Empty where there is none. */
static void read_boot(char boot[40]) {
    memset(boot, 0, 40);
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (!file) return;
    const size_t n = fread(boot, 1, 39, file);
    (void)fclose(file);
    if (n != 37) memset(boot, 0, 40);
}

void hs_offer_fill(const hs_comm *comm, uint32_t channel, hs_offer *offer) {
    const hs_ways *w = comm->ways;
    memset(offer, 0, sizeof *offer);
    memcpy(offer->magic, HS_OFFER_MAGIC, sizeof offer->magic);
    offer->version = HS_OFFER_VERSION;
    offer->channel = channel;
    offer->rank = comm->rank;
    offer->allowed = w->config->allowed;
    offer->able = TCP | (w->facts.shares_memory ? IPC : 0u) | (w->facts.library ? NCCL : 0u);
    offer->library = w->facts.library;
    offer->bytes = comm->channels[channel].bytes;
    read_boot(offer->boot);
    memcpy(offer->device, w->facts.device, sizeof offer->device);
    memcpy(offer->memory, &w->memory, sizeof offer->memory);
    memcpy(offer->flags, &w->flags, sizeof offer->flags);
    offer->flag = (uint64_t)channel * HS_FLAG_BYTES;
    (void)snprintf(offer->why, sizeof offer->why, "%s", w->facts.why);
}

const char *hs_offer_wrong(const hs_comm *comm, uint32_t channel, const hs_offer *offer, char *text,
                           size_t size) {
    hs_link_memory flags;
    memcpy(&flags, offer->flags, sizeof flags);
    if (memcmp(offer->magic, HS_OFFER_MAGIC, sizeof offer->magic) != 0 ||
        offer->version != HS_OFFER_VERSION) {
        (void)snprintf(text, size, "it sent no offer of a way (is it a rank of another version?)");
    } else if (offer->channel != channel || offer->rank != hs_tcp_peer(comm, channel)) {
        (void)snprintf(text, size, "its offer is rank %" PRIu32 "'s for channel %" PRIu32,
                       offer->rank, offer->channel);
    } else if (offer->bytes != comm->channels[channel].bytes) {
        (void)snprintf(text, size, "its messages have %" PRIu64 " bytes, this rank's %" PRIu64,
                       offer->bytes, comm->channels[channel].bytes);
    } else if ((offer->able & IPC) &&
               (flags.bytes < HS_FLAG_BYTES || offer->flag > flags.bytes - HS_FLAG_BYTES)) {
        (void)snprintf(text, size, "its flag lies outside of what it shares");
    } else if (!memchr(offer->boot, 0, sizeof offer->boot) ||
               !memchr(offer->why, 0, sizeof offer->why)) {
        (void)snprintf(text, size, "its offer has a text without an end");
    } else {
        return NULL;
    }
    return text;
}

static bool same_host(const hs_offer *a, const hs_offer *b) {
    return a->boot[0] && memcmp(a->boot, b->boot, sizeof a->boot) == 0;
}

/* Why a way that both may use is none. */
static const char *missing(const hs_offer *mine, const hs_offer *theirs, uint32_t way, char *text,
                           size_t size) {
    const hs_offer *const both[2] = {mine, theirs};
    if (!(mine->allowed & theirs->allowed & way)) return "not allowed here";
    for (int i = 0; i < 2; i++) {
        if (both[i]->able & way) continue;
        (void)snprintf(text, size, "rank %" PRIu32 " cannot: %s", both[i]->rank, both[i]->why);
        return text;
    }
    if (way == IPC && !same_host(mine, theirs)) return "the ranks are on two machines";
    if (way == NCCL && mine->library != theirs->library) {
        (void)snprintf(text, size,
                       "rank %" PRIu32 " has version %" PRIu32 ", rank %" PRIu32 " %" PRIu32,
                       mine->rank, mine->library, theirs->rank, theirs->library);
        return text;
    }
    return NULL;
}

hs_status hs_offer_choose(const hs_comm *comm, uint32_t channel, const hs_offer *mine,
                          const hs_offer *theirs, uint32_t except, const char *failed,
                          uint32_t *way, hs_why *why) {
    static const uint32_t ways[2] = {HS_WAY_IPC, HS_WAY_NCCL};
    const bool sends = comm->channels[channel].from == comm->position;
    const uint32_t from = sends ? mine->rank : theirs->rank, to = sends ? theirs->rank : mine->rank;
    char texts[2][200];
    const char *whys[2];
    *way = HS_WAY_TCP;
    for (int i = 0; i < 2; i++) {
        const uint32_t bit = UINT32_C(1) << ways[i];
        whys[i] = except & bit ? failed : missing(mine, theirs, bit, texts[i], sizeof texts[i]);
        if (whys[i]) continue;
        if (ways[i] == HS_WAY_NCCL && memcmp(mine->device, theirs->device, 16) == 0)
            return hs_fail(why, HS_E_CONFIG,
                           "ranks %" PRIu32 " and %" PRIu32
                           " are on one device, between which NCCL carries nothing (channel "
                           "%" PRIu32 "; ipc: %s); give each rank a device of its own "
                           "(HOTSTAGE_DEVICES), or let them share memory",
                           from < to ? from : to, from < to ? to : from, channel, whys[0]);
        *way = ways[i];
        return HS_OK;
    }
    if (mine->allowed & theirs->allowed & TCP) return HS_OK;
    return hs_fail(why, HS_E_CONFIG,
                   "channel %" PRIu32 " from rank %" PRIu32 " to rank %" PRIu32
                   " could only go over tcp, which launch.fabric = \"%s\" rules out (ipc: %s; "
                   "nccl: %s); mend what is missing, or set launch.fabric = \"tcp\"",
                   channel, from, to, comm->ways->config->fabric, whys[0], whys[1]);
}
