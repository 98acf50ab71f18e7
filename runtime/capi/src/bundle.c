#include "bundle.h"

#include "platform.h"
#include "sha256.h"

#include <stdlib.h>
#include <string.h>

enum { ATTEMPTS = 10 }; /* a bundle that is replaced while it is read is read again */

typedef struct opened {
    const bundle_source *source;
    folder *root;
} opened;

/* ---- one file ---- */

static tusfm_status *copy_file(const tusfm_file *file, int64_t size, int64_t limit, uint8_t **data, int64_t *count) {
    if (size >= 0 ? file->size != (uint64_t)size : file->size > (uint64_t)limit)
        return status_new(TUSFM_TAMPERED, "%s has %llu bytes; %lld were expected", file->path,
                          (unsigned long long)file->size, (long long)(size >= 0 ? size : limit));
    *data = malloc((size_t)file->size + 1);
    if (!*data) return no_memory();
    if (file->size) memcpy(*data, file->data, (size_t)file->size);
    *count = (int64_t)file->size;
    return NULL;
}

static tusfm_status *ask_reader(const tusfm_reader *reader, const char *path, int64_t size, int64_t limit,
                                uint8_t **data, int64_t *count) {
    int64_t there = reader->size(reader->user, path);
    if (there < 0 && strcmp(path, MANIFEST_NAME) == 0)
        return status_new(TUSFM_BUNDLE, "there is no %s, so it is no bundle", MANIFEST_NAME);
    if (there < 0) return status_new(TUSFM_TAMPERED, "the bundle lacks %s, which the manifest lists", path);
    if (size >= 0 ? there != size : there > limit)
        return status_new(TUSFM_TAMPERED, "%s has %lld bytes; %lld were expected", path, (long long)there,
                          (long long)(size >= 0 ? size : limit));
    uint8_t *content = malloc((size_t)there + 1);
    if (!content) return no_memory();
    if (reader->read(reader->user, path, content, (uint64_t)there) != 0) {
        free(content);
        return status_new(TUSFM_BUNDLE, "%s in the bundle cannot be read", path);
    }
    *data = content;
    *count = there;
    return NULL;
}

static tusfm_status *read_one(const opened *o, const char *path, int64_t size, int64_t limit, uint8_t **data,
                              int64_t *count) {
    if (o->root) return folder_read(o->root, path, size, limit, data, count);
    if (o->source->reader) return ask_reader(o->source->reader, path, size, limit, data, count);
    for (size_t i = 0; i < o->source->file_count; i++)
        if (strcmp(o->source->files[i].path, path) == 0)
            return copy_file(&o->source->files[i], size, limit, data, count);
    if (strcmp(path, MANIFEST_NAME) == 0)
        return status_new(TUSFM_BUNDLE, "there is no %s, so it is no bundle", MANIFEST_NAME);
    return status_new(TUSFM_TAMPERED, "the bundle lacks %s, which the manifest lists", path);
}

/* ---- the list of files, where there is one ---- */

typedef struct listing {
    char **paths; /* the first letter says what it is: 'f' or 'd' */
    size_t count, room;
    int has_manifest, has_signature;
} listing;

static tusfm_status *list_one(void *user, const char *path, int is_folder) {
    listing *list = user;
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        char **more = realloc(list->paths, room * sizeof *more);
        if (!more) return no_memory();
        list->paths = more;
        list->room = room;
    }
    if (list->count >= 2 * MAX_FILES)
        return status_new(TUSFM_TAMPERED, "the folder holds more than %d files", MAX_FILES);
    size_t length = strlen(path);
    char *kept = malloc(length + 2);
    if (!kept) return no_memory();
    kept[0] = is_folder ? 'd' : 'f';
    memcpy(kept + 1, path, length + 1);
    list->paths[list->count++] = kept;
    if (!is_folder && strcmp(path, MANIFEST_NAME) == 0) list->has_manifest = 1;
    if (!is_folder && strcmp(path, SIGNATURE_NAME) == 0) list->has_signature = 1;
    return NULL;
}

static void free_list(listing *list) {
    for (size_t i = 0; i < list->count; i++) free(list->paths[i]);
    free(list->paths);
}

/* Whether the manifest lists anything below a folder: files are sorted, so its neighbours are there. */
static int is_parent(const manifest *m, const char *path) {
    size_t length = strlen(path);
    for (size_t i = 0; i < m->file_count; i++)
        if (strncmp(m->files[i].path, path, length) == 0 && m->files[i].path[length] == '/') return 1;
    return 0;
}

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* Left by a file browser, see LITTER of reader.py. */
static int is_litter(const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    return strncmp(name, "._", 2) == 0 || strcmp(name, ".DS_Store") == 0 || strcmp(name, "Thumbs.db") == 0 ||
           strcmp(name, "desktop.ini") == 0;
}

static tusfm_status *compare_lists(const manifest *m, const listing *list) {
    if (list->count) qsort(list->paths, list->count, sizeof *list->paths, by_text);
    size_t files = 0;
    for (size_t i = 0; i < list->count; i++) {
        const char *path = list->paths[i] + 1;
        int is_folder = list->paths[i][0] == 'd';
        if (!is_folder && i && strcmp(list->paths[i], list->paths[i - 1]) == 0)
            return status_new(TUSFM_TAMPERED, "the bundle holds %.200s twice", path);
        if (!is_folder && strcmp(path, SIGNATURE_NAME) == 0) continue;
        if (!is_folder && is_litter(path) && !manifest_file(m, path))
            return status_new(TUSFM_TAMPERED, "unexpected file in the bundle: %.200s, left by a file browser: delete it",
                              path);
        if (is_folder ? !is_parent(m, path) : strcmp(path, MANIFEST_NAME) != 0 && !manifest_file(m, path))
            return status_new(TUSFM_TAMPERED, "the bundle holds %.200s, which the manifest does not list", path);
        files += !is_folder;
    }
    if (files != m->file_count + 1)
        return status_new(TUSFM_TAMPERED, "the bundle lacks a file that the manifest lists");
    return NULL;
}

static tusfm_status *list_all(const opened *o, listing *list) {
    if (o->root) TRY(folder_walk(o->root, list_one, list));
    for (size_t i = 0; i < o->source->file_count; i++) {
        const tusfm_file *file = &o->source->files[i];
        if (!file->path || (!file->data && file->size))
            return status_new(TUSFM_INPUT, "a file of the bundle in memory has no path or no data");
        TRY(list_one(list, file->path, 0));
    }
    if (!o->source->reader && !list->has_manifest)
        return status_new(TUSFM_BUNDLE, "the folder holds no %s, so it is no bundle", MANIFEST_NAME);
    return NULL;
}

/* ---- everything ---- */

static tusfm_status *read_all(const opened *o, manifest *m) {
    for (size_t i = 0; i < m->file_count; i++) {
        file_entry *entry = &m->files[i];
        int64_t count;
        char sha256[65];
        TRY(read_one(o, entry->path, entry->size, 0, &entry->data, &count));
        TRY(sha256_hex(entry->data, (size_t)entry->size, sha256));
        if (strcmp(sha256, entry->sha256) != 0)
            return status_new(TUSFM_TAMPERED,
                              "%s is not the file that was published: its sha256 does not match the manifest",
                              entry->path);
    }
    return NULL;
}

/* What is read before anything vouches for it. */
typedef struct unproved {
    listing list;
    uint8_t *manifest, *signature; /* signature NULL: there is none */
    int64_t manifest_count, signature_count;
} unproved;

static tusfm_status *read_signature(const opened *o, unproved *u) {
    const tusfm_reader *reader = o->source->reader;
    if (reader ? reader->size(reader->user, SIGNATURE_NAME) < 0 : !u->list.has_signature) return NULL;
    return read_one(o, SIGNATURE_NAME, -1, MAX_MANIFEST_BYTES, &u->signature, &u->signature_count);
}

static tusfm_status *prove(const opened *o, const trust_demands *trust, const unproved *u, manifest *m, int64_t *version) {
    if (!o->source->reader) TRY(compare_lists(m, &u->list));
    TRY(trust_check(trust, m, u->manifest, (size_t)u->manifest_count, u->signature, (size_t)u->signature_count, version));
    return read_all(o, m);
}

static tusfm_status *verified(const opened *o, const trust_demands *trust, manifest *m, int64_t *version) {
    unproved u = {0};
    tusfm_status *failed = list_all(o, &u.list);
    if (!failed) failed = read_one(o, MANIFEST_NAME, -1, MAX_MANIFEST_BYTES, &u.manifest, &u.manifest_count);
    if (!failed) failed = manifest_parse(u.manifest, (size_t)u.manifest_count, m);
    if (!failed) {
        failed = read_signature(o, &u);
        if (!failed) failed = prove(o, trust, &u, m, version);
        if (failed) manifest_free(m);
    }
    free(u.manifest), free(u.signature);
    free_list(&u.list);
    return failed;
}

static tusfm_status *read_bundle(const bundle_source *source, const trust_demands *trust, manifest *m, int64_t *version) {
    opened o = {.source = source};
    if (!source->folder) return verified(&o, trust, m, version);
    for (int left = ATTEMPTS; left > 0; left--) {
        TRY(folder_open(source->folder, &o.root));
        tusfm_status *failed = verified(&o, trust, m, version);
        int again = failed && left > 1 && folder_was_replaced(source->folder, o.root);
        folder_close(o.root);
        if (!again) return failed;
        tusfm_status_free(failed);
    }
    return NULL;
}

tusfm_status *bundle_open(const bundle_source *source, const trust_demands *trust, manifest *m) {
    int64_t version = -1;
    TRY(read_bundle(source, trust, m, &version));
    tusfm_status *failed = trust_accept(trust, m, version);
    if (failed) manifest_free(m);
    return failed;
}

void bundle_drop(manifest *m, const char *path) {
    file_entry *entry = manifest_file(m, path);
    if (!entry) return;
    free(entry->data);
    entry->data = NULL;
}
