/* Bounded text in a buffer of the caller's, and JSON values in it. Never allocates, never writes
 * past the end. What does not fit is cut and `over` is set; the text stays NUL-terminated. */
#ifndef HS_CORE_TEXT_H
#define HS_CORE_TEXT_H

#include <stdbool.h>
#include <stddef.h>

typedef struct hs_text {
    char *at;
    size_t size; /* of the buffer, at least 1 */
    size_t used; /* without the NUL */
    bool over;   /* something was cut */
} hs_text;

/* An empty text over buffer[size]. */
hs_text hs_text_over(char *buffer, size_t size);
__attribute__((format(printf, 2, 3))) void hs_text_printf(hs_text *text, const char *format, ...);
/* A JSON string with its quotes; bytes that are not printable ASCII or valid UTF-8 leave as \u00XX.
 */
void hs_text_json_string(hs_text *text, const char *value);
/* %.17g, or null where the value is not finite: JSON has no word for it. */
void hs_text_json_real(hs_text *text, double value);

#endif
