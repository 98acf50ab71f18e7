/* Whether a bundle may run here: its signature, its signer, its device class, its version; as trust/policy.py. */
#ifndef TUSFM_TRUST_H
#define TUSFM_TRUST_H

#include "manifest.h"

/* What is demanded of a bundle: by the program, and by the machine's policy file. */
typedef struct trust_demands trust_demands;

/* `options` NULL: the policy file alone. *made is NULL where nothing is demanded. TUSFM_INPUT: a trust store cannot be
 * read; TUSFM_UNTRUSTED: it holds something that is no key, or the policy file cannot be read. */
tusfm_status *trust_open(const tusfm_trust_options *options, trust_demands **made);
void trust_free(trust_demands *d);

/* Checks a bundle before any of its files is used. `signature` NULL: it has none. */
tusfm_status *trust_check(const trust_demands *d, const manifest *m, const uint8_t *raw, size_t count,
                          const uint8_t *signature, size_t signature_count, int64_t *security_version);

/* Raises the floors to the version of a bundle that opened; -1 where no signature was looked at. */
tusfm_status *trust_accept(const trust_demands *d, const manifest *m, int64_t security_version);

#endif
