/* The arithmetic in front of and behind a network, in portable C11: frame to input, logits to mask, mask to moments.
 *
 * Every function gives the same bytes as its numpy twin (runtime/tinyusfm_runtime/numerics), on every machine: whole
 * numbers, or + - * / and square roots of doubles in a stated order, compiled without fused multiply-adds
 * (-ffp-contract=off). The functions keep no state, allocate nothing, call no maths library, write only through the
 * pointers they are given and may be called from any number of threads.
 *
 * The header knows nothing of Python, of bundles or of engines.
 */
#ifndef TUE_NUMERICS_H
#define TUE_NUMERICS_H

#include <stddef.h>
#include <stdint.h>

#if defined(TUE_API)
/* the build says it: empty where the functions stay inside another library */
#elif defined(_WIN32)
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
#define TUE_NUMERICS_VERSION 3

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

/* The mask without its holes: pixels from which no 4-connected way outside the mask leads to the picture's border become
 * 1. `out` must not be `mask`. Scratch: tue_holes_scratch bytes, any alignment. */
TUE_API size_t tue_holes_scratch(int32_t rows, int32_t columns);
TUE_API int32_t tue_fill_holes(const uint8_t *mask, int32_t rows, int32_t columns, uint8_t *out, void *scratch,
                               size_t scratch_bytes);

/* Border pixels of the component that holds the mask's first pixel, clockwise, thinned evenly to `most`:
 * points = {row, column, row, column, ...} with room for 2 * most; *count of them are written. */
TUE_API int32_t tue_contour(const uint8_t *mask, int32_t rows, int32_t columns, int32_t most, int32_t *points,
                            int32_t *count);

/* Whether the edge of the field of view, found in the brightness `codes`, cuts a mask of 0 and 1 of the same size.
 * Scratch: tue_view_scratch bytes, any alignment. */
TUE_API size_t tue_view_scratch(int32_t rows, int32_t columns);
TUE_API int32_t tue_cut_by_sector(const uint8_t *mask, const uint8_t *codes, int32_t rows, int32_t columns,
                                  int32_t *cut, void *scratch, size_t scratch_bytes);

/* What a logit must exceed for a probability above `probability`: log(p / (1 - p)) as a float; 0 outside (0, 1). */
TUE_API float tue_logit(double probability);

/* Averages into `out` (the first pass, channels x rows x columns) the logits of a second pass of the same size, at the
 * rows and columns listed; their places in the second field are fractions of its pixels, centres at whole numbers. */
TUE_API int32_t tue_blend(const float *second, int32_t channels, int32_t rows, int32_t columns,
                          const int32_t *at_rows, const double *row_places, int32_t row_count,
                          const int32_t *at_columns, const double *column_places, int32_t column_count, float *out);

/* Where a frame lies in the network's input: row, column, rows, columns each. */
typedef struct tue_view {
    int32_t crop[4];      /* region of the frame that is used, pixels of the frame */
    int32_t box[4];       /* what that region fills in the input */
    double spacing_mm[2]; /* (row, column) of the *input's* pixels */
    int32_t has_spacing;  /* 0: unknown */
    int32_t reserved;
} tue_view;

/* What is to be measured. */
typedef struct tue_asked {
    int32_t rows, columns, channels; /* of the logits */
    int32_t index;                   /* the label's value in the mask, and its channel where there are several */
    int32_t ellipse;                 /* not 0: fill holes, fit an ellipse */
    float cut;                       /* what one channel must exceed (tue_logit); unused with several */
    double min_area;                 /* least share of the box, 0 .. 1, that counts as found */
} tue_asked;

#define TUE_CONTOUR_POINTS 64

/* What was measured, in pixels of the frame (centres at whole numbers) and mm; all 0 where nothing was found, the mm
 * ones also without a spacing, those from `centre_px` on also where no ellipse was asked for. */
typedef struct tue_measurement {
    int32_t found, touches_border, cut_by_sector, contour_points;
    int64_t pixels;    /* of the input */
    double confidence; /* mean probability inside */
    double area_px, area_mm2;
    double box_px[4];      /* row, column, height, width */
    double centroid_px[2]; /* row, column */
    double centre_px[2], axes_px[2], axes_mm[2], angle_deg, hc_px, hc_mm;
    double agreement; /* Dice of component and ellipse */
    double contour_px[2 * TUE_CONTOUR_POINTS];
} tue_measurement;

/* Measures the largest component of one label of a mask (rows x columns of labels) and writes it as 0 and 1 to
 * `component`, of the same size. `codes` is the input's brightness, or null to leave the field of view out. Scratch:
 * tue_measure_scratch(rows, columns of the view's box) bytes, any alignment. */
TUE_API size_t tue_measure_scratch(int32_t rows, int32_t columns);
TUE_API int32_t tue_measure(const uint8_t *mask, const float *logits, const uint8_t *codes, const tue_view *view,
                            const tue_asked *asked, uint8_t *component, tue_measurement *out, void *scratch,
                            size_t scratch_bytes);

/* CRC-64 of ECMA-182, as OpenIGTLink guards the body of a message: start 0, no final inversion. */
TUE_API int32_t tue_crc64(const uint8_t *data, size_t count, uint64_t *out);

#ifdef __cplusplus
}
#endif

#endif
