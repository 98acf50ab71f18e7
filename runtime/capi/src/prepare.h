/* Frame to input tensor: where the frame lies in it, resampling weights, and the kernels of preprocess.c. */
#ifndef TUSFM_PREPARE_H
#define TUSFM_PREPARE_H

#include "spec.h"
#include "tue_numerics.h"

/* As Placement in preprocess.py: rows and columns, not corners. */
typedef struct placement {
    int32_t crop[4]; /* row, column, rows, columns of the frame */
    int32_t box[4];  /* the same of the input */
    int has_spacing;
    double spacing_mm[2]; /* row, column; of the input's pixels */
    int32_t frame_rows, frame_columns;
} placement;

typedef struct preparer preparer;

/* Keeps the resampling weights of the sizes it has seen last and its scratch memory; one thread at a time. */
tusfm_status *preparer_new(const model_spec *spec, preparer **made);
void preparer_free(preparer *p);

/* TUSFM_FRAME: no frame, or the model's crop lies outside it. */
tusfm_status *frame_check(const tusfm_frame *frame);
tusfm_status *frame_place(const tusfm_frame *frame, const model_spec *spec, placement *place);

/* Fills the tensor: uint8, 1 or 3 channels of the input's rows and columns. Allocates for new sizes only. */
tusfm_status *prepare(preparer *p, const tusfm_frame *frame, uint8_t *tensor, placement *place);
/* The same with a region of the frame (row, column, rows, columns) in place of the model's crop. */
tusfm_status *prepare_region(preparer *p, const tusfm_frame *frame, const int32_t region[4], uint8_t *tensor,
                             placement *place);

size_t spec_input_bytes(const model_spec *spec);

/* The frame's pixels as the kernels take them: its region of the image. */
tue_picture frame_picture(const tusfm_frame *frame);

#endif
