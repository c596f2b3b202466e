#include "run/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/hash.h"

static const char *const time_names[HS_TIME_COUNT] = {"F",    "B",    "opt",     "send",
                                                      "recv", "data", "snapshot"};

void hs_metrics_open(hs_metrics *metrics, const char *run, uint64_t epoch, uint32_t rank,
                     uint64_t tokens) {
    *metrics = (hs_metrics){.run = run, .epoch = epoch, .rank = rank, .tokens = tokens};
    metrics->statm_fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    metrics->page_bytes = sysconf(_SC_PAGESIZE);
}

void hs_metrics_close(hs_metrics *metrics) {
    if (metrics->statm_fd >= 0) (void)close(metrics->statm_fd);
    metrics->statm_fd = -1;
}

void hs_metrics_begin(hs_metrics *metrics) {
    memset(metrics->ns, 0, sizeof metrics->ns);
    metrics->step_start_ns = hs_clock_ns();
}

int hs_metrics_kind(const hs_plan_action *action) {
    switch (action->kind) {
    case HS_A_RUN:
        return action->op == 'F'                   ? HS_TIME_F
               : strchr("BIW", action->op) != NULL ? HS_TIME_B
                                                   : HS_TIME_OPT;
    case HS_A_SEND:
        return HS_TIME_SEND;
    case HS_A_RECV:
        return HS_TIME_RECV;
    case HS_A_DATA:
        return HS_TIME_DATA;
    case HS_A_SNAPSHOT:
        return HS_TIME_SNAPSHOT;
    default: /* reports and control blocks: what a step's end takes beside its kernels */
        return HS_TIME_OPT;
    }
}

void hs_metrics_add(hs_metrics *metrics, const hs_plan_action *action, int64_t ns) {
    const int kind = hs_metrics_kind(action);
    metrics->ns[kind] += ns;
    if (kind == HS_TIME_F || kind == HS_TIME_B) metrics->busy_ns += ns;
}

uint32_t hs_metrics_busy_us(hs_metrics *metrics) {
    const int64_t us = (metrics->busy_ns - metrics->reported_ns) / 1000;
    metrics->reported_ns = metrics->busy_ns;
    return us < (int64_t)UINT32_MAX ? (uint32_t)us : UINT32_MAX;
}

int64_t hs_metrics_rss_bytes(const hs_metrics *metrics) {
    char text[128];
    const ssize_t n =
        metrics->statm_fd < 0 ? -1 : pread(metrics->statm_fd, text, sizeof text - 1, 0);
    if (n <= 0) return 0;
    text[n] = 0;
    const char *second = strchr(text, ' ');
    return second ? strtoll(second, NULL, 10) * metrics->page_bytes : 0;
}

void hs_metrics_event(const hs_metrics *metrics, const char *event, hs_text *text) {
    hs_text_printf(text, "{\"event\":\"%s\",\"run\":", event);
    hs_text_json_string(text, metrics->run);
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_REALTIME, &now); /* for people; nothing is ordered by it */
    hs_text_printf(text, ",\"epoch\":%" PRIu64 ",\"rank\":%" PRIu32 ",\"time\":%" PRId64 ".%06ld",
                   metrics->epoch, metrics->rank, (int64_t)now.tv_sec, now.tv_nsec / 1000);
}

void hs_metrics_evidence(hs_metrics *metrics, const uint8_t *reports, size_t positions,
                         size_t tensors) {
    const size_t groups = tensors < HS_METRICS_SUMS ? tensors : HS_METRICS_SUMS;
    const size_t stride = sizeof(hs_step_report) + 8 * tensors;
    for (size_t g = 0, t = 0; g < groups; g++) {
        uint32_t crc = 0;
        for (; t < tensors && t * groups / tensors == g; t++)
            crc = hs_crc32c(crc, reports + sizeof(hs_step_report) + 8 * t, 8);
        (void)snprintf(metrics->sums + 8 * g, 9, "%08" PRIx32, crc);
    }
    if (positions < 2 || positions > HS_METRICS_SENT) return;
    size_t busy = 0;
    for (size_t p = 0; p < positions; p++) {
        hs_step_report report;
        memcpy(&report, reports + p * stride, sizeof report);
        busy += (size_t)snprintf(metrics->busy + busy, sizeof metrics->busy - busy, "%s%" PRIu32,
                                 p ? "," : "", report.busy_us);
        (void)snprintf(metrics->sent + 16 * p, 17, "%08" PRIx32 "%08" PRIx32, report.sent_forward,
                       report.sent_backward);
    }
}

void hs_metrics_step(hs_metrics *metrics, const hs_step_control *control, int64_t batch,
                     hs_text *text) {
    const int64_t ns = hs_clock_ns() - metrics->step_start_ns;
    metrics->skipped += control->skipped;
    metrics->idle += control->counted == 0;
    hs_metrics_event(metrics, "step", text);
    hs_text_printf(text, ",\"step\":%" PRId64 ",\"loss\":", control->step);
    hs_text_json_real(text, control->loss);
    hs_text_printf(text, ",\"grad_norm\":");
    hs_text_json_real(text, control->norm);
    hs_text_printf(text, ",\"lr\":");
    hs_text_json_real(text, control->lr);
    if (batch != control->step) hs_text_printf(text, ",\"batch\":%" PRId64, batch);
    if (control->counted != metrics->tokens)
        hs_text_printf(text, ",\"counted\":%" PRIu64, control->counted);
    hs_text_printf(text, ",\"sums\":\"%s\",\"sent\":\"%s\",\"busy\":[%s]", metrics->sums,
                   metrics->sent, metrics->busy);
    hs_text_printf(
        text, ",\"tokens\":%" PRIu64 ",\"step_us\":%" PRId64 ",\"tokens_per_s\":%.1f,\"us\":{",
        metrics->tokens, ns / 1000, (double)metrics->tokens * 1e9 / (double)(ns > 0 ? ns : 1));
    for (int k = 0; k < HS_TIME_COUNT; k++) {
        hs_text_printf(text, "%s\"%s\":%" PRId64, k ? "," : "", time_names[k],
                       metrics->ns[k] / 1000);
    }
    hs_text_printf(text,
                   "},\"rss_bytes\":%" PRId64 ",\"snapshot\":%" PRIu32 ",\"skipped\":%" PRIu64 "}",
                   hs_metrics_rss_bytes(metrics), control->snapshot, metrics->skipped);
}

void hs_metrics_print(const hs_text *text) {
    struct iovec parts[2] = {{.iov_base = text->at, .iov_len = text->used},
                             {.iov_base = (char[]){'\n'}, .iov_len = 1}};
    size_t left = text->used + 1;
    while (left > 0) {
        const ssize_t n = writev(STDOUT_FILENO, parts, 2);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return; /* nobody reads the metrics: that is no reason to stop */
        left -= (size_t)n;
        for (size_t i = 0, gone = (size_t)n; i < 2; i++) {
            const size_t part = gone < parts[i].iov_len ? gone : parts[i].iov_len;
            parts[i].iov_base = (char *)parts[i].iov_base + part;
            parts[i].iov_len -= part;
            gone -= part;
        }
    }
}
