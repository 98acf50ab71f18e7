/* What differs between operating systems: clock, threads, shared libraries, the files of a folder. */
#ifndef TUSFM_PLATFORM_H
#define TUSFM_PLATFORM_H

#include "status.h"

#if defined(_WIN32)
/* SRWLOCK, CONDITION_VARIABLE and HANDLE, without windows.h and its names */
typedef struct mutex {
    void *lock;
} mutex;
typedef struct condition {
    void *variable;
} condition;
typedef struct thread {
    void *handle;
    unsigned long id;
    int started;
} thread;
#else
#include <pthread.h>
typedef pthread_mutex_t mutex;
typedef pthread_cond_t condition;
typedef struct thread {
    pthread_t id;
    int started;
} thread;
#endif

int64_t now_ns(void);

/* None of these can fail but by lack of memory or a programming error. */
void mutex_init(mutex *m);
void mutex_free(mutex *m);
void mutex_lock(mutex *m);
void mutex_unlock(mutex *m);
int mutex_try_lock(mutex *m); /* 0: somebody else holds it */
void condition_init(condition *c);
void condition_free(condition *c);
void condition_wait(condition *c, mutex *m);
/* Until a time of now_ns; returns 0 when that time has come. May also wake for no reason. */
int condition_wait_until(condition *c, mutex *m, int64_t end_ns);
void condition_wake_all(condition *c);

int thread_start(thread *t, void (*work)(void *), void *argument); /* 0: it could not be started */
void thread_join(thread *t);
void thread_detach(thread *t);
int thread_is_me(const thread *t);

/* Opens a shared library: FOLDER/NAME, or NAME where the system looks for it if the folder is NULL. */
void *library_open(const char *folder, const char *name, char *why, size_t why_size);
void *library_symbol(void *library, const char *name);
/* The first file of a folder, by name, whose name begins so; 0: there is none. */
int library_find(const char *folder, const char *beginning, char *name, size_t size);
/* The folder in which the library lies that holds this code; 0: it cannot be told. */
int library_folder(char *into, size_t size);
/* Sets a variable of the environment unless it is set. */
void environment_default(const char *name, const char *value);

/* The calling thread's stack for signal handlers. A library that puts its own in place may free it later: the next signal
 * would end the program. Windows has none. */
typedef struct signal_stack {
    void *base;
    size_t size;
    int flags, known;
} signal_stack;
signal_stack signal_stack_now(void);
void signal_stack_put_back(const signal_stack *before);

/* The folder of a bundle, held open. */
typedef struct folder folder;
enum { MAX_DEPTH = 8 };
/* A link to the folder is resolved first. TUSFM_INPUT: there is none, or the link leads nowhere. */
tusfm_status *folder_open(const char *path, folder **opened);
void folder_close(folder *f);
/* Whether the path means another folder than the one that is open. */
int folder_was_replaced(const char *path, const folder *f);
/* Calls `found` for every file and folder below it, in no order, with the path inside; refuses links and whatever is
 * neither file nor folder. */
tusfm_status *folder_walk(folder *f, tusfm_status *(*found)(void *user, const char *path, int is_folder), void *user);
/* Reads a file of exactly `size` bytes, or, where `size` is negative, of at most `limit`. The caller frees *data. */
tusfm_status *folder_read(folder *f, const char *path, int64_t size, int64_t limit, uint8_t **data, int64_t *count);

/* The text of /proc/cpuinfo, or NULL where there is none; the caller frees it. */
char *cpu_description(void);
const char *cpu_architecture(void); /* as Python's platform.machine() */
int32_t usable_cpus(void);

#endif
