#include "sha256.h"

#include <mbedtls/sha256.h>
#include <mbedtls/version.h>

int sha256_bytes(const void *data, size_t count, unsigned char out[32]) {
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    return mbedtls_sha256(data, count, out, 0);
#else
    return mbedtls_sha256_ret(data, count, out, 0);
#endif
}

tusfm_status *sha256_hex(const void *data, size_t count, char out[65]) {
    unsigned char digest[32];
    int failed = sha256_bytes(data, count, digest);
    if (failed) return status_new(TUSFM_UNSUPPORTED, "SHA-256 failed with code %d of mbedTLS", failed);
    for (int i = 0; i < 32; i++) {
        out[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        out[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
    out[64] = 0;
    return NULL;
}
