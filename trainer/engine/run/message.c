#include "run/message.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

const char *hs_message_name(uint32_t type) {
    switch (type) {
#define X(number, NAME)                                                                            \
    case HS_MSG_##NAME:                                                                            \
        return #NAME;
        HS_MSGS(X)
#undef X
    default:
        return "?";
    }
}

hs_status hs_message_check_path(const char *socket_path, hs_why *why) {
    struct sockaddr_un address;
    if (socket_path[0] && strlen(socket_path) < sizeof address.sun_path) return HS_OK;
    return hs_fail(
        why, HS_E_CONFIG,
        "the agent's socket path has %zu bytes, a Unix socket takes 1 to %zu; give a shorter or a "
        "relative one: %.120s",
        strlen(socket_path), sizeof address.sun_path - 1, socket_path);
}

int hs_message_connect(const char *socket_path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(socket_path) >= sizeof address.sun_path) return -1;
    memcpy(address.sun_path, socket_path, strlen(socket_path));
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    if (connect(fd, (const void *)&address, sizeof address) == 0) return fd;
    close(fd); /* nobody, or a full queue (EAGAIN): the caller comes back */
    return -1;
}

hs_status hs_message_send(int fd, hs_msg *msg, const void *payload, size_t bytes, const int *fds,
                          int fd_count) {
    HS_ASSERT(bytes <= HS_MESSAGE_PAYLOAD_MAX && fd_count <= HS_MESSAGE_FDS_MAX);
    msg->magic = HS_MSG_MAGIC;
    msg->bytes = (uint32_t)bytes;
    struct iovec parts[2] = {{.iov_base = msg, .iov_len = sizeof *msg},
                             {.iov_base = (void *)(uintptr_t)payload, .iov_len = bytes}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * HS_MESSAGE_FDS_MAX)];
    } control;
    struct msghdr packet = {.msg_iov = parts, .msg_iovlen = bytes ? 2 : 1};
    if (fd_count > 0) {
        const size_t fd_bytes = sizeof(int) * (size_t)fd_count;
        memset(&control, 0, sizeof control);
        packet.msg_control = control.bytes;
        packet.msg_controllen = CMSG_SPACE(fd_bytes);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&packet);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fd_bytes);
        memcpy(CMSG_DATA(rights), fds, fd_bytes);
    }
    for (;;) {
        if (sendmsg(fd, &packet, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return HS_OK;
        if (errno == EINTR) continue;
        return errno == EAGAIN || errno == ENOBUFS ? HS_E_AGAIN : HS_E_LOST;
    }
}

hs_status hs_message_recv(int fd, hs_msg *msg, char *payload, int fds[HS_MESSAGE_FDS_MAX],
                          int *fd_count) {
    struct iovec parts[2] = {{.iov_base = msg, .iov_len = sizeof *msg},
                             {.iov_base = payload, .iov_len = HS_MSG_MAX - 1}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * HS_MESSAGE_FDS_MAX)];
    } control;
    struct msghdr packet = {.msg_iov = parts,
                            .msg_iovlen = 2,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control.bytes};
    ssize_t n;
    *fd_count = 0;
    do n = recvmsg(fd, &packet, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN) return HS_E_AGAIN;
    if (n <= 0) return HS_E_LOST;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(&packet); at; at = CMSG_NXTHDR(&packet, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS) continue;
        const int count = (int)((at->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < count; i++) {
            int got;
            memcpy(&got, CMSG_DATA(at) + sizeof(int) * (size_t)i, sizeof got);
            if (*fd_count < HS_MESSAGE_FDS_MAX)
                fds[(*fd_count)++] = got;
            else
                close(got);
        }
    }
    if ((size_t)n >= sizeof *msg && !(packet.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
        msg->magic == HS_MSG_MAGIC && msg->bytes == (size_t)n - sizeof *msg) {
        payload[msg->bytes] = '\0';
        return HS_OK;
    }
    for (int i = 0; i < *fd_count; i++) close(fds[i]);
    *fd_count = 0;
    return HS_E_LOST;
}
