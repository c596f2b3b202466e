/* A rank's talk with its agent, told by lines on standard input.
 *
 *   link_drive SOCKET RANK EPOCH
 *   slots MS    metrics TEXT    ready SLOT STEP FINAL    words TEXT    trace PATH    poll committed
 * STEP MS    leave MS    agree MS TEXT (the answer, of 64 bytes at most, is in the line)
 *   ahead STEP    read STEP    data STEP MS
 *
 * One line of answer each: "ok ...", or "<STATUS> why". After `slots` the descriptors are attached
 * to a snapshot of one tensor of 16 elements, and are what a restarted agent gets.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "run/agent_link.h"

static const hs_plan_state state = {
    .tensor = 0, .master_offset = 0, .m_offset = 64, .v_offset = 128};
static const hs_plan_tensor tensor = {.elements = 16};
static uint8_t arena[192], digest[32];

static hs_status take_slots(hs_agent_link *link, int64_t ms, uint64_t epoch, hs_stop *stop,
                            hs_snapshot **snapshot, int *restore, hs_why *why) {
    int fds[HS_SNAPSHOT_SLOTS_MAX], count;
    HS_TRY(hs_agent_link_slots(link, hs_deadline_ns(ms), stop, fds, &count, restore, why));
    const hs_snapshot_config config = {.states = &state,
                                       .state_count = 1,
                                       .tensors = &tensor,
                                       .slot_bytes = 1 << 20,
                                       .arena = arena,
                                       .plan_digest = digest,
                                       .what_digest = digest,
                                       .epoch = epoch};
    HS_TRY(hs_snapshot_create(&config, snapshot, why));
    HS_TRY(hs_snapshot_attach(*snapshot, fds, count, why));
    hs_agent_link_keep(link, *snapshot);
    return HS_OK;
}

static hs_status agree(hs_agent_link *link, const char *text, int64_t ms, hs_stop *stop,
                       hs_why *why) {
    char answer[64];
    size_t came;
    const char *table = strchr(text, ' ') ? strchr(text, ' ') + 1 : "";
    HS_TRY(hs_agent_link_agree(link, table, strlen(table), answer, sizeof answer, &came,
                               hs_deadline_ns(ms), stop, why));
    (void)snprintf(why->text, sizeof why->text, "%.*s", (int)came, answer);
    return HS_OK;
}

int main(int argc, char **argv) {
    if (argc != 4) return 64;
    const hs_log log = {.fd = 2, .level = HS_LOG_DEBUG, .rank = atoi(argv[2])};
    hs_agent_link *link;
    hs_snapshot *snapshot = NULL;
    hs_stop *stop;
    hs_why why = {.text = ""};
    const uint64_t epoch = strtoull(argv[3], NULL, 10);
    if (hs_stop_create(&stop) != HS_OK) return 70;
    hs_status st = hs_agent_link_create(argv[1], (uint32_t)atoi(argv[2]), epoch, &log, &link, &why);
    if (st != HS_OK) {
        (void)printf("%s %s\n", hs_status_name(st), why.text);
        hs_stop_destroy(stop);
        return hs_status_exit(st);
    }
    char line[8192], word[32];
    while (fgets(line, sizeof line, stdin)) {
        long long a = 0, b = 0, c = 0;
        int restore = 0;
        line[strcspn(line, "\n")] = '\0';
        (void)sscanf(line, "%31s %lld %lld %lld", word, &a, &b, &c);
        const char *text = strchr(line, ' ') ? strchr(line, ' ') + 1 : "";
        why.text[0] = '\0';
        st = HS_OK;
        if (strcmp(word, "slots") == 0)
            st = take_slots(link, a, epoch, stop, &snapshot, &restore, &why);
        else if (strcmp(word, "metrics") == 0)
            hs_agent_link_metrics(link, text);
        else if (strcmp(word, "ready") == 0)
            hs_agent_link_ready(link, (int)a, b, c != 0);
        else if (strcmp(word, "words") == 0)
            hs_agent_link_words(link, text);
        else if (strcmp(word, "trace") == 0)
            hs_agent_link_trace(link, text);
        else if (strcmp(word, "poll") == 0)
            hs_agent_link_poll(link);
        else if (strcmp(word, "committed") == 0)
            st = hs_agent_link_wait_committed(link, a, hs_deadline_ns(b), stop, &why);
        else if (strcmp(word, "ahead") == 0)
            hs_agent_link_ahead(link, a);
        else if (strcmp(word, "read") == 0)
            hs_agent_link_has_read(link, a);
        else if (strcmp(word, "data") == 0)
            st = hs_agent_link_wait_data(link, a, hs_deadline_ns(b), stop, &why);
        else if (strcmp(word, "agree") == 0)
            st = agree(link, text, a, stop, &why);
        else if (strcmp(word, "leave") == 0)
            st = hs_agent_link_leave(link, hs_deadline_ns(a)) ? HS_OK : HS_E_AGAIN;
        (void)printf("%s %d %s\n", st == HS_OK ? "ok" : hs_status_name(st), restore, why.text);
        (void)fflush(stdout);
    }
    hs_agent_link_destroy(link);
    hs_snapshot_destroy(snapshot);
    hs_stop_destroy(stop);
    return 0;
}
