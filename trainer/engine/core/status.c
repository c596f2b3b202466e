#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

const char *hs_status_text(hs_status status) {
    switch (status) {
    case HS_OK:
        return "done";
#define X(number, NAME, code, text)                                                                \
    case HS_E_##NAME:                                                                              \
        return text;
        HS_STATUSES(X)
#undef X
    default:
        return "a status that is not in the list";
    }
}

const char *hs_status_name(hs_status status) {
    switch (status) {
    case HS_OK:
        return "OK";
#define X(number, NAME, code, text)                                                                \
    case HS_E_##NAME:                                                                              \
        return #NAME;
        HS_STATUSES(X)
#undef X
    default:
        return "UNKNOWN";
    }
}

int hs_status_exit(hs_status status) {
    switch (status) {
    case HS_OK:
        return 0;
#define X(number, NAME, code, text)                                                                \
    case HS_E_##NAME:                                                                              \
        return code;
        HS_STATUSES(X)
#undef X
    default:
        return 70;
    }
}

hs_status hs_fail(hs_why *why, hs_status status, const char *format, ...) {
    if (why && !why->text[0]) {
        va_list args;
        va_start(args, format);
        (void)vsnprintf(why->text, sizeof why->text, format, args);
        va_end(args);
    }
    return status;
}

/* Global, because a process that fails an assertion has no other place that its handler can find.
 */
static char assert_text[512];

const char *hs_assert_text(void) {
    return assert_text;
}

void hs_assert_failed(const char *expression, const char *file, int line, const char *function) {
    (void)snprintf(assert_text, sizeof assert_text, "%s:%d: %s: this should hold and does not: %s",
                   file, line, function, expression);
    (void)fprintf(stderr, "%s\n", assert_text);
    (void)fflush(stderr);
    abort();
}
