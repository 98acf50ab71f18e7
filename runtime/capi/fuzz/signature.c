/* Fuzzes the readers of signature files, of statements and of public keys: what a stranger may hand in before anything is
 * trusted. The first byte chooses. */
#include "../src/envelope.h"

#include <stdlib.h>
#include <string.h>

static void judge(tusfm_status *failed) {
    if (failed && (strchr(tusfm_status_text(failed), '\n') || tusfm_status_code(failed) == TUSFM_OK)) abort();
    tusfm_status_free(failed);
}

static void read_file(const uint8_t *data, size_t size) {
    envelope e;
    tusfm_status *failed = envelope_read(data, size, &e);
    if (!failed) envelope_free(&e);
    judge(failed);
}

static void read_statement(const uint8_t *data, size_t size) {
    statement s;
    envelope e = {.payload = malloc(size + 1), .payload_count = size};
    if (!e.payload) return;
    memcpy(e.payload, data, size);
    tusfm_status *failed = statement_read(&e, &s);
    if (!failed) statement_free(&s);
    judge(failed);
    envelope_free(&e);
}

static void read_key(const uint8_t *data, size_t size) {
    public_key key;
    char *pem = malloc(size + 1);
    if (!pem) return;
    memcpy(pem, data, size);
    pem[size] = 0;
    judge(public_key_read(pem, size, &key));
    free(pem);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size) return 0;
    if (data[0] % 3 == 0) read_file(data + 1, size - 1);
    else if (data[0] % 3 == 1) read_statement(data + 1, size - 1);
    else read_key(data + 1, size - 1);
    return 0;
}
