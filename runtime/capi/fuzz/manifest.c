/* Fuzzes the reader of manifests. The first byte says whether the rest is read as it is, or written canonically and with
 * its own hash set right first, so that what lies behind the hash is reached too. */
#include "../src/canonical.h"
#include "../src/manifest.h"
#include "../src/sha256.h"

#include <stdlib.h>
#include <string.h>

static void look_at(const uint8_t *data, size_t size) {
    manifest m;
    tusfm_status *failed = manifest_parse(data, size, &m);
    if (failed) {
        if (strchr(tusfm_status_text(failed), '\n') || tusfm_status_code(failed) == TUSFM_OK) abort();
        tusfm_status_free(failed);
        return;
    }
    for (size_t i = 0; i < m.file_count; i++)
        if (manifest_file(&m, m.files[i].path) != &m.files[i] || m.files[i].path[0] == '/' || strstr(m.files[i].path, "..")) abort();
    for (size_t i = 0; i < m.artefact_count; i++)
        if (!manifest_file(&m, m.artefacts[i].golden)) abort();
    manifest_free(&m);
}

static void repaired(const uint8_t *data, size_t size) {
    json_t *root = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
    text compact = {0}, whole = {0};
    char hash[65];
    tusfm_status *failed = NULL;
    if (json_is_object(root)) failed = canonical_write(&compact, root, 0, "manifest_sha256");
    if (json_is_object(root) && !failed) {
        sha256_hex((const uint8_t *)compact.bytes, compact.count, hash);
        json_object_set_new(root, "manifest_sha256", json_string(hash));
        failed = canonical_write(&whole, root, 1, NULL);
        if (!failed) failed = text_add(&whole, "\n", 1);
        if (!failed) look_at((const uint8_t *)whole.bytes, whole.count);
    }
    tusfm_status_free(failed);
    text_free(&compact);
    text_free(&whole);
    json_decref(root);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (data[0] & 1) repaired(data + 1, size - 1);
    else look_at(data + 1, size - 1);
    return 0;
}
