/* tue_shm_guard: a handler of SIGBUS for copies from a mapping. A writer may cut its object short at any moment; whoever
 * reads the mapping behind its new end gets SIGBUS. The handler puts pages of zeros there, so that the copy ends, and
 * notes it, so that the frame is refused. */
#define _GNU_SOURCE
#include "shm_guard.h"

#include "shm_common.h"

#include <signal.h>

typedef struct guarded_copy {
    uintptr_t begin, end; /* of the mapping that this thread reads; 0: of none */
    int gone;
} guarded_copy;

/* volatile: the handler runs in the middle of the copy */
static _Thread_local volatile guarded_copy copying;
static atomic_int installed;
static struct sigaction before;

static void on_bus(int number, siginfo_t *what, void *context) {
    uintptr_t at = (uintptr_t)what->si_addr;
    if (at >= copying.begin && at < copying.end) {
        uintptr_t page = at & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
        int error = errno;
        void *there = mmap((void *)page, copying.end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        errno = error;
        copying.gone = 1;
        if (there != MAP_FAILED) return;
    }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, what, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else { /* the faulting instruction comes again, and now ends the program as it would have */
        struct sigaction usual = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &usual, NULL);
    }
}

int32_t tue_shm_guard(void) {
    struct sigaction act = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (atomic_load(&installed)) return TUE_SHM_OK;
    if (sigaction(SIGBUS, &act, &before) != 0) return TUE_SHM_SYSTEM;
    atomic_store(&installed, 1);
    return TUE_SHM_OK;
}

int shm_guarded(void) { return atomic_load(&installed); }

void shm_begin(const uint8_t *map, size_t bytes) {
    copying.gone = 0;
    copying.end = (uintptr_t)map + bytes;
    copying.begin = (uintptr_t)map;
    atomic_signal_fence(memory_order_seq_cst);
}

int shm_end(void) {
    atomic_signal_fence(memory_order_seq_cst);
    copying.begin = copying.end = 0;
    return copying.gone;
}

int shm_copy(uint8_t *into, const uint8_t *map, size_t bytes, size_t at, size_t count) {
    shm_begin(map, bytes);
    memcpy(into, map + at, count);
    return !shm_end();
}

void shm_touch(const uint8_t *map, size_t bytes) {
#if defined(MADV_POPULATE_READ)
    (void)madvise((void *)(uintptr_t)map, bytes, MADV_POPULATE_READ); /* it fails where pages are gone, without a signal */
#else
    (void)map, (void)bytes;
#endif
}
