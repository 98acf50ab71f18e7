/* SHA-256 by mbedTLS, as 64 small hex digits. */
#ifndef TUSFM_SHA256_H
#define TUSFM_SHA256_H

#include "status.h"

/* 0, or what mbedTLS says. */
int sha256_bytes(const void *data, size_t count, unsigned char out[32]);
tusfm_status *sha256_hex(const void *data, size_t count, char out[65]);

#endif
