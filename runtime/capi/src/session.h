/* What a tusfm_session is: a fallback of artefacts, whose turn it is, and the stream once something was submitted. */
#ifndef TUSFM_SESSION_H
#define TUSFM_SESSION_H

#include "fallback.h"
#include "structs.h"

typedef struct live live; /* live.h */

struct tusfm_session {
    tusfm_options options; /* its strings are the session's own */
    char *texts[7];
    tusfm_trust_options trust;
    trust_demands *demands; /* a bundle that takes the place of this one must satisfy the same */
    fallback *now;
    mutex turn;
    condition turned;
    int busy, closed, orphan, swapping;
    runner *running; /* in tusfm_predict, for cancel; guarded by turn */
    answer made;
    double verify_ms;
    live *stream; /* NULL before the first submit; guarded by turn */
};

/* A caller's reading out of an answer. */
void reading_fill(tusfm_reading *reading, const runner *r, const tusfm_frame *frame, const answer *made,
                  const placement *place, const timings *took, int32_t exit_index);

/* Waits for the session to be nobody's; TUSFM_ENGINE: it was closed. */
tusfm_status *session_take(tusfm_session *s);
void session_give(tusfm_session *s);

#endif
