/* A bundle whose every byte was read once and hashed; from a folder, from memory, or through the caller's reader. */
#ifndef TUSFM_BUNDLE_H
#define TUSFM_BUNDLE_H

#include "manifest.h"
#include "trust.h"

/* Where the bytes come from: exactly one of the three is not NULL. */
typedef struct bundle_source {
    const char *folder;
    const tusfm_file *files;
    size_t file_count;
    const tusfm_reader *reader;
} bundle_source;

/* TUSFM_INPUT: there is no such folder; TUSFM_TAMPERED: a file was changed, added, removed, or is a link; TUSFM_BUNDLE:
 * not a bundle, of another version, or unreadable; TUSFM_UNTRUSTED: not what `trust` (NULL: nothing) demands. On success every entry of m->files has its verified bytes. */
tusfm_status *bundle_open(const bundle_source *source, const trust_demands *trust, manifest *m);

/* Gives the bytes of a file back that nobody needs any more. */
void bundle_drop(manifest *m, const char *path);

#endif
