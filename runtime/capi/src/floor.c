#define _POSIX_C_SOURCE 200809L
#include "floor.h"

#include "canonical.h"
#include "files.h"
#include "strict_json.h"
#include "want.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)

static tusfm_status *file_floors(const tusfm_trust_options *options, json_t **floors) {
    (void)options, (void)floors;
    return status_new(TUSFM_UNSUPPORTED, "on Windows the floor is kept by the program: set floor_read and floor_raise");
}
static tusfm_status *keep_floors(const tusfm_trust_options *options, const json_t *floors) {
    return file_floors(options, (json_t **)(void *)&floors);
}

#else

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FLOOR_BYTES = 1 << 20, LONGEST = 1024 };

/* The file, and the folder in which it lies. */
static tusfm_status *place_of(const tusfm_trust_options *options, char file[LONGEST], char folder[LONGEST]) {
    const char *cache = getenv("TINYUSFM_EDGE_CACHE"), *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int used;
    if (options->floor_file)
        used = snprintf(file, LONGEST, "%s", options->floor_file);
    else if (cache && *cache)
        used = *cache == '/' ? snprintf(file, LONGEST, "%s/trust/floor.json", cache) : -1;
    else if (base && *base == '/')
        used = snprintf(file, LONGEST, "%s/tinyusfm-edge/trust/floor.json", base);
    else
        used = home && *home == '/' ? snprintf(file, LONGEST, "%s/.cache/tinyusfm-edge/trust/floor.json", home) : -1;
    const char *slash = used > 0 && used < LONGEST ? strrchr(file, '/') : NULL;
    if (!slash)
        return status_new(TUSFM_INPUT, "there is no place for the floor of security versions: set floor_file to a path from /");
    memcpy(folder, file, (size_t)(slash - file));
    folder[slash - file] = 0;
    return NULL;
}

static tusfm_status *not_ours(void) {
    return status_new(TUSFM_TAMPERED, "the floor of security versions is a link, or others may write to it");
}

static int is_ours(const struct stat *found) { return found->st_uid == geteuid() && !(found->st_mode & (S_IWGRP | S_IWOTH)); }

static tusfm_status *damaged(void) {
    return status_new(TUSFM_UNTRUSTED,
                      "the floor of security versions is damaged: restore it, or remove it if you accept older bundles");
}

static tusfm_status *read_text(const char *file, char **text, size_t *count) {
    struct stat found;
    int handle = open(file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (handle < 0 && errno == ENOENT) return NULL;
    if (handle < 0 && errno == ELOOP) return not_ours();
    if (handle < 0 || fstat(handle, &found)) {
        if (handle >= 0) close(handle);
        return status_new(TUSFM_UNTRUSTED, "the floor of security versions cannot be read");
    }
    int ours = S_ISREG(found.st_mode) && found.st_nlink == 1 && is_ours(&found);
    *text = ours ? malloc(MAX_FLOOR_BYTES + 1) : NULL;
    ssize_t got = *text ? read(handle, *text, MAX_FLOOR_BYTES + 1) : 0;
    close(handle);
    if (!ours) return not_ours();
    if (!*text) return no_memory();
    if (got < 0 || got > MAX_FLOOR_BYTES) return damaged();
    *count = (size_t)got;
    return NULL;
}

/* Model -> version, the caller's own; an empty one where there is no file yet. */
static tusfm_status *file_floors(const tusfm_trust_options *options, json_t **floors) {
    char file[LONGEST], folder[LONGEST], *text = NULL;
    const char *name;
    size_t count = 0;
    json_t *value;
    TRY(place_of(options, file, folder));
    tusfm_status *failed = read_text(file, &text, &count);
    json_t *root = !failed && text ? strict_json(text, count) : NULL;
    const json_t *version = json_object_get(root, "version");
    int there = text != NULL;
    free(text);
    if (failed) return failed;
    *floors = there ? json_incref(json_object_get(root, "floors")) : json_object();
    int good = json_is_object(*floors) && (!there || (json_is_integer(version) && json_integer_value(version) == 1));
    json_decref(root);
    json_object_foreach(*floors, name, value) good = good && json_is_integer(value) && json_integer_value(value) >= 0;
    if (good) return NULL;
    json_decref(*floors);
    return there ? damaged() : no_memory();
}

static int make_folder(const char *path) {
    char part[LONGEST];
    struct stat found;
    for (size_t i = 1; i <= strlen(path); i++) {
        if (path[i] != '/' && path[i]) continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0700) && errno != EEXIST) return 0;
    }
    return lstat(path, &found) == 0 && S_ISDIR(found.st_mode) && is_ours(&found);
}

/* Whole or not at all: another name first, forced onto the disk, then renamed. */
static int write_file(const char *file, const char *folder, const char *bytes, size_t count) {
    char other[LONGEST + 40];
    snprintf(other, sizeof other, "%s.%ld.tmp", file, (long)getpid());
    int handle = open(other, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600), done = 0;
    if (handle < 0) return 0;
    done = write(handle, bytes, count) == (ssize_t)count && fsync(handle) == 0;
    done = close(handle) == 0 && done && rename(other, file) == 0;
    if (!done) (void)unlink(other);
    int place = done ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (place >= 0) (void)fsync(place), close(place);
    return done;
}

static tusfm_status *keep_floors(const tusfm_trust_options *options, const json_t *floors) {
    char file[LONGEST], folder[LONGEST];
    text written = {0};
    TRY(place_of(options, file, folder));
    json_t *root = json_pack("{s:i,s:O}", "version", 1, "floors", floors);
    tusfm_status *failed = root ? canonical_write(&written, root, 0, NULL) : no_memory();
    int done = !failed && make_folder(folder) && write_file(file, folder, written.bytes, written.count);
    text_free(&written);
    json_decref(root);
    if (failed || done) return failed;
    return status_new(TUSFM_OUTPUT, "the floor of security versions cannot be kept: its folder must be the user's own");
}

#endif

tusfm_status *floor_read(const tusfm_trust_options *options, const char *model, int64_t *version) {
    json_t *floors = NULL;
    *version = 0;
    if (options->floor_read) {
        *version = options->floor_read(options->floor_user, model);
        return *version < 0 ? status_new(TUSFM_UNTRUSTED, "the device cannot tell its floor of security versions") : NULL;
    }
    TRY(file_floors(options, &floors));
    *version = want_integer(floors, model);
    json_decref(floors);
    return NULL;
}

tusfm_status *floor_raise(const tusfm_trust_options *options, const char *model, int64_t version) {
    json_t *floors = NULL;
    if (options->floor_raise) {
        if (options->floor_raise(options->floor_user, model, version) == 0) return NULL;
        return status_new(TUSFM_OUTPUT, "the device cannot keep its floor of security versions");
    }
    TRY(file_floors(options, &floors));
    tusfm_status *failed = NULL;
    if (version > want_integer(floors, model))
        failed = json_object_set_new(floors, model, json_integer(version)) ? no_memory() : keep_floors(options, floors);
    json_decref(floors);
    return failed;
}
