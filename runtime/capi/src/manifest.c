#include "manifest.h"

#include "canonical.h"
#include "sha256.h"
#include "want.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int is_component(const char *name, size_t length) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_";
    if (length < 1 || length > 120 || !strchr(letters, name[0])) return 0;
    for (size_t i = 1; i < length; i++)
        if (!name[i] || (!strchr(letters, name[i]) && name[i] != '.' && name[i] != '-')) return 0;
    return name[0] != 0;
}

static int is_sha256(const char *hex) {
    return hex && strlen(hex) == 64 && strspn(hex, "0123456789abcdef") == 64;
}

/* ---- the bytes ---- */

static tusfm_status *parse_json(const uint8_t *raw, size_t count, json_t **root) {
    json_error_t where;
    for (size_t i = 0; i < count; i++)
        if (raw[i] >= 128)
            return status_new(TUSFM_TAMPERED, "manifest.json cannot be parsed: byte %zu is not ASCII", i);
    *root = json_loadb((const char *)raw, count, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &where);
    if (*root) return NULL;
    if (json_error_code(&where) == json_error_out_of_memory) return no_memory();
    return status_new(TUSFM_TAMPERED, "manifest.json cannot be parsed: line %d: %.160s", where.line, where.text);
}

/* The command that makes an older bundle again, as far as its manifest tells; only plain names are repeated. */
static void export_line(const json_t *root, char *line, size_t size) {
    const char *name = want_string(json_object_get(root, "spec"), "name");
    const json_t *artefacts = json_object_get(root, "artefacts");
    char targets[200] = "", flags[200] = "";
    for (size_t i = 0; i < json_array_size(artefacts) && i < 16; i++) {
        const json_t *entry = json_array_get(artefacts, i);
        const char *target = want_string(entry, "target"), *precision = want_string(entry, "precision");
        char flag[132];
        if (target && is_component(target, strlen(target)) && !strstr(targets, target) &&
            strlen(targets) + strlen(target) + 2 < sizeof targets) {
            if (*targets) strcat(targets, ",");
            strcat(targets, target);
        }
        if (!precision || !is_component(precision, strlen(precision))) continue;
        snprintf(flag, sizeof flag, " --%s", precision);
        if (!strstr(flags, flag) && strlen(flags) + strlen(flag) + 1 < sizeof flags) strcat(flags, flag);
    }
    snprintf(line, size, "tinyusfm-edge export %s --target %s%s",
             name && is_component(name, strlen(name)) ? name : "WEIGHTS", *targets ? targets : "openvino", flags);
}

static tusfm_status *check_schema(const json_t *root) {
    const json_t *schema = json_object_get(root, "schema"); /* NULL where root is no object */
    if (!json_is_integer(schema))
        return status_new(TUSFM_BUNDLE, "manifest.json is not a bundle's manifest: it has no schema version");
    json_int_t version = json_integer_value(schema);
    if (version == SCHEMA_VERSION) return NULL;
    char line[500];
    export_line(root, line, sizeof line);
    return status_new(TUSFM_BUNDLE, "the bundle has schema version %lld, this library reads version %d: %s%s",
                      (long long)version, SCHEMA_VERSION,
                      version > SCHEMA_VERSION ? "take a newer one" : "export the bundle again: ",
                      version > SCHEMA_VERSION ? "" : line);
}

static tusfm_status *check_bytes(const json_t *root, const uint8_t *raw, size_t count) {
    text again = {0};
    tusfm_status *failed = canonical_write(&again, root, 1, NULL);
    int same = !failed && again.count == count && memcmp(again.bytes, raw, count) == 0;
    text_free(&again);
    if (failed) return failed;
    return same ? NULL : status_new(TUSFM_TAMPERED, "manifest.json is not byte for byte as it was written");
}

static tusfm_status *check_own_hash(const json_t *root, char sha256[65]) {
    text compact = {0};
    tusfm_status *failed = canonical_write(&compact, root, 0, "manifest_sha256");
    if (!failed) failed = sha256_hex(compact.bytes, compact.count, sha256);
    text_free(&compact);
    if (failed) return failed;
    const char *said = want_string(root, "manifest_sha256");
    if (said && strcmp(said, sha256) == 0) return NULL;
    return status_new(TUSFM_TAMPERED, "manifest.json is not the one that was published: its own hash does not match");
}

/* ---- files ---- */

static tusfm_status *parse_entry(const char *path, const json_t *data, file_entry *entry) {
    static const wanted keys[] = {{"sha256", "s"}, {"size_bytes", "i"}};
    TRY(want_object(data, keys, 2, "the entry of a file"));
    entry->path = path;
    entry->sha256 = want_string(data, "sha256");
    entry->size = want_integer(data, "size_bytes");
    if (!is_sha256(entry->sha256)) return status_new(TUSFM_BUNDLE, "a file's sha256 is not 64 small hex digits");
    if (entry->size < 0 || entry->size > MAX_BUNDLE_BYTES)
        return status_new(TUSFM_BUNDLE, "a file's size is out of range");
    return NULL;
}

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }

static int compare_lower(const char *a, const char *b) {
    while (*a && lower(*a) == lower(*b)) a++, b++;
    return (unsigned char)lower(*a) - (unsigned char)lower(*b);
}

static int by_lower(const void *a, const void *b) {
    return compare_lower(((const file_entry *)a)->path, ((const file_entry *)b)->path);
}

static int by_path(const void *a, const void *b) {
    return strcmp(((const file_entry *)a)->path, ((const file_entry *)b)->path);
}

static int is_path(const char *path) {
    for (;;) {
        const char *slash = strchr(path, '/');
        if (!is_component(path, slash ? (size_t)(slash - path) : strlen(path))) return 0;
        if (!slash) return 1;
        path = slash + 1;
    }
}

static tusfm_status *check_paths(manifest *m) {
    int64_t sum = 0;
    for (size_t i = 0; i < m->file_count; i++) {
        if (!is_path(m->files[i].path))
            return status_new(TUSFM_BUNDLE, "the manifest lists a path that is not plain and inside the bundle");
        if (compare_lower(m->files[i].path, MANIFEST_NAME) == 0)
            return status_new(TUSFM_BUNDLE, "the manifest lists itself");
        sum += m->files[i].size;
    }
    if (sum > MAX_BUNDLE_BYTES) return status_new(TUSFM_BUNDLE, "the files in the manifest are too large together");
    qsort(m->files, m->file_count, sizeof *m->files, by_lower);
    for (size_t i = 1; i < m->file_count; i++)
        if (by_lower(&m->files[i - 1], &m->files[i]) == 0)
            return status_new(TUSFM_BUNDLE, "the manifest lists paths that differ in capitals only");
    qsort(m->files, m->file_count, sizeof *m->files, by_path);
    return NULL;
}

static tusfm_status *parse_files(const json_t *data, manifest *m) {
    size_t count = json_object_size(data);
    if (count > MAX_FILES) return status_new(TUSFM_BUNDLE, "the manifest lists %zu files; %d is the most", count, MAX_FILES);
    m->files = calloc(count ? count : 1, sizeof *m->files);
    if (!m->files) return no_memory();
    const char *path;
    json_t *entry;
    json_object_foreach((json_t *)data, path, entry) {
        TRY(parse_entry(path, entry, &m->files[m->file_count]));
        m->file_count++;
    }
    return check_paths(m);
}

file_entry *manifest_file(const manifest *m, const char *path) {
    file_entry asked = {.path = path};
    return m->file_count ? bsearch(&asked, m->files, m->file_count, sizeof *m->files, by_path) : NULL;
}

/* ---- artefacts ---- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static tusfm_status *check_artefact_files(const artefact *a, const manifest *m) {
    const char *path, *other;
    json_t *data, *unused;
    if (json_object_size(a->files) == 0) return status_new(TUSFM_BUNDLE, "artefact %s has no files", a->name);
    if (json_object_size(a->files) > MAX_FILES) return status_new(TUSFM_BUNDLE, "artefact %s has too many files", a->name);
    json_object_foreach((json_t *)a->files, path, data) {
        file_entry entry = {0}, *listed = manifest_file(m, path);
        TRY(parse_entry(path, data, &entry));
        if (!listed || listed->size != entry.size || strcmp(listed->sha256, entry.sha256) != 0)
            return status_new(TUSFM_BUNDLE, "artefact %s and the file list disagree about a file", a->name);
        json_object_foreach((json_t *)a->files, other, unused) if (other != path &&
                                                                  strcmp(base_name(other), base_name(path)) == 0)
            return status_new(TUSFM_BUNDLE, "artefact %s has two files of the same name", a->name);
    }
    return NULL;
}

/* What the start-up check may allow at most, so that no manifest switches it off (manifest.py TOLERANCE_CEILINGS). */
static tusfm_status *check_tolerance(const artefact *a) {
    static const struct {
        const char *name;
        double most;
    } ceilings[] = {{"logit_abs", 1000.0}, {"differing_pixels", 0.05}, {"hc_mm", 5.0}};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)a->tolerance, key, value) {
        size_t i = 0;
        while (i < sizeof ceilings / sizeof *ceilings && strcmp(key, ceilings[i].name) != 0) i++;
        if (i == sizeof ceilings / sizeof *ceilings)
            return status_new(TUSFM_BUNDLE, "artefact %s: tolerance %.40s is not known", a->name, key);
        double number = json_is_number(value) ? json_number_value(value) : -1.0;
        if (!(number >= 0 && number <= ceilings[i].most))
            return status_new(TUSFM_BUNDLE, "artefact %s: tolerance %s is not from 0 to %g", a->name, key,
                              ceilings[i].most);
    }
    return NULL;
}

static tusfm_status *parse_artefact(const json_t *data, artefact *a) {
    static const wanted keys[] = {{"target", "s"}, {"engine", "s"},       {"precision", "s"}, {"rest_precision", "s"},
                                  {"form", "s"},   {"files", "o"},        {"requirements", "o"}, {"gate", "o0"},
                                  {"state", "s"},  {"gated", "b"},        {"golden", "s"},    {"tolerance", "o"}};
    TRY(want_object(data, keys, sizeof keys / sizeof *keys, "an artefact"));
    a->target = want_string(data, "target"), a->engine = want_string(data, "engine");
    a->precision = want_string(data, "precision"), a->rest_precision = want_string(data, "rest_precision");
    const char *names[] = {a->target, a->engine, a->precision};
    for (int i = 0; i < 3; i++)
        if (!is_component(names[i], strlen(names[i])))
            return status_new(TUSFM_BUNDLE, "an artefact's %s is not a plain name", keys[i].key);
    const json_t *sector = json_object_get(json_object_get(data, "requirements"), "sector");
    a->sector = json_string_value(sector);
    snprintf(a->name, sizeof a->name, "%s-%s%s", a->target, a->precision, a->sector ? "-sector" : "");
    if (sector && (!a->sector || !*a->sector))
        return status_new(TUSFM_BUNDLE, "artefact %s: its sector is not a name", a->name);
    const char *rest = a->rest_precision, *state = want_string(data, "state");
    if (strcmp(rest, "f32") != 0 && strcmp(rest, "f16") != 0 && strcmp(rest, "bf16") != 0)
        return status_new(TUSFM_BUNDLE, "artefact %s: rest precision is not known", a->name);
    a->verified = strcmp(state, "verified") == 0;
    if (!a->verified && strcmp(state, "unverified") != 0)
        return status_new(TUSFM_BUNDLE, "artefact %s: state is not known", a->name);
    a->gated = want_true(data, "gated");
    a->golden = want_string(data, "golden");
    a->files = json_object_get(data, "files"), a->requirements = json_object_get(data, "requirements");
    a->gate = json_object_get(data, "gate"), a->tolerance = json_object_get(data, "tolerance");
    if (json_is_null(a->gate)) a->gate = NULL;
    return check_tolerance(a);
}

static tusfm_status *parse_artefacts(const json_t *data, manifest *m) {
    size_t count = json_array_size(data);
    if (!count) return status_new(TUSFM_BUNDLE, "the manifest names no artefact");
    if (count > MAX_FILES) return status_new(TUSFM_BUNDLE, "the manifest names too many artefacts");
    m->artefacts = calloc(count, sizeof *m->artefacts);
    if (!m->artefacts) return no_memory();
    for (; m->artefact_count < count; m->artefact_count++) {
        artefact *a = &m->artefacts[m->artefact_count];
        TRY(parse_artefact(json_array_get(data, m->artefact_count), a));
        for (artefact *before = m->artefacts; before < a; before++)
            if (strcmp(before->name, a->name) == 0)
                return status_new(TUSFM_BUNDLE, "the manifest names artefact %s twice", a->name);
        TRY(check_artefact_files(a, m));
        if (a->sector && (!m->spec.sector || strcmp(a->sector, m->spec.sector) != 0))
            return status_new(TUSFM_BUNDLE, "artefact %s was pruned to a sector that is not the model's", a->name);
        if (a->sector && !manifest_file(m, GOLDEN_SECTOR))
            return status_new(TUSFM_BUNDLE, "the manifest does not list the reference of %s", a->name);
        if (!manifest_file(m, a->golden))
            return status_new(TUSFM_BUNDLE, "the manifest does not list the golden answers of %s", a->name);
    }
    return NULL;
}

int artefact_trusted(const artefact *a) { return a->verified && a->gated; }

const char *artefact_pending(const artefact *a) {
    const char *what = want_string(a->requirements, "pending");
    return a->gated && !a->verified && what ? what : "";
}

/* ---- the whole ---- */

static tusfm_status *check_identity(const json_t *root, const manifest *m) {
    const json_t *drift = json_object_get(root, "drift");
    int has_drift = manifest_file(m, DRIFT_FILE) != NULL;
    if (has_drift != json_is_string(drift) || (has_drift && strcmp(json_string_value(drift), DRIFT_FILE) != 0))
        return status_new(TUSFM_BUNDLE, "the manifest and the file list disagree about the drift statistic");
    const char *device = want_string(root, "device_class");
    if (device && !is_component(device, strlen(device)))
        return status_new(TUSFM_BUNDLE, "the manifest's device class is not a plain name");
    const json_t *version = json_object_get(root, "security_version");
    if (json_is_integer(version) && (json_integer_value(version) < 0 || json_integer_value(version) > INT32_MAX))
        return status_new(TUSFM_BUNDLE, "the manifest's security version is not from 0 to 2147483647");
    const char *stage;
    json_t *digest;
    json_object_foreach(json_object_get(root, "trace"), stage, digest) if (!is_component(stage, strlen(stage)) ||
                                                                           !is_sha256(json_string_value(digest)))
        return status_new(TUSFM_BUNDLE, "the manifest's trace is not plain names with sha256");
    return NULL;
}

static tusfm_status *parse(const uint8_t *raw, size_t count, manifest *m) {
    static const wanted keys[] = {
        {"schema", "i"},         {"spec", "o"},           {"artefacts", "a"},         {"weights_sha256", "s"},
        {"calibration_id", "s0"}, {"tools", "o"},         {"created_utc", "s"},       {"files", "o"},
        {"drift", "s0"},         {"device_class", "s0"},  {"security_version", "i0"}, {"trace", "o0"},
        {"manifest_sha256", "s"}};
    TRY(parse_json(raw, count, &m->root));
    TRY(check_schema(m->root));
    TRY(check_bytes(m->root, raw, count));
    TRY(check_own_hash(m->root, m->sha256));
    TRY(want_object(m->root, keys, sizeof keys / sizeof *keys, "the manifest"));
    TRY(spec_parse(json_object_get(m->root, "spec"), &m->spec));
    TRY(parse_files(json_object_get(m->root, "files"), m));
    TRY(parse_artefacts(json_object_get(m->root, "artefacts"), m));
    if (!manifest_file(m, GOLDEN_FRAMES) || !manifest_file(m, GOLDEN_REFERENCE))
        return status_new(TUSFM_BUNDLE, "the manifest does not list the golden frames and their reference");
    return check_identity(m->root, m);
}

tusfm_status *manifest_parse(const uint8_t *raw, size_t count, manifest *m) {
    memset(m, 0, sizeof *m);
    tusfm_status *failed = parse(raw, count, m);
    if (failed) manifest_free(m);
    return failed;
}

void manifest_free(manifest *m) {
    for (size_t i = 0; i < m->file_count; i++) free(m->files[i].data);
    free(m->files);
    free(m->artefacts);
    json_decref(m->root);
    memset(m, 0, sizeof *m);
}
