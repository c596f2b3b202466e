/* What travels between ranks over TCP: the handshake of a channel, then frames.
 *
 * One connection a channel of the plan, opened by the sender (`from`) to the receiver's listener; of a channel between
 * replicas, which has messages both ways, by the lower of the two ranks, which is the sender here.
 *   sender    hs_hello   with its nonce
 *   receiver  hs_hello   with its nonce and mac = HMAC-SHA256(key, "R" | sender's hello without mac | own hello without mac)
 *   sender    mac[32]    = HMAC-SHA256(key, "S" | the same two)
 *   receiver  one byte: 1 accepted; anything else or a close: turned away (the reason is logged by the receiver)
 * Both refuse where magic, version, run, epoch, plan digest, gang nonce, channel or ranks differ, where a channel is
 * already connected, and where the mac is wrong. The listener stays open until every channel of the rank is connected; what is
 * turned away does not end the attempt.
 * In a gang on CUDA a channel of device memory (forward, backward, tied) then agrees on its way, channel after channel
 * in ascending order:
 *   both      hs_offer   what this end may and can do; each end chooses from the two by the same rule (comm/offer.c)
 *   both      hs_answer  whether this end can do what was chosen; where one cannot, both choose again without it
 *   NCCL: an hs_answer of the sender with the name to meet under, and when both have joined one more of both
 * Its messages are frames where the way is TCP. Else no byte passes until the end, but a closing end's
 * HS_BYE: the connection is the life line.
 * Frames: hs_frame, bytes of payload, hs_frame_end. sequence counts from 0 on a channel, each way. crc = CRC-32C of the
 * payload: it comes last, so that neither end goes over the payload but piece by piece, as it passes.
 */
#ifndef HS_WIRE_FRAME_H
#define HS_WIRE_FRAME_H

#include <stdint.h>

#define HS_HELLO_MAGIC "HSHELO\r\n"
#define HS_HELLO_VERSION 2u
#define HS_FRAME_MAGIC 0x52465348u
#define HS_FRAME_END_MAGIC 0x45465348u
/* Bytes of a message that one end of a connection keeps in the kernel, at most: plans count them. */
#define HS_BUFFER_MOST (8 << 20)
#define HS_OFFER_MAGIC "HSOFFR\r\n"
#define HS_OFFER_VERSION 1u
#define HS_ANSWER_MAGIC 0x52574E41u
#define HS_BYE 0x42u

/* How the messages of a channel pass: over its connection; by a copy into the receiver's memory (CUDA IPC); through a
 * library. */
enum { HS_WAY_TCP = 0, HS_WAY_IPC, HS_WAY_NCCL, HS_WAYS };

typedef struct hs_hello {
    char magic[8];
    uint32_t version;
    uint32_t channel;
    uint32_t from, to;
    uint64_t epoch;
    char run[64];
    uint8_t plan_digest[32];
    uint8_t gang_nonce[16];
    uint8_t nonce[16];
    int64_t start_step; /* both ends must say the same */
    uint8_t mac[32];    /* sender's first hello: zero */
} hs_hello;

typedef struct hs_frame {
    uint32_t magic;
    uint32_t channel;
    uint64_t sequence;
    uint64_t bytes;
    uint32_t microbatch;
    uint32_t reserved; /* 0 */
} hs_frame;

typedef struct hs_frame_end {
    uint32_t magic; /* HS_FRAME_END_MAGIC */
    uint32_t crc;
} hs_frame_end;

typedef struct hs_offer {
    char magic[8];
    uint32_t version;
    uint32_t channel;
    uint32_t rank;
    uint32_t allowed;      /* 1 << HS_WAY_*: by the launch */
    uint32_t able;         /* by this machine */
    uint32_t library;      /* NCCL's version number; 0: none */
    uint64_t bytes;        /* of a message */
    char boot[40];         /* of this host's kernel: equal on one machine alone */
    uint8_t device[16];    /* UUID */
    uint8_t memory[80];    /* what messages are copied into (receiver): hs_link_memory of backend/links.h */
    uint8_t flags[80];     /* what the other end's device writes to, both ends: the same */
    uint64_t flag;         /* offset of this channel's in it */
    char why[160];         /* where an allowed way is not able: what is missing */
} hs_offer;

typedef struct hs_answer {
    uint32_t magic;
    uint32_t channel;
    uint32_t way;
    uint32_t can;          /* 1, or 0 and why */
    uint8_t id[128];       /* NCCL, of the sender */
    char why[256];
} hs_answer;

#endif
