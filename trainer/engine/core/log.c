#include "core/log.h"

#include <errno.h>
#include <inttypes.h>
#include <time.h>
#include <unistd.h>

#include "core/text.h"

static const char *const level_names[] = {"debug", "info", "warn", "error"};

void hs_log_write(const hs_log *log, hs_log_level level, const hs_kv *pairs, size_t count) {
    if (!log || level < log->level) return;
    char buffer[4096];
    hs_text line = hs_text_over(buffer, sizeof buffer - 3); /* room for "}\n" of a cut line */
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_REALTIME, &now); /* for people; nothing is ordered by it */
    hs_text_printf(&line, "{\"level\":\"%s\",\"time\":%" PRId64 ".%03ld", level_names[level],
                   (int64_t)now.tv_sec, now.tv_nsec / 1000000);
    if (log->run[0]) {
        hs_text_printf(&line, ",\"run\":");
        hs_text_json_string(&line, log->run);
    }
    if (log->epoch) hs_text_printf(&line, ",\"epoch\":%" PRIu64, log->epoch);
    if (log->rank >= 0) hs_text_printf(&line, ",\"rank\":%" PRId32, log->rank);
    for (size_t i = 0; i < count; i++) {
        const hs_kv *kv = &pairs[i];
        if (!kv->key[0]) continue;
        /* A pair that does not fit is left out whole, so that the line stays JSON. */
        const hs_text before = line;
        hs_text_printf(&line, ",\"%s\":", kv->key);
        if (kv->kind == HS_KV_TEXT) {
            hs_text_json_string(&line, kv->text);
        } else if (kv->kind == HS_KV_INT) {
            hs_text_printf(&line, "%" PRId64, kv->integer);
        } else {
            hs_text_json_real(&line, kv->real);
        }
        if (line.over) line = before;
    }
    buffer[line.used] = '}';
    buffer[line.used + 1] = '\n';
    for (size_t at = 0, all = line.used + 2; at < all;) {
        const ssize_t n = write(log->fd, buffer + at, all - at);
        if (n > 0) {
            at += (size_t)n;
        } else if (n < 0 && errno != EINTR) {
            return; /* nobody reads the log: that is no reason to stop */
        }
    }
}
