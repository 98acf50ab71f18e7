/* platform.h for Windows 7 and later. Paths come as UTF-8. */
#include "platform.h"

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LONGEST = 1024 };

/* UTF-8 to UTF-16; 0: it does not fit, or is none. */
static int widen(const char *path, wchar_t wide[LONGEST]) {
    return MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, LONGEST) > 0;
}

static int narrow(const wchar_t *wide, char *path, size_t size) {
    return WideCharToMultiByte(CP_UTF8, 0, wide, -1, path, (int)size, NULL, NULL) > 0;
}

int64_t now_ns(void) {
    LARGE_INTEGER rate, now;
    QueryPerformanceFrequency(&rate);
    QueryPerformanceCounter(&now);
    int64_t whole = now.QuadPart / rate.QuadPart, part = now.QuadPart % rate.QuadPart;
    return whole * 1000000000 + part * 1000000000 / rate.QuadPart;
}

_Static_assert(sizeof(mutex) == sizeof(SRWLOCK) && sizeof(condition) == sizeof(CONDITION_VARIABLE), "platform.h");
static SRWLOCK *lock_of(mutex *m) { return (SRWLOCK *)(void *)m; }
static CONDITION_VARIABLE *variable_of(condition *c) { return (CONDITION_VARIABLE *)(void *)c; }

void mutex_init(mutex *m) { InitializeSRWLock(lock_of(m)); }
void mutex_free(mutex *m) { (void)m; }
void mutex_lock(mutex *m) { AcquireSRWLockExclusive(lock_of(m)); }
void mutex_unlock(mutex *m) { ReleaseSRWLockExclusive(lock_of(m)); }
int mutex_try_lock(mutex *m) { return TryAcquireSRWLockExclusive(lock_of(m)) != 0; }

void condition_init(condition *c) { InitializeConditionVariable(variable_of(c)); }
void condition_free(condition *c) { (void)c; }
void condition_wait(condition *c, mutex *m) { SleepConditionVariableSRW(variable_of(c), lock_of(m), INFINITE, 0); }
int condition_wait_until(condition *c, mutex *m, int64_t end_ns) {
    int64_t left = end_ns - now_ns();
    if (left <= 0) return 0;
    int64_t ms = (left + 999999) / 1000000;
    SleepConditionVariableSRW(variable_of(c), lock_of(m), ms < 1000000000 ? (DWORD)ms : 1000000000, 0);
    return now_ns() < end_ns;
}
void condition_wake_all(condition *c) { WakeAllConditionVariable(variable_of(c)); }

typedef struct beginning {
    void (*work)(void *);
    void *argument;
} beginning;

static DWORD WINAPI begin(void *given) {
    beginning first = *(beginning *)given;
    free(given);
    first.work(first.argument);
    return 0;
}

int thread_start(thread *t, void (*work)(void *), void *argument) {
    beginning *first = malloc(sizeof *first);
    if (!first) return 0;
    *first = (beginning){work, argument};
    t->handle = CreateThread(NULL, 0, begin, first, 0, &t->id);
    t->started = t->handle != NULL;
    if (!t->started) free(first);
    return t->started;
}
void thread_join(thread *t) {
    if (t->started) WaitForSingleObject(t->handle, INFINITE);
    thread_detach(t);
}
void thread_detach(thread *t) {
    if (t->started) CloseHandle(t->handle);
    t->started = 0;
}
int thread_is_me(const thread *t) { return t->started && t->id == GetCurrentThreadId(); }

void *library_open(const char *folder, const char *name, char *why, size_t why_size) {
    char path[LONGEST];
    wchar_t wide[LONGEST];
    int length = snprintf(path, sizeof path, "%s%s%s", folder ? folder : "", folder ? "\\" : "", name);
    if (length < 0 || length >= LONGEST || !widen(path, wide)) {
        copy_line(why, why_size, "the path is too long");
        return NULL;
    }
    for (wchar_t *at = wide; *at; at++)
        if (*at == L'/') *at = L'\\';
    /* with a folder, what the library needs is looked for beside it; without, never in the current folder */
    HMODULE library = LoadLibraryExW(wide, NULL, folder ? LOAD_WITH_ALTERED_SEARCH_PATH : LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
    if (!library && why_size) snprintf(why, why_size, "Windows error %lu", (unsigned long)GetLastError());
    return (void *)library;
}
void *library_symbol(void *library, const char *name) {
    FARPROC found = GetProcAddress((HMODULE)library, name);
    void *symbol;
    memcpy(&symbol, &found, sizeof symbol);
    return symbol;
}
int library_find(const char *folder, const char *beginning, char *name, size_t size) {
    char pattern[LONGEST], each[LONGEST];
    wchar_t wide[LONGEST];
    WIN32_FIND_DATAW entry;
    int length = snprintf(pattern, sizeof pattern, "%s\\%s*", folder, beginning), found = 0;
    if (length < 0 || length >= LONGEST || !widen(pattern, wide)) return 0;
    HANDLE list = FindFirstFileW(wide, &entry);
    if (list == INVALID_HANDLE_VALUE) return 0;
    do
        if (narrow(entry.cFileName, each, sizeof each) && strlen(each) < size && (!found || strcmp(each, name) < 0)) {
            copy_line(name, size, each);
            found = 1;
        }
    while (FindNextFileW(list, &entry));
    FindClose(list);
    return found;
}
int library_folder(char *into, size_t size) {
    HMODULE mine;
    wchar_t wide[LONGEST];
    DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(flags, (const wchar_t *)(const void *)(uintptr_t)&library_open, &mine)) return 0;
    DWORD length = GetModuleFileNameW(mine, wide, LONGEST);
    if (!length || length >= LONGEST) return 0;
    wchar_t *slash = wcsrchr(wide, L'\\');
    if (!slash) return 0;
    *slash = 0;
    return narrow(wide, into, size);
}
void environment_default(const char *name, const char *value) {
    char held[8];
    if (GetEnvironmentVariableA(name, held, sizeof held) == 0 && GetLastError() == ERROR_ENVVAR_NOT_FOUND) {
        SetEnvironmentVariableA(name, value);
        _putenv_s(name, value); /* the C library keeps a copy of its own */
    }
}

signal_stack signal_stack_now(void) { return (signal_stack){NULL, 0, 0, 0}; }
void signal_stack_put_back(const signal_stack *before) { (void)before; }

/* ---- folders: a handle on the root forbids to rename or delete it; each step is looked at without following links ---- */

struct folder {
    HANDLE handle;
    char path[LONGEST];
};

typedef BY_HANDLE_FILE_INFORMATION facts;

/* A file or folder itself, never what a link leads to; INVALID_HANDLE_VALUE and the reason in GetLastError. */
static HANDLE open_itself(const char *path, DWORD access, facts *found) {
    wchar_t wide[LONGEST];
    if (!widen(path, wide)) {
        SetLastError(ERROR_FILENAME_EXCED_RANGE);
        return INVALID_HANDLE_VALUE;
    }
    HANDLE handle = CreateFileW(wide, access, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                                FILE_FLAG_OPEN_REPARSE_POINT | FILE_FLAG_BACKUP_SEMANTICS, NULL);
    if (handle != INVALID_HANDLE_VALUE && !GetFileInformationByHandle(handle, found)) {
        DWORD why = GetLastError();
        CloseHandle(handle);
        SetLastError(why);
        handle = INVALID_HANDLE_VALUE;
    }
    return handle;
}

static int is_missing(DWORD why) {
    return why == ERROR_FILE_NOT_FOUND || why == ERROR_PATH_NOT_FOUND || why == ERROR_INVALID_NAME;
}
static int is_link(const facts *f) { return (f->dwFileAttributes & FILE_ATTRIBUTE_REPARSE_POINT) != 0; }
static int is_folder(const facts *f) { return (f->dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0; }

static tusfm_status *cannot_read(const char *path, DWORD why) {
    if (is_missing(why)) return status_new(TUSFM_TAMPERED, "%s vanished while the bundle was read", path);
    return status_new(TUSFM_BUNDLE, "%s in the bundle cannot be read: Windows error %lu", path, (unsigned long)why);
}

tusfm_status *folder_open(const char *path, folder **opened) {
    facts found;
    HANDLE handle = open_itself(path, GENERIC_READ, &found);
    if (handle == INVALID_HANDLE_VALUE) {
        DWORD why = GetLastError();
        if (is_missing(why)) return status_new(TUSFM_INPUT, "there is no bundle at %s", path);
        return status_new(TUSFM_BUNDLE, "%s cannot be opened: Windows error %lu", path, (unsigned long)why);
    }
    folder *made = NULL;
    tusfm_status *failed = NULL;
    if (is_link(&found))
        failed = status_new(TUSFM_TAMPERED, "%s is a link: name the bundle's own folder", path);
    else if (!is_folder(&found))
        failed = status_new(TUSFM_BUNDLE, "%s is not a folder, so it is no bundle", path);
    else if (strlen(path) >= LONGEST / 2)
        failed = status_new(TUSFM_BUNDLE, "the bundle's path is too long");
    else if (!(made = calloc(1, sizeof *made)))
        failed = no_memory();
    if (failed) {
        CloseHandle(handle);
        return failed;
    }
    made->handle = handle;
    copy_line(made->path, sizeof made->path, path);
    *opened = made;
    return NULL;
}

void folder_close(folder *f) {
    if (!f) return;
    CloseHandle(f->handle);
    free(f);
}

int folder_was_replaced(const char *path, const folder *f) {
    facts named, here;
    HANDLE handle = open_itself(path, 0, &named);
    if (handle == INVALID_HANDLE_VALUE) return 0;
    CloseHandle(handle);
    return GetFileInformationByHandle(f->handle, &here) &&
           (named.dwVolumeSerialNumber != here.dwVolumeSerialNumber || named.nFileIndexHigh != here.nFileIndexHigh ||
            named.nFileIndexLow != here.nFileIndexLow);
}

static tusfm_status *refuse_special(const char *path, const facts *f) {
    if (is_link(f)) return status_new(TUSFM_TAMPERED, "%s is a link; a bundle holds none", path);
    if (is_folder(f) || (f->dwFileAttributes & FILE_ATTRIBUTE_DEVICE))
        return status_new(TUSFM_TAMPERED, "%s is a special file; a bundle holds none", path);
    if (f->nNumberOfLinks != 1)
        return status_new(TUSFM_TAMPERED, "%s is a hard link (%lu names): copy the bundle without links", path,
                          (unsigned long)f->nNumberOfLinks);
    return NULL;
}

/* ROOT\PATH with the separators of Windows; 0: too long. */
static int join(const folder *f, const char *path, char whole[LONGEST]) {
    int length = snprintf(whole, LONGEST, "%s%s%s", f->path, *path ? "\\" : "", path);
    for (char *at = whole; *at; at++)
        if (*at == '/') *at = '\\';
    return length >= 0 && length < LONGEST;
}

typedef tusfm_status *(*finder)(void *user, const char *path, int folder);

static tusfm_status *walk(folder *f, const char *prefix, int depth, finder found, void *user);

static tusfm_status *look_at(folder *f, const char *path, int depth, finder found, void *user) {
    char whole[LONGEST];
    facts what;
    if (!join(f, path, whole)) return status_new(TUSFM_TAMPERED, "a path in the bundle is too long");
    HANDLE handle = open_itself(whole, 0, &what);
    if (handle == INVALID_HANDLE_VALUE) return cannot_read(path, GetLastError());
    CloseHandle(handle);
    if (!is_folder(&what) || is_link(&what)) {
        TRY(refuse_special(path, &what));
        return found(user, path, 0);
    }
    TRY(walk(f, path, depth + 1, found, user));
    return found(user, path, 1);
}

static tusfm_status *walk(folder *f, const char *prefix, int depth, finder found, void *user) {
    char pattern[LONGEST], path[LONGEST], name[LONGEST];
    wchar_t wide[LONGEST];
    WIN32_FIND_DATAW entry;
    if (depth > MAX_DEPTH) return status_new(TUSFM_TAMPERED, "%s lies deeper than any bundle's folder", prefix);
    if (!join(f, prefix, pattern) || strlen(pattern) + 3 > LONGEST) return status_new(TUSFM_TAMPERED, "a path in the bundle is too long");
    strcat(pattern, "\\*");
    HANDLE list = widen(pattern, wide) ? FindFirstFileW(wide, &entry) : INVALID_HANDLE_VALUE;
    if (list == INVALID_HANDLE_VALUE) return cannot_read(*prefix ? prefix : ".", GetLastError());
    tusfm_status *failed = NULL;
    do {
        if (wcscmp(entry.cFileName, L".") == 0 || wcscmp(entry.cFileName, L"..") == 0) continue;
        int length = narrow(entry.cFileName, name, sizeof name)
                         ? snprintf(path, sizeof path, "%s%s%s", prefix, *prefix ? "/" : "", name)
                         : -1;
        if (length < 0 || length >= LONGEST)
            failed = status_new(TUSFM_TAMPERED, "a path in the bundle is too long");
        else
            failed = look_at(f, path, depth, found, user);
    } while (!failed && FindNextFileW(list, &entry));
    FindClose(list);
    return failed;
}

tusfm_status *folder_walk(folder *f, finder found, void *user) { return walk(f, "", 0, found, user); }

static tusfm_status *read_open(HANDLE handle, const char *path, const facts *what, int64_t size, int64_t limit,
                               uint8_t **data, int64_t *count) {
    TRY(refuse_special(path, what));
    int64_t there = (int64_t)((uint64_t)what->nFileSizeHigh << 32 | what->nFileSizeLow);
    if (size >= 0 ? there != size : there > limit)
        return status_new(TUSFM_TAMPERED, "%s has %lld bytes; %lld were expected", path, (long long)there,
                          (long long)(size >= 0 ? size : limit));
    uint8_t *content = malloc((size_t)there + 1);
    if (!content) return no_memory();
    int64_t got = 0;
    while (got < there + 1) { /* one byte more: a file that grew is noticed */
        int64_t left = there + 1 - got;
        DWORD more = 0;
        if (!ReadFile(handle, content + got, left > 1 << 24 ? 1 << 24 : (DWORD)left, &more, NULL)) {
            DWORD why = GetLastError();
            free(content);
            return cannot_read(path, why);
        }
        if (more == 0) break;
        got += more;
    }
    if (got != there) {
        free(content);
        return status_new(TUSFM_TAMPERED, "%s changed its size while it was read", path);
    }
    *data = content;
    *count = there;
    return NULL;
}

/* Looks at every folder on the way; the last handle, or a status. */
static tusfm_status *open_steps(const folder *f, const char *path, HANDLE *opened, facts *what) {
    char whole[LONGEST];
    if (!join(f, path, whole)) return status_new(TUSFM_TAMPERED, "a path in the bundle is too long");
    for (char *slash = whole + strlen(f->path) + 1; (slash = strchr(slash, '\\')); slash++) {
        facts step;
        *slash = 0;
        HANDLE handle = open_itself(whole, 0, &step);
        *slash = '\\';
        if (handle == INVALID_HANDLE_VALUE) return cannot_read(path, GetLastError());
        CloseHandle(handle);
        if (is_link(&step)) return status_new(TUSFM_BUNDLE, "%s in the bundle cannot be read: a link", path);
    }
    *opened = open_itself(whole, GENERIC_READ, what);
    return *opened == INVALID_HANDLE_VALUE ? cannot_read(path, GetLastError()) : NULL;
}

tusfm_status *folder_read(folder *f, const char *path, int64_t size, int64_t limit, uint8_t **data, int64_t *count) {
    HANDLE handle;
    facts what;
    TRY(open_steps(f, path, &handle, &what));
    tusfm_status *failed = read_open(handle, path, &what, size, limit, data, count);
    CloseHandle(handle);
    return failed;
}

char *cpu_description(void) { return NULL; }

const char *cpu_architecture(void) {
#if defined(__x86_64__) || defined(_M_X64)
    return "AMD64";
#elif defined(__aarch64__) || defined(_M_ARM64)
    return "ARM64";
#else
    return "unknown";
#endif
}

int32_t usable_cpus(void) {
    DWORD_PTR mine = 0, all = 0;
    int32_t count = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all))
        for (; mine; mine &= mine - 1) count++;
    return count < 1 ? 1 : count;
}
