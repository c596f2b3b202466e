/* Messages of wire/agent.h on a connected SOCK_SEQPACKET socket: what the supervisor and the ranks
 * share. Nothing here blocks or allocates. */
#ifndef HS_RUN_MESSAGE_H
#define HS_RUN_MESSAGE_H

#include <stddef.h>

#include "core/status.h"
#include "wire/agent.h"
#include "wire/slot.h"

#define HS_MESSAGE_PAYLOAD_MAX (HS_MSG_MAX - sizeof(hs_msg))
#define HS_MESSAGE_FDS_MAX     ((int)HS_SLOTS_MAX)

/* A non-blocking connection to the agent, or -1 (nobody listens there now). HS_E_CONFIG of
 * hs_message_check_path says beforehand where the path can never work. */
int hs_message_connect(const char *socket_path);
hs_status hs_message_check_path(const char *socket_path, hs_why *why);

/* Sends msg (magic and bytes are filled in) with its payload and descriptors, whole or not at all.
 * HS_E_AGAIN: the socket is full. HS_E_LOST: the connection is gone. */
hs_status hs_message_send(int fd, hs_msg *msg, const void *payload, size_t bytes, const int *fds,
                          int fd_count);

/* Takes one message. payload has HS_MSG_MAX bytes; msg->bytes says how many came, a NUL follows
 * them. *fd_count descriptors (close-on-exec) belong to the caller. HS_E_AGAIN: nothing there.
 * HS_E_LOST: the connection is gone or spoke another language. */
hs_status hs_message_recv(int fd, hs_msg *msg, char *payload, int fds[HS_MESSAGE_FDS_MAX],
                          int *fd_count);

/* "HELLO", ...; "?" for a number that is not in the list. */
const char *hs_message_name(uint32_t type);

#endif
