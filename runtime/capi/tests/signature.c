/* Checks a signature file with a public key:  signature model.sig KEY.pem
 * Prints "NAME DIGEST" for every file that was signed, or says what was wrong and ends with 1. */
#include "envelope.h"
#include "files.h"
#include "want.h"

#include <stdio.h>
#include <stdlib.h>

static int finish(tusfm_status *failed) {
    if (failed) fprintf(stderr, "%d %s\n", tusfm_status_code(failed), tusfm_status_text(failed));
    int code = failed != NULL;
    tusfm_status_free(failed);
    return code;
}

static tusfm_status *check(const char *raw, size_t count, const char *pem, size_t pem_count, statement *s) {
    envelope e;
    public_key key;
    TRY(envelope_read((const uint8_t *)raw, count, &e));
    tusfm_status *failed = public_key_read(pem, pem_count, &key);
    if (!failed) failed = envelope_check(&e, &key);
    if (!failed) failed = statement_read(&e, s);
    envelope_free(&e);
    return failed;
}

int main(int count, char **words) {
    char *raw = NULL, *pem = NULL;
    size_t raw_count = 0, pem_count = 0;
    statement s = {0};
    if (count < 3 || file_read_all(words[1], 16 << 20, &raw, &raw_count) != FILE_READ ||
        file_read_all(words[2], 1 << 20, &pem, &pem_count) != FILE_READ)
        return 2;
    int code = finish(check(raw, raw_count, pem, pem_count, &s));
    for (size_t i = 0; !code && i < json_array_size(s.resources); i++) {
        const json_t *item = json_array_get(s.resources, i);
        printf("%s %s\n", want_string(item, "name"), want_string(item, "digest"));
    }
    statement_free(&s);
    free(raw);
    free(pem);
    return code;
}
