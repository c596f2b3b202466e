/* How much a connection holds: a message that fits leaves its sender at once and waits in its receiver's
 * kernel until there is a place for it; of a longer one the rest moves when both ends are in a call.
 *
 * Linux gives a socket what it needs by itself, between limits of the machine (the last numbers of
 * net.ipv4.tcp_wmem and tcp_rmem); but to receive only as fast as the process reads, which a rank that
 * computes does not. To announce that it will read so much at once (SO_RCVLOWAT) makes it give the
 * room now, and take nothing before bytes are there. What is asked for by SO_SNDBUF is fixed from then
 * on, and has a limit of its own (net.core.wmem_max); so it is asked for only where that comes further.
 */
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "comm/tcp_internal.h"

enum { SEND_ITSELF_BYTES = 4 << 20 }; /* tcp_wmem's limit where it cannot be read: Linux' own */

static int option(int fd, int name) {
    int value = 0;
    socklen_t bytes = sizeof value;
    return getsockopt(fd, SOL_SOCKET, name, &value, &bytes) == 0 ? value : 0;
}

static void set(int fd, int name, int value) {
    (void)setsockopt(fd, SOL_SOCKET, name, &value, sizeof value);
}

/* What a socket may come to hold by itself. */
static int send_itself(void) {
    int least, first, most = 0;
    FILE *file = fopen("/proc/sys/net/ipv4/tcp_wmem", "re");
    if (file && fscanf(file, "%d %d %d", &least, &first, &most) != 3) most = 0;
    if (file) (void)fclose(file);
    return most > 0 ? most : SEND_ITSELF_BYTES;
}

/* What it holds where `want` is asked for; of another socket, which is closed again. */
static int send_asked(int want) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return 0;
    set(fd, SO_SNDBUF, want);
    const int held = option(fd, SO_SNDBUF);
    (void)close(fd);
    return held;
}

static int widen_send(int fd, int want, int itself) {
    if (want <= itself) return want;
    if (send_asked(want) <= itself) return itself;
    set(fd, SO_SNDBUF, want);
    return option(fd, SO_SNDBUF);
}

/* Half of what the kernel says is for payload, the rest for what it keeps with it. */
static int widen_receive(int fd, int want) {
    set(fd, SO_RCVLOWAT, want);
    set(fd, SO_RCVLOWAT, 1);
    return option(fd, SO_RCVBUF) / 2;
}

void hs_buffers_widen(const hs_comm *comm) {
    const int itself = send_itself();
    uint32_t short_channel = UINT32_MAX, shorts = 0;
    int short_holds = 0;
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        if (comm->fds[c] < 0) continue;
        const uint64_t frame = sizeof(hs_frame) + comm->channels[c].bytes + sizeof(hs_frame_end);
        const int want = frame < HS_BUFFER_MOST ? (int)frame : HS_BUFFER_MOST;
        int holds = want;
        if (hs_tcp_sends(comm, c)) holds = widen_send(comm->fds[c], want, itself);
        if (hs_tcp_receives(comm, c)) {
            const int there = widen_receive(comm->fds[c], want);
            if (there < holds) holds = there;
        }
        if (holds >= want) continue;
        if (shorts++ && holds >= short_holds) continue;
        short_channel = c;
        short_holds = holds;
    }
    if (shorts)
        HS_LOG(comm->log, HS_LOG_INFO, "connections hold less than a message",
               HS_I("channels", shorts), HS_I("channel", short_channel),
               HS_I("message_bytes", (int64_t)comm->channels[short_channel].bytes),
               HS_I("holds_bytes", short_holds),
               HS_S("mend", "for speed alone: raise the last numbers of net.ipv4.tcp_rmem and "
                            "tcp_wmem"));
}
