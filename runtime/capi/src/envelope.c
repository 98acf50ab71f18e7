#include "envelope.h"

#include "sha256.h"
#include "strict_json.h"
#include "want.h"

#include <mbedtls/base64.h>
#include <mbedtls/pk.h>
#include <mbedtls/sha512.h>
#include <mbedtls/version.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAYLOAD_TYPE "application/vnd.in-toto+json"
#define STATEMENT_TYPE "https://in-toto.io/Statement/v1"
#define PREDICATE_TYPE "https://model_signing/signature/v1.0"
enum { MAX_SIGNATURE_BYTES = 4 << 20 };

static const char base64_letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static tusfm_status *unreadable(void) {
    return status_new(TUSFM_UNTRUSTED, "the signature file cannot be read: sign the bundle again");
}

/* ---- base64 ---- */

static int from_base64(const char *text, uint8_t **data, size_t *count) {
    size_t length = text ? strlen(text) : 1, letters = text ? strspn(text, base64_letters) : 0;
    if (length % 4 || length - letters > 2 || strspn(text + letters, "=") != length - letters) return 0;
    *data = malloc(length / 4 * 3 + 1);
    return *data && mbedtls_base64_decode(*data, length / 4 * 3 + 1, count, (const unsigned char *)text, length) == 0;
}

/* ---- the file ---- */

static int same(const char *text, const char *wanted) { return text && strcmp(text, wanted) == 0; }

static tusfm_status *read_hint(const json_t *key, char hint[65]) {
    const json_t *given = json_object_get(key, "hint");
    uint8_t *raw = NULL;
    size_t count = 0;
    hint[0] = 0;
    if (json_is_string(given)) {
        copy_line(hint, 65, json_string_value(given));
        return NULL;
    }
    const char *bytes = want_string(key, "rawBytes");
    if (given || !bytes) return unreadable();
    tusfm_status *failed = from_base64(bytes, &raw, &count) ? sha256_hex(raw, count, hint) : NULL;
    free(raw);
    return failed;
}

static tusfm_status *read_parts(const json_t *root, envelope *e) {
    const char *media = want_string(root, "mediaType");
    const json_t *material = json_object_get(root, "verificationMaterial"), *dsse = json_object_get(root, "dsseEnvelope");
    const json_t *signatures = json_object_get(dsse, "signatures");
    if (!media) return unreadable();
    if (!same(media, "application/vnd.dev.sigstore.bundle.v0.3+json") &&
        !same(media, "application/vnd.dev.sigstore.bundle+json;version=0.3"))
        return status_new(TUSFM_UNTRUSTED, "the signature file is of another type, which is not read");
    if (!json_is_object(material)) return unreadable();
    if (!json_object_get(material, "publicKey"))
        return status_new(TUSFM_UNTRUSTED, "the signature was made with a certificate: sign with a P-256 or P-384 key");
    if (!json_is_object(dsse) || !json_object_get(dsse, "payloadType")) return unreadable();
    if (!same(want_string(dsse, "payloadType"), PAYLOAD_TYPE) || json_array_size(signatures) != 1)
        return status_new(TUSFM_UNTRUSTED, "the signature file holds no single signature of an in-toto statement");
    if (!from_base64(want_string(dsse, "payload"), &e->payload, &e->payload_count) ||
        !from_base64(want_string(json_array_get(signatures, 0), "sig"), &e->signature, &e->signature_count))
        return unreadable();
    return read_hint(json_object_get(material, "publicKey"), e->hint);
}

tusfm_status *envelope_read(const uint8_t *raw, size_t count, envelope *e) {
    memset(e, 0, sizeof *e);
    if (count > MAX_SIGNATURE_BYTES)
        return status_new(TUSFM_UNTRUSTED, "the signature file has %zu bytes; %d are allowed", count, MAX_SIGNATURE_BYTES);
    json_t *root = strict_json(raw, count);
    tusfm_status *failed = json_is_object(root) ? read_parts(root, e) : unreadable();
    json_decref(root);
    if (failed) envelope_free(e);
    return failed;
}

void envelope_free(envelope *e) {
    free(e->payload);
    free(e->signature);
    memset(e, 0, sizeof *e);
}

/* ---- keys ---- */

/* What stands before the point of an uncompressed public key on each curve. */
static const uint8_t p256[] = {0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06,
                               0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04};
static const uint8_t p384[] = {0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02,
                               0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22, 0x03, 0x62, 0x00, 0x04};

static int begins(const public_key *key, const uint8_t *prefix, size_t count, size_t whole) {
    return key->count == whole && memcmp(key->der, prefix, count) == 0;
}

static tusfm_status *hash_pem(public_key *key) {
    unsigned char text[300];
    char pem[400] = "-----BEGIN PUBLIC KEY-----\n";
    size_t count = 0, at = strlen(pem);
    if (mbedtls_base64_encode(text, sizeof text, &count, key->der, key->count) != 0)
        return status_new(TUSFM_UNSUPPORTED, "mbedTLS cannot write base64");
    for (size_t begin = 0; begin < count; begin += 64)
        at += (size_t)snprintf(pem + at, sizeof pem - at, "%.*s\n", (int)(count - begin < 64 ? count - begin : 64),
                               (const char *)text + begin);
    at += (size_t)snprintf(pem + at, sizeof pem - at, "-----END PUBLIC KEY-----\n");
    return sha256_hex(pem, at, key->fingerprint);
}

tusfm_status *public_key_read(const char *pem, size_t count, public_key *key) {
    mbedtls_pk_context parsed;
    const char *begin = strlen(pem) == count ? strstr(pem, "-----BEGIN PUBLIC KEY-----") : NULL;
    uint8_t written[sizeof key->der];
    memset(key, 0, sizeof *key);
    if (!begin) return status_new(TUSFM_UNTRUSTED, "a trusted key is not a public key in PEM");
    mbedtls_pk_init(&parsed);
    int failed = mbedtls_pk_parse_public_key(&parsed, (const unsigned char *)begin, strlen(begin) + 1);
    int length = failed ? 0 : mbedtls_pk_write_pubkey_der(&parsed, written, sizeof written);
    mbedtls_pk_free(&parsed);
    if (failed) return status_new(TUSFM_UNTRUSTED, "a trusted key is not a public key in PEM");
    if (length > 0) { /* it is written at the end of the buffer */
        key->count = (size_t)length;
        memcpy(key->der, written + sizeof written - key->count, key->count);
    }
    key->is_p384 = begins(key, p384, sizeof p384, sizeof p384 + 96);
    if (!key->is_p384 && !begins(key, p256, sizeof p256, sizeof p256 + 64))
        return status_new(TUSFM_UNTRUSTED, "a trusted key is not on one of the curves secp256r1, secp384r1");
    return hash_pem(key);
}

/* ---- the signature ---- */

static int digest(const public_key *key, const uint8_t *data, size_t count, unsigned char out[64]) {
    if (key->is_p384) {
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
        return mbedtls_sha512(data, count, out, 1);
#else
        return mbedtls_sha512_ret(data, count, out, 1);
#endif
    }
    return sha256_bytes(data, count, out);
}

tusfm_status *envelope_check(const envelope *e, const public_key *key) {
    char head[120];
    unsigned char hash[64];
    mbedtls_pk_context parsed;
    int head_count = snprintf(head, sizeof head, "DSSEv1 %zu %s %zu ", strlen(PAYLOAD_TYPE), PAYLOAD_TYPE, e->payload_count);
    size_t count = (size_t)head_count + e->payload_count;
    uint8_t *signed_bytes = malloc(count);
    if (!signed_bytes) return no_memory();
    memcpy(signed_bytes, head, (size_t)head_count);
    memcpy(signed_bytes + head_count, e->payload, e->payload_count);
    int failed = digest(key, signed_bytes, count, hash);
    free(signed_bytes);
    mbedtls_pk_init(&parsed);
    if (!failed) failed = mbedtls_pk_parse_public_key(&parsed, key->der, key->count);
    if (!failed)
        failed = mbedtls_pk_verify(&parsed, key->is_p384 ? MBEDTLS_MD_SHA384 : MBEDTLS_MD_SHA256, hash,
                                   key->is_p384 ? 48 : 32, e->signature, e->signature_count);
    mbedtls_pk_free(&parsed);
    return failed ? status_new(TUSFM_UNTRUSTED, "the signature does not belong to this statement and key") : NULL;
}

/* ---- the statement ---- */

static tusfm_status *unfit(const char *why) { return status_new(TUSFM_UNTRUSTED, "the signed statement %s", why); }

static int is_hex(const char *text) { return text && strlen(text) == 64 && strspn(text, "0123456789abcdef") == 64; }

static uint8_t nibble(char c) { return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10); }

/* The subject's digest is the sha256 of the files' digests one after another. */
static tusfm_status *check_root(const json_t *resources, const char *subject) {
    size_t count = json_array_size(resources);
    uint8_t *all = malloc(count ? 32 * count : 1);
    char root[65];
    if (!all) return no_memory();
    for (size_t i = 0; i < count; i++) {
        const char *hex = want_string(json_array_get(resources, i), "digest");
        for (size_t k = 0; k < 32; k++) all[32 * i + k] = (uint8_t)(nibble(hex[2 * k]) << 4 | nibble(hex[2 * k + 1]));
    }
    tusfm_status *failed = sha256_hex(all, 32 * count, root);
    free(all);
    if (failed) return failed;
    return same(subject, root) ? NULL : unfit("has a subject that does not fit the files that it lists");
}

static tusfm_status *check_resources(const json_t *resources) {
    json_t *seen = json_object();
    tusfm_status *failed = seen ? NULL : no_memory();
    for (size_t i = 0; !failed && i < json_array_size(resources); i++) {
        const json_t *item = json_array_get(resources, i);
        const char *name = want_string(item, "name");
        if (!name || !is_hex(want_string(item, "digest")) || json_object_get(seen, name))
            failed = unfit("lists a file twice, or with something that is no sha256");
        else if (json_object_set_new(seen, name, json_true()))
            failed = no_memory();
    }
    json_decref(seen);
    return failed;
}

static tusfm_status *read_binding(const json_t *data, statement *s) {
    static const wanted keys[] = {{"bundle_id", "s"}, {"spec_sha256", "s"}, {"device_class", "s0"}, {"security_version", "i"}};
    if (!data || json_is_null(data)) return NULL;
    tusfm_status *failed = want_object(data, keys, 4, "the signed statement's binding");
    if (failed) return status_as(failed, TUSFM_UNTRUSTED);
    s->security_version = want_integer(data, "security_version");
    if (s->security_version < 0 || s->security_version > INT32_MAX)
        return unfit("has a security version that is not from 0 to 2147483647");
    s->bundle_id = want_string(data, "bundle_id"), s->spec_sha256 = want_string(data, "spec_sha256");
    s->device_class = want_string(data, "device_class");
    return NULL;
}

static tusfm_status *parse(statement *s) {
    const json_t *predicate = json_object_get(s->root, "predicate"), *written = json_object_get(predicate, "serialization");
    const json_t *subject = json_array_get(json_object_get(s->root, "subject"), 0);
    s->resources = json_object_get(predicate, "resources");
    if (!json_is_array(s->resources) || !json_is_object(written)) return unfit("cannot be read");
    if (!same(want_string(s->root, "_type"), STATEMENT_TYPE) ||
        !same(want_string(s->root, "predicateType"), PREDICATE_TYPE))
        return unfit("is of another type");
    if (!same(want_string(written, "method"), "files") || !same(want_string(written, "hash_type"), "sha256"))
        return unfit("hashes files in another way than sha256 file by file");
    TRY(check_resources(s->resources));
    TRY(check_root(s->resources, want_string(json_object_get(subject, "digest"), "sha256")));
    return read_binding(json_object_get(predicate, "tinyusfm_bundle"), s);
}

tusfm_status *statement_read(const envelope *e, statement *s) {
    memset(s, 0, sizeof *s);
    s->root = strict_json(e->payload, e->payload_count);
    tusfm_status *failed = json_is_object(s->root) ? parse(s) : unfit("cannot be read");
    if (failed) statement_free(s);
    return failed;
}

void statement_free(statement *s) {
    json_decref(s->root);
    memset(s, 0, sizeof *s);
}
