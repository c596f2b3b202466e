/* Loaded before the engine (LD_PRELOAD): a connection takes one piece of a message, and the next one later, as where
 * its buffers are smaller than that. */
#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>
#include <sys/types.h>

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    static ssize_t (*real)(int, const struct msghdr *, int);
    static unsigned asked;
    int type = 0;
    socklen_t bytes = sizeof type;
    if (!real) real = (ssize_t(*)(int, const struct msghdr *, int))dlsym(RTLD_NEXT, "sendmsg");
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &bytes) || type != SOCK_STREAM ||
        asked++ % 2 == 0)
        return real(fd, message, flags);
    errno = EAGAIN;
    return -1;
}
