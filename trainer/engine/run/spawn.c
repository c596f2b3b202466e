#include "run/spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "core/files.h"
#include "wire/exit.h"

bool hs_spawn_is_secret(const char *name_and_value) {
    static const char *const words[] = {"SECRET",     "PASSWORD", "TOKEN",
                                        "CREDENTIAL", "API_KEY",  "ACCESS_KEY"};
    const size_t length = strcspn(name_and_value, "=");
    char name[256];
    if (length >= sizeof name) return true; /* no variable of ours is so long: better without it */
    for (size_t i = 0; i < length; i++) {
        const char c = name_and_value[i];
        name[i] = (char)(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
    }
    name[length] = '\0';
    if (strncmp(name, "AWS_", 4) == 0) return true;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strstr(name, words[i])) return true;
    return false;
}

static char **clean_environment(void) {
    size_t count = 0, kept = 0;
    while (environ[count]) count++;
    char **clean = calloc(count + 1, sizeof *clean);
    for (size_t i = 0; clean && i < count; i++)
        if (!hs_spawn_is_secret(environ[i])) clean[kept++] = environ[i];
    return clean;
}

/* What a child keeps of the parent's descriptors, beside the standard ones. */
enum { KEPT = 3 };
typedef struct child {
    char *const *arguments, *const *environment;
    int out_fd, err_fd; /* err_fd -1: the parent's own */
    int keep[KEPT];     /* -1: none */
} child;

static bool keep(int fd) {
    return fd < 0 || fcntl(fd, F_SETFD, 0) == 0;
}

/* In the child. Never returns. */
_Noreturn static void become(pid_t parent, const child *c) {
    static const char complaint[] =
        "{\"level\":\"error\",\"event\":\"a process of the node cannot start\"}\n";
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(HS_EXIT_LOST); /* it died before the prctl */
    sigset_t waiting;
    (void)sigemptyset(&waiting);
    (void)sigaddset(&waiting, SIGTERM);
    (void)sigaddset(&waiting, SIGINT);
    (void)sigaddset(&waiting, SIGUSR1);
    (void)sigprocmask(SIG_SETMASK, &waiting, NULL);
    (void)signal(SIGPIPE, SIG_DFL);
    bool ready = dup2(c->out_fd, STDOUT_FILENO) >= 0 &&
                 (c->err_fd < 0 || dup2(c->err_fd, STDERR_FILENO) >= 0);
    close(STDIN_FILENO); /* the lowest number is the next one's, also where no other is left */
    ready = ready && open("/dev/null", O_RDONLY) == STDIN_FILENO;
    for (int i = 0; i < KEPT; i++) ready = ready && keep(c->keep[i]);
    if (ready) (void)execve("/proc/self/exe", c->arguments, c->environment);
    (void)!write(STDERR_FILENO, complaint, sizeof complaint - 1);
    _exit(HS_EXIT_BUG);
}

static hs_status make_pipe(int ends[2], hs_why *why) {
    if (pipe2(ends, O_CLOEXEC) != 0)
        return hs_files_failed(why, "a pipe for what a process says", errno);
    (void)fcntl(ends[0], F_SETFL, O_NONBLOCK);
    return HS_OK;
}

static void close_pair(const int ends[2]) {
    if (ends[0] >= 0) close(ends[0]);
    if (ends[1] >= 0) close(ends[1]);
}

/* `name` is for the refusal. err_fd NULL: the child has the caller's. */
static hs_status start(const char *name, const char *const *arguments, const int kept[KEPT],
                       pid_t *pid, int *out_fd, int *err_fd, hs_why *why) {
    int out[2] = {-1, -1}, err[2] = {-1, -1};
    char **environment = clean_environment();
    hs_status st = environment ? HS_OK : hs_fail(why, HS_E_MEMORY, "no memory for an environment");
    if (st == HS_OK) st = make_pipe(out, why);
    if (st == HS_OK && err_fd) st = make_pipe(err, why);
    const child c = {.arguments = (char *const *)(uintptr_t)arguments,
                     .environment = environment,
                     .out_fd = out[1],
                     .err_fd = err[1],
                     .keep = {kept[0], kept[1], kept[2]}};
    const pid_t parent = getpid();
    const pid_t made = st == HS_OK ? fork() : -1;
    if (made == 0) become(parent, &c);
    free(environment);
    if (made < 0) {
        if (st == HS_OK) st = hs_fail(why, HS_E_MEMORY, "fork of %s: %s", name, strerror(errno));
        close_pair(out);
        close_pair(err);
        return st;
    }
    close(out[1]);
    if (err_fd) close(err[1]);
    *pid = made;
    *out_fd = out[0];
    if (err_fd) *err_fd = err[0];
    return HS_OK;
}

hs_status hs_spawn_devices(pid_t *pid, int *out_fd, hs_why *why) {
    const char *const arguments[] = {"hotstage-engine", "devices", NULL};
    const int none[KEPT] = {-1, -1, -1};
    return start("the look at the devices", arguments, none, pid, out_fd, NULL, why);
}

hs_status hs_spawn_rank(const hs_spawn *spawn, pid_t *pid, int *out_fd, int *err_fd, hs_why *why) {
    char name[32], rank[16], listen_fd[16], status_fd[16], arena_fd[16];
    (void)snprintf(name, sizeof name, "rank %u", spawn->rank);
    (void)snprintf(rank, sizeof rank, "%u", spawn->rank);
    (void)snprintf(listen_fd, sizeof listen_fd, "%d", spawn->listen_fd);
    (void)snprintf(status_fd, sizeof status_fd, "%d", spawn->status_fd);
    (void)snprintf(arena_fd, sizeof arena_fd, "%d", spawn->arena_fd);
    const char *arguments[] = {"hotstage-engine",
                               "rank",
                               "--plan",
                               spawn->plan_path,
                               "--attempt",
                               spawn->attempt_path,
                               "--rank",
                               rank,
                               "--agent",
                               spawn->socket_path,
                               "--status-fd",
                               status_fd,
                               "--arena-fd",
                               arena_fd,
                               NULL,
                               NULL,
                               NULL};
    if (spawn->listen_fd >= 0) {
        arguments[14] = "--listen-fd";
        arguments[15] = listen_fd;
    }
    const int kept[KEPT] = {spawn->listen_fd, spawn->status_fd, spawn->arena_fd};
    return start(name, arguments, kept, pid, out_fd, err_fd, why);
}
