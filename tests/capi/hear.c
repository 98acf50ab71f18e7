/* Loaded before everything else (LD_PRELOAD): notes in the file that HEARD names, and refuses, every call to another machine. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    char line[300];
    const char *path = getenv("HEARD");
    int length = snprintf(line, sizeof line, "%s %.200s\n", what, where);
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (file < 0 || write(file, line, (size_t)length) != length) abort(); /* a listener that is deaf must not pass */
    close(file);
}

static int is_elsewhere(const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (!address || (address->sa_family != AF_INET && address->sa_family != AF_INET6)) return 0;
    if (address->sa_family == AF_INET) inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
    else inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
    note("address", text);
    return 1;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    (void)service, (void)hints, (void)found;
    note("name", node ? node : "");
    return EAI_FAIL;
}

struct hostent *gethostbyname(const char *name) {
    note("name", name);
    return NULL;
}

int connect(int handle, const struct sockaddr *address, socklen_t size) {
    int (*next)(int, const struct sockaddr *, socklen_t);
    if (is_elsewhere(address)) {
        errno = ENETUNREACH;
        return -1;
    }
    *(void **)&next = dlsym(RTLD_NEXT, "connect");
    return next(handle, address, size);
}

ssize_t sendto(int handle, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t);
    if (is_elsewhere(address)) {
        errno = ENETUNREACH;
        return -1;
    }
    *(void **)&next = dlsym(RTLD_NEXT, "sendto");
    return next(handle, data, size, flags, address, length);
}

ssize_t sendmsg(int handle, const struct msghdr *message, int flags) {
    ssize_t (*next)(int, const struct msghdr *, int);
    if (message && is_elsewhere(message->msg_name)) {
        errno = ENETUNREACH;
        return -1;
    }
    *(void **)&next = dlsym(RTLD_NEXT, "sendmsg");
    return next(handle, message, flags);
}
