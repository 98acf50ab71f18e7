#include "files.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <windows.h>
static FILE *open_file(const char *path) {
    wchar_t wide[1024];
    if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024)) return NULL;
    return _wfopen(wide, L"rb");
}
#else
static FILE *open_file(const char *path) { return fopen(path, "rb"); }
#endif

char *file_path(const char *folder, const char *name) {
    size_t size = strlen(folder) + strlen(name) + 2;
    char *path = malloc(size);
    if (path) snprintf(path, size, "%s/%s", folder, name);
    return path;
}

enum file_found file_read_all(const char *path, size_t limit, char **data, size_t *count) {
    errno = 0;
    FILE *file = open_file(path);
    if (!file) return errno == ENOENT || errno == ENOTDIR ? FILE_MISSING : FILE_BROKEN;
    char *bytes = malloc(limit + 2);
    size_t got = bytes ? fread(bytes, 1, limit + 1, file) : 0;
    int broken = !bytes || ferror(file) || got > limit;
    fclose(file);
    if (broken) {
        free(bytes);
        return FILE_BROKEN;
    }
    bytes[got] = 0;
    *data = bytes;
    *count = got;
    return FILE_READ;
}
