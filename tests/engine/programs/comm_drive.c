/* Ranks of a communicator, told on the command line what to do; the tests are their peers.
 *
 *   comm_drive tcp ATTEMPT CHANNELS RANK LISTEN_FD START_STEP ACTION...
 *   comm_drive device ...      the same with CUDA device RANK % (devices that there are): a message lies in its memory,
 *                              at the place of its channel, and goes as the ends agree
 *   comm_drive loop ATTEMPT CHANNELS ACTIONS_OF_RANK_0 ACTIONS_OF_RANK_1 ...   (each one argument,
 * by spaces)
 *   comm_drive late.SEED ...   the same, messages as late as may be
 *
 * ATTEMPT: file of hs_attempt and its hs_attempt_rank. CHANNELS: from:to:bytes[:across],... of
 * positions; with more ranks than positions every replica has them. One across replicas carries at most
 * that many bytes a message, and an action on it may say how many: X0.3.500.
 * ACTION: S<channel>.<microbatch> send and see it off, R<channel>.<microbatch> receive and check the contents; in two:
 * B begins a send, W<channel>.<messages> waits until they are sent, O<channel>.<microbatch> opens a place, G gets what
 * the oldest open place of the channel is for and checks it; X<channel>.<microbatch> exchanges; P pauses until a line comes on standard input, C
 * computes until then: calls progress. Lines on standard output: "<rank> created", "<rank>
 * ok <action>",
 * "<rank> <STATUS> <action or create> <why>". Exit: hs_status_exit of the first failure.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/load.h"
#include "comm/comm.h"
#include "core/stop.h"
#include "run/environment.h"
#include "wire/frame.h"

enum { CHANNELS_MAX = 64, RANKS_MAX = 16, BUFFERS_MAX = 256, MOST = 16 };

typedef struct setting {
    hs_attempt attempt;
    hs_attempt_rank peers[RANKS_MAX];
    hs_plan_channel channels[CHANNELS_MAX];
    uint32_t channel_count;
    uint32_t positions; /* that the channels join; the ranks are that many a replica */
} setting;

typedef struct driver {
    const setting *set;
    const hs_comm_table *table;
    struct hs_comm_loop *loop;
    struct hs_stop *stop;
    uint32_t rank;
    int listen_fd;
    int64_t start_step;
    char *const *actions;
    int action_count;
    hs_status result;
    hs_comm_device between; /* device: NULL without */
    uint8_t *pinned;
    uint8_t *buffers[BUFFERS_MAX]; /* until the end: a message may be under way */
    int buffer_count;
    uint8_t *open[CHANNELS_MAX][BUFFERS_MAX];
    size_t open_bytes[CHANNELS_MAX][BUFFERS_MAX];
    uint64_t opened[CHANNELS_MAX], got[CHANNELS_MAX], sent[CHANNELS_MAX];
} driver;

static uint8_t byte_at(uint32_t channel, uint32_t microbatch, size_t i) {
    return (uint8_t)(i * 31 + channel * 7 + microbatch * 13 + (i >> 8));
}

static void say(const driver *d, const char *word, const char *what, const char *why) {
    char line[1200];
    (void)snprintf(line, sizeof line, "%u %s %s %s\n", d->rank, word, what, why);
    (void)fputs(line, stdout);
    (void)fflush(stdout);
}

static size_t place_of(const setting *set, uint32_t channel) {
    size_t at = 0;
    for (uint32_t c = 0; c < channel; c++) at += (set->channels[c].bytes + 63) / 64 * 64;
    return at;
}

/* From memory of the device to the same place of the peer's; the host looks at it before and after. */
static hs_status pass(driver *d, hs_comm *comm, bool sends, uint32_t channel, uint32_t microbatch,
                      uint8_t *buffer, hs_why *why) {
    const hs_backend *b = d->between.backend;
    hs_device *device = d->between.device;
    const size_t bytes = d->set->channels[channel].bytes, place = place_of(d->set, channel);
    uint8_t *at = (uint8_t *)(uintptr_t)d->between.arena + place, *host = d->pinned + place;
    if (sends) {
        memcpy(host, buffer, bytes);
        HS_TRY(b->copy(device, HS_STREAM_OUT, at, host, bytes, HS_COPY_TO_DEVICE, why));
        HS_TRY(d->table->put(comm, channel, at, place, bytes, microbatch, why));
        HS_TRY(b->record(device, HS_STREAM_OUT, 0, why));
        return d->table->await(comm, 0, why);
    }
    HS_TRY(d->table->take(comm, channel, at, bytes, microbatch, why));
    HS_TRY(b->copy(device, HS_STREAM_IN, host, at, bytes, HS_COPY_FROM_DEVICE, why));
    HS_TRY(b->record(device, HS_STREAM_IN, 0, why));
    HS_TRY(d->table->await(comm, 0, why));
    memcpy(buffer, host, bytes);
    return HS_OK;
}

/* Calls progress, as a rank does between kernels, until a line comes on standard input. */
static hs_status compute(driver *d, hs_comm *comm, hs_why *why) {
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[16];
    while (poll(&in, 1, 1) == 0) HS_TRY(d->table->progress(comm, why));
    return fgets(line, sizeof line, stdin) ? HS_OK : HS_E_IO;
}

static hs_status check(const uint8_t *buffer, uint32_t channel, uint32_t microbatch, size_t bytes,
                       hs_why *why) {
    for (size_t i = 0; i < bytes; i++)
        if (buffer[i] != byte_at(channel, microbatch, i))
            return hs_fail(why, HS_E_BUG, "byte %zu differs", i);
    return HS_OK;
}

static uint8_t *new_buffer(driver *d, size_t bytes) {
    HS_ASSERT(d->buffer_count < BUFFERS_MAX);
    return d->buffers[d->buffer_count++] = calloc(bytes + 1, 1);
}

static hs_status act(driver *d, hs_comm *comm, const char *action, hs_why *why) {
    if (action[0] == 'C') return compute(d, comm, why);
    if (action[0] == 'P') {
        char line[16];
        return fgets(line, sizeof line, stdin) ? HS_OK : HS_E_IO;
    }
    uint32_t channel = 0, microbatch = 0;
    unsigned long said = 0;
    if (sscanf(action + 1, "%u.%u.%lu", &channel, &microbatch, &said) < 2) return HS_E_USAGE;
    if (action[0] == 'W') return d->table->sent(comm, channel, microbatch, why);
    const size_t bytes = action[0] == 'G' ? d->open_bytes[channel][d->got[channel] % BUFFERS_MAX]
                         : said           ? said
                                          : d->set->channels[channel].bytes;
    const bool direct = d->between.device && d->table->way(comm, channel) != HS_WAY_TCP;
    uint8_t *buffer =
        action[0] == 'G' ? d->open[channel][d->got[channel] % BUFFERS_MAX] : new_buffer(d, bytes);
    if (!buffer) return HS_E_MEMORY;
    if (action[0] == 'S' || action[0] == 'B' || action[0] == 'X')
        for (size_t i = 0; i < bytes; i++) buffer[i] = byte_at(channel, microbatch, i);
    switch (action[0]) {
    case 'X': {
        uint8_t *const in = new_buffer(d, bytes);
        HS_TRY(d->table->post(comm, channel, in, bytes, microbatch, why));
        HS_TRY(d->table->send(comm, channel, buffer, bytes, microbatch, why));
        HS_TRY(d->table->got(comm, channel, ++d->got[channel], why));
        d->opened[channel]++;
        HS_TRY(d->table->sent(comm, channel, ++d->sent[channel], why));
        return check(in, channel, microbatch, bytes, why);
    }
    case 'S':
    case 'B':
        if (direct) return pass(d, comm, true, channel, microbatch, buffer, why);
        HS_TRY(d->table->send(comm, channel, buffer, bytes, microbatch, why));
        d->sent[channel]++;
        return action[0] == 'S' ? d->table->sent(comm, channel, d->sent[channel], why) : HS_OK;
    case 'R':
    case 'O':
        if (direct) {
            HS_TRY(pass(d, comm, false, channel, microbatch, buffer, why));
            return check(buffer, channel, microbatch, bytes, why);
        }
        HS_TRY(d->table->post(comm, channel, buffer, bytes, microbatch, why));
        d->open_bytes[channel][d->opened[channel] % BUFFERS_MAX] = bytes;
        d->open[channel][d->opened[channel]++ % BUFFERS_MAX] = buffer;
        if (action[0] == 'O') return HS_OK;
        HS_ASSERT(d->opened[channel] == d->got[channel] + 1);
        break;
    default:
        break;
    }
    HS_TRY(d->table->got(comm, channel, ++d->got[channel], why));
    return check(buffer, channel, microbatch, bytes, why);
}

static void *drive(void *argument) {
    driver *d = argument;
    hs_why why = {.text = ""};
    const hs_log log = {.fd = 2, .level = HS_LOG_DEBUG, .rank = (int32_t)d->rank};
    const hs_comm_config config = {.attempt = &d->set->attempt,
                                   .peers = d->set->peers,
                                   .channels = d->set->channels,
                                   .channel_count = d->set->channel_count,
                                   .rank = d->rank,
                                   .positions = d->set->positions,
                                   .start_step = d->start_step,
                                   .listen_fd = d->listen_fd,
                                   .loop = d->loop,
                                   .most = MOST,
                                   .stop = d->stop,
                                   .device = d->between.device ? &d->between : NULL,
                                   .log = &log};
    hs_comm *comm = NULL;
    d->result = d->table->create(&config, &comm, &why);
    say(d, d->result == HS_OK ? "created" : hs_status_name(d->result),
        d->result == HS_OK ? "" : "create", why.text);
    for (int i = 0; comm && i < d->action_count; i++) {
        hs_why sentence = {.text = ""};
        const hs_status st = act(d, comm, d->actions[i], &sentence);
        say(d, st == HS_OK ? "ok" : hs_status_name(st), d->actions[i], sentence.text);
        if (st != HS_OK && d->result == HS_OK)
            d->result = st; /* and on: the rest must be refused */
    }
    if (comm && d->result == HS_OK && d->between.device) {
        d->result = d->table->settle(comm, &why);
        if (d->result != HS_OK) say(d, hs_status_name(d->result), "settle", why.text);
    }
    if (comm && d->between.device && d->table->hangs(comm)) _exit(hs_status_exit(d->result));
    d->table->close(comm);
    for (int i = 0; i < d->buffer_count; i++) free(d->buffers[i]);
    return NULL;
}

static int read_setting(const char *path, const char *channels, setting *set) {
    FILE *file = fopen(path, "rb");
    if (!file || fread(&set->attempt, sizeof set->attempt, 1, file) != 1) return 0;
    const uint32_t ranks = set->attempt.ranks;
    if (ranks > RANKS_MAX || fread(set->peers, sizeof set->peers[0], ranks, file) != ranks)
        return 0;
    (void)fclose(file);
    for (const char *at = channels; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        hs_plan_channel *ch = &set->channels[set->channel_count++];
        unsigned long bytes = 0;
        if (sscanf(at, "%u:%u:%lu:%u", &ch->from, &ch->to, &bytes, &ch->across) < 3) return 0;
        ch->bytes = bytes;
        ch->kind = ch->across ? HS_CH_REDUCE : 0;
        if (ch->from >= set->positions) set->positions = ch->from + 1;
        if (ch->to >= set->positions) set->positions = ch->to + 1;
    }
    return 1;
}

static int run_loop(const setting *set, const char *mode, int count, char **lists) {
    static driver drivers[RANKS_MAX];
    static char *words[RANKS_MAX][256];
    pthread_t threads[RANKS_MAX];
    struct hs_comm_loop *loop;
    const bool late = strncmp(mode, "late.", 5) == 0;
    if (hs_comm_loop_create((uint32_t)count, set->channels, set->channel_count,
                            late ? HS_LOOP_LATE : HS_LOOP_RENDEZVOUS,
                            late ? (uint64_t)atoll(mode + 5) : 0, &loop) != HS_OK)
        return 70;
    for (int r = 0; r < count; r++) {
        char *state = NULL;
        int n = 0;
        for (char *word = strtok_r(lists[r], " ", &state); word; word = strtok_r(NULL, " ", &state))
            words[r][n++] = word;
        drivers[r] = (driver){.set = set,
                              .table = &hs_comm_loop_table,
                              .loop = loop,
                              .rank = (uint32_t)r,
                              .listen_fd = -1,
                              .actions = words[r],
                              .action_count = n};
        if (pthread_create(&threads[r], NULL, drive, &drivers[r]) != 0) return 70;
    }
    hs_status first = HS_OK;
    for (int r = 0; r < count; r++) {
        (void)pthread_join(threads[r], NULL);
        if (first == HS_OK) first = drivers[r].result;
    }
    hs_comm_loop_destroy(loop);
    return hs_status_exit(first);
}

static hs_status open_device(driver *d, hs_environment *environment, hs_why *why) {
    hs_device_facts facts, list[RANKS_MAX];
    uint32_t count = 0;
    uint8_t *arena;
    const size_t bytes = place_of(d->set, d->set->channel_count) + 64;
    HS_TRY(hs_environment_read(environment, why));
    HS_TRY(hs_backend_load(HS_DEVICE_CUDA, &d->between.backend, why));
    const hs_backend *b = d->between.backend;
    HS_TRY(b->devices(list, RANKS_MAX, &count, why));
    const hs_device_config config = {.index = d->rank % count};
    HS_TRY(b->open(&config, &d->between.device, &facts, why));
    HS_TRY(b->alloc(d->between.device, bytes, -1, &arena, why));
    HS_TRY(b->pinned(d->between.device, bytes, &d->pinned, why));
    d->between.arena = arena;
    d->between.arena_bytes = bytes;
    d->between.allowed = environment->ways;
    d->between.fabric = environment->fabric;
    d->between.event = HS_EVENTS - 1;
    return HS_OK;
}

int main(int argc, char **argv) {
    static setting set;
    if (argc < 5 || !read_setting(argv[2], argv[3], &set)) return 64;
    if (strcmp(argv[1], "loop") == 0 || strncmp(argv[1], "late.", 5) == 0)
        return run_loop(&set, argv[1], argc - 4, argv + 4);
    if (argc < 7) return 64;
    static driver d;
    d = (driver){.set = &set,
                 .table = &hs_comm_tcp,
                 .rank = (uint32_t)atoi(argv[4]),
                 .listen_fd = atoi(argv[5]),
                 .start_step = atoll(argv[6]),
                 .actions = argv + 7,
                 .action_count = argc - 7};
    hs_environment environment;
    hs_why why = {.text = ""};
    if (strcmp(argv[1], "device") == 0 && open_device(&d, &environment, &why) != HS_OK) {
        (void)fprintf(stderr, "%s\n", why.text);
        return 70;
    }
    if (hs_stop_create(&d.stop) != HS_OK) return 70;
    (void)drive(&d);
    if (d.between.device) d.between.backend->close(d.between.device);
    hs_stop_destroy(d.stop);
    return hs_status_exit(d.result);
}
