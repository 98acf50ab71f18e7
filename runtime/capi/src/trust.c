#define _POSIX_C_SOURCE 200809L
#include "trust.h"

#include "envelope.h"
#include "files.h"
#include "floor.h"
#include "sha256.h"
#include "strict_json.h"
#include "structs.h"
#include "want.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_LIST_BYTES = 1 << 20, MAX_KEYS = 1024, DEMANDS = 2 };

typedef struct trusted_key {
    public_key key;
    int is_release, is_development;
    int32_t expires; /* YYYYMMDD, or 0 */
} trusted_key;

/* A trust store and what is asked of it. */
typedef struct demand {
    tusfm_trust_options options; /* its texts are the caller's or the policy's */
    trusted_key *keys;
    size_t count;
    json_t *list, *policy;
} demand;

struct trust_demands {
    demand all[DEMANDS];
    size_t count;
};

/* ---- the store ---- */

static tusfm_status *bad_list(const char *why) { return status_new(TUSFM_INPUT, "the trust store's trust.json: %s", why); }

static int digits(const char *text, int count, int *value) {
    *value = 0;
    for (int i = 0; i < count; i++) {
        if (text[i] < '0' || text[i] > '9') return 0;
        *value = 10 * *value + (text[i] - '0');
    }
    return 1;
}

/* YYYY-MM-DD */
static int read_day(const char *text, int32_t *day) {
    static const int lengths[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    int year, month, date;
    if (strlen(text) != 10 || text[4] != '-' || text[7] != '-' || !digits(text, 4, &year) || !digits(text + 5, 2, &month) ||
        !digits(text + 8, 2, &date) || year < 1 || month < 1 || month > 12)
        return 0;
    int leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    if (date < 1 || date > lengths[month - 1] + (month == 2 && leap)) return 0;
    *day = (int32_t)(10000 * year + 100 * month + date);
    return 1;
}

static tusfm_status *read_roles(const json_t *roles, trusted_key *key) {
    if (!json_array_size(roles)) return bad_list("a key has no roles");
    for (size_t i = 0; i < json_array_size(roles); i++) {
        const char *role = json_string_value(json_array_get(roles, i));
        if (role && strcmp(role, "release") == 0) key->is_release = 1;
        else if (role && strcmp(role, "development") == 0) key->is_development = 1;
        else return bad_list("a key has a file beside the list, roles among release, development, expires");
    }
    return NULL;
}

static tusfm_status *read_key(const char *folder, const json_t *item, trusted_key *key) {
    const char *name = want_string(item, "file");
    const json_t *expires = json_object_get(item, "expires");
    size_t known = 2 + (expires != NULL), count = 0;
    char *pem = NULL;
    if (!name || !*name || strchr(name, '/') || strchr(name, '\\') || json_object_size(item) != known)
        return bad_list("a key has a file beside the list, roles among release, development, expires");
    TRY(read_roles(json_object_get(item, "roles"), key));
    const char *day = json_string_value(expires);
    if (expires && !json_is_null(expires) && (!day || (*day && !read_day(day, &key->expires))))
        return bad_list("a key expires on a day that is not written YYYY-MM-DD");
    char *path = file_path(folder, name);
    if (!path) return no_memory();
    enum file_found found = file_read_all(path, MAX_LIST_BYTES, &pem, &count);
    free(path);
    if (found != FILE_READ) return status_new(TUSFM_INPUT, "the trust store lacks %.100s, or it cannot be read", name);
    tusfm_status *failed = public_key_read(pem, count, &key->key);
    free(pem);
    return failed;
}

static tusfm_status *read_list(demand *d) {
    const json_t *version = json_object_get(d->list, "version"), *keys = json_object_get(d->list, "keys");
    const json_t *revoked = json_object_get(d->list, "revoked");
    if (!json_is_object(d->list) || !json_is_array(keys) || (revoked && !json_is_array(revoked)))
        return bad_list("it cannot be read");
    if (!json_is_integer(version) || json_integer_value(version) != 1 ||
        json_object_size(d->list) != 2u + (revoked != NULL))
        return bad_list("it is of another version");
    size_t count = json_array_size(keys);
    if (count > MAX_KEYS) return bad_list("it lists too many keys");
    d->keys = calloc(count ? count : 1, sizeof *d->keys);
    if (!d->keys) return no_memory();
    for (; d->count < count; d->count++)
        TRY(read_key(d->options.store, json_array_get(keys, d->count), &d->keys[d->count]));
    return NULL;
}

static tusfm_status *store_open(demand *d) {
    char *text = NULL, *path;
    size_t count = 0;
    if (!d->options.store || !*d->options.store)
        return status_new(TUSFM_INPUT, "options.trust names no folder with trust.json and keys");
    path = file_path(d->options.store, "trust.json");
    if (!path) return no_memory();
    enum file_found found = file_read_all(path, MAX_LIST_BYTES, &text, &count);
    free(path);
    if (found != FILE_READ)
        return status_new(TUSFM_INPUT, "the trust store %.200s has no trust.json that can be read", d->options.store);
    d->list = strict_json(text, count);
    free(text);
    return read_list(d);
}

static int is_revoked(const demand *d, const char *hint) {
    const json_t *revoked = json_object_get(d->list, "revoked");
    for (size_t i = 0; i < json_array_size(revoked); i++) {
        const char *name = json_string_value(json_array_get(revoked, i));
        if (name && strcmp(name, hint) == 0) return 1;
    }
    return 0;
}

static int32_t today(const demand *d) {
    struct tm parts;
    time_t now = time(NULL);
    if (d->options.today) return d->options.today;
#if defined(_WIN32)
    if (localtime_s(&parts, &now)) return INT32_MAX;
#else
    if (!localtime_r(&now, &parts)) return INT32_MAX;
#endif
    return (int32_t)(10000 * (parts.tm_year + 1900) + 100 * (parts.tm_mon + 1) + parts.tm_mday);
}

static tusfm_status *find_key(const demand *d, const char *hint, const trusted_key **found) {
    const char *role = d->options.role ? d->options.role : "release";
    const trusted_key *key = NULL;
    if (is_revoked(d, hint)) return status_new(TUSFM_UNTRUSTED, "the signature's key %.16s is revoked", hint);
    for (size_t i = 0; i < d->count; i++)
        if (strcmp(d->keys[i].key.fingerprint, hint) == 0) key = &d->keys[i]; /* of two entries the last one */
    if (!key)
        return status_new(TUSFM_UNTRUSTED, "the signature's key %.16s is not in the trust store",
                          *hint ? hint : "without a name");
    if (strcmp(role, "release") == 0 ? !key->is_release : strcmp(role, "development") == 0 ? !key->is_development : 1)
        return status_new(TUSFM_UNTRUSTED, "the signature's key %.16s is not trusted for %.40s", hint, role);
    if (key->expires && today(d) > key->expires)
        return status_new(TUSFM_UNTRUSTED, "the signature's key %.16s expired on %d-%02d-%02d", hint, key->expires / 10000,
                          key->expires / 100 % 100, key->expires % 100);
    *found = key;
    return NULL;
}

/* ---- opening ---- */

static tusfm_status *read_policy(demand *d, int *there) {
    char *text = NULL;
    const char *named = getenv("TINYUSFM_EDGE_POLICY");
#if defined(_WIN32)
    if (!named || !*named) return NULL;
#endif
    char *path = file_path(named && *named ? named : "/etc/tinyusfm-edge", "policy.json");
    size_t count = 0;
    if (!path) return no_memory();
    enum file_found found = file_read_all(path, MAX_LIST_BYTES, &text, &count);
    free(path);
    if (found == FILE_MISSING) return NULL;
    if (found == FILE_READ) d->policy = strict_json(text, count);
    free(text);
    const json_t *version = json_object_get(d->policy, "version"), *device = json_object_get(d->policy, "device_class");
    const char *store = want_string(d->policy, "require_signed");
    int good = json_is_integer(version) && json_integer_value(version) == 1 && store &&
               json_object_size(d->policy) == 2u + (device != NULL) &&
               (!device || json_is_null(device) || json_is_string(device));
    if (!good)
        return status_new(TUSFM_UNTRUSTED, "the machine's policy.json is no policy: no bundle opens until it is mended");
    tusfm_trust_options_init(&d->options, sizeof d->options);
    d->options.store = store, d->options.device_class = json_string_value(device);
    *there = 1;
    return NULL;
}

static tusfm_status *open_all(const tusfm_trust_options *options, trust_demands *d) {
    int policy = 0;
    if (options) {
        d->all[d->count++].options = *options;
        TRY(store_open(&d->all[0]));
    }
    demand *last = &d->all[d->count];
    tusfm_status *failed = read_policy(last, &policy);
    d->count += (size_t)policy;
    if (!failed && policy) failed = store_open(last);
    if (failed && !policy) json_decref(last->policy), last->policy = NULL;
    return failed;
}

tusfm_status *trust_open(const tusfm_trust_options *options, trust_demands **made) {
    trust_demands *d = calloc(1, sizeof *d);
    *made = NULL;
    if (!d) return no_memory();
    tusfm_status *failed = open_all(options, d);
    if (failed || !d->count)
        trust_free(d);
    else
        *made = d;
    return failed;
}

void trust_free(trust_demands *d) {
    if (!d) return;
    for (size_t i = 0; i < DEMANDS; i++) {
        free(d->all[i].keys);
        json_decref(d->all[i].list);
        json_decref(d->all[i].policy);
    }
    free(d);
}

/* ---- a bundle ---- */

/* Whether the statement lists every file of the bundle, the manifest too, each with its hash, and nothing else. */
static tusfm_status *check_files(const statement *s, const manifest *m, const uint8_t *raw, size_t count) {
    char own[65];
    size_t found = 0;
    TRY(sha256_hex(raw, count, own));
    for (size_t i = 0; i < json_array_size(s->resources); i++) {
        const json_t *item = json_array_get(s->resources, i);
        const char *name = want_string(item, "name"), *hex = want_string(item, "digest");
        const file_entry *entry = manifest_file(m, name);
        const char *wanted = strcmp(name, MANIFEST_NAME) == 0 ? own : entry ? entry->sha256 : NULL;
        found += wanted && strcmp(wanted, hex) == 0;
    }
    if (found == m->file_count + 1 && found == json_array_size(s->resources)) return NULL;
    return status_new(TUSFM_UNTRUSTED, "the signed list of files is not this bundle's: the signature belongs to another one");
}

static tusfm_status *check_binding(const demand *d, const statement *s, const manifest *m) {
    char digest[65];
    int64_t floor = 0;
    if (!s->bundle_id)
        return status_new(TUSFM_UNTRUSTED, "the signature names no security version and no device: sign with tinyusfm-edge");
    TRY(spec_digest(&m->spec, digest));
    if (strlen(s->bundle_id) != 16 || strncmp(s->bundle_id, m->sha256, 16) != 0 || strcmp(s->spec_sha256, digest) != 0)
        return status_new(TUSFM_UNTRUSTED, "the signed statement was made for another bundle");
    const char *here = d->options.device_class;
    if (s->device_class && (!here || strcmp(s->device_class, here) != 0))
        return status_new(TUSFM_UNTRUSTED, "the bundle is signed for %.80s, and this is %.80s", s->device_class,
                          here ? here : "a device without a class");
    TRY(floor_read(&d->options, m->spec.name, &floor));
    if (s->security_version < floor)
        return status_new(TUSFM_UNTRUSTED, "the bundle's security version is %lld; this device has run %lld and takes no older one",
                          (long long)s->security_version, (long long)floor);
    return NULL;
}

static tusfm_status *check_one(const demand *d, const manifest *m, const uint8_t *raw, size_t count,
                               const uint8_t *signature, size_t signature_count, int64_t *version) {
    envelope e;
    statement s = {0};
    const trusted_key *key = NULL;
    if (!signature && !d->options.require_signed) return NULL;
    if (!signature)
        return status_new(TUSFM_UNTRUSTED, "the bundle has no " SIGNATURE_NAME ", and this device runs signed bundles only");
    TRY(envelope_read(signature, signature_count, &e));
    tusfm_status *failed = find_key(d, e.hint, &key);
    if (!failed) failed = envelope_check(&e, &key->key);
    if (!failed) failed = statement_read(&e, &s);
    if (!failed) failed = check_files(&s, m, raw, count);
    if (!failed) failed = check_binding(d, &s, m);
    if (!failed) *version = s.security_version;
    envelope_free(&e);
    statement_free(&s);
    return failed;
}

tusfm_status *trust_check(const trust_demands *d, const manifest *m, const uint8_t *raw, size_t count,
                          const uint8_t *signature, size_t signature_count, int64_t *security_version) {
    *security_version = -1;
    for (size_t i = 0; d && i < d->count; i++)
        TRY(check_one(&d->all[i], m, raw, count, signature, signature_count, security_version));
    return NULL;
}

tusfm_status *trust_accept(const trust_demands *d, const manifest *m, int64_t security_version) {
    for (size_t i = 0; d && security_version >= 0 && i < d->count; i++)
        TRY(floor_raise(&d->all[i].options, m->spec.name, security_version));
    return NULL;
}
