/* Loaded before the engine (LD_PRELOAD): the file that HS_FAIL_OPEN ends with cannot be opened; errno is HS_FAIL_ERRNO. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int open(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    const char *end = getenv("HS_FAIL_OPEN"), *number = getenv("HS_FAIL_ERRNO");
    va_list rest;
    va_start(rest, flags);
    const unsigned mode = flags & O_CREAT ? va_arg(rest, unsigned) : 0;
    va_end(rest);
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    if (!end || !number || strlen(path) < strlen(end) ||
        strcmp(path + strlen(path) - strlen(end), end) != 0)
        return real(path, flags, mode);
    errno = atoi(number);
    return -1;
}
