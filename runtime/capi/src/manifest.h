/* manifest.json: what a bundle says about itself, read as bundle/manifest.py reads it. */
#ifndef TUSFM_MANIFEST_H
#define TUSFM_MANIFEST_H

#include "spec.h"

enum { SCHEMA_VERSION = 2, MAX_FILES = 4096 };
#define MAX_BUNDLE_BYTES ((int64_t)1 << 30)
#define MAX_MANIFEST_BYTES ((int64_t)16 << 20)
#define MANIFEST_NAME "manifest.json"
#define SIGNATURE_NAME "model.sig" /* the one file that a bundle may hold and its manifest does not list */
#define GOLDEN_FRAMES "golden/frames.safetensors"
#define GOLDEN_REFERENCE "golden/reference.safetensors"
#define GOLDEN_SECTOR "golden/reference-sector.safetensors"
#define DRIFT_FILE "drift/statistic.safetensors"

typedef struct file_entry {
    const char *path, *sha256;
    int64_t size;
    uint8_t *data; /* filled in by the reader of the bundle, which owns it */
} file_entry;

typedef struct artefact {
    char name[256]; /* target-precision */
    const char *target, *engine, *precision, *rest_precision, *golden;
    const char *sector; /* NULL: it looks at all patches */
    const json_t *files, *requirements, *gate, *tolerance; /* gate NULL: none */
    int verified, gated;
} artefact;

typedef struct manifest {
    json_t *root;
    model_spec spec;
    artefact *artefacts;
    size_t artefact_count;
    file_entry *files; /* sorted by path */
    size_t file_count;
    char sha256[65];
} manifest;

/* Parses the file's bytes. TUSFM_TAMPERED: they are not what was published; TUSFM_BUNDLE: no manifest of this version.
 * On failure the manifest needs no freeing. */
tusfm_status *manifest_parse(const uint8_t *raw, size_t count, manifest *m);
void manifest_free(manifest *m);

file_entry *manifest_file(const manifest *m, const char *path); /* or NULL */

/* Whether it passed a gate, and what has still to complete it ("" where nothing has). */
int artefact_trusted(const artefact *a);
const char *artefact_pending(const artefact *a);

/* A plain name as targets, engines and parts of paths have them. */
int is_component(const char *name, size_t length);

#endif
