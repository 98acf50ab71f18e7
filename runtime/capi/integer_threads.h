/* A few threads that wait for work, and a flag that one thread sets and another reads. */
#ifndef TUE_INTEGER_THREADS_H
#define TUE_INTEGER_THREADS_H

#include <stdint.h>

typedef struct tue_int_threads tue_int_threads;
typedef volatile int32_t tue_int_flag;

/* Calls `part(argument, thread, threads)` once on every thread, the calling one as number 0, and waits for all. */
typedef void (*tue_int_part)(void *argument, int32_t thread, int32_t threads);

/* NULL for one thread, or where this system has none: everything is then computed by the caller. */
tue_int_threads *tue_int_start_threads(int32_t count);
int32_t tue_int_count_threads(const tue_int_threads *threads);
void tue_int_share(tue_int_threads *threads, tue_int_part part, void *argument);
void tue_int_stop_threads(tue_int_threads *threads);

#if defined(__GNUC__)
static inline void tue_int_set_flag(tue_int_flag *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }
static inline void tue_int_clear_flag(tue_int_flag *flag) { __atomic_store_n(flag, 0, __ATOMIC_RELEASE); }
static inline int32_t tue_int_read_flag(const tue_int_flag *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
#else /* aligned 32-bit accesses are whole on every machine that other compilers here build for */
static inline void tue_int_set_flag(tue_int_flag *flag) { *flag = 1; }
static inline void tue_int_clear_flag(tue_int_flag *flag) { *flag = 0; }
static inline int32_t tue_int_read_flag(const tue_int_flag *flag) { return *flag; }
#endif

#endif
