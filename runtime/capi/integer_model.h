/* A table of tensors read as a model: what integer_engine.c gets from integer_model.c. */
#ifndef TUE_INTEGER_MODEL_H
#define TUE_INTEGER_MODEL_H

#include "integer_internal.h"

enum { TUE_MAX_BUFFERS = 256, TUE_MAX_OPS = 4096, TUE_MAX_PORTS = 64, TUE_NAME_BYTES = 65 };

typedef struct tue_int_named_port {
    tue_int_port port; /* its name points at `name` */
    char name[TUE_NAME_BYTES];
} tue_int_named_port;

/* Everything but the buffers' memory and the packed weights. `constants` holds copies of all small tensors; the weights
 * of `ops` point into the caller's table and are good only while tue_int_open runs. */
typedef struct tue_int_model {
    int32_t buffer_count, op_count, port_count;
    tue_int_buffer *buffers;
    tue_int_op *ops;
    tue_int_named_port *ports; /* the input first */
    void *constants;
} tue_int_model;

/* Checks the table and fills `model`, whose memory tue_int_free_model frees also after a failure. */
int32_t tue_int_read_model(const tue_int_tensor *tensors, size_t count, tue_int_model *model, char *text,
                           size_t text_bytes);
void tue_int_free_model(tue_int_model *model);

/* Whether an operation's numbers, shapes and bounds hold (integer_checks.c); NULL, or what does not. */
const char *tue_int_check(const tue_int_op *op, const tue_int_model *model);

#endif
