/* The engine's one binary. Reads the command line, calls one part, maps its status to an exit code;
 * nothing else. */
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "run/abort_words.h"
#include "run/devices.h"
#include "run/environment.h"
#include "run/infer.h"
#include "run/plan_data.h"
#include "run/rank.h"
#include "run/supervisor.h"
#include "run/wire_json.h"
#include "wire/attempt.h"
#include "wire/exit.h"

static const char usage[] =
    "hotstage-engine: runs a compiled plan\n"
    "\n"
    "  node --agent SOCKET [--with-parent PID]\n"
    "                                 supervise the ranks of a node, as the agent says; end when "
    "that parent does\n"
    "  rank --plan F --attempt F --rank R --agent SOCKET|- [--listen-fd N] [--status-fd N]\n"
    "       [--arena-fd N] [--weights F] [--dump DIR]\n"
    "                                 one rank; `-`: no agent, metrics on standard output only\n"
    "  infer --plan F --weights F [--kernel-path N] [--threads N]\n"
    "       [--device-kind N] [--device N]\n"
    "                                 i32 tokens on standard input, f32 logits on standard "
    "output;\n"
    "                                 of a plan with losses: tokens, targets; losses\n"
    "  check-plan F                   0 where the plan holds, 78 and one line where it does not\n"
    "  devices                        the CUDA devices of this machine, or why there are none: "
    "JSON\n"
    "  order --plan F --first I --count N\n"
    "                                 which sample the run reads at place I, I+1, ... one a line\n"
    "  wire                           every byte format as JSON\n"
    "  version\n"
    "\n"
    "Exit codes: 0 done, 64 usage, 65 data, 70 bug, 75 peer lost, 76 restore point damaged, 78 "
    "refused,\n"
    "85 preempted (saved), 86 stalled, 87 diverged, 88 sick machine, 143 stopped with nothing "
    "saved.\n";

/* An option `--name VALUE`; exactly one of the three targets is set. */
typedef struct option {
    const char *name;
    bool required;
    const char **text;
    uint64_t *number;
    int *descriptor;
} option;

static bool parse_number(const char *text, uint64_t most, uint64_t *value) {
    if (!text[0] || strspn(text, "0123456789") != strlen(text) || strlen(text) > 19) return false;
    *value = strtoull(text, NULL, 10);
    return *value <= most;
}

static hs_status set_option(const option *o, const char *value, hs_why *why) {
    uint64_t number = 0;
    if (o->text) {
        *o->text = value;
        return HS_OK;
    }
    if (!parse_number(value, o->number ? UINT64_MAX : 1 << 20, &number)) {
        return hs_fail(why, HS_E_USAGE, "%s takes a number, not '%s'", o->name, value);
    }
    if (o->number) *o->number = number;
    if (o->descriptor) *o->descriptor = (int)number;
    return HS_OK;
}

static hs_status parse(int argc, char **argv, const option *options, size_t count, hs_why *why) {
    bool seen[16] = {false};
    for (int i = 0; i < argc; i += 2) {
        size_t k = 0;
        while (k < count && strcmp(argv[i], options[k].name) != 0) k++;
        if (k == count) return hs_fail(why, HS_E_USAGE, "no option '%s'", argv[i]);
        if (i + 1 == argc) return hs_fail(why, HS_E_USAGE, "%s needs a value", argv[i]);
        HS_TRY(set_option(&options[k], argv[i + 1], why));
        seen[k] = true;
    }
    for (size_t k = 0; k < count; k++) {
        if (options[k].required && !seen[k]) {
            return hs_fail(why, HS_E_USAGE, "%s is missing", options[k].name);
        }
    }
    return HS_OK;
}

#define PARSE(options, why) parse(argc, argv, options, sizeof(options) / sizeof *(options), why)

static hs_status command_rank(int argc, char **argv, hs_why *why) {
    hs_rank_args args = {.listen_fd = -1, .page_fd = -1, .arena_fd = -1};
    uint64_t rank = 0;
    const option options[] = {
        {.name = "--plan", .required = true, .text = &args.plan},
        {.name = "--attempt", .required = true, .text = &args.attempt},
        {.name = "--rank", .required = true, .number = &rank},
        {.name = "--agent", .required = true, .text = &args.agent},
        {.name = "--weights", .text = &args.weights},
        {.name = "--dump", .text = &args.dump_dir},
        {.name = "--listen-fd", .descriptor = &args.listen_fd},
        {.name = "--status-fd", .descriptor = &args.page_fd},
        {.name = "--arena-fd", .descriptor = &args.arena_fd},
    };
    HS_TRY(PARSE(options, why));
    if (rank >= UINT32_MAX) return hs_fail(why, HS_E_USAGE, "no rank %" PRIu64, rank);
    hs_environment environment;
    const hs_status known = hs_environment_read(&environment, why);
    if (known != HS_OK) {
        (void)fprintf(stderr, "hotstage-engine rank: %s\n", why->text);
        return known;
    }
    args.environment = &environment;
    args.rank = (uint32_t)rank;
    if (strcmp(args.agent, "-") == 0) args.agent = NULL;
    return hs_rank_run(&args, why);
}

static hs_status command_infer(int argc, char **argv, hs_why *why) {
    const hs_log log = {.fd = STDERR_FILENO, .level = HS_LOG_INFO, .rank = -1};
    hs_infer_args args = {.log = &log};
    uint64_t path = 0, threads = 0, kind = HS_DEVICE_CPU, device = 0;
    const option options[] = {
        {.name = "--plan", .required = true, .text = &args.plan},
        {.name = "--weights", .required = true, .text = &args.weights},
        {.name = "--kernel-path", .number = &path},
        {.name = "--threads", .number = &threads},
        {.name = "--device-kind", .number = &kind},
        {.name = "--device", .number = &device},
    };
    HS_TRY(PARSE(options, why));
    args.kernel_path = path >= HS_PATH_COUNT ? HS_PATH_COUNT : (uint32_t)path;
    args.device_kind = kind > UINT32_MAX ? UINT32_MAX : (uint32_t)kind;
    args.device = device > UINT32_MAX ? UINT32_MAX : (uint32_t)device;
    args.threads = threads > 256 ? 256 : (uint32_t)threads;
    return hs_infer(&args, why);
}

static hs_status command_check(int argc, char **argv, hs_why *why) {
    if (argc != 1) return hs_fail(why, HS_E_USAGE, "check-plan takes one file");
    hs_plan plan;
    HS_TRY(hs_plan_open(argv[0], &plan, why));
    hs_plan_close(&plan);
    return HS_OK;
}

static hs_status command_order(int argc, char **argv, hs_why *why) {
    const char *path = NULL;
    uint64_t first = 0, count = 0;
    const option options[] = {
        {.name = "--plan", .required = true, .text = &path},
        {.name = "--first", .required = true, .number = &first},
        {.name = "--count", .required = true, .number = &count},
    };
    HS_TRY(PARSE(options, why));
    hs_plan plan;
    HS_TRY(hs_plan_open(path, &plan, why));
    hs_status st = HS_OK;
    const hs_order order = hs_plan_order(&plan);
    if (plan.config->data_samples == 0 || plan.config->data_block == 0 ||
        plan.config->data_window == 0) {
        st = hs_fail(why, HS_E_CONFIG, "plan %s has no data", path);
    }
    for (uint64_t i = 0; st == HS_OK && i < count; i++) {
        if (printf("%" PRIu64 "\n", hs_order_sample(&order, first + i)) < 0) {
            st = hs_fail(why, HS_E_IO, "standard output cannot be written");
        }
    }
    hs_plan_close(&plan);
    return st;
}

int main(int argc, char **argv) {
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGXFSZ, SIG_IGN); /* a limit on files is an error with a word, also for a memfd */
    (void)signal(SIGABRT, hs_abort_words_leave);
    const char *command = argc > 1 ? argv[1] : "";
    char **rest = argv + 2;
    const int left = argc > 2 ? argc - 2 : 0;
    hs_why why = {0};
    hs_status st;
    if (strcmp(command, "rank") == 0) {
        st = command_rank(left, rest, &why);
    } else if (strcmp(command, "infer") == 0) {
        st = command_infer(left, rest, &why);
    } else if (strcmp(command, "check-plan") == 0) {
        st = command_check(left, rest, &why);
    } else if (strcmp(command, "order") == 0) {
        st = command_order(left, rest, &why);
    } else if (strcmp(command, "node") == 0) {
        const char *agent = NULL;
        uint64_t parent = 0;
        const option options[] = {{.name = "--agent", .required = true, .text = &agent},
                                  {.name = "--with-parent", .number = &parent}};
        hs_environment environment;
        st = parse(left, rest, options, 2, &why);
        if (st == HS_OK) st = hs_environment_read(&environment, &why);
        if (st == HS_OK && parent != 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != (pid_t)parent) return HS_EXIT_LOST; /* it ended before the prctl */
        }
        if (st == HS_OK) return hs_supervisor_main(agent, environment.agent_away_ms);
    } else if (strcmp(command, "devices") == 0 && left == 0) {
        st = hs_devices_print(&why);
    } else if (strcmp(command, "wire") == 0 && left == 0) {
        hs_wire_print();
        st = HS_OK;
    } else if (strcmp(command, "version") == 0 && left == 0) {
        (void)printf("hotstage-engine 0.1.0, plan %u, attempt %u, built by %s\n", HS_PLAN_VERSION,
                     HS_ATTEMPT_VERSION, __VERSION__);
        st = HS_OK;
    } else if (strcmp(command, "--help") == 0 || strcmp(command, "help") == 0) {
        (void)fputs(usage, stdout);
        st = HS_OK;
    } else {
        (void)fputs(usage, stderr);
        st = HS_E_USAGE;
    }
    /* a rank has said why already, in its last words */
    if (st != HS_OK && why.text[0] && (st == HS_E_USAGE || strcmp(command, "rank") != 0)) {
        (void)fprintf(stderr, "hotstage-engine %s: %s\n", command, why.text);
    }
    if (fflush(stdout) != 0 && st == HS_OK) st = HS_E_IO;
    return hs_status_exit(st);
}
