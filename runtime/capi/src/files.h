/* Small files outside of bundles: lists of keys, policies, the floor of security versions. */
#ifndef TUSFM_FILES_H
#define TUSFM_FILES_H

#include "status.h"

enum file_found { FILE_READ, FILE_MISSING, FILE_BROKEN };

/* Reads a whole file of at most `limit` bytes; the caller frees *data, which ends with a 0 that is not counted. */
enum file_found file_read_all(const char *path, size_t limit, char **data, size_t *count);

/* FOLDER/NAME in memory of the caller's, or NULL. */
char *file_path(const char *folder, const char *name);

#endif
