/* Inside the handshake: what greet.c and its rooms share.
 *
 *   greet.c     the loop: one thread, one poll, until every channel is connected or the time is up
 *   hello.c     the messages: what a hello says, whether two of them agree, their codes
 *   talk.c      a conversation, from the first byte to the last: the phases, and what becomes of it
 *   dial.c      the connecting side: addresses, tries, pauses
 *   accept.c    the listener: who is accepted, and for whom there is no room
 *
 * I1  A channel is connected at most once; the first conversation that ends well is it.
 * I2  What is turned away is closed and logged and changes nothing else.
 * I3  A connection that came to us and does not finish its greeting in HS_GREET_MS is dropped. One
 *     that we opened waits as long as the deadline of all: it may lie in the queue of a rank that
 *     still restores.
 * I4  As many unfinished conversations are kept as peers come to this rank, and HS_STRANGERS more; the
 *     oldest makes room.
 */
#ifndef HS_COMM_GREET_INTERNAL_H
#define HS_COMM_GREET_INTERNAL_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "comm/comm_internal.h"
#include "wire/frame.h"

enum { HS_GREET_MS = 2000, HS_STRANGERS = 64 };

/* phases; those of a sender left, of a receiver right; what both do stands once */
typedef enum hs_phase {
    HS_TALK_FREE = 0,  /* of an incoming place: nobody */
    HS_TALK_PAUSE,     /* sender: until `until_ns`, then ASK */
    HS_TALK_ASK,       /* sender: waits for the address */
    HS_TALK_CONNECT,   /* sender: connect(2) is under way */
    HS_TALK_PUT_HELLO, /* sender, then GET_HELLO; receiver, then GET_MAC */
    HS_TALK_GET_HELLO, /* sender, then PUT_MAC; receiver, then PUT_HELLO */
    HS_TALK_PUT_MAC,   /* sender, then GET_WORD */
    HS_TALK_GET_MAC,   /* receiver, then PUT_WORD */
    HS_TALK_PUT_WORD,  /* receiver, then DONE */
    HS_TALK_GET_WORD,  /* sender, then DONE */
    HS_TALK_DONE,
} hs_phase;

typedef struct hs_talk {
    int fd;
    bool sender; /* in the handshake: it opens the connection */
    hs_phase at;
    uint32_t channel; /* sender: known from the start; receiver: from the hello */
    size_t moved;     /* bytes of this phase */
    int64_t until_ns; /* PAUSE, CONNECT, and all of a receiver's */
    int64_t order;    /* receiver: when it came, for I4 */
    hs_hello mine, theirs;
    uint8_t mac[32];
    uint8_t word;
    /* sender only */
    hs_addresses addresses;
    int address; /* the next to try */
    int64_t backoff_ms;
    char trouble[160]; /* the last thing that went wrong */
    char peer[80];     /* address, for the log */
} hs_talk;

typedef struct hs_greeter {
    const hs_comm_config *config;
    int listen_fd;
    int *fds;
    uint32_t missing; /* channels of this rank that are not connected */
    hs_resolver *resolver;
    uint32_t senders, receivers; /* connections that this rank opens, and that come to it */
    int64_t arrivals;
    struct pollfd *polls;
    hs_talk *talks; /* senders first, then places for those that come */
} hs_greeter;

/* The rank at the other end of a channel whose connection this rank opens, or else takes; UINT32_MAX: it
 * does not. */
static inline uint32_t hs_greet_peer(const hs_comm_config *config, uint32_t channel, bool opens) {
    const hs_plan_channel *ch = &config->channels[channel];
    const uint32_t peer = hs_comm_peer(ch, config->rank, config->positions, !opens);
    return ch->across && (config->rank < peer) != opens ? UINT32_MAX : peer;
}

static inline uint32_t hs_talks_count(const hs_greeter *g) {
    return g->senders + g->receivers + HS_STRANGERS;
}

/* --- hello.c ----------------------------------------------------------------------------- */

/* What this rank says for a channel, with a nonce of its own. */
hs_status hs_hello_start(const hs_comm_config *config, uint32_t channel, hs_hello *hello,
                         hs_why *why);
/* mac = HMAC(key, role | sender's hello | receiver's hello), both without their mac. */
void hs_hello_sign(const hs_comm_config *config, char role, const hs_hello *sender,
                   const hs_hello *receiver, uint8_t mac[32]);
/* NULL where it is a hello of this version, else why it is none. */
const char *hs_hello_bad_form(const hs_hello *hello);
/* NULL where the hello fits `expected` (ours for that channel), else why it does not. */
const char *hs_hello_disagreement(const hs_hello *hello, const hs_hello *expected, char *text,
                                  size_t size);

/* --- talk.c ------------------------------------------------------------------------------ */

/* The bytes of a phase, and their direction: POLLIN, POLLOUT, or 0 where it has none. */
short hs_talk_bytes(hs_talk *talk, uint8_t **at, size_t *bytes);
/* Moves what can be moved, phase after phase. */
hs_status hs_talk_advance(hs_greeter *greeter, hs_talk *talk, hs_why *why);
/* I2: what does not belong here. */
void hs_talk_turn_away(hs_greeter *greeter, hs_talk *talk, const char *reason);
void hs_talk_drop_socket(hs_talk *talk);

/* --- dial.c ------------------------------------------------------------------------------ */

/* A sender tries again: the next address at once, all of them again after a pause, resolved anew. */
void hs_dial_again(hs_talk *talk, const char *trouble);
/* connect(2) has ended, well or not. */
hs_status hs_dial_finish(hs_greeter *greeter, hs_talk *talk, hs_why *why);
/* Moves a sender that waits for time or for an address. */
hs_status hs_dial_tick(hs_greeter *greeter, uint32_t job, hs_why *why);

/* --- accept.c ---------------------------------------------------------------------------- */

/* Takes in who waits at the listener. */
void hs_accept_peers(hs_greeter *greeter);

#endif
