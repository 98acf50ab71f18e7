#include "canonical.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

tusfm_status *text_add(text *to, const char *bytes, size_t count) {
    if (to->room - to->count < count) {
        size_t room = to->room ? to->room : 4096;
        while (room - to->count < count) {
            if (room > SIZE_MAX / 2) return no_memory();
            room *= 2;
        }
        char *more = realloc(to->bytes, room);
        if (!more) return no_memory();
        to->bytes = more;
        to->room = room;
    }
    memcpy(to->bytes + to->count, bytes, count);
    to->count += count;
    return NULL;
}

void text_free(text *t) {
    free(t->bytes);
    *t = (text){0};
}

static tusfm_status *add(text *to, const char *line) { return text_add(to, line, strlen(line)); }

static tusfm_status *escape(text *to, uint32_t unit) {
    char code[8];
    snprintf(code, sizeof code, "\\u%04x", (unsigned)(unit & 0xffff));
    return add(to, code);
}

/* One character of valid UTF-8 (jansson checked it); *at moves behind it. */
static uint32_t next_character(const unsigned char *s, size_t *at) {
    unsigned char first = s[*at];
    int more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    uint32_t value = more == 0 ? first : (uint32_t)(first & (0x3f >> more));
    ++*at;
    while (more--) value = value << 6 | (s[(*at)++] & 0x3f);
    return value;
}

static tusfm_status *write_string(text *to, const char *bytes, size_t count) {
    static const char plain[] = "\"\\\n\r\t\f\b", letter[] = "\"\\nrtfb";
    const unsigned char *s = (const unsigned char *)bytes;
    TRY(add(to, "\""));
    for (size_t at = 0; at < count;) {
        size_t here = at;
        uint32_t c = next_character(s, &at);
        const char *short_form = c && c < 128 ? strchr(plain, (int)c) : NULL;
        if (short_form) {
            char pair[2] = {'\\', letter[short_form - plain]};
            TRY(text_add(to, pair, 2));
        } else if (c >= 32 && c < 127) {
            TRY(text_add(to, bytes + here, 1));
        } else if (c < 0x10000) {
            TRY(escape(to, c));
        } else {
            TRY(escape(to, 0xd800 + ((c - 0x10000) >> 10)));
            TRY(escape(to, 0xdc00 + ((c - 0x10000) & 0x3ff)));
        }
    }
    return add(to, "\"");
}

/* Adds 1 to a number of decimal digits; its exponent grows where 999 becomes 100. */
static void next_up(char *digits, int count, int *exponent) {
    int at = count - 1;
    while (at >= 0 && digits[at] == '9') digits[at--] = '0';
    if (at >= 0) {
        digits[at]++;
    } else {
        digits[0] = '1';
        ++*exponent;
    }
}

static int reads_back(const char *digits, int exponent, double value) {
    char line[48];
    snprintf(line, sizeof line, "%se%d", digits, exponent - (int)strlen(digits) + 1);
    return strtod(line, NULL) == value;
}

/* The fewest significant digits (1 .. 17) that read back as the value, and its decimal exponent. Below a power of two
 * doubles lie twice as dense, so there the nearest number of some digits may read back as a neighbour while the next one
 * up does not. */
static int shortest(double value, char digits[20], int *exponent) {
    char line[40];
    for (int count = 1; count <= 17; count++) {
        int used = 0;
        snprintf(line, sizeof line, "%.*e", count - 1, value);
        const char *c = line;
        for (; *c && *c != 'e'; c++)
            if (*c >= '0' && *c <= '9') digits[used++] = *c; /* the point is the locale's */
        digits[used] = 0;
        *exponent = *c ? atoi(c + 1) : 0;
        if (!reads_back(digits, *exponent, value)) {
            next_up(digits, used, exponent);
            if (!reads_back(digits, *exponent, value) && count < 17) continue;
        }
        while (used > 1 && digits[used - 1] == '0') used--;
        digits[used] = 0;
        return used;
    }
    return 0;
}

void canonical_real(double value, char into[32]) {
    char digits[20];
    int exponent = 0, at = 0;
    if (signbit(value)) into[at++] = '-';
    int count = shortest(fabs(value), digits, &exponent);
    if (exponent < -4 || exponent >= 16) { /* 1.5e-07 */
        into[at++] = digits[0];
        if (count > 1) into[at++] = '.';
        for (int i = 1; i < count; i++) into[at++] = digits[i];
        snprintf(into + at, 32 - (size_t)at, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
        return;
    }
    if (exponent < 0) { /* 0.0015 */
        into[at++] = '0', into[at++] = '.';
        for (int i = -1; i > exponent; i--) into[at++] = '0';
        for (int i = 0; i < count; i++) into[at++] = digits[i];
    } else { /* 150.0 */
        for (int i = 0; i <= exponent; i++) into[at++] = i < count ? digits[i] : '0';
        into[at++] = '.';
        if (count <= exponent + 1) into[at++] = '0';
        for (int i = exponent + 1; i < count; i++) into[at++] = digits[i];
    }
    into[at] = 0;
}

static tusfm_status *line_break(text *to, int pretty, int depth) {
    if (!pretty) return NULL;
    TRY(add(to, "\n"));
    for (int i = 0; i < depth; i++) TRY(add(to, " "));
    return NULL;
}

static tusfm_status *write_value(text *to, const json_t *value, int pretty, int depth, const char *leave_out);

static int by_bytes(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static tusfm_status *write_keys(text *to, const json_t *object, const char **keys, size_t count, int pretty, int depth) {
    for (size_t i = 0; i < count; i++) {
        if (i) TRY(add(to, ","));
        TRY(line_break(to, pretty, depth + 1));
        TRY(write_string(to, keys[i], strlen(keys[i])));
        TRY(add(to, pretty ? ": " : ":"));
        TRY(write_value(to, json_object_get(object, keys[i]), pretty, depth + 1, NULL));
    }
    return NULL;
}

static tusfm_status *write_object(text *to, const json_t *object, int pretty, int depth, const char *leave_out) {
    size_t size = json_object_size(object), count = 0;
    const char **keys = malloc((size ? size : 1) * sizeof *keys);
    if (!keys) return no_memory();
    const char *key;
    json_t *member;
    json_object_foreach((json_t *)object, key, member) if (!leave_out || strcmp(key, leave_out) != 0)
        keys[count++] = key;
    qsort(keys, count, sizeof *keys, by_bytes);
    tusfm_status *failed = add(to, "{");
    if (!failed) failed = write_keys(to, object, keys, count, pretty, depth);
    if (!failed && count) failed = line_break(to, pretty, depth);
    free(keys);
    return failed ? failed : add(to, "}");
}

static tusfm_status *write_array(text *to, const json_t *array, int pretty, int depth) {
    size_t count = json_array_size(array);
    TRY(add(to, "["));
    for (size_t i = 0; i < count; i++) {
        if (i) TRY(add(to, ","));
        TRY(line_break(to, pretty, depth + 1));
        TRY(write_value(to, json_array_get(array, i), pretty, depth + 1, NULL));
    }
    if (count) TRY(line_break(to, pretty, depth));
    return add(to, "]");
}

static tusfm_status *write_value(text *to, const json_t *value, int pretty, int depth, const char *leave_out) {
    char number[32];
    switch (json_typeof(value)) {
    case JSON_OBJECT: return write_object(to, value, pretty, depth, leave_out);
    case JSON_ARRAY: return write_array(to, value, pretty, depth);
    case JSON_STRING: return write_string(to, json_string_value(value), json_string_length(value));
    case JSON_INTEGER:
        snprintf(number, sizeof number, "%lld", (long long)json_integer_value(value));
        return add(to, number);
    case JSON_REAL: canonical_real(json_real_value(value), number); return add(to, number);
    case JSON_TRUE: return add(to, "true");
    case JSON_FALSE: return add(to, "false");
    case JSON_NULL: break;
    }
    return add(to, "null");
}

tusfm_status *canonical_write(text *to, const json_t *value, int pretty, const char *leave_out) {
    TRY(write_value(to, value, pretty, 0, leave_out));
    return pretty ? add(to, "\n") : NULL;
}
