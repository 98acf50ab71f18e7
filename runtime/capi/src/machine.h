/* Which CPU this is, as far as an engine cares; as device/machine.py. */
#ifndef TUSFM_MACHINE_H
#define TUSFM_MACHINE_H

#include <jansson.h>
#include <stdint.h>

typedef struct machine {
    uint64_t features; /* a bit for each watched feature that it has */
    int32_t cores;     /* that this process may use, at least 1 */
} machine;

machine machine_card(void);

/* Whether the machine is of the class that a manifest's list of features describes: only if its features are known and
 * exactly these among the watched ones. */
int machine_same_class(const machine *card, const json_t *features);

/* Half of the cores, at least 1, at most 4. */
int32_t machine_threads(const machine *card);

/* For tests: the card of this text of /proc/cpuinfo. */
machine machine_from_text(const char *text, int32_t usable);

#endif
