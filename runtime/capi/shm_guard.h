/* Copies from a mapping whose memory somebody else may take away. */
#ifndef TUE_SHM_GUARD_H
#define TUE_SHM_GUARD_H

#include <stddef.h>
#include <stdint.h>

/* Whether tue_shm_guard was called. */
int shm_guarded(void);

/* Copies `count` bytes at `at` of a mapping of `bytes`; 0: its memory is gone, and the mapping may only be unmapped. */
int shm_copy(uint8_t *into, const uint8_t *map, size_t bytes, size_t at, size_t count);

/* Before and after this thread reads a mapping itself; shm_end says whether its memory was taken away meanwhile. */
void shm_begin(const uint8_t *map, size_t bytes);
int shm_end(void);

/* Has the pages of a mapping put in place now. */
void shm_touch(const uint8_t *map, size_t bytes);

#endif
