/* Structs of the header: defaults, and copies of what a caller with an older or newer header hands in or takes. */
#ifndef TUSFM_STRUCTS_H
#define TUSFM_STRUCTS_H

#include "status.h"

/* The caller's options as this library knows them; fields behind the caller's size keep their defaults. TUSFM_INPUT:
 * not filled in by tusfm_options_init, by another interface, or out of range. */
tusfm_status *options_take(const tusfm_options *given, tusfm_options *taken);
tusfm_status *trust_options_take(const tusfm_trust_options *given, tusfm_trust_options *taken);
tusfm_status *lease_take(const tusfm_lease *given, tusfm_lease *taken); /* NULL: the defaults */
tusfm_status *frame_take(const tusfm_frame *given, tusfm_frame *taken);
tusfm_status *swap_options_take(const tusfm_swap_options *given, tusfm_swap_options *taken);

/* Copies a struct of `size` bytes to a caller's struct, whose first field says how large it is. TUSFM_INPUT: NULL, or a
 * size that was not filled in. */
tusfm_status *struct_check(const void *to, const char *what);
void struct_give(void *to, const void *from, size_t size);

#endif
