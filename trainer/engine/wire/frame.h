/* What travels between ranks over TCP: the handshake of a channel, then frames.
 *
 * One connection a channel of the plan, opened by the sender (`from`) to the receiver's listener.
 *   sender    hs_hello   with its nonce
 *   receiver  hs_hello   with its nonce and mac = HMAC-SHA256(key, "R" | sender's hello without mac | own hello without mac)
 *   sender    mac[32]    = HMAC-SHA256(key, "S" | the same two)
 *   receiver  one byte: 1 accepted; anything else or a close: turned away (the reason is logged by the receiver)
 * Both refuse where magic, version, run, epoch, plan digest, gang nonce, channel or ranks differ, where a channel is
 * already connected, and where the mac is wrong. The listener stays open until every channel of the rank is connected; what is
 * turned away does not end the attempt.
 * Frames: hs_frame, then bytes of payload. crc = CRC-32C of the payload; sequence counts from 0 on a channel.
 */
#ifndef HS_WIRE_FRAME_H
#define HS_WIRE_FRAME_H

#include <stdint.h>

#define HS_HELLO_MAGIC "HSHELO\r\n"
#define HS_HELLO_VERSION 1u
#define HS_FRAME_MAGIC 0x52465348u

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
    uint32_t crc;
    uint32_t microbatch;
} hs_frame;

#endif
