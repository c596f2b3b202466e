/* The engine's log: JSON lines on a descriptor (stderr), one write(2) a line, at most 4 KiB.
 *
 *   {"level":"info","event":"connected","time":1732300000.123,"run":"demo-1a2b3c","epoch":3,"rank":1,"peer":0}
 *
 * The context carries run, epoch and rank, so that a line needs no more than its event and its own
 * keys:
 *
 *   HS_LOG(log, HS_LOG_WARN, "turned away", HS_S("peer", host), HS_I("port", port));
 *
 * A context is written by its owner before threads start and only read afterwards; logging is then
 * safe from any thread and allocates nothing. A NULL context logs nothing.
 */
#ifndef HS_CORE_LOG_H
#define HS_CORE_LOG_H

#include <stddef.h>
#include <stdint.h>

typedef enum hs_log_level { HS_LOG_DEBUG, HS_LOG_INFO, HS_LOG_WARN, HS_LOG_ERROR } hs_log_level;

typedef struct hs_log {
    int fd;             /* lines go here */
    hs_log_level level; /* lower ones are left out */
    char run[64];       /* empty: left out */
    uint64_t epoch;     /* 0: left out */
    int32_t rank;       /* -1: left out */
} hs_log;

typedef struct hs_kv {
    const char *key;
    enum { HS_KV_TEXT, HS_KV_INT, HS_KV_REAL } kind;
    const char *text;
    int64_t integer;
    double real;
} hs_kv;

static inline hs_kv HS_S(const char *key, const char *value) {
    return (hs_kv){
        .key = key, .kind = HS_KV_TEXT, .text = value ? value : "", .integer = 0, .real = 0};
}
static inline hs_kv HS_I(const char *key, int64_t value) {
    return (hs_kv){.key = key, .kind = HS_KV_INT, .text = NULL, .integer = value, .real = 0};
}
static inline hs_kv HS_R(const char *key, double value) {
    return (hs_kv){.key = key, .kind = HS_KV_REAL, .text = NULL, .integer = 0, .real = value};
}

void hs_log_write(const hs_log *log, hs_log_level level, const hs_kv *pairs, size_t count);

/* The first argument after the level is the event's text; then any number of HS_S, HS_I, HS_R. */
#define HS_LOG(log, level, ...) HS_LOG_PICK_(log, level, __VA_ARGS__, HS_S("", ""))
#define HS_LOG_PICK_(log, level, event, ...)                                                       \
    hs_log_write((log), (level), (const hs_kv[]){HS_S("event", (event)), __VA_ARGS__},             \
                 sizeof((const hs_kv[]){HS_S("event", (event)), __VA_ARGS__}) / sizeof(hs_kv))

#endif
