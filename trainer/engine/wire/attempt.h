/* The attempt file: what a plan does not know. Written by the agent (mode 0600) before START, read once by
 * every rank of the node. Little-endian: hs_attempt, positions*replicas hs_attempt_rank, then the amendments.
 *
 * Amendments are what orders changed of the run's numbers (docs/adr/0015). Batch b is the samples that step b reads where
 * nothing is skipped; step s reads the s-th batch that is in no hs_attempt_skip. The rate of a step is the plan's times
 * the factor of the last hs_attempt_rate whose step is not above it.
 *
 * Refused (exit 78) where magic, version, sizes, or crc (CRC-32C of everything after the first 16 bytes) fail.
 */
#ifndef HS_WIRE_ATTEMPT_H
#define HS_WIRE_ATTEMPT_H

#include <stdint.h>

#define HS_ATTEMPT_MAGIC "HSATTM\r\n"
#define HS_ATTEMPT_VERSION 4u /* 1 had no devices, 2 no amendments, 3 no data_ahead; each engine reads one, its agent's */

enum { HS_ATTEMPT_SKIPS_MAX = 256, HS_ATTEMPT_RATES_MAX = 64 };
enum { HS_TRACE_OFF = 0, HS_TRACE_ON = 1, HS_TRACE_CALLS = 2 };
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
    uint32_t trace;          /* HS_TRACE_*: instruction times of the last steps into work_dir; CALLS: and kernels' */
    uint32_t device_kind;    /* HS_DEVICE_* */
    uint32_t data_ahead;     /* 1: the shards come while the ranks run; a step's are there once the agent says so (DATA) */
    uint8_t algorithms_digest[32]; /* SHA-256 of the table of a library's algorithms that the gang uses; zero: none yet */
    int64_t total_steps;     /* the run ends after this many optimizer steps; 0: the plan's */
    uint32_t skips;          /* hs_attempt_skip records, behind the ranks' */
    uint32_t rates;          /* hs_attempt_rate records, behind those */
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

/* Batches that are passed over, from 1, both ends included; ascending, apart from one another. */
typedef struct hs_attempt_skip {
    int64_t first, last;
} hs_attempt_skip;

typedef struct hs_attempt_rate {
    int64_t step;  /* from this 1-based step on; ascending */
    double factor; /* above 0, at most 1 */
} hs_attempt_rate;

#endif
