#include "run/abort_words.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire/agent.h"
#include "wire/exit.h"

/* The one global: a signal handler is given nothing else. */
static struct {
    _Atomic bool armed, spoken;
    uint32_t rank;
    uint64_t epoch;
    const hs_agent_link *link;
    const volatile int64_t *step;
} own;

void hs_abort_words_arm(uint32_t rank, uint64_t epoch, const hs_agent_link *link,
                        const volatile int64_t *step) {
    own.rank = rank;
    own.epoch = epoch;
    own.link = link;
    own.step = step;
    atomic_store(&own.armed, true);
}

void hs_abort_words_disarm(void) {
    atomic_store(&own.armed, false);
}

typedef struct buffer {
    char at[1024];
    size_t used;
} buffer;

static void put(buffer *b, const char *text) {
    for (; *text && b->used + 1 < sizeof b->at; text++) b->at[b->used++] = *text;
}

/* Inside a JSON string: what would end it, or is no character, becomes a blank or a quote mark. */
static void put_plain(buffer *b, const char *text) {
    for (; *text && b->used + 1 < sizeof b->at; text++)
        b->at[b->used++] = *text == '"' || *text == '\\' ? '\'' : (*text >= ' ' ? *text : ' ');
}

static void put_number(buffer *b, uint64_t n) {
    char digits[24];
    size_t i = sizeof digits - 1;
    digits[i] = '\0';
    do digits[--i] = (char)('0' + n % 10);
    while (n /= 10);
    put(b, digits + i);
}

/* The words as JSON; `quote` is what stands for a quote mark. */
static void put_words(buffer *b, const char *quote) {
    const char *said = hs_assert_text();
    const int64_t step = *own.step;
    const char *const parts[] = {"{", "code", ":70,", "status", ":", "BUG", ",", "why", ":"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const bool name = parts[i][0] != '{' && parts[i][0] != ':' && parts[i][0] != ',';
        if (name) put(b, quote);
        put(b, parts[i]);
        if (name) put(b, quote);
    }
    put(b, quote);
    put_plain(b, said[0] ? said : "the process aborted; its log may say why");
    put(b, quote);
    put(b, ",");
    put(b, quote);
    put(b, "step");
    put(b, quote);
    put(b, ":");
    put_number(b, step > 0 ? (uint64_t)step : 0);
    put(b, "}");
}

void hs_abort_words_leave(int signal_number) {
    (void)signal_number;
    if (!atomic_load(&own.armed) || atomic_exchange(&own.spoken, true)) _exit(HS_EXIT_BUG);
    buffer words = {.used = 0}, line = {.used = 0};
    put_words(&words, "\"");
    put(&line, "{\"level\":\"error\",\"event\":\"last words\",\"epoch\":");
    put_number(&line, own.epoch);
    put(&line, ",\"rank\":");
    put_number(&line, own.rank);
    put(&line, ",\"code\":70,\"words\":\"");
    put_words(&line, "\\\"");
    put(&line, "\"}\n");
    (void)!write(STDERR_FILENO, line.at, line.used);
    const int fd = own.link ? hs_agent_link_socket(own.link) : -1;
    if (fd >= 0) {
        struct {
            hs_msg head;
            char words[sizeof words.at];
        } message = {.head = {.magic = HS_MSG_MAGIC,
                              .type = HS_MSG_WORDS,
                              .rank = (int32_t)own.rank,
                              .bytes = (uint32_t)words.used,
                              .epoch = own.epoch}};
        memcpy(message.words, words.at, words.used);
        (void)send(fd, &message, sizeof message.head + words.used, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    _exit(HS_EXIT_BUG);
}
