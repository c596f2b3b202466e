#include "core/text.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "core/status.h"

hs_text hs_text_over(char *buffer, size_t size) {
    HS_ASSERT(size > 0);
    buffer[0] = 0;
    return (hs_text){.at = buffer, .size = size, .used = 0, .over = false};
}

void hs_text_printf(hs_text *text, const char *format, ...) {
    const size_t left = text->size - text->used;
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(text->at + text->used, left, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= left) {
        text->over = true;
        text->used = n < 0 ? text->used : text->size - 1;
        text->at[text->used] = 0;
        return;
    }
    text->used += (size_t)n;
}

static void put(hs_text *text, const char *bytes, size_t n) {
    if (text->size - text->used <= n) {
        text->over = true;
        return;
    }
    memcpy(text->at + text->used, bytes, n);
    text->used += n;
    text->at[text->used] = 0;
}

/* Length of the well-formed UTF-8 sequence at s (2..4), or 0. Surrogates and overlong forms are not
 * well-formed. */
static size_t utf8_length(const unsigned char *s) {
    const unsigned c = s[0];
    const size_t n = c >= 0xC2 && c < 0xE0   ? 2
                     : c >= 0xE0 && c < 0xF0 ? 3
                     : c >= 0xF0 && c < 0xF5 ? 4
                                             : 0;
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0; /* also ends at the NUL */
    }
    if ((c == 0xE0 && s[1] < 0xA0) || (c == 0xED && s[1] > 0x9F) || (c == 0xF0 && s[1] < 0x90) ||
        (c == 0xF4 && s[1] > 0x8F)) {
        return 0;
    }
    return n;
}

void hs_text_json_string(hs_text *text, const char *value) {
    put(text, "\"", 1);
    for (const unsigned char *s = (const unsigned char *)value; *s;) {
        const size_t n = utf8_length(s);
        if (n) {
            put(text, (const char *)s, n);
            s += n;
        } else if (*s == '"' || *s == '\\') {
            put(text, (const char[]){'\\', (char)*s++}, 2);
        } else if (*s >= 0x20 && *s < 0x7F) {
            put(text, (const char *)s++, 1);
        } else {
            hs_text_printf(text, "\\u%04x", (unsigned)*s++);
        }
    }
    put(text, "\"", 1);
}

void hs_text_json_real(hs_text *text, double value) {
    if (value - value != 0.0) {
        hs_text_printf(text, "null");
    } else {
        hs_text_printf(text, "%.17g", value);
    }
}
