/* A pod's sandbox holds its namespaces open, and reaps what its containers leave behind. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void leave(int number) {
    (void)number;
    _exit(0);
}

static void reap(int number) {
    (void)number;
    while (waitpid(-1, 0, WNOHANG) > 0) {}
}

int main(void) {
    struct sigaction ends = {.sa_handler = leave}, child = {.sa_handler = reap};

    child.sa_flags = SA_NOCLDSTOP;
    if (sigaction(SIGINT, &ends, 0) || sigaction(SIGTERM, &ends, 0) ||
        sigaction(SIGCHLD, &child, 0)) {
        return 1;
    }
    for (;;) {
        pause();
    }
}
