/* The integer engine: a whole network in integers alone, the same bytes on every machine. Plain C11, no dependency.
 *
 * What every operation computes is defined to the bit in docs/reference/integer.md; the implementations for each
 * instruction set give equal bytes. An artefact is `model.safetensors` (everything that is computed with) beside
 * `model.json` (shapes and scales for people and tools). This engine reads neither JSON nor files: the caller, who has a
 * JSON library, parses the safetensors header and hands in a table of its tensors. The JSON file is not needed to run.
 *
 *     tue_int_tensor table[N];                       name, dtype, shape, pointer and size of every tensor in the file
 *     tue_int_engine *engine; char text[256];
 *     if (tue_int_open(table, N, NULL, &engine, text, sizeof text) != TUE_INT_OK) { puts(text); ... }
 *     float logits[224 * 224]; float *outputs[] = {logits};
 *     tue_int_run(engine, image, outputs);           image: what tue_int_describe_input says, uint8 NCHW as a rule
 *     tue_int_close(engine);
 *
 * tue_int_open copies and packs what it needs; the table and the file's bytes may go afterwards. It trusts nothing in
 * the table: every size, index and bound of an accumulator is checked before memory is taken. tue_int_run allocates
 * nothing. One engine is used from one thread at a time; only tue_int_cancel may come from another. Engines share no
 * state. Nothing is printed, nothing exits.
 */
#ifndef TUE_INTEGER_ENGINE_H
#define TUE_INTEGER_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "tue_numerics.h" /* TUE_API */

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature, a struct or the arithmetic changes. */
#define TUE_INT_VERSION 1

enum tue_int_status {
    TUE_INT_OK = 0,
    TUE_INT_BAD_ARGUMENT = 1, /* a null pointer, or a number of threads out of range */
    TUE_INT_BAD_MODEL = 2,    /* the tensors are no model of this version, or could overflow; the text says why */
    TUE_INT_NO_MEMORY = 3,
    TUE_INT_UNSUPPORTED = 4, /* the instruction set that was asked for is not compiled in, or not in this CPU */
    TUE_INT_CANCELLED = 5
};

/* Element types, with their names in a safetensors header. */
enum tue_int_dtype {
    TUE_INT_U8 = 0,  /* "U8" */
    TUE_INT_I8 = 1,  /* "I8" */
    TUE_INT_I16 = 2, /* "I16" */
    TUE_INT_I32 = 3, /* "I32" */
    TUE_INT_I64 = 4, /* "I64" */
    TUE_INT_F32 = 5  /* "F32": only as an input's or output's type, never as a tensor of the file */
};

#define TUE_INT_MAX_DIMS 4

/* One tensor of the file: little-endian, row-major, any alignment. */
typedef struct tue_int_tensor {
    const char *name; /* terminated by a zero; as in the file */
    const void *data;
    size_t bytes; /* as the file says; has to be the product of the shape times the size of an element */
    int64_t shape[TUE_INT_MAX_DIMS];
    int32_t dims;
    int32_t dtype; /* enum tue_int_dtype */
} tue_int_tensor;

/* What is rarely changed; NULL in its place takes threads = 1 and the fastest instruction set. */
typedef struct tue_int_options {
    size_t struct_size; /* sizeof(tue_int_options) */
    int32_t threads;    /* 1 .. 64; the bytes do not depend on it */
    const char *isa;    /* one of tue_int_isas, or NULL for the fastest that this CPU has */
} tue_int_options;

typedef struct tue_int_engine tue_int_engine;

/* One input or output. Names are those of the graph: "image" or "tokens_in"; "logits" first, then the others. */
typedef struct tue_int_port {
    const char *name; /* lives as long as the engine */
    int64_t shape[TUE_INT_MAX_DIMS];
    size_t elements;
    int32_t dims;
    int32_t dtype; /* TUE_INT_U8 for an image, else TUE_INT_F32 */
} tue_int_port;

TUE_API int32_t tue_int_version(void);

/* Instruction sets that this library holds AND this CPU has, fastest first, joined by commas, "portable" last; such as
 * "avx2,portable". A static string. */
TUE_API const char *tue_int_isas(void);

/* Makes an engine. On failure *engine is untouched and `text` (if not NULL) says in one line what was wrong. */
TUE_API int32_t tue_int_open(const tue_int_tensor *tensors, size_t count, const tue_int_options *options,
                             tue_int_engine **engine, char *text, size_t text_bytes);

/* One line: instruction set, threads, bytes held. Lives as long as the engine. */
TUE_API const char *tue_int_describe(const tue_int_engine *engine);

TUE_API int32_t tue_int_describe_input(const tue_int_engine *engine, tue_int_port *port);
TUE_API size_t tue_int_output_count(const tue_int_engine *engine);
TUE_API int32_t tue_int_describe_output(const tue_int_engine *engine, size_t index, tue_int_port *port);

/* Computes one answer. `outputs` has one caller-owned array of float per output, in their order. */
TUE_API int32_t tue_int_run(tue_int_engine *engine, const void *input, float *const *outputs);

/* A run in progress returns TUE_INT_CANCELLED before its next operation; without one, nothing happens. */
TUE_API void tue_int_cancel(tue_int_engine *engine);

/* Frees everything; NULL is allowed. */
TUE_API void tue_int_close(tue_int_engine *engine);

#ifdef __cplusplus
}
#endif

#endif
