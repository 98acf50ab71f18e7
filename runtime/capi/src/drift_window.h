/* Frames that decide together whether a stream has drifted; the rule of DriftMonitor in drift.py. */
#ifndef TUSFM_DRIFT_WINDOW_H
#define TUSFM_DRIFT_WINDOW_H

#include "status.h"

enum { WINDOW_FRAMES = 25, MAX_WINDOW_FRAMES = 100000 };

tusfm_status *drift_window_new(int32_t frames, tusfm_drift_monitor **made);

/* Of a reading that was compared: that frame alone. Of any other: nothing is known. */
void drift_window_alone(tusfm_reading *reading);
/* One more reading; what was not compared does not count. */
void drift_window_observe(tusfm_drift_monitor *w, tusfm_reading *reading);

#endif
