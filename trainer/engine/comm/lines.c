/* Messages over TCP, behind the rank's work: a line is one way of a channel, with the messages that it was
 * given. They move in three places: where they are begun, in progress (between calls of kernels), and in
 * every wait, whatever it is for.
 *
 * L1  A frame is head, payload, end; `moved` of its bytes are on their way or here. A line is whole or the
 *     communicator has failed.
 * L2  A receive reads no byte beyond its own frame: the next one's place may not be free yet.
 * L3  The checksum goes over a piece when it passes, while the caches have it: once at each end.
 * L4  What fails names the line that it happened on, not the one that is waited for.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/tcp_internal.h"
#include "core/clock.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/stop.h"

enum {
    PIECE_BYTES = 256 << 10,
    LOOK_NS = 200000, /* between looks of progress: a look costs a microsecond or two */
};

hs_status hs_lines_create(hs_comm *comm, uint32_t most, hs_why *why) {
    const size_t count = comm->channel_count;
    size_t mine = 0;
    comm->most = most ? most : 1;
    for (int in = 0; in < 2; in++) comm->lines[in] = calloc(count + 1, sizeof *comm->lines[in]);
    for (size_t c = 0; c < count; c++)
        if (comm->fds[c] >= 0) mine += hs_tcp_sends(comm, c) + hs_tcp_receives(comm, c);
    comm->messages = calloc(mine * comm->most + 1, sizeof *comm->messages);
    comm->busy = calloc(mine + 1, sizeof *comm->busy);
    comm->polls = calloc(mine + 1, sizeof *comm->polls);
    if (!comm->lines[0] || !comm->lines[1] || !comm->messages || !comm->busy || !comm->polls)
        return hs_fail(why, HS_E_MEMORY, "no memory for %zu messages on %zu channels",
                       mine * comm->most, count);
    size_t at = 0;
    for (uint32_t c = 0; c < count; c++) {
        for (int in = 0; in < 2 && comm->fds[c] >= 0; in++) {
            if (in ? !hs_tcp_receives(comm, c) : !hs_tcp_sends(comm, c)) continue;
            comm->lines[in][c] =
                (hs_line){.channel = c, .in = in == 1, .ring = &comm->messages[comm->most * at++]};
        }
    }
    return HS_OK;
}

void hs_lines_destroy(hs_comm *comm) {
    free(comm->lines[0]);
    free(comm->lines[1]);
    free(comm->messages);
    free(comm->busy);
    free(comm->polls);
}

static const hs_message *moving(const hs_comm *comm, const hs_line *line) {
    return &line->ring[line->ended % comm->most];
}

static uint64_t frame_bytes(const hs_comm *comm, const hs_line *line) {
    return sizeof line->head + moving(comm, line)->bytes + sizeof line->end;
}

static hs_comm_wait wait_of(const hs_comm *comm, const hs_line *line, uint32_t microbatch) {
    return (hs_comm_wait){.doing = line->in ? "recv" : "send",
                          .channel = line->channel,
                          .peer = hs_tcp_peer(comm, line->channel),
                          .microbatch = microbatch,
                          .since_ns = hs_clock_ns()};
}

/* --- moving ------------------------------------------------------------------------------ */

static hs_status gone(const hs_comm *comm, const hs_line *line, const char *how, hs_why *why) {
    const hs_comm_wait wait = wait_of(comm, line, moving(comm, line)->microbatch);
    char text[96];
    return hs_fail(why, HS_E_LOST, "rank %u is gone: %s during %s", wait.peer, how,
                   hs_tcp_wait_text(&wait, text));
}

static void hash_until(const hs_comm *comm, hs_line *line, uint64_t payload) {
    if (payload <= line->hashed) return;
    line->crc = hs_crc32c(line->crc, moving(comm, line)->at + line->hashed, payload - line->hashed);
    line->hashed = payload;
}

static uint64_t payload_of(const hs_comm *comm, const hs_line *line) {
    if (line->moved <= sizeof line->head) return 0;
    const uint64_t payload = line->moved - sizeof line->head, bytes = moving(comm, line)->bytes;
    return payload < bytes ? payload : bytes;
}

/* What is next of the frame: the rest of its head, a piece of the payload, then its end. */
static size_t next_parts(const hs_comm *comm, hs_line *line, struct iovec parts[3]) {
    size_t count = 0;
    const uint64_t head = sizeof line->head, bytes = moving(comm, line)->bytes;
    if (line->moved < head)
        parts[count++] = (struct iovec){.iov_base = (uint8_t *)&line->head + line->moved,
                                        .iov_len = head - line->moved};
    const uint64_t payload = payload_of(comm, line);
    uint64_t piece = bytes - payload;
    if (piece > PIECE_BYTES) piece = PIECE_BYTES;
    if (piece)
        parts[count++] =
            (struct iovec){.iov_base = moving(comm, line)->at + payload, .iov_len = piece};
    if (payload + piece < bytes) return count;
    const uint64_t end = line->moved > head + bytes ? line->moved - head - bytes : 0;
    parts[count++] =
        (struct iovec){.iov_base = (uint8_t *)&line->end + end, .iov_len = sizeof line->end - end};
    return count;
}

static void next_frame(hs_line *line) {
    line->ended++;
    line->moved = line->hashed = 0;
    line->crc = 0;
}

/* Sends what the connection takes. */
static hs_status push(const hs_comm *comm, hs_line *line, hs_why *why) {
    while (line->begun > line->ended) {
        struct iovec parts[3];
        if (line->moved == 0)
            line->head = (hs_frame){.magic = HS_FRAME_MAGIC,
                                    .channel = line->channel,
                                    .sequence = line->ended,
                                    .bytes = moving(comm, line)->bytes,
                                    .microbatch = moving(comm, line)->microbatch};
        const uint64_t payload = payload_of(comm, line);
        const uint64_t rest = moving(comm, line)->bytes - payload;
        hash_until(comm, line, payload + (rest < PIECE_BYTES ? rest : PIECE_BYTES));
        line->end = (hs_frame_end){.magic = HS_FRAME_END_MAGIC, .crc = line->crc};
        const struct msghdr message = {.msg_iov = parts,
                                       .msg_iovlen = next_parts(comm, line, parts)};
        const bool more = rest > PIECE_BYTES;
        const ssize_t n = sendmsg(comm->fds[line->channel], &message,
                                  MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return HS_OK;
        if (n < 0) return gone(comm, line, strerror(errno), why);
        line->moved += (uint64_t)n;
        line->passed += (uint64_t)n;
        if (line->moved == frame_bytes(comm, line)) next_frame(line);
    }
    return HS_OK;
}

static hs_status check_head(const hs_comm *comm, const hs_line *line, hs_why *why) {
    const hs_frame *head = &line->head;
    const uint32_t peer = hs_tcp_peer(comm, line->channel);
    const uint32_t microbatch = moving(comm, line)->microbatch;
    if (head->magic != HS_FRAME_MAGIC || head->channel != line->channel)
        return hs_fail(why, HS_E_LOST,
                       "rank %u sent no frame of channel %u (magic %08x, channel %u)", peer,
                       line->channel, head->magic, head->channel);
    if (head->sequence != line->ended)
        return hs_fail(why, HS_E_LOST, "rank %u sent frame %llu of channel %u, not %llu", peer,
                       (unsigned long long)head->sequence, line->channel,
                       (unsigned long long)line->ended);
    if (head->bytes != moving(comm, line)->bytes || head->microbatch != microbatch)
        return hs_fail(why, HS_E_LOST,
                       "rank %u sent %llu bytes of microbatch %d on channel %u, not %llu of %d",
                       peer, (unsigned long long)head->bytes, (int)head->microbatch, line->channel,
                       (unsigned long long)moving(comm, line)->bytes, (int)microbatch);
    return HS_OK;
}

static hs_status check_end(const hs_comm *comm, const hs_line *line, hs_why *why) {
    if (line->end.magic == HS_FRAME_END_MAGIC && line->end.crc == line->crc) return HS_OK;
    return hs_fail(
        why, HS_E_LOST, "frame %llu of channel %u from rank %u was damaged on its way (checksum)",
        (unsigned long long)line->ended, line->channel, hs_tcp_peer(comm, line->channel));
}

/* Takes what has come, into places that are there for it (L2). */
static hs_status pull(const hs_comm *comm, hs_line *line, hs_why *why) {
    while (line->begun > line->ended) {
        struct iovec parts[3];
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = next_parts(comm, line, parts)};
        const ssize_t n = recvmsg(comm->fds[line->channel], &message, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return HS_OK;
        if (n <= 0) return gone(comm, line, n ? strerror(errno) : "the connection was closed", why);
        const uint64_t before = line->moved;
        line->moved += (uint64_t)n;
        line->passed += (uint64_t)n;
        if (before < sizeof line->head && line->moved >= sizeof line->head)
            HS_TRY(check_head(comm, line, why));
        hash_until(comm, line, payload_of(comm, line));
        if (line->moved < frame_bytes(comm, line)) continue;
        HS_TRY(check_end(comm, line, why));
        next_frame(line);
    }
    return HS_OK;
}

/* Notes the line's failure, for good. */
static hs_status fail(hs_comm *comm, const hs_line *line, hs_status st, const hs_why *local,
                      hs_why *why) {
    comm->failed_wait = wait_of(comm, line, moving(comm, line)->microbatch);
    if (comm->wait.channel == line->channel) comm->failed_wait.since_ns = comm->wait.since_ns;
    comm->broken = true;
    return hs_tcp_fail(comm, st, local, why);
}

static hs_status move_line(hs_comm *comm, hs_line *line, hs_why *why) {
    hs_why local = {.text = ""};
    const hs_status st = line->in ? pull(comm, line, &local) : push(comm, line, &local);
    return st == HS_OK ? HS_OK : fail(comm, line, st, &local, why);
}

/* The busy lines that still are. */
static void tidy(hs_comm *comm) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < comm->busy_count; i++)
        if (comm->busy[i]->begun > comm->busy[i]->ended) comm->busy[kept++] = comm->busy[i];
    comm->busy_count = kept;
}

/* Looks at all busy lines, for at most so long or until the stop has something to say, and moves those
 * that can. */
static hs_status turn(hs_comm *comm, int timeout_ms, hs_why *why) {
    for (uint32_t i = 0; i < comm->busy_count; i++) {
        const hs_line *line = comm->busy[i];
        comm->polls[i] =
            (struct pollfd){.fd = comm->fds[line->channel],
                            .events = line->in ? POLLIN : (short)(POLLOUT | POLLRDHUP)};
    }
    comm->polls[comm->busy_count] = (struct pollfd){.fd = hs_stop_fd(comm->stop), .events = POLLIN};
    const int n = poll(comm->polls, comm->busy_count + 1, timeout_ms);
    if (n < 0 && errno != EINTR) {
        hs_why local = {.text = ""};
        const hs_status st = hs_files_failed(&local, "poll", errno);
        return hs_tcp_fail(comm, st, &local, why);
    }
    for (uint32_t i = 0; n > 0 && i < comm->busy_count; i++) {
        hs_line *line = comm->busy[i];
        if (!comm->polls[i].revents) continue;
        HS_TRY(move_line(comm, line, why));
        if (line->in || line->begun == line->ended || !(comm->polls[i].revents & POLLRDHUP))
            continue;
        hs_why local = {.text = ""}; /* I1 of tcp.c */
        const hs_status st = gone(comm, line, "the connection was closed", &local);
        return fail(comm, line, st, &local, why);
    }
    tidy(comm);
    return HS_OK;
}

/* --- calls ------------------------------------------------------------------------------- */

static hs_status begin(hs_comm *comm, bool in, uint32_t channel, const void *at, size_t bytes,
                       uint32_t microbatch, hs_why *why) {
    HS_TRY(hs_tcp_enter(comm, why));
    HS_ASSERT(channel < comm->channel_count && comm->fds[channel] >= 0);
    HS_ASSERT(!comm->ways || comm->ways->channels[channel].way == HS_WAY_TCP);
    hs_line *line = &comm->lines[in][channel];
    HS_ASSERT(line->ring && line->begun - line->ended < comm->most);
    HS_ASSERT(hs_comm_length(&comm->channels[channel], bytes));
    line->ring[line->begun++ % comm->most] =
        (hs_message){.at = (uint8_t *)(uintptr_t)at, .bytes = bytes, .microbatch = microbatch};
    if (line->begun - line->ended == 1) comm->busy[comm->busy_count++] = line;
    HS_TRY(move_line(comm, line, why));
    if (line->begun == line->ended) tidy(comm);
    return HS_OK;
}

hs_status hs_lines_post(hs_comm *comm, uint32_t channel, void *buf, size_t bytes,
                        uint32_t microbatch, hs_why *why) {
    return begin(comm, true, channel, buf, bytes, microbatch, why);
}

hs_status hs_lines_send(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                        uint32_t microbatch, hs_why *why) {
    return begin(comm, false, channel, buf, bytes, microbatch, why);
}

static hs_status stalled(hs_comm *comm, const hs_line *line, hs_why *why) {
    hs_why local = {.text = ""};
    char text[96];
    const hs_status st =
        hs_fail(&local, HS_E_STALLED, "no byte moved for %u ms: %s with rank %u", comm->patience_ms,
                hs_tcp_wait_text(&comm->wait, text), comm->wait.peer);
    return fail(comm, line, st, &local, why);
}

static hs_status told_lost(hs_comm *comm, const hs_line *line, hs_why *why) {
    hs_why local = {.text = ""};
    char text[96];
    const hs_status st =
        hs_fail(&local, HS_E_LOST, "the supervisor says that a peer was lost (during %s)",
                hs_tcp_wait_text(&comm->wait, text));
    return fail(comm, line, st, &local, why);
}

static hs_status until(hs_comm *comm, bool in, uint32_t channel, uint64_t count, hs_why *why) {
    HS_TRY(hs_tcp_enter(comm, why));
    HS_ASSERT(channel < comm->channel_count && comm->fds[channel] >= 0);
    hs_line *line = &comm->lines[in][channel];
    HS_ASSERT(line->ring && count <= line->begun);
    if (line->ended >= count) return HS_OK;
    comm->wait = wait_of(comm, line, line->ring[(count - 1) % comm->most].microbatch);
    int64_t deadline_ns = hs_deadline_ns(comm->patience_ms);
    HS_TRY(turn(comm, 0, why));
    while (line->ended < count) {
        const uint64_t passed = line->passed;
        if (hs_stop_lost(comm->stop)) return told_lost(comm, line, why);
        if (hs_clock_ns() >= deadline_ns) return stalled(comm, line, why);
        HS_TRY(turn(comm, hs_deadline_poll_ms(deadline_ns), why));
        if (line->passed != passed) deadline_ns = hs_deadline_ns(comm->patience_ms);
    }
    return HS_OK;
}

hs_status hs_lines_got(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    return until(comm, true, channel, count, why);
}

hs_status hs_lines_sent(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    return until(comm, false, channel, count, why);
}

hs_status hs_lines_progress(hs_comm *comm, hs_why *why) {
    HS_TRY(hs_tcp_enter(comm, why));
    if (!comm->busy_count) return HS_OK;
    const int64_t now = hs_clock_ns();
    if (now < comm->look_ns) return HS_OK;
    comm->look_ns = now + LOOK_NS;
    return turn(comm, 0, why);
}
