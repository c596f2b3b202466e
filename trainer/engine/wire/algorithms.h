/* Which algorithm of a library computes each product of a run under kernel path cuda: bits follow
 * from it, so that it is chosen once a run and product, and kept.
 *
 * A table, little-endian: hs_algorithms, then `count` hs_algorithm. Several tables may stand one after the
 * other, as the store's objects of a run do; of two that speak of one device and library the first that
 * has a key holds.
 *
 * Where they lie:
 *   store     runs/<run>/algorithms/<number>, from 0 on without gap, each created if absent by an agent: the
 *             products that no table before it has
 *   node      <work_dir>/algorithms: the agent's copy, made before START, of all of them, whose SHA-256 the
 *             attempt file has; without an agent the rank's own
 *   message   ALGORITHMS (wire/agent.h)
 *
 * Refused where magic, version, sizes or crc (CRC-32C of the table after its first 16 bytes) fail.
 */
#ifndef HS_WIRE_ALGORITHMS_H
#define HS_WIRE_ALGORITHMS_H

#include <stdint.h>

#define HS_ALGORITHMS_MAGIC   "HSALGO\r\n"
#define HS_ALGORITHMS_VERSION 1u
#define HS_ALGORITHMS_MAX     256u /* products of a position, and entries of a table */

typedef struct hs_algorithms {
    char magic[8];
    uint32_t version;
    uint32_t crc;
    char device[96];  /* "NVIDIA H100 80GB HBM3", NUL-terminated */
    char library[32]; /* "cuBLASLt 13.1.0" */
    uint32_t capability;
    uint32_t count;
} hs_algorithms;

/* A product, but for where its operands lie. Unused is 0. */
typedef struct hs_algorithm_key {
    int64_t m, n, k;
    int64_t ld_a, ld_b, ld_out, ld_add; /* in elements; ld_add 0: nothing is added */
    uint8_t type_a, type_b, type_out;   /* HS_F32, HS_BF16, ... */
    uint8_t across;                     /* bit 0: a, bit 1: b */
    uint8_t add;                        /* 0 nothing, 1 the old out, 2 another matrix */
    uint8_t bias, scale;                /* 1: there is one */
    uint8_t align_a, align_b, align_out, align_add, align_bias; /* bytes, 1 to 16 */
    uint8_t unused[4];
} hs_algorithm_key;

typedef struct hs_algorithm {
    hs_algorithm_key key;
    uint8_t algorithm[64]; /* the library's own: cublasLtMatmulAlgo_t; 0 where candidates is */
    uint64_t workspace_bytes;
    uint32_t microseconds; /* as it was timed; for people */
    uint32_t candidates;   /* it was the fastest of so many; 0: the library has none of one sum, and a
                            * kernel of the engine's computes the product, without tensor cores */
} hs_algorithm;

#endif
