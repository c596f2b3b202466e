/* Inside comm/: what tcp.c, resolve.c and the handshake (greet_internal.h) share. */
#ifndef HS_COMM_INTERNAL_H
#define HS_COMM_INTERNAL_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "comm/comm.h"

/* --- resolve.c: names to addresses, without holding up the loop that greets -------------- */

enum { HS_RESOLVE_ADDRESSES = 8 };

typedef struct hs_addresses {
    int count;
    struct sockaddr_storage at[HS_RESOLVE_ADDRESSES];
    socklen_t bytes[HS_RESOLVE_ADDRESSES];
} hs_addresses;

/* A thread that asks the system's resolver, which may block for many seconds. It lives while create
 * runs and outlives it only where it hangs in a query of an attempt that failed: it then frees
 * itself. */
typedef struct hs_resolver hs_resolver;

hs_status hs_resolver_create(uint32_t jobs, hs_resolver **out, hs_why *why);
/* Never blocks. */
void hs_resolver_destroy(hs_resolver *resolver);
/* Readable when some job was answered; hs_resolver_take clears it. */
int hs_resolver_fd(const hs_resolver *resolver);
/* Numbers are answered at once, names by the thread; one question a job at a time. */
hs_status hs_resolver_ask(hs_resolver *resolver, uint32_t job, const char *host, uint32_t port,
                          hs_why *why);
/* True when the job was answered: addresses->count is 0 where the name was not found, *error then
 * says why. */
bool hs_resolver_take(hs_resolver *resolver, uint32_t job, hs_addresses *addresses,
                      const char **error);

/* Whether a message of that length is one of the channel's. */
static inline bool hs_comm_length(const hs_plan_channel *channel, uint64_t bytes) {
    return channel->across && channel->kind >= HS_CH_REDUCE ? bytes > 0 && bytes <= channel->bytes
                                                            : bytes == channel->bytes;
}

/* --- greet.c: the handshake of wire/frame.h ---------------------------------------------- */

/* Connects and greets every channel that starts or ends at config->rank: fds[channel] is then a
 * connected non-blocking socket, -1 for the channels of others. Takes listen_fd (>= 0 where some
 * channel ends here) and closes it. On failure everything is closed. */
hs_status hs_greet_all(const hs_comm_config *config, int listen_fd, int *fds, hs_why *why);

/* Opens the rank's own listener on peers[rank]. */
hs_status hs_greet_listen(const hs_comm_config *config, int *listen_fd, hs_why *why);

/* "127.0.0.1:8080" or "[::1]:8080" */
void hs_address_text(const struct sockaddr_storage *address, char *text, size_t size);

#endif
