#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tusfm_status {
    int32_t code;
    char text[700];
};

static tusfm_status out_of_memory = {TUSFM_NO_MEMORY, "there is no memory left"};

tusfm_status *no_memory(void) { return &out_of_memory; }

tusfm_status *status_new(int32_t code, const char *format, ...) {
    tusfm_status *made = malloc(sizeof *made);
    if (!made) return no_memory();
    made->code = code;
    va_list words;
    va_start(words, format);
    vsnprintf(made->text, sizeof made->text, format, words);
    va_end(words);
    for (char *c = made->text; *c; c++)
        if (*c < ' ' || *c > '~') *c = '?'; /* one line, whatever a path or a library said */
    return made;
}

tusfm_status *status_as(tusfm_status *status, int32_t code) {
    if (status && status != &out_of_memory) status->code = code;
    return status;
}

tusfm_status *status_within(tusfm_status *status, const char *text) {
    if (!status || status == &out_of_memory) return status;
    char before[sizeof status->text];
    memcpy(before, status->text, sizeof before);
    int used = snprintf(status->text, sizeof status->text, "%s: ", text);
    if (used > 0 && (size_t)used < sizeof status->text)
        copy_line(status->text + used, sizeof status->text - (size_t)used, before);
    return status;
}

void copy_line(char *into, size_t size, const char *text) {
    size_t length = strlen(text);
    if (length >= size) length = size - 1;
    memcpy(into, text, length);
    into[length] = 0;
}

int32_t tusfm_status_code(const tusfm_status *status) { return status ? status->code : TUSFM_OK; }

const char *tusfm_status_text(const tusfm_status *status) { return status ? status->text : ""; }

void tusfm_status_free(tusfm_status *status) {
    if (status != &out_of_memory) free(status);
}

uint32_t tusfm_abi(void) { return TUSFM_ABI; }

const char *tusfm_version(void) { return TUSFM_VERSION; }
