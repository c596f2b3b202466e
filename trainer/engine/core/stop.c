#include "core/stop.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <unistd.h>

struct hs_stop {
    int fd;
    bool requested;
    bool lost;
};

hs_status hs_stop_create(hs_stop **out) {
    *out = NULL;
    hs_stop *stop = calloc(1, sizeof *stop);
    if (!stop) return HS_E_MEMORY;
    /* What is ignored never gets to a signalfd. An ignored SIGINT may be on purpose. */
    (void)signal(SIGTERM, SIG_DFL);
    (void)signal(SIGUSR1, SIG_DFL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGUSR1);
    if (sigprocmask(SIG_BLOCK, &set, NULL) != 0 ||
        (stop->fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC)) < 0) {
        free(stop);
        return HS_E_IO;
    }
    *out = stop;
    return HS_OK;
}

void hs_stop_destroy(hs_stop *stop) {
    if (!stop) return;
    close(stop->fd);
    free(stop);
}

int hs_stop_fd(const hs_stop *stop) {
    return stop ? stop->fd : -1;
}

static void drain(hs_stop *stop) {
    struct signalfd_siginfo info;
    while (read(stop->fd, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo == SIGUSR1)
            stop->lost = true;
        else
            stop->requested = true;
    }
}

bool hs_stop_requested(hs_stop *stop) {
    if (!stop) return false;
    drain(stop);
    return stop->requested;
}

bool hs_stop_lost(hs_stop *stop) {
    if (!stop) return false;
    drain(stop);
    return stop->lost;
}
