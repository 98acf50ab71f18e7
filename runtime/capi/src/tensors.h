/* Named arrays of a .safetensors file in memory, read as bundle/arrays.py reads them. */
#ifndef TUSFM_TENSORS_H
#define TUSFM_TENSORS_H

#include "status.h"

#include <jansson.h>

enum { MAX_AXES = 8, MAX_TENSORS = 256, MAX_HEADER_BYTES = 1 << 20 };

enum dtype { BOOL, U8, I8, U16, I16, F16, U32, I32, F32, U64, I64, F64 };

/* One array; `data` points into the file's bytes, at any alignment. */
typedef struct tensor {
    const char *name;
    int dtype, axes;
    int64_t shape[MAX_AXES];
    size_t count; /* elements */
    const uint8_t *data;
} tensor;

typedef struct tensors {
    json_t *header, *texts; /* texts: of "__metadata__", or NULL */
    tensor *all; /* in the order of their bytes */
    size_t count;
} tensors;

/* TUSFM_BUNDLE: not such a file, or a header that does not fit what is there. `what` is its name, for messages; the
 * bytes have to live as long as the tensors. `limit`: most arrays may be in it. */
tusfm_status *tensors_open(const uint8_t *raw, size_t size, const char *what, size_t limit, tensors *t);
void tensors_close(tensors *t);

const tensor *tensors_find(const tensors *t, const char *name); /* or NULL */
/* A text that lies beside the arrays, or NULL. */
const char *tensors_text(const tensors *t, const char *name);
size_t tensor_item_bytes(const tensor *t);

/* An element as a number; for float16, float32 and float64, truth values and whole numbers of at most 32 bits. */
double tensor_number(const tensor *t, size_t at);
int64_t tensor_integer(const tensor *t, size_t at); /* of I64 */
float half_to_float(uint16_t half);

#endif
