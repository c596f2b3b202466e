/* The attempt file: what a plan does not know. Written by the agent (mode 0600) before START, read once by
 * every rank of the node. Little-endian, hs_attempt followed by positions*replicas hs_attempt_rank.
 * Refused (exit 78) where magic, version, sizes, or crc (CRC-32C of everything after the first 16 bytes) fail.
 */
#ifndef HS_WIRE_ATTEMPT_H
#define HS_WIRE_ATTEMPT_H

#include <stdint.h>

#define HS_ATTEMPT_MAGIC "HSATTM\r\n"
#define HS_ATTEMPT_VERSION 2u /* 1 had no devices; each engine reads one version, its agent's */

enum { HS_TRACE_OFF = 0, HS_TRACE_ON = 1 };
/* What a gang runs on (backend/load.h); never "auto": who writes an attempt has chosen. */
enum { HS_DEVICE_CPU = 1, HS_DEVICE_CUDA = 2 };

typedef struct hs_attempt {
    char magic[8];
    uint32_t version;
    uint32_t crc;
    char run[64];            /* NUL-terminated */
    uint64_t epoch;
    uint8_t plan_digest[32];
    uint8_t key[32];         /* of this attempt: HMAC of the handshakes */
    uint8_t nonce[16];       /* of this gang */
    uint32_t ranks;          /* records that follow */
    uint32_t kernel_path;    /* HS_PATH_* of wire/kernels.h; recorded, one a gang */
    int64_t start_step;      /* steps done at the restore point; -1: fresh start */
    int64_t stop_after;      /* leave with DONE after this step; -1: the plan's last (a debugging aid) */
    uint32_t connect_ms;     /* deadline to find and greet all peers */
    uint32_t stall_ms;       /* deadline of every wait inside a step */
    uint32_t commit_ms;      /* deadline of the wait for the last commit */
    uint32_t trace;          /* HS_TRACE_*: instruction times of the last steps into trace_dir */
    uint32_t device_kind;    /* HS_DEVICE_* */
    uint32_t reserved;       /* 0 */
    uint8_t algorithms_digest[32]; /* SHA-256 of the table of a library's algorithms that the gang uses; zero: none yet */
    char data_dir[512];      /* shards: <data_dir>/00000.bin ... */
    char work_dir[512];      /* of the node: traces go here */
} hs_attempt;

typedef struct hs_attempt_rank {
    char host[256]; /* NUL-terminated name or address; resolved again until connect_ms */
    uint32_t port;
    uint32_t node;
    uint32_t device;   /* index among the devices of its node; the CPU is 0 */
    uint32_t reserved; /* 0 */
} hs_attempt_rank;

#endif
