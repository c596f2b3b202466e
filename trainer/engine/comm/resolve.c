#include <errno.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "comm/comm_internal.h"
#include "core/files.h"

enum { JOB_IDLE, JOB_ASKED, JOB_ANSWERED };

typedef struct job {
    int state;
    int error; /* of getaddrinfo */
    char host[256];
    char port[8];
    hs_addresses addresses;
} job;

struct hs_resolver {
    pthread_mutex_t lock;
    pthread_cond_t asked;
    int event_fd;
    int owners; /* the creator, and the thread where it runs */
    bool quit, threaded;
    uint32_t count;
    job jobs[];
};

static int look_up(const char *host, const char *port, int flags, hs_addresses *addresses) {
    const struct addrinfo hints = {
        .ai_flags = AI_NUMERICSERV | flags, .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    struct addrinfo *list = NULL;
    addresses->count = 0;
    const int error = getaddrinfo(host, port, &hints, &list);
    if (error) return error;
    for (const struct addrinfo *at = list; at && addresses->count < HS_RESOLVE_ADDRESSES;
         at = at->ai_next) {
        if (at->ai_addrlen > sizeof addresses->at[0]) continue;
        memcpy(&addresses->at[addresses->count], at->ai_addr, at->ai_addrlen);
        addresses->bytes[addresses->count++] = at->ai_addrlen;
    }
    freeaddrinfo(list);
    return addresses->count ? 0 : EAI_NONAME;
}

/* Call with the lock held; releases it. The last owner frees. */
static void leave(hs_resolver *resolver) {
    const bool last = --resolver->owners == 0;
    (void)pthread_mutex_unlock(&resolver->lock);
    if (!last) return;
    close(resolver->event_fd);
    (void)pthread_cond_destroy(&resolver->asked);
    (void)pthread_mutex_destroy(&resolver->lock);
    free(resolver);
}

static void *serve(void *argument) {
    hs_resolver *resolver = argument;
    (void)pthread_mutex_lock(&resolver->lock);
    while (!resolver->quit) {
        job *next = NULL;
        for (uint32_t i = 0; i < resolver->count && !next; i++)
            if (resolver->jobs[i].state == JOB_ASKED) next = &resolver->jobs[i];
        if (!next) {
            (void)pthread_cond_wait(&resolver->asked, &resolver->lock);
            continue;
        }
        char host[sizeof next->host], port[sizeof next->port];
        memcpy(host, next->host, sizeof host);
        memcpy(port, next->port, sizeof port);
        (void)pthread_mutex_unlock(&resolver->lock);
        hs_addresses found;
        const int error = look_up(host, port, 0, &found); /* may block for long */
        (void)pthread_mutex_lock(&resolver->lock);
        next->error = error;
        next->addresses = found;
        next->state = JOB_ANSWERED;
        (void)eventfd_write(resolver->event_fd, 1);
    }
    leave(resolver);
    return NULL;
}

hs_status hs_resolver_create(uint32_t jobs, hs_resolver **out, hs_why *why) {
    *out = NULL;
    hs_resolver *resolver = calloc(1, sizeof *resolver + (size_t)jobs * sizeof resolver->jobs[0]);
    if (!resolver) return hs_fail(why, HS_E_MEMORY, "no memory to resolve %u names", jobs);
    resolver->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (resolver->event_fd < 0) {
        const int code = errno;
        free(resolver);
        return hs_files_failed(why, "an event of names that are resolved", code);
    }
    (void)pthread_mutex_init(&resolver->lock, NULL);
    (void)pthread_cond_init(&resolver->asked, NULL);
    resolver->count = jobs;
    resolver->owners = 1;
    *out = resolver;
    return HS_OK;
}

void hs_resolver_destroy(hs_resolver *resolver) {
    if (!resolver) return;
    (void)pthread_mutex_lock(&resolver->lock);
    resolver->quit = true;
    (void)pthread_cond_signal(&resolver->asked);
    leave(resolver);
}

int hs_resolver_fd(const hs_resolver *resolver) {
    return resolver->event_fd;
}

/* Call with the lock held. Signals stay with the main thread: the resolver's has all of them
 * blocked. */
static int start_thread(hs_resolver *resolver) {
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const int error = pthread_create(&thread, NULL, serve, resolver);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) return error;
    (void)pthread_detach(thread);
    resolver->owners++;
    resolver->threaded = true;
    return 0;
}

hs_status hs_resolver_ask(hs_resolver *resolver, uint32_t number, const char *host, uint32_t port,
                          hs_why *why) {
    (void)pthread_mutex_lock(&resolver->lock);
    job *asked = &resolver->jobs[number];
    hs_status st = HS_OK;
    if (asked->state != JOB_ASKED) {
        (void)snprintf(asked->host, sizeof asked->host, "%s", host);
        (void)snprintf(asked->port, sizeof asked->port, "%u", port & 0xffffu);
        asked->error = look_up(asked->host, asked->port, AI_NUMERICHOST, &asked->addresses);
        asked->state = JOB_ANSWERED;
        if (asked->error) {
            const int error = resolver->threaded ? 0 : start_thread(resolver);
            asked->state = error ? JOB_IDLE : JOB_ASKED;
            (void)pthread_cond_signal(&resolver->asked);
            if (error)
                st = hs_fail(why, HS_E_MEMORY, "a thread to resolve names: %s", strerror(error));
        }
    }
    (void)pthread_mutex_unlock(&resolver->lock);
    return st;
}

bool hs_resolver_take(hs_resolver *resolver, uint32_t number, hs_addresses *addresses,
                      const char **error) {
    eventfd_t ignored;
    (void)eventfd_read(resolver->event_fd, &ignored);
    (void)pthread_mutex_lock(&resolver->lock);
    job *answered = &resolver->jobs[number];
    const bool is = answered->state == JOB_ANSWERED;
    if (is) {
        *addresses = answered->addresses;
        *error = answered->error ? gai_strerror(answered->error) : "";
        answered->state = JOB_IDLE;
    }
    (void)pthread_mutex_unlock(&resolver->lock);
    return is;
}
