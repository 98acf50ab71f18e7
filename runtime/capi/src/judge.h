/* What is thought of an answer, by the thresholds and limits of the model; as reading.py. */
#ifndef TUSFM_JUDGE_H
#define TUSFM_JUDGE_H

#include "answer.h"

/* Fills in trust and reasons of the answer and of its labels; the drift reading must be there. */
void judge(answer *made, const model_spec *spec, const placement *place);

#endif
