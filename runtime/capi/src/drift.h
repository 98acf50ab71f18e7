/* Do frames still look like the ones the model was calibrated on? As drift.py: the same bytes. */
#ifndef TUSFM_DRIFT_H
#define TUSFM_DRIFT_H

#include "answer.h"
#include "manifest.h"

/* The bundle's statistic, and memory for one frame; one thread at a time. */
typedef struct drift drift;

/* *opened: NULL where the bundle has none. TUSFM_BUNDLE: it cannot be read, or its parts do not fit. */
tusfm_status *drift_open(const manifest *m, drift **opened);
void drift_free(drift *d);

/* Chooses features where the engine gives what they need, else grey levels alone. */
void drift_bind(drift *d, const engine_output *outputs, size_t count);

/* How strange one frame is, by the outputs of its first pass. */
tusfm_status *drift_look(drift *d, const engine_output *outputs, size_t count, const tusfm_frame *frame,
                         drift_reading *reading);

/* What is said of a frame whose answer is not finite. */
drift_reading drift_infinite(const drift *d);

/* Brightness and colour in a few numbers: GREY_NAMES of drift.py. */
enum { GREY_NUMBERS = 9 };
void drift_grey(const tusfm_frame *frame, double out[GREY_NUMBERS]);

#endif
