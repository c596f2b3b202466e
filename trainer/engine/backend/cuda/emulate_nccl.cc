/* NCCL between processes on emulated devices (nccl.h), for the tests: two ranks that meet in a file
 * of shared memory named by the id (a memfd of the one that made it). Non-blocking as the real one: joining, and each group, is "in
 * progress" until it was asked for twice. A message is taken when its receive is posted and not
 * before.
 *
 * HS_EMULATED_NCCL=no: the library is not here; =CODE: what joins fails with that ncclResult_t. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/cuda/nccl.h"

namespace {

/* Begins the file; a message's bytes follow. Messages that were posted by the receiver, given by the
 * sender, taken by the receiver. */
struct meeting {
    uint32_t came[2]; /* process ids */
    int device[2];
    uint32_t posted, given, taken;
    uint64_t bytes;
};

} // namespace

struct ncclComm {
    char path[96];
    int fd, rank, device, questions;
    uint32_t messages;
    bool given_up; /* what is on streams ends, and does nothing */
    meeting *shared;
    nccl::result state;
    char text[160];
};

namespace {

nccl::comm in_group; /* what GroupStart began, if something was put */
bool group;

nccl::result fails(nccl::comm c, nccl::result error, const char *text) {
    if (c) {
        c->state = error;
        snprintf(c->text, sizeof c->text, "%s", text);
    }
    return error;
}

struct message {
    nccl::comm c;
    void *to;
    const void *from;
    size_t bytes;
    uint32_t number; /* from 1 */
};

uint32_t load(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

void store(uint32_t *at, uint32_t number) {
    __atomic_store_n(at, number, __ATOMIC_RELEASE);
}

bool wanted(void *closure) {
    const message *m = static_cast<message *>(closure);
    return m->c->given_up || load(&m->c->shared->posted) == m->number;
}

bool taken(void *closure) {
    const message *m = static_cast<message *>(closure);
    return m->c->given_up || load(&m->c->shared->taken) >= m->number;
}

bool arrived(void *closure) {
    const message *m = static_cast<message *>(closure);
    return m->c->given_up || load(&m->c->shared->given) == m->number;
}

bool always(void *) {
    return true;
}

/* Bytes that fit no mapping made at the start go through the file. */
int give(void *closure) {
    const message *m = static_cast<message *>(closure);
    if (m->c->given_up) return 0;
    if (m->c->shared->bytes != m->bytes || !hs_emulated::on_device(m->from, m->bytes)) return 1;
    if (pwrite(m->c->fd, m->from, m->bytes, sizeof(meeting)) != (ssize_t)m->bytes) return 1;
    store(&m->c->shared->given, m->number);
    return 0;
}

int post(void *closure) {
    const message *m = static_cast<message *>(closure);
    if (m->c->given_up) return 0;
    m->c->shared->bytes = m->bytes;
    store(&m->c->shared->posted, m->number);
    return 0;
}

int take(void *closure) {
    const message *m = static_cast<message *>(closure);
    if (m->c->given_up) return 0;
    if (!hs_emulated::on_device(m->to, m->bytes)) return 1;
    if (pread(m->c->fd, m->to, m->bytes, sizeof(meeting)) != (ssize_t)m->bytes) return 1;
    store(&m->c->shared->taken, m->number);
    return 0;
}

int nothing(void *) {
    return 0;
}

nccl::result version(int *number) {
    *number = 22809;
    return nccl::SUCCESS;
}

/* A memfd of the process that makes the name, which the other opens: nothing is left behind. */
nccl::result unique_id(nccl::id *made) {
    memset(made, 0, sizeof *made);
    const int fd = memfd_create("hs-emulated-nccl", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, sizeof(meeting)) != 0) return nccl::SYSTEM_ERROR;
    snprintf(made->bytes, sizeof made->bytes, "/proc/%d/fd/%d", getpid(), fd);
    return nccl::SUCCESS;
}

nccl::result init(nccl::comm *made, int ranks, nccl::id name, int rank, nccl::config *how) {
    *made = NULL;
    if (ranks != 2 || rank < 0 || rank > 1 || how->magic != nccl::MAGIC || how->blocking != 0)
        return nccl::INVALID_ARGUMENT;
    nccl::comm c = static_cast<nccl::comm>(calloc(1, sizeof *c));
    if (!c) return nccl::SYSTEM_ERROR;
    *made = c;
    snprintf(c->path, sizeof c->path, "%.95s", name.bytes);
    c->rank = rank;
    (void)cudaGetDevice(&c->device);
    c->state = nccl::IN_PROGRESS;
    c->fd = open(c->path, O_RDWR | O_CLOEXEC);
    void *map = MAP_FAILED;
    if (c->fd >= 0) map = mmap(NULL, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (map == MAP_FAILED) return fails(c, nccl::SYSTEM_ERROR, strerror(errno));
    c->shared = static_cast<meeting *>(map);
    c->shared->device[rank] = c->device;
    __atomic_store_n(&c->shared->came[rank], (uint32_t)getpid(), __ATOMIC_RELEASE);
    return nccl::IN_PROGRESS;
}

nccl::result async_error(nccl::comm c, nccl::result *error) {
    if (c->state == nccl::IN_PROGRESS && ++c->questions > 1 && c->shared &&
        __atomic_load_n(&c->shared->came[!c->rank], __ATOMIC_ACQUIRE)) {
        c->state = nccl::SUCCESS;
        const char *text = getenv("HS_EMULATED_NCCL");
        if (text && atoi(text))
            fails(c, static_cast<nccl::result>(atoi(text)), "said to");
        else if (c->shared->device[0] == c->shared->device[1])
            fails(c, nccl::INVALID_USAGE, "Duplicate GPU detected");
    }
    *error = c->state;
    return nccl::SUCCESS;
}

nccl::result put(nccl::comm c, cudaStream_t s, message m, bool sends) {
    if (c->state != nccl::SUCCESS || !group || m.c->rank != (sends ? 0 : 1))
        return fails(c, nccl::INVALID_USAGE, "a message of a communicator that is not ready");
    in_group = c;
    m.number = ++c->messages;
    if (sends) {
        hs_emulated::enqueue_when(s, wanted, give, &m, sizeof m);
        hs_emulated::enqueue_when(s, taken, nothing, &m, sizeof m);
    } else {
        hs_emulated::enqueue_when(s, always, post, &m, sizeof m);
        hs_emulated::enqueue_when(s, arrived, take, &m, sizeof m);
    }
    return nccl::SUCCESS;
}

nccl::result send(const void *from, size_t count, int type, int peer, nccl::comm c,
                  cudaStream_t s) {
    if (type != nccl::INT8 || peer != 1) return nccl::INVALID_ARGUMENT;
    return put(c, s, message{c, NULL, from, count, 0}, true);
}

nccl::result receive(void *to, size_t count, int type, int peer, nccl::comm c, cudaStream_t s) {
    if (type != nccl::INT8 || peer != 0) return nccl::INVALID_ARGUMENT;
    return put(c, s, message{c, to, NULL, count, 0}, false);
}

nccl::result group_start(void) {
    group = true;
    in_group = NULL;
    return nccl::SUCCESS;
}

nccl::result group_end(void) {
    group = false;
    if (!in_group) return nccl::INVALID_USAGE;
    in_group->questions = 0;
    in_group->state = nccl::IN_PROGRESS;
    return nccl::IN_PROGRESS;
}

nccl::result finalize(nccl::comm c) {
    c->questions = 0;
    c->state = nccl::IN_PROGRESS;
    return nccl::IN_PROGRESS;
}

nccl::result destroy(nccl::comm c) {
    if (c->shared) (void)munmap(c->shared, sizeof(meeting));
    if (c->fd >= 0) (void)close(c->fd);
    free(c);
    return nccl::SUCCESS;
}

/* Streams still hold its work, so that it stays, until the process ends. */
nccl::result abort_(nccl::comm c) {
    c->given_up = true;
    return nccl::SUCCESS;
}

const char *error_string(nccl::result error) {
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited",
                                        "NCCL operation in progress"};
    return texts[error];
}

const char *last_error(nccl::comm c) {
    return c ? c->text : "";
}

} // namespace

hs_status nccl::open(api *out, hs_why *why) {
    const char *text = getenv("HS_EMULATED_NCCL");
    if (text && text[0] == 'n')
        return hs_fail(why, HS_E_UNSUPPORTED, "libnccl.so.2 is not found; install hotstage[cuda]");
    *out = api{22809,  version, unique_id, init,        async_error, finalize,     destroy,
               abort_, send,    receive,   group_start, group_end,   error_string, last_error};
    return HS_OK;
}
