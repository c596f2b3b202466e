/* The real supervisor, with ranks that do as a script says: `node --agent SOCKET` is the engine's
 * own; `rank ...` takes the command line that the supervisor gives and, instead of a plan, reads
 * lines "<rank> <word> [text]":
 *
 *   out TEXT, err TEXT   a line on stdout, stderr
 *
 *   env NAME             "NAME=value" or "NAME is not set" on stdout
 *
 *   flood N, pour        N KiB on stdout; without end
 *
 *   exit CODE, raise SIGNAL
 *
 *   listen               says the port of --listen-fd
 *
 *   move                 one move on the status page, at step 3
 *
 *   wait                 until asked: "lost" on stderr and 75 when a peer is lost, 85 when asked to
 * stop
 *
 *   hang                 ignores everything but SIGKILL
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/rank_page.h"
#include "core/stop.h"
#include "run/environment.h"
#include "run/supervisor.h"

static const char *option(int argc, char **argv, const char *name) {
    for (int i = 2; i + 1 < argc; i += 2)
        if (strcmp(argv[i], name) == 0) return argv[i + 1];
    return "";
}

static int wait_for_word(struct hs_stop *stop) {
    for (;;) {
        if (hs_stop_lost(stop)) {
            (void)fputs("last words of a rank\n", stderr);
            return 75;
        }
        if (hs_stop_requested(stop)) return 85;
        struct pollfd word = {.fd = hs_stop_fd(stop), .events = POLLIN};
        (void)poll(&word, 1, -1);
    }
}

static void show_port(int fd) {
    struct sockaddr_in address;
    socklen_t bytes = sizeof address;
    if (getsockname(fd, (void *)&address, &bytes) == 0)
        (void)printf("port %u\n", ntohs(address.sin_port));
}

static const char pour[65536]; /* as fast as a pipe takes it */

static int follow(const char *word, const char *text, struct hs_stop *stop, hs_rank_page *page,
                  int listen_fd) {
    if (strcmp(word, "out") == 0) {
        (void)puts(text);
    } else if (strcmp(word, "err") == 0) {
        (void)fprintf(stderr, "%s\n", text);
    } else if (strcmp(word, "env") == 0) {
        const char *value = getenv(text);
        (void)printf("%s%s%s\n", text, value ? "=" : " is not set", value ? value : "");
    } else if (strcmp(word, "flood") == 0) {
        for (int i = 0; i < atoi(text); i++)
            for (int k = 0; k < 64; k++) (void)printf("%05d-%04d-....\n", i, k);
        (void)puts("the end of the flood");
    } else if (strcmp(word, "pour") == 0) {
        while (write(STDOUT_FILENO, pour, sizeof pour) > 0) continue;
    } else if (strcmp(word, "exit") == 0) {
        (void)fflush(stdout);
        return atoi(text);
    } else if (strcmp(word, "raise") == 0) {
        (void)fflush(stdout);
        (void)kill(getpid(), atoi(text));
    } else if (strcmp(word, "listen") == 0) {
        show_port(listen_fd);
    } else if (strcmp(word, "move") == 0) {
        hs_rank_page_set(page, 3, 4, 3, 'F', 1, 0);
    } else if (strcmp(word, "wait") == 0) {
        (void)fflush(stdout);
        return wait_for_word(stop);
    } else if (strcmp(word, "hang") == 0) {
        (void)fflush(stdout);
        for (;;) (void)poll(NULL, 0, -1);
    }
    (void)fflush(stdout);
    return -1;
}

static int be_rank(int argc, char **argv) {
    struct hs_stop *stop;
    char line[512], word[32], text[256];
    int result = 0;
    const int me = atoi(option(argc, argv, "--rank"));
    void *page = mmap(NULL, HS_RANK_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                      atoi(option(argc, argv, "--status-fd")), 0);
    FILE *script = fopen(option(argc, argv, "--plan"), "r");
    if (!script || page == MAP_FAILED || hs_stop_create(&stop) != HS_OK) return 64;
    while (fgets(line, sizeof line, script)) {
        int rank = -1;
        text[0] = '\0';
        if (sscanf(line, "%d %31s %255[^\n]", &rank, word, text) < 2 || rank != me) continue;
        const int code = follow(word, text, stop, page, atoi(option(argc, argv, "--listen-fd")));
        if (code >= 0) {
            result = code;
            break;
        }
    }
    (void)fclose(script);
    hs_stop_destroy(stop);
    return result;
}

/* What NODE_DRIVE_DEVICES says: a line; nothing where it is not set; "hang" waits for a SIGKILL. */
static int be_devices(void) {
    const char *line = getenv("NODE_DRIVE_DEVICES");
    if (!line) return 1;
    while (strcmp(line, "hang") == 0) (void)poll(NULL, 0, -1);
    return puts(line) < 0;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "node") == 0) {
        hs_environment environment;
        hs_why why = {0};
        if (hs_environment_read(&environment, &why) != HS_OK) return 78;
        return hs_supervisor_main(argv[3], environment.agent_away_ms);
    }
    if (argc > 3 && strcmp(argv[1], "rank") == 0) return be_rank(argc, argv);
    if (argc == 2 && strcmp(argv[1], "devices") == 0) return be_devices();
    return 64;
}
