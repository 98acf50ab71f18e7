/* Statuses inside the library: made with a code and a formatted line, handed up unread. */
#ifndef TUSFM_STATUS_H
#define TUSFM_STATUS_H

#include "tinyusfm.h"

#if defined(__MINGW32__) /* whose own printf is asked for, not Windows' */
#define TUSFM_PRINTF(at, first) __attribute__((format(gnu_printf, at, first)))
#elif defined(__GNUC__)
#define TUSFM_PRINTF(at, first) __attribute__((format(printf, at, first)))
#else
#define TUSFM_PRINTF(at, first)
#endif

/* Never NULL: where there is no memory it gives one status that says so and need not be freed. */
tusfm_status *status_new(int32_t code, const char *format, ...) TUSFM_PRINTF(2, 3);

/* The same status with another code, or with "TEXT: " in front of its text. */
tusfm_status *status_as(tusfm_status *status, int32_t code);
tusfm_status *status_within(tusfm_status *status, const char *text);

tusfm_status *no_memory(void);

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        tusfm_status *failed_ = (call);                                                                                \
        if (failed_) return failed_;                                                                                   \
    } while (0)

/* Copies at most size - 1 bytes of a line and ends it. */
void copy_line(char *into, size_t size, const char *text);

#endif
