/* Signature files: a DSSE envelope with an in-toto statement in a sigstore bundle, as the OpenSSF model-signing project
 * writes them; as trust/envelope.py and trust/statement.py. P-256 with SHA-256, P-384 with SHA-384, nothing else. */
#ifndef TUSFM_ENVELOPE_H
#define TUSFM_ENVELOPE_H

#include "status.h"

#include <jansson.h>

/* A signature file, read and not yet checked. */
typedef struct envelope {
    uint8_t *payload, *signature;
    size_t payload_count, signature_count;
    char hint[65]; /* sha256 of the public key's PEM, or of the key that an older file holds */
} envelope;

/* A public key: its SubjectPublicKeyInfo in DER, and the hash of its PEM. */
typedef struct public_key {
    uint8_t der[160];
    size_t count;
    int is_p384;
    char fingerprint[65];
} public_key;

/* What was signed. */
typedef struct statement {
    json_t *root;
    const json_t *resources; /* every one has a name and a sha256, no name twice */
    const char *bundle_id, *spec_sha256, *device_class; /* bundle_id NULL: a statement of another tool */
    int64_t security_version;
} statement;

/* TUSFM_UNTRUSTED: too large, malformed, of another type, or made with a certificate. */
tusfm_status *envelope_read(const uint8_t *raw, size_t count, envelope *e);
void envelope_free(envelope *e);

/* `pem` ends with a 0. TUSFM_UNTRUSTED: no P-256 or P-384 public key. */
tusfm_status *public_key_read(const char *pem, size_t count, public_key *key);

/* TUSFM_UNTRUSTED: the key did not make this signature. */
tusfm_status *envelope_check(const envelope *e, const public_key *key);

/* Of an envelope whose signature was checked. TUSFM_UNTRUSTED: malformed, or its parts contradict one another. */
tusfm_status *statement_read(const envelope *e, statement *s);
void statement_free(statement *s);

#endif
