#include "core/stop.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "core/files.h"

enum { AGAIN_MS = 10 }; /* between looks at an owner that is about to hear it by itself */

struct hs_stop {
    int fd;
    bool requested;
    bool lost;
    /* the second thread */
    bool watched;
    int lost_fd, end_fd; /* SIGUSR1 alone; readable: the thread ends */
    pthread_t thread;
    pthread_mutex_t lock; /* of busy; held by the thread while fn runs */
    bool busy;
    void (*fn)(void *ctx);
    void *ctx;
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
    if (stop->watched) {
        (void)eventfd_write(stop->end_fd, 1);
        (void)pthread_join(stop->thread, NULL);
        (void)pthread_mutex_destroy(&stop->lock);
        close(stop->lost_fd);
        close(stop->end_fd);
    }
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

bool hs_stop_was_lost(const hs_stop *stop) {
    return stop && stop->lost;
}

/* Takes no signal: one that the owner can hear is the owner's. */
static void *watch(void *argument) {
    hs_stop *stop = argument;
    for (;;) {
        struct pollfd polls[2] = {{.fd = stop->lost_fd, .events = POLLIN},
                                  {.fd = stop->end_fd, .events = POLLIN}};
        if (poll(polls, 2, -1) < 0) continue;
        if (polls[1].revents) return NULL;
        if (!polls[0].revents) continue;
        (void)pthread_mutex_lock(&stop->lock);
        if (stop->busy) stop->fn(stop->ctx);
        (void)pthread_mutex_unlock(&stop->lock);
        (void)poll(&polls[1], 1, AGAIN_MS);
    }
}

hs_status hs_stop_watch(hs_stop *stop, void (*fn)(void *ctx), void *ctx, hs_why *why) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    stop->fn = fn;
    stop->ctx = ctx;
    stop->lost_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    stop->end_fd = eventfd(0, EFD_CLOEXEC);
    const int code = errno;
    if (stop->lost_fd >= 0 && stop->end_fd >= 0) {
        (void)pthread_mutex_init(&stop->lock, NULL);
        if (pthread_create(&stop->thread, NULL, watch, stop) == 0) {
            stop->watched = true;
            return HS_OK;
        }
        (void)pthread_mutex_destroy(&stop->lock);
    }
    const hs_status st = stop->lost_fd < 0 || stop->end_fd < 0
                             ? hs_files_failed(why, "an event of peers that are lost", code)
                             : hs_fail(why, HS_E_MEMORY,
                                       "cannot start the thread that hears of lost peers; is there "
                                       "memory for one?");
    if (stop->lost_fd >= 0) close(stop->lost_fd);
    if (stop->end_fd >= 0) close(stop->end_fd);
    return st;
}

void hs_stop_busy(hs_stop *stop, bool busy) {
    if (!stop || !stop->watched) return;
    (void)pthread_mutex_lock(&stop->lock);
    stop->busy = busy;
    (void)pthread_mutex_unlock(&stop->lock);
}
