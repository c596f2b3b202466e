/* What two ranks say of themselves before a channel is theirs (wire/frame.h). */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "comm/greet_internal.h"
#include "core/hash.h"

static void fill_hello(const hs_comm_config *config, uint32_t channel, hs_hello *hello) {
    const hs_attempt *attempt = config->attempt;
    memset(hello, 0, sizeof *hello);
    memcpy(hello->magic, HS_HELLO_MAGIC, sizeof hello->magic);
    hello->version = HS_HELLO_VERSION;
    hello->channel = channel;
    const uint32_t to = hs_greet_peer(config, channel, true);
    hello->from = to == UINT32_MAX ? hs_greet_peer(config, channel, false) : config->rank;
    hello->to = to == UINT32_MAX ? config->rank : to;
    hello->epoch = attempt->epoch;
    memcpy(hello->run, attempt->run, sizeof hello->run);
    memcpy(hello->plan_digest, attempt->plan_digest, sizeof hello->plan_digest);
    memcpy(hello->gang_nonce, attempt->nonce, sizeof hello->gang_nonce);
    hello->start_step = config->start_step;
}

hs_status hs_hello_start(const hs_comm_config *config, uint32_t channel, hs_hello *hello,
                         hs_why *why) {
    fill_hello(config, channel, hello);
    if (getrandom(hello->nonce, sizeof hello->nonce, 0) != (ssize_t)sizeof hello->nonce)
        return hs_fail(why, HS_E_IO, "getrandom: %s", strerror(errno));
    return HS_OK;
}

void hs_hello_sign(const hs_comm_config *config, char role, const hs_hello *sender,
                   const hs_hello *receiver, uint8_t mac[32]) {
    hs_hmac hmac;
    hs_hmac_init(&hmac, config->attempt->key, sizeof config->attempt->key);
    hs_hmac_update(&hmac, &role, 1);
    hs_hmac_update(&hmac, sender, offsetof(hs_hello, mac));
    hs_hmac_update(&hmac, receiver, offsetof(hs_hello, mac));
    hs_hmac_final(&hmac, mac);
}

const char *hs_hello_disagreement(const hs_hello *hello, const hs_hello *expected, char *text,
                                  size_t size) {
    if (memcmp(hello->run, expected->run, sizeof hello->run) != 0) {
        (void)snprintf(text, size, "it is of the run '%.63s'", hello->run);
    } else if (hello->epoch != expected->epoch) {
        (void)snprintf(text, size, "its epoch is %llu, this attempt's is %llu",
                       (unsigned long long)hello->epoch, (unsigned long long)expected->epoch);
    } else if (memcmp(hello->plan_digest, expected->plan_digest, sizeof hello->plan_digest) != 0) {
        (void)snprintf(text, size, "it runs another plan");
    } else if (memcmp(hello->gang_nonce, expected->gang_nonce, sizeof hello->gang_nonce) != 0) {
        (void)snprintf(text, size, "it belongs to another gang of this epoch");
    } else if (hello->channel != expected->channel || hello->from != expected->from ||
               hello->to != expected->to) {
        (void)snprintf(text, size, "it says channel %u from rank %u to %u, not %u from %u to %u",
                       hello->channel, hello->from, hello->to, expected->channel, expected->from,
                       expected->to);
    } else if (hello->start_step != expected->start_step) {
        (void)snprintf(text, size, "it starts after step %lld, this rank after %lld",
                       (long long)hello->start_step, (long long)expected->start_step);
    } else {
        return NULL;
    }
    return text;
}

const char *hs_hello_bad_form(const hs_hello *hello) {
    if (memcmp(hello->magic, HS_HELLO_MAGIC, sizeof hello->magic) != 0)
        return "it does not speak this protocol";
    if (hello->version != HS_HELLO_VERSION) return "its handshake is of another version";
    return NULL;
}
