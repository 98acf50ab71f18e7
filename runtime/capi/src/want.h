/* Reading a JSON object strictly: each key must be there, be of its kind, and nothing else may be there. */
#ifndef TUSFM_WANT_H
#define TUSFM_WANT_H

#include "status.h"

#include <jansson.h>

typedef struct wanted {
    const char *key;
    const char *kinds; /* letters of the kinds that are allowed: s string, i whole number, n number, b truth value,
                          o object, a array, 0 null */
} wanted;

/* TUSFM_BUNDLE: not an object, unknown or missing keys, or a value of another kind. `what` names it in messages. */
tusfm_status *want_object(const json_t *data, const wanted *keys, size_t count, const char *what);

/* Shorthands for values that want_object has checked. */
const char *want_string(const json_t *object, const char *key); /* NULL where it is null */
double want_number(const json_t *object, const char *key);
int64_t want_integer(const json_t *object, const char *key);
int want_true(const json_t *object, const char *key);

/* `count` numbers, or whole numbers. TUSFM_BUNDLE: anything else. */
tusfm_status *want_numbers(const json_t *array, size_t count, double *out, const char *what);
tusfm_status *want_integers(const json_t *array, size_t count, int64_t *out, const char *what);

#endif
