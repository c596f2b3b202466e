#include "core/files.h"

#include <errno.h>
#include <string.h>
#include <sys/resource.h>

void hs_files_allow(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
}

hs_status hs_files_failed(hs_why *why, const char *what, int code) {
    struct rlimit limit = {.rlim_cur = 0};
    (void)getrlimit(RLIMIT_NOFILE, &limit);
    if (code == EMFILE || code == EINVAL)
        return hs_fail(why, HS_E_CONFIG,
                       "%s: this process may have %llu open files, and needs more; raise the hard "
                       "limit (ulimit -Hn, a service's LimitNOFILE)",
                       what, (unsigned long long)limit.rlim_cur);
    if (code == ENFILE)
        return hs_fail(why, HS_E_LOST,
                       "%s: this machine has all the open files that it may have (fs.file-max)",
                       what);
    return hs_fail(why, HS_E_IO, "%s: %s", what, strerror(code));
}
