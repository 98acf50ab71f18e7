/* The arithmetic in front of and behind a network, in portable C11: frame to input, logits to mask, mask to moments.
 *
 * Every function gives the same bytes as its numpy twin (runtime/tinyusfm_runtime/preprocess.py and measure.py), on
 * every machine: integers only, except one float comparison in tue_threshold. The functions keep no state, allocate
 * nothing, write only through the pointers they are given and may be called from any number of threads.
 *
 * The header knows nothing of Python, of bundles or of engines.
 */
#ifndef TUE_NUMERICS_H
#define TUE_NUMERICS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TUE_API __declspec(dllexport)
#elif defined(__GNUC__)
#define TUE_API __attribute__((visibility("default")))
#else
#define TUE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature, a struct or a definition changes; callers compare it with the one they know. */
#define TUE_NUMERICS_VERSION 2

/* What every function returns. */
enum tue_status {
    TUE_OK = 0,
    TUE_BAD_ARGUMENT = 1, /* a null pointer, a size out of range, a table that points outside its axis */
    TUE_SMALL_SCRATCH = 2 /* fewer scratch bytes than the matching *_scratch function asks for */
};

/* What the channels of a picture are. */
enum tue_format { TUE_GREY = 0, TUE_RGB = 1, TUE_BGR = 2, TUE_RGBA = 3 };

/* Longest side of a picture and longest side of a result. */
#define TUE_MAX_SIDE 16384

/* A view of 8-bit pixels. Strides are bytes, of either sign or zero; the caller crops by moving `pixels`. */
typedef struct tue_picture {
    const uint8_t *pixels; /* row 0, column 0, channel 0 */
    ptrdiff_t row_stride;
    ptrdiff_t column_stride;
    ptrdiff_t channel_stride; /* unused for TUE_GREY */
    int32_t rows;
    int32_t columns;
    int32_t format;  /* enum tue_format; the fourth channel of TUE_RGBA is not read */
    int32_t limited; /* not 0: codes 16..235 are expanded to 0..255 first */
} tue_picture;

/* Resampling weights of one axis: output i is the rounded sum over t < span of
 * sample[first[i] + t] * weights[i * stride + t], in 22-bit fixed point. */
typedef struct tue_filter {
    const int32_t *first;   /* out_size entries, each 0 .. in_size - 1 */
    const int32_t *weights; /* out_size rows of `stride`; >= 0; a row sums to 2^22 within 2^12; zero from `span` on
                               and wherever first[i] + t >= in_size */
    int32_t in_size;        /* 1 .. TUE_MAX_SIDE */
    int32_t out_size;       /* 1 .. TUE_MAX_SIDE */
    int32_t span;           /* 1 .. stride: the longest row without its trailing zeros */
    int32_t stride;         /* a multiple of 8 */
} tue_filter;

TUE_API int32_t tue_numerics_version(void);

/* Brightness and antialiased resize, fused: range expansion, luma (77 R + 150 G + 29 B + 128) >> 8, columns, rows.
 * `along_columns` maps picture.columns to the result's columns, `along_rows` maps picture.rows to its rows; `out` is
 * written at out + row * out_stride + column. Scratch: tue_preprocess_scratch bytes, any alignment. */
TUE_API size_t tue_preprocess_scratch(const tue_filter *along_columns, const tue_filter *along_rows);
TUE_API int32_t tue_preprocess(const tue_picture *picture, const tue_filter *along_columns,
                               const tue_filter *along_rows, uint8_t *out, ptrdiff_t out_stride, void *scratch,
                               size_t scratch_bytes);

/* out[i] = logits[i] > cut; a NaN is not greater. */
TUE_API int32_t tue_threshold(const float *logits, size_t count, float cut, uint8_t *out);

/* Largest 8-connected component of the non-zero pixels of a contiguous mask: out is 1 on it, 0 elsewhere, *area its
 * pixels (0 when the mask is empty). Of equally large ones, the one whose first pixel comes first row by row.
 * `out` may be `mask`. Scratch: tue_components_scratch bytes, any alignment. */
TUE_API size_t tue_components_scratch(int32_t rows, int32_t columns);
TUE_API int32_t tue_largest_component(const uint8_t *mask, int32_t rows, int32_t columns, uint8_t *out, int64_t *area,
                                      void *scratch, size_t scratch_bytes);

/* Raw moments of the non-zero pixels of a contiguous mask, x = column, y = row, both from 0:
 * out = {sum 1, sum x, sum y, sum x x, sum x y, sum y y}. Exact: the largest is below 2^57. */
TUE_API int32_t tue_moments(const uint8_t *mask, int32_t rows, int32_t columns, int64_t out[6]);

/* CRC-64 of ECMA-182, as OpenIGTLink guards the body of a message: start 0, no final inversion. */
TUE_API int32_t tue_crc64(const uint8_t *data, size_t count, uint64_t *out);

#ifdef __cplusplus
}
#endif

#endif
