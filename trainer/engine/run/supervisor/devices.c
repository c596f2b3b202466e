/* What devices this node has, asked of a process of its own (run/devices.h) while an attempt is
 * prepared: PORTS waits for its line, which the agent reads. Nothing here can keep the supervisor. */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "run/spawn.h"
#include "run/supervisor/supervisor_internal.h"

enum { ANSWER_MS = 45000 /* a driver that was not loaded takes seconds a device */ };

static void say_why(hs_sup_devices *d, const char *why) {
    d->bytes =
        (size_t)snprintf(d->line, sizeof d->line,
                         "{\"devices\":[],\"why\":\"%s\",\"driver\":true,\"chosen\":null}", why);
}

static void stop_asking(const hs_sup_devices *d) {
    if (d->pid) (void)kill(d->pid, SIGKILL); /* reaped with the ranks */
}

void hs_sup_forget_devices(hs_sup_devices *d) {
    if (d->asking) {
        stop_asking(d);
        close(d->fd);
    }
    *d = (hs_sup_devices){.asking = false};
}

void hs_sup_ask_devices(hs_supervisor *s) {
    hs_sup_devices *d = &s->attempt.devices;
    hs_why why = {.text = ""};
    d->bytes = 0;
    if (hs_spawn_devices(&d->pid, &d->fd, &why) != HS_OK) {
        HS_LOG(&s->log, HS_LOG_ERROR, "no look at the devices", HS_S("why", why.text));
        say_why(d,
                "the process that looks for devices cannot start; the supervisor's log says why");
        return;
    }
    d->asking = true;
    d->deadline_ns = hs_deadline_ns(ANSWER_MS);
}

static void end(hs_supervisor *s, const char *why) {
    hs_sup_attempt *a = &s->attempt;
    a->devices.asking = false;
    close(a->devices.fd);
    while (a->devices.bytes && a->devices.line[a->devices.bytes - 1] == '\n') a->devices.bytes--;
    if (why) say_why(&a->devices, why);
    if (why) HS_LOG(&s->log, HS_LOG_WARN, "devices", HS_S("why", why));
    a->ports_unsent = a->at == HS_SUP_PREPARED;
}

void hs_sup_hear_devices(hs_supervisor *s) {
    hs_sup_devices *d = &s->attempt.devices;
    if (!d->asking) return;
    for (;;) {
        const size_t room = sizeof d->line - d->bytes;
        const ssize_t n = room ? read(d->fd, d->line + d->bytes, room) : 0;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n > 0) {
            d->bytes += (size_t)n;
            continue;
        }
        end(s, d->bytes
                   ? NULL
                   : "the process that looks for devices ended without a word, as a driver that "
                     "crashes does it; `hotstage-engine devices` on this node shows how");
        return;
    }
    if (hs_clock_ns() < d->deadline_ns) return;
    stop_asking(d);
    end(s,
        "the driver did not list its devices within 45 s; look at nvidia-smi and the kernel's log "
        "on this node, and restart it if they hang too");
}
