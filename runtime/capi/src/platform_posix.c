/* platform.h for Linux and other POSIX systems. */
#define _GNU_SOURCE
#include "platform.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void mutex_init(mutex *m) { pthread_mutex_init(m, NULL); }
void mutex_free(mutex *m) { pthread_mutex_destroy(m); }
void mutex_lock(mutex *m) { pthread_mutex_lock(m); }
void mutex_unlock(mutex *m) { pthread_mutex_unlock(m); }
int mutex_try_lock(mutex *m) { return pthread_mutex_trylock(m) == 0; }

void condition_init(condition *c) {
#if defined(__APPLE__)
    pthread_cond_init(c, NULL);
#else
    pthread_condattr_t with;
    pthread_condattr_init(&with);
    pthread_condattr_setclock(&with, CLOCK_MONOTONIC);
    pthread_cond_init(c, &with);
    pthread_condattr_destroy(&with);
#endif
}
void condition_free(condition *c) { pthread_cond_destroy(c); }
void condition_wait(condition *c, mutex *m) { pthread_cond_wait(c, m); }
int condition_wait_until(condition *c, mutex *m, int64_t end_ns) {
#if defined(__APPLE__)
    int64_t left = end_ns - now_ns();
    if (left <= 0) return 0;
    struct timespec wait = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
    return pthread_cond_timedwait_relative_np(c, m, &wait) == 0;
#else
    struct timespec end = {(time_t)(end_ns / 1000000000), (long)(end_ns % 1000000000)};
    return pthread_cond_timedwait(c, m, &end) == 0;
#endif
}
void condition_wake_all(condition *c) { pthread_cond_broadcast(c); }

typedef struct beginning {
    void (*work)(void *);
    void *argument;
} beginning;

static void *begin(void *given) {
    beginning first = *(beginning *)given;
    free(given);
    first.work(first.argument);
    return NULL;
}

int thread_start(thread *t, void (*work)(void *), void *argument) {
    beginning *first = malloc(sizeof *first);
    if (!first) return 0;
    *first = (beginning){work, argument};
    t->started = pthread_create(&t->id, NULL, begin, first) == 0;
    if (!t->started) free(first);
    return t->started;
}
void thread_join(thread *t) {
    if (t->started) pthread_join(t->id, NULL);
    t->started = 0;
}
void thread_detach(thread *t) {
    if (t->started) pthread_detach(t->id);
    t->started = 0;
}
int thread_is_me(const thread *t) { return t->started && pthread_equal(t->id, pthread_self()); }

void *library_open(const char *folder, const char *name, char *why, size_t why_size) {
    char path[PATH_MAX];
    const char *asked = name;
    if (folder) {
        int length = snprintf(path, sizeof path, "%s/%s", folder, name);
        if (length < 0 || (size_t)length >= sizeof path) {
            copy_line(why, why_size, "the path is too long");
            return NULL;
        }
        asked = path;
    }
    void *library = dlopen(asked, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *said = dlerror();
        copy_line(why, why_size, said ? said : "unknown reason");
    }
    return library;
}
void *library_symbol(void *library, const char *name) { return dlsym(library, name); }
int library_find(const char *folder, const char *beginning, char *name, size_t size) {
    DIR *list = opendir(folder);
    int found = 0;
    for (struct dirent *entry; list && (entry = readdir(list));)
        if (strncmp(entry->d_name, beginning, strlen(beginning)) == 0 && strlen(entry->d_name) < size &&
            (!found || strcmp(entry->d_name, name) < 0)) {
            copy_line(name, size, entry->d_name);
            found = 1;
        }
    if (list) closedir(list);
    return found;
}
int library_folder(char *into, size_t size) {
    Dl_info facts;
    if (!dladdr((void *)(uintptr_t)&library_open, &facts) || !facts.dli_fname) return 0;
    const char *slash = strrchr(facts.dli_fname, '/');
    if (!slash || (size_t)(slash - facts.dli_fname) >= size) return 0;
    memcpy(into, facts.dli_fname, (size_t)(slash - facts.dli_fname));
    into[slash - facts.dli_fname] = 0;
    return 1;
}
void environment_default(const char *name, const char *value) { setenv(name, value, 0); }

signal_stack signal_stack_now(void) {
    stack_t found;
    memset(&found, 0, sizeof found);
    int known = sigaltstack(NULL, &found) == 0;
    return (signal_stack){found.ss_sp, found.ss_size, found.ss_flags & ~SS_ONSTACK, known};
}

/* Fails in a handler that runs on the stack itself, where nothing may be changed. */
void signal_stack_put_back(const signal_stack *before) {
    stack_t kept;
    memset(&kept, 0, sizeof kept);
    kept.ss_sp = before->base, kept.ss_size = before->size, kept.ss_flags = before->flags;
    if (before->known) (void)sigaltstack(&kept, NULL);
}

/* ---- folders: every step through descriptors that follow no link ---- */

struct folder {
    int handle;
};

static const int FOLDER_FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

tusfm_status *folder_open(const char *path, folder **opened) {
    struct stat facts;
    char *real = NULL;
    if (lstat(path, &facts) == 0 && S_ISLNK(facts.st_mode) && !(real = realpath(path, NULL)))
        return status_new(TUSFM_INPUT, "%s is a link that leads nowhere: point it to a bundle's folder", path);
    int handle = open(real ? real : path, FOLDER_FLAGS);
    int why = errno;
    free(real);
    if (handle < 0) {
        if (why == ENOENT) return status_new(TUSFM_INPUT, "there is no bundle at %s", path);
        if (why == ELOOP)
            return status_new(TUSFM_TAMPERED, "%s was exchanged for a link while it was opened", path);
        if (why == ENOTDIR) return status_new(TUSFM_BUNDLE, "%s is not a folder, so it is no bundle", path);
        return status_new(TUSFM_BUNDLE, "%s cannot be opened: %s", path, strerror(why));
    }
    folder *made = malloc(sizeof *made);
    if (!made) {
        close(handle);
        return no_memory();
    }
    made->handle = handle;
    *opened = made;
    return NULL;
}

void folder_close(folder *f) {
    if (!f) return;
    close(f->handle);
    free(f);
}

int folder_was_replaced(const char *path, const folder *f) {
    struct stat named, here;
    return stat(path, &named) == 0 && fstat(f->handle, &here) == 0 && named.st_ino != here.st_ino;
}

static tusfm_status *refuse_special(const char *path, const struct stat *facts) {
    if (S_ISLNK(facts->st_mode)) return status_new(TUSFM_TAMPERED, "%s is a link; a bundle holds none", path);
    if (!S_ISREG(facts->st_mode)) return status_new(TUSFM_TAMPERED, "%s is a special file; a bundle holds none", path);
    if (facts->st_nlink != 1)
        return status_new(TUSFM_TAMPERED, "%s is a hard link (%lu names): copy the bundle without links", path,
                          (unsigned long)facts->st_nlink);
    return NULL;
}

static tusfm_status *cannot_read(const char *path, int why) {
    if (why == ENOENT || why == ENOTDIR)
        return status_new(TUSFM_TAMPERED, "%s vanished while the bundle was read", path);
    return status_new(TUSFM_BUNDLE, "%s in the bundle cannot be read: %s", path, strerror(why));
}

typedef tusfm_status *(*finder)(void *user, const char *path, int is_folder);

static tusfm_status *walk(int handle, const char *prefix, int depth, finder found, void *user);

static tusfm_status *look_at(int handle, const char *name, const char *path, int depth, finder found, void *user) {
    struct stat facts;
    if (fstatat(handle, name, &facts, AT_SYMLINK_NOFOLLOW) != 0) return cannot_read(path, errno);
    if (!S_ISDIR(facts.st_mode)) {
        TRY(refuse_special(path, &facts));
        return found(user, path, 0);
    }
    int inner = openat(handle, name, FOLDER_FLAGS);
    if (inner < 0) return cannot_read(path, errno);
    TRY(walk(inner, path, depth + 1, found, user)); /* closes it */
    return found(user, path, 1);
}

static tusfm_status *walk(int handle, const char *prefix, int depth, finder found, void *user) {
    if (depth > MAX_DEPTH) {
        close(handle);
        return status_new(TUSFM_TAMPERED, "%s lies deeper than any bundle's folder", prefix);
    }
    DIR *list = fdopendir(handle);
    if (!list) {
        tusfm_status *failed = cannot_read(prefix, errno);
        close(handle);
        return failed;
    }
    tusfm_status *failed = NULL;
    for (struct dirent *entry; !failed && (entry = readdir(list));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char path[PATH_MAX];
        int length = snprintf(path, sizeof path, "%s%s%s", prefix, *prefix ? "/" : "", entry->d_name);
        if (length < 0 || (size_t)length >= sizeof path)
            failed = status_new(TUSFM_TAMPERED, "a path in the bundle is too long");
        else
            failed = look_at(handle, entry->d_name, path, depth, found, user);
    }
    closedir(list);
    return failed;
}

tusfm_status *folder_walk(folder *f, finder found, void *user) {
    int handle = openat(f->handle, ".", FOLDER_FLAGS);
    if (handle < 0) return cannot_read(".", errno);
    return walk(handle, "", 0, found, user);
}

/* Opens the folder that holds a path, step by step; *name is the last part. */
static int open_parent(int root, const char *path, const char **name) {
    int handle = dup(root);
    for (const char *slash; handle >= 0 && (slash = strchr(path, '/')); path = slash + 1) {
        char part[NAME_MAX + 1];
        size_t length = (size_t)(slash - path);
        int inner = -1;
        if (length <= NAME_MAX) {
            memcpy(part, path, length);
            part[length] = 0;
            inner = openat(handle, part, FOLDER_FLAGS);
        } else {
            errno = ENAMETOOLONG;
        }
        int why = errno;
        close(handle);
        errno = why;
        handle = inner;
    }
    *name = path;
    return handle;
}

static tusfm_status *read_open(int handle, const char *path, int64_t size, int64_t limit, uint8_t **data,
                               int64_t *count) {
    struct stat facts;
    if (fstat(handle, &facts) != 0) return cannot_read(path, errno);
    TRY(refuse_special(path, &facts));
    int64_t there = (int64_t)facts.st_size;
    if (size >= 0 ? there != size : there > limit)
        return status_new(TUSFM_TAMPERED, "%s has %lld bytes; %lld were expected", path, (long long)there,
                          (long long)(size >= 0 ? size : limit));
    uint8_t *content = malloc((size_t)there + 1);
    if (!content) return no_memory();
    size_t got = 0;
    while (got < (size_t)there + 1) { /* one byte more: a file that grew is noticed */
        ssize_t more = read(handle, content + got, (size_t)there + 1 - got);
        if (more < 0 && errno == EINTR) continue;
        if (more < 0) {
            free(content);
            return cannot_read(path, errno);
        }
        if (more == 0) break;
        got += (size_t)more;
    }
    if (got != (size_t)there) {
        free(content);
        return status_new(TUSFM_TAMPERED, "%s changed its size while it was read", path);
    }
    *data = content;
    *count = there;
    return NULL;
}

tusfm_status *folder_read(folder *f, const char *path, int64_t size, int64_t limit, uint8_t **data, int64_t *count) {
    const char *name;
    int parent = open_parent(f->handle, path, &name);
    if (parent < 0) return cannot_read(path, errno);
    /* a pipe put in its place cannot hang us */
    int handle = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    int why = errno;
    close(parent);
    if (handle < 0 && why == ELOOP) return status_new(TUSFM_BUNDLE, "%s in the bundle cannot be read: a link", path);
    if (handle < 0) return cannot_read(path, why);
    tusfm_status *failed = read_open(handle, path, size, limit, data, count);
    close(handle);
    return failed;
}

char *cpu_description(void) {
    FILE *file = fopen("/proc/cpuinfo", "re");
    if (!file) return NULL;
    size_t room = 1 << 16, used = 0;
    char *text = malloc(room);
    while (text) {
        used += fread(text + used, 1, room - 1 - used, file);
        if (used < room - 1 || room > (1u << 24)) break;
        char *more = realloc(text, room *= 2);
        if (!more) free(text);
        text = more;
    }
    fclose(file);
    if (text) text[used] = 0;
    return text;
}

const char *cpu_architecture(void) {
#if defined(__x86_64__)
    return "x86_64";
#elif defined(__aarch64__) && defined(__APPLE__)
    return "arm64";
#elif defined(__aarch64__)
    return "aarch64";
#elif defined(__arm__)
    return "armv7l";
#else
    return "unknown";
#endif
}

int32_t usable_cpus(void) {
#if defined(__linux__)
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) == 0) return CPU_COUNT(&mine);
#endif
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : (int32_t)count;
}
